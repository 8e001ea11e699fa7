"""The one colour scale of pages and pictures: ivory over teal to navy."""

import functools

import numpy as np

# Okabe and Ito's palette without black and yellow: told apart without red-green vision.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# In OKLCH, from the light end to the dark one. The chroma is what sRGB still has at each lightness
# and hue, and less at the end that the background is near.
_LIGHTNESS = (0.98, 0.26)
_HUE_DEGREES = (104.0, 272.0)
_CHROMA_AT = (0.0, 0.3, 0.65, 0.8, 1.0)
_CHROMA_ON_LIGHT = (0.02, 0.102, 0.085, 0.085, 0.1)
_CHROMA_ON_DARK = (0.06, 0.102, 0.085, 0.085, 0.035)

# From OKLab to the cubic roots of cone responses, and from those to linear sRGB:
# bottosson.github.io/posts/oklab.
_TO_CONES = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@functools.cache
def ramp(*, dark: bool = False) -> np.ndarray:
    """Make the colour scale, which starts near the colour of the background.

    Lightness changes by equal steps in OKLab, so equal differences look equally large, also without
    red-green vision and in grey.

    Args:
      dark: for a dark background; runs from dark to light.
    Returns: uint8 [256, 3], sRGB, from no weight to the largest.
    Example:
      >>> ramp()[0].tolist(), ramp()[255].tolist()
      ([250, 249, 234], [21, 28, 83])
    """
    t = np.linspace(0.0, 1.0, 256)
    hue = np.deg2rad(_HUE_DEGREES[0] + t * (_HUE_DEGREES[1] - _HUE_DEGREES[0]))
    chroma = np.interp(t, _CHROMA_AT, _CHROMA_ON_DARK if dark else _CHROMA_ON_LIGHT)
    lightness = _LIGHTNESS[0] + t * (_LIGHTNESS[1] - _LIGHTNESS[0])
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    linear = (lab @ _TO_CONES.T) ** 3 @ _TO_RGB.T
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)[:: -1 if dark else 1]
