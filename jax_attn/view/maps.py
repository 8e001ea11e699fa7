"""Attention maps, read and checked one head at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_attn import shapes

# Rows of probabilities sum to 1 up to rounding, or to less where a sink takes its share.
_SUM_TOLERANCE = 1e-3


class Maps(NamedTuple):
    """Hold how many heads there are, and how to read one.

    Attributes:
      L, N: layers, and heads in each.
      read: `read(layer, head)` returns the checked map, float32 or float64 [T, S].
    Example:
      >>> maps = open_maps(np.ones((2, 3, 1, 1)))
      >>> maps.L, maps.N, maps.read(1, 2).tolist()
      (2, 3, [[1.0]])
    """

    L: int
    N: int
    read: Callable[[int, int], np.ndarray]


def open_maps(weights_LNTS: Any, *, L: int | None = None, N: int | None = None) -> Maps:
    """Take weights as an array or as a function that makes one map at a time.

    Args:
      weights_LNTS: probabilities [L,N,T,S]; or a function `(layer, head) -> [T,S]`.
      L, N: the numbers of layers and heads, which a function does not tell.
    Returns: `Maps`. Nothing is read yet.
    Raises: ValueError naming the argument, the letter and both sizes; reading raises one that names
      layer, head and row.
    Example:
      >>> open_maps(lambda layer, head: np.eye(3), L=1, N=2).read(0, 1)[2].tolist()
      [0.0, 0.0, 1.0]
    """
    if callable(weights_LNTS):
        for letter, size in (("L", L), ("N", N)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"{letter} ({shapes.ALPHABET[letter]}) must be an int >= 1 where weights_LNTS "
                    f"is a function, got {size!r}"
                )
        assert L is not None
        assert N is not None

        def read(layer: int, head: int) -> np.ndarray:
            weights_TS = weights_LNTS(layer, head)
            if getattr(weights_TS, "ndim", None) != 2:
                got = getattr(weights_TS, "shape", type(weights_TS).__name__)
                raise ValueError(f"weights_LNTS({layer}, {head}) must return [T, S], got {got}")
            return checked(weights_TS, layer, head)

        return Maps(L, N, read)
    sizes = shapes.dims(weights_LNTS=weights_LNTS)
    for letter, given in (("L", L), ("N", N)):
        (size,) = sizes[letter]
        if given not in (None, size):
            raise ValueError(f"{letter}={given} but weights_LNTS has {letter}={size}; leave it out")
    for letter in "LNTS":
        if sizes[letter] == (0,):
            raise ValueError(f"weights_LNTS has {letter}=0 ({shapes.ALPHABET[letter]}): no map")
    return Maps(sizes.L, sizes.N, lambda l, n: checked(weights_LNTS[l, n], l, n))


def checked(weights_TS: Any, layer: int, head: int) -> np.ndarray:
    """Check that a map holds probabilities, and copy it to the host.

    Rows may sum to less than 1 (a sink takes the rest) and to 0 (fully masked).

    Args:
      weights_TS: a floating-point array; what 16-bit ones round is allowed for in their sums.
      layer, head: what to call the map in an error.
    Returns: float64 for float64, else float32.
    Raises: ValueError naming layer, head and the first row with NaN, infinity, a negative weight
      or a sum above 1.001.
    Example:
      >>> checked(np.array([[0.5, 0.25], [0.0, 0.0]]), 0, 0).tolist()
      [[0.5, 0.25], [0.0, 0.0]]
      >>> checked(np.array([[1.0, 0.0], [0.75, 0.75]]), 2, 3)
      Traceback (most recent call last):
      ValueError: weights_LNTS: layer 2, head 3, row 1 sums to 1.5, more than 1; pass ...
    """
    shapes.floating(weights_LNTS=weights_TS)
    tolerance = max(_SUM_TOLERANCE, float(jnp.finfo(weights_TS.dtype).eps))
    wide = np.float64 if weights_TS.dtype == np.float64 else np.float32
    weights_TS = np.asarray(weights_TS).astype(wide)
    sums_T = weights_TS.sum(-1, dtype=np.float64)
    # NaN compares as False, and infinity is caught by its sum.
    good_T = (weights_TS >= 0).all(-1) & (sums_T <= 1 + tolerance)
    if not good_T.all():
        row = int(np.argmin(good_T))
        raise ValueError(
            f"weights_LNTS: layer {layer}, head {head}, row {row} {_fault(weights_TS[row])}; pass "
            "probabilities such as those of dense_weights"
        )
    return weights_TS


def _fault(weights_S: np.ndarray) -> str:
    for says, bad_S in (
        ("NaN", np.isnan(weights_S)),
        ("infinity", np.isinf(weights_S)),
        ("a negative weight", weights_S < 0),
    ):
        if bad_S.any():
            key = int(np.argmax(bad_S))
            return f"has {says} at key {key}: {weights_S[key]:.4g}"
    return f"sums to {weights_S.sum(dtype=np.float64):.6g}, more than 1"


def check_statistic(name: str, values_LN: Any, maps: Maps) -> np.ndarray:
    """Check that there is a number for each head.

    Args:
      name, values_LN: a statistic, [L,N].
      maps: the heads.
    Returns: the numbers, float64.
    Raises: ValueError naming the statistic and both shapes.
    Example:
      >>> check_statistic("entropy", [[1, 2]], open_maps(np.eye(3)[None, None].repeat(2, 1)))
      array([[1., 2.]])
    """
    array = np.asarray(values_LN, np.float64)
    if array.shape != (maps.L, maps.N):
        raise ValueError(
            f"statistics: {name!r} must be [L, N] = ({maps.L}, {maps.N}), one number for each "
            f"head, got {array.shape}"
        )
    return array


def largest_in_blocks(weights_TS: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Shrink a map without losing thin lines: each block is shown by its largest weight.

    Args:
      weights_TS: the map.
      rows, columns: the size to shrink to; an axis that is shorter stays as it is.
    Returns: the smaller map.
    Example:
      >>> largest_in_blocks(np.eye(4) / 2, 2, 9).tolist()
      [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    for axis, most in enumerate((rows, columns)):
        size = weights_TS.shape[axis]
        if size > most:
            starts = np.arange(most) * size // most
            weights_TS = np.maximum.reduceat(weights_TS, starts, axis=axis)
    return weights_TS
