"""Masks: which query may attend to which key. True = attend; compose with `&`, `|`, `~`.

The query at index t has position p = q_offset + t, a key's position is its index s; drawings show
queries downwards and keys to the right, q_offset = 0. A mask is a small frozen pytree: it can be
closed over or passed through `jit`, and is written out only where, and as far as, it is needed.

    causal() & window(128) & segments(ids_BT)
"""

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_attn.mask_types import Chunks, Dense, Lengths, Mask, Prefix, Segments, Where, Window
from jax_attn.shapes import dims, integer

__all__ = ["Mask", "causal", "chunks", "dense", "lengths", "prefix", "segments", "where", "window"]


def causal() -> Mask:
    """Attend to the own position and what came before: s <= p.

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1

    With T != S the first query still sits at position q_offset, default 0; decoding passes it.

    Returns: a Mask.
    Example:
      >>> causal().materialize(2, 4, q_offset=1)[0, 0].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 1, 0]]
    """
    return Window(None, 0)


def window(left: int | None, right: int | EllipsisType | None = ...) -> Mask:
    """Attend to a neighbourhood: p - left <= s <= p + right.

        window(1):            window(2, 0):
        1 1 0 0               1 0 0 0
        1 1 1 0               1 1 0 0
        0 1 1 1               1 1 1 0
        0 0 1 1               0 1 1 1

    Args:
      left: keys before the own position; None for all.
      right: keys after it; None for all; left out, the same as `left`.
    Returns: a Mask.
    Raises: ValueError naming the argument that is no int >= 0 or None.
    Example:
      >>> (causal() & window(1)).materialize(3, 3)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    right = left if isinstance(right, EllipsisType) else right
    for name, size in (("left", left), ("right", right)):
        if size is not None and (
            not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 0
        ):
            raise ValueError(f"window: {name} must be an int >= 0 or None, got {size!r}")
    # Positions are int32: p + right must not wrap where right stands for "no bound".
    left, right = (None if size is None or size >= 2**30 else size for size in (left, right))
    return Window(left, right)


def prefix(n: Any) -> Mask:
    """Attend to the first n keys: s < n. `causal() | prefix(n)` is the prefix-LM mask.

        prefix(2):            causal() | prefix(2):
        1 1 0 0               1 1 0 0
        1 1 0 0               1 1 0 0
        1 1 0 0               1 1 1 0
        1 1 0 0               1 1 1 1

    Args:
      n: int, or int array [B] for one prefix a sequence; may be traced.
    Returns: a Mask.
    Raises: ValueError for another dtype or rank.
    Example:
      >>> prefix(1).materialize(2, 3)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 0, 0]]
    """
    if not isinstance(n, int | np.integer) and not hasattr(n, "dtype"):
        raise ValueError(f"prefix: n must be an int or an int array [B], got {n!r}")
    array = jnp.asarray(n)
    integer(n=array)
    if array.ndim:
        dims(n_B=array)
    return Prefix(int(n) if isinstance(n, int | np.integer) else array)


def chunks(n: int) -> Mask:
    """Attend within the own chunk of n positions: p // n == s // n.

        chunks(2):
        1 1 0 0
        1 1 0 0
        0 0 1 1
        0 0 1 1

    Args:
      n: chunk length, int >= 1.
    Returns: a Mask.
    Raises: ValueError naming n.
    Example:
      >>> (causal() & chunks(2)).materialize(3, 3)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"chunks: n must be an int >= 1, got {n!r}")
    return Chunks(n)


def segments(q_ids_BT: Any, kv_ids_BS: Any = None) -> Mask:
    """Attend within the own segment, for packed sequences: q_ids[b, t] == kv_ids[b, s].

        ids 0 0 1 1:
        1 1 0 0
        1 1 0 0
        0 0 1 1
        0 0 1 1

    Args:
      q_ids_BT: int segment ids of the queries; B may be 1.
      kv_ids_BS: of the keys; left out, those of the queries.
    Returns: a Mask.
    Raises: ValueError naming the argument with a wrong dtype or rank; sizes are compared with
      the queries and keys when the mask is used.
    Example:
      >>> ids_BT = jnp.array([[0, 0, 1]])
      >>> segments(ids_BT).materialize(3, 3)[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    kv_ids_BS = q_ids_BT if kv_ids_BS is None else kv_ids_BS
    dims(q_ids_BT=q_ids_BT)
    dims(kv_ids_BS=kv_ids_BS)
    integer(q_ids_BT=q_ids_BT, kv_ids_BS=kv_ids_BS)
    return Segments(q_ids_BT, kv_ids_BS)


def lengths(q_B: Any = None, kv_B: Any = None) -> Mask:
    """Attend only among real tokens of right-padded sequences: t < q[b] and s < kv[b].

        q 3, kv 2:
        1 1 0 0
        1 1 0 0
        1 1 0 0
        0 0 0 0

    Args:
      q_B, kv_B: int numbers of real queries and keys a sequence, counted in indices whatever
        q_offset is; None for all.
    Returns: a Mask.
    Raises: ValueError naming the argument with a wrong dtype or rank, or if both are None.
    Example:
      >>> lengths(jnp.array([1]), jnp.array([2])).materialize(2, 3)[0, 0].astype(int).tolist()
      [[1, 1, 0], [0, 0, 0]]
    """
    if q_B is None and kv_B is None:
        raise ValueError("lengths: give q_B, kv_B or both")
    dims(q_B=q_B)
    dims(kv_B=kv_B)
    integer(q_B=q_B, kv_B=kv_B)
    return Lengths(q_B, kv_B)


def where(fn: Callable[..., Any], *args: Any) -> Mask:
    """Attend where a function of the indices says so.

        where(lambda b, n, t, s: (t + s) % 2 == 0):
        1 0 1 0
        0 1 0 1
        1 0 1 0
        0 1 0 1

    Args:
      fn: maps index arrays (b, n, t, s) of shapes [B,1,1,1], [1,N,1,1], [1,1,T,1], [1,1,1,S],
        followed by `args`, to bool that broadcasts to [B,N,T,S]. Here t is the query's position,
        q_offset + index, so that the function means the same in decoding.
      *args: arrays that fn needs; they become leaves of the pytree.
    Returns: a Mask.
    Raises: ValueError if fn is not callable or returns another dtype or rank.
    Example:
      >>> even = where(lambda b, n, t, s: (t + s) % 2 == 0)
      >>> even.materialize(2, 3)[0, 0].astype(int).tolist()
      [[1, 0, 1], [0, 1, 0]]
    """
    if not callable(fn):
        raise ValueError(f"where: fn must be a function of (b, n, t, s), got {type(fn).__name__}")
    return Where(fn, args)


def dense(mask_BNTS: Any) -> Mask:
    """Attend where a bool array says so.

        1 0 1 0
        1 1 1 1
        0 0 0 0
        0 1 1 0

    Args:
      mask_BNTS: bool, rank 4; axes of size 1 broadcast.
    Returns: a Mask.
    Raises: ValueError naming a wrong dtype or rank; sizes are compared when the mask is used.
    Example:
      >>> dense(jnp.ones((1, 1, 2, 3), bool)).materialize(2, 3).shape
      (1, 1, 2, 3)
    """
    dims(mask_BNTS=mask_BNTS)
    if mask_BNTS.dtype != jnp.bool_:
        integers = jnp.issubdtype(mask_BNTS.dtype, jnp.integer)
        cure = "use mask.astype(bool)" if integers else "an additive mask is a bias: bias_BNTS"
        raise ValueError(f"mask_BNTS must be bool, True = attend, got {mask_BNTS.dtype}; {cure}")
    return Dense(mask_BNTS)
