"""Rotary position embedding, and the published ways to stretch it to longer contexts.

A pair of coordinates (x_i, x_{i + H/2}) of a query or key at position p is turned by the angle
p·w_i, so that q·k depends on positions only through their difference (arXiv:2104.09864). The
pairing is by halves, as in GPT-NeoX, Llama and Gemma checkpoints.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.shapes import dims, floating


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Rope:
    """Angular frequencies of each coordinate, and a factor on the rotated vectors.

    Attributes:
      frequency_H: radians per position, float32; the second half repeats the first. A frequency
        of 0 leaves its coordinates unturned, so zeros make a partial rotary embedding.
      magnitude: factor on rotated queries and on rotated keys (yarn's temperature); else 1.
    Example:
      >>> half = Rope(plain(4).frequency_H * [1, 0, 1, 0])  # the second pair stays unturned
      >>> [round(float(w), 2) for w in half.frequency_H]
      [1.0, 0.0, 1.0, 0.0]
    """

    frequency_H: np.ndarray
    magnitude: float = 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rope) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[bytes, float]:
        """By value: a Flax shell that holds a Rope can be compared, and be a static argument."""
        return np.asarray(self.frequency_H, np.float32).tobytes(), float(self.magnitude)


def plain(H: int, *, theta: float = 10_000.0) -> Rope:
    """Turn pair i by w_i = theta^(-2i/H) per position (arXiv:2104.09864).

    Args:
      H: head width, even.
      theta: base of the frequencies, > 1; the slowest wavelength is about 2π·theta positions.
    Returns: a Rope.
    Raises: ValueError naming H or theta.
    Example:
      >>> plain(4).frequency_H.tolist()
      [1.0, 0.009999999776482582, 1.0, 0.009999999776482582]
    """
    return Rope(_both_halves(_half(H, theta)))


def linear(H: int, *, factor: float, theta: float = 10_000.0) -> Rope:
    """Slow every frequency down by `factor`: positions are interpolated (arXiv:2306.15595).

    Args:
      H: head width, even.
      factor: new context length over the trained one, >= 1.
      theta: base of the frequencies.
    Returns: a Rope.
    Raises: ValueError naming the argument.
    Example:
      >>> linear(4, factor=2.0).frequency_H.tolist()
      [0.5, 0.004999999888241291, 0.5, 0.004999999888241291]
    """
    _at_least("factor", factor, 1.0)
    return Rope(_both_halves(_half(H, theta) / factor))


def llama3(
    H: int,
    *,
    factor: float = 8.0,
    low: float = 1.0,
    high: float = 4.0,
    original: int = 8192,
    theta: float = 500_000.0,
) -> Rope:
    """Slow low frequencies down, keep high ones, blend between (Llama 3.1, arXiv:2407.21783).

    With r = original / wavelength, wavelength = 2π/w: w where r > high, w / factor where
    r < low, and between them (1 - c)·w/factor + c·w with c = (r - low) / (high - low).

    Args:
      H: head width, even.
      factor: how much low frequencies are slowed, >= 1.
      low, high: turns within the trained context that bound the blend, 0 < low < high.
      original: trained context length.
      theta: base of the frequencies.
    Returns: a Rope.
    Raises: ValueError naming the argument.
    Example:
      >>> llama3(128).frequency_H.shape
      (128,)
    """
    _at_least("factor", factor, 1.0)
    _at_least("original", original, 1)
    if not 0 < low < high:
        raise ValueError(f"rope: needs 0 < low < high, got low={low}, high={high}")
    w = _half(H, theta)
    turns = original * w / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Rope(_both_halves((1 - blend) * w / factor + blend * w))


def yarn(
    H: int,
    *,
    factor: float,
    original: int,
    fast: float = 32.0,
    slow: float = 1.0,
    theta: float = 10_000.0,
) -> Rope:
    """Interpolate by parts and sharpen the softmax (YaRN, arXiv:2309.00071).

    The pair that makes n turns within the trained context has the index
    d(n) = H·ln(original / 2πn) / (2·ln theta). Pairs before floor(d(fast)) keep their frequency,
    those after ceil(d(slow)) are slowed by `factor`, with a linear ramp over the index between;
    rotated vectors are multiplied by 0.1·ln(factor) + 1.

    Args:
      H: head width, even.
      factor: new context length over the trained one, >= 1.
      original: trained context length.
      fast, slow: turns within the trained context that bound the ramp, fast > slow > 0.
      theta: base of the frequencies.
    Returns: a Rope, with its magnitude.
    Raises: ValueError naming the argument.
    Example:
      >>> round(yarn(64, factor=4.0, original=2048).magnitude, 4)
      1.1386
    """
    _at_least("factor", factor, 1.0)
    _at_least("original", original, 1)
    if not 0 < slow < fast:
        raise ValueError(f"rope: needs 0 < slow < fast, got slow={slow}, fast={fast}")
    w = _half(H, theta)

    def index(turns: float) -> float:
        return H * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    first = max(math.floor(index(fast)), 0)
    last = min(math.ceil(index(slow)), H - 1)
    ramp = np.clip((np.arange(H // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    frequency = w * (1 - ramp) + w / factor * ramp
    return Rope(_both_halves(frequency), 0.1 * math.log(factor) + 1.0)


def rotate(x_BTNH: jax.Array, rope: Rope, position_BT: jax.Array) -> jax.Array:
    """Turn each head's coordinates by position times frequency.

        (x_i, x_j) -> (x_i·cos a - x_j·sin a, x_j·cos a + x_i·sin a),  j = i + H/2,  a = p·w_i

    Args:
      x_BTNH: queries or keys, any number of heads.
      rope: what `plain`, `linear`, `llama3` or `yarn` returned for this H.
      position_BT: positions, int or float; B may be 1.
    Returns: [B,T,N,H], dtype of x; angles and products are float32 or wider.
    Raises: ValueError naming the argument, the letter and both sizes.
    Example:
      >>> x_BTNH = jnp.ones((2, 3, 5, 4))
      >>> y_BTNH = rotate(x_BTNH, plain(4), jnp.arange(3)[None])
      >>> bool((y_BTNH[:, 0] == 1).all())
      True
    """
    sizes = dims(x_BTNH=x_BTNH, frequency_H=rope.frequency_H)
    floating(x_BTNH=x_BTNH)
    dims(position_BT=position_BT)
    if position_BT.shape[0] not in (1, sizes.B) or position_BT.shape[1] != sizes.T:
        raise ValueError(
            f"position_BT has shape {position_BT.shape} but x_BTNH has B={sizes.B}, T={sizes.T}"
        )
    wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequency = jnp.asarray(rope.frequency_H, wide)
    angle_BTNH = position_BT.astype(wide)[:, :, None, None] * frequency[None, None, None, :]
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    turned_BTNH = jnp.concatenate([-second, first], axis=-1)
    y_BTNH = x_BTNH * jnp.cos(angle_BTNH) + turned_BTNH * jnp.sin(angle_BTNH)
    return (y_BTNH * rope.magnitude).astype(x_BTNH.dtype)


def _half(H: int, theta: float) -> np.ndarray:
    """Frequencies of the H/2 pairs, in float64."""
    if not isinstance(H, int | np.integer) or H < 2 or H % 2:
        raise ValueError(f"rope: H must be an even int >= 2, got {H!r}")
    if not theta > 1:
        raise ValueError(f"rope: theta must be > 1, got {theta}")
    return theta ** (-np.arange(0, H, 2) / H)


def _both_halves(half: np.ndarray) -> np.ndarray:
    return np.concatenate([half, half]).astype(np.float32)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"rope: {name} must be >= {least}, got {value}")
