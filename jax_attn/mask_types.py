"""What a mask is: a frozen pytree that knows which (t, s) pairs it allows, and bounds on blocks.

Users build masks with `jax_attn.masks`; this file holds the types behind them. About a rectangle
of pairs a mask says whether it allows none, all or some, so that implementations can skip blocks
or leave them unmasked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.shapes import Sizes, fits

_STATIC: Any = {"static": True}


class Coverage(NamedTuple):
    """Bounds on a block of pairs: `some` is False only if none is allowed, `every` is True only
    if all are. Python bools where the answer is static, else scalar bool arrays."""

    some: Any
    every: Any


class Mask:
    """What `causal()`, `window()` and the others return: a frozen pytree.

    Example:
      >>> near = Window(None, 0) & Window(1, 1)
      >>> near.materialize(3, 3)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, _checked(other))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, _checked(other))

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise ValueError("a mask has no truth value: combine masks with &, |, ~, not and, or, not")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        """Structure and numbers by value, arrays by identity: fit for a static argument."""
        leaves, structure = jax.tree.flatten(self)
        return structure, *(leaf if isinstance(leaf, int) else id(leaf) for leaf in leaves)

    def allows(self, b, n, t, s, p) -> Any:
        """Say of each pair whether it may attend.

        Args:
          b, n, t, s: integer index arrays of batch, head, query and key that broadcast together.
          p: the queries' positions, q_offset + t.
        Returns: bool array that broadcasts with the indices.
        """
        raise NotImplementedError

    def coverage(self, t0: Any, nt: int, s0: Any, ns: int, q_offset: Any = 0) -> Coverage:
        """Bound a block of queries [t0, t0 + nt) and keys [s0, s0 + ns), over all b and n.

        Args:
          t0, s0: first index, int or traced scalar.
          nt, ns: sizes, static ints >= 1.
          q_offset: position of query 0.
        Returns: Coverage, conservative: "mixed" (some, not every) is always a safe answer.
        """
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise ValueError if arrays in the mask do not fit B, N, T, S of the call."""

    def materialize(
        self, T: int, S: int, *, q_offset: Any = 0, B: int = 1, N: int = 1
    ) -> jax.Array:
        """Write the mask out.

        Args:
          T, S: query and key lengths.
          q_offset: position of query 0.
          B, N: batch size and heads; needed only by masks that depend on them.
        Returns: bool [B or 1, N or 1, T, S].
        Raises: ValueError if arrays in the mask have other sizes.
        Example:
          >>> Window(None, 0).materialize(2, 3)[0, 0].astype(int).tolist()
          [[1, 0, 0], [1, 1, 0]]
        """
        self.check(Sizes(B=B, N=N, T=T, S=S))
        b = jnp.arange(B)[:, None, None, None]
        n = jnp.arange(N)[None, :, None, None]
        t = jnp.arange(T)[None, None, :, None]
        s = jnp.arange(S)[None, None, None, :]
        allowed = jnp.asarray(self.allows(b, n, t, s, t + q_offset))
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))

    def classify(
        self, t_range: tuple[int, int], s_range: tuple[int, int], *, q_offset: int = 0
    ) -> str:
        """Say whether a block is all-False, all-True or mixed.

        Args:
          t_range, s_range: (first, end) of queries and keys; not empty, and inside the arrays
            that the mask holds.
          q_offset: position of query 0.
        Returns: "none", "all" or "mixed". "mixed" may also be said of a block whose pairs
          happen to agree; the other two are certain. Not for traced masks: see `coverage`.
        Raises: ValueError for an empty range.
        Example:
          >>> causal = Window(None, 0)
          >>> causal.classify((0, 4), (4, 8)), causal.classify((4, 8), (0, 4))
          ('none', 'all')
        """
        for name, (first, end) in (("t_range", t_range), ("s_range", s_range)):
            if not 0 <= first < end:
                raise ValueError(f"{name} needs 0 <= first < end, got ({first}, {end})")
        (t0, t1), (s0, s1) = t_range, s_range
        some, every = self.coverage(t0, t1 - t0, s0, s1 - s0, q_offset)
        return "none" if not some else "all" if every else "mixed"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Window(Mask):
    """position - left <= s <= position + right; None is unbounded. See `window`, `causal`."""

    left: int | None = field(metadata=_STATIC)
    right: int | None = field(metadata=_STATIC)

    def allows(self, b, n, t, s, p):
        inside = s == s
        if self.left is not None:
            inside = inside & (s >= p - self.left)
        if self.right is not None:
            inside = inside & (s <= p + self.right)
        return inside

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        p0, p1, s1 = q_offset + t0, q_offset + t0 + nt - 1, s0 + ns - 1
        some, every = True, True
        if self.left is not None:
            some, every = some & (s1 >= p0 - self.left), every & (s0 >= p1 - self.left)
        if self.right is not None:
            some, every = some & (s0 <= p1 + self.right), every & (s1 <= p0 + self.right)
        return Coverage(some, every)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """s < n. See `prefix`."""

    n_B: Any

    def allows(self, b, n, t, s, p):
        return s < (at_index(self.n_B, b) if jnp.ndim(self.n_B) else self.n_B)

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        return Coverage(s0 < _largest(self.n_B), s0 + ns <= _smallest(self.n_B))

    def check(self, sizes):
        if jnp.ndim(self.n_B):
            fits(sizes, n_B=self.n_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Chunks(Mask):
    """position // n == s // n. See `chunks`."""

    n: int = field(metadata=_STATIC)

    def allows(self, b, n, t, s, p):
        return p // self.n == s // self.n

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        q_first, q_last = (q_offset + t0) // self.n, (q_offset + t0 + nt - 1) // self.n
        k_first, k_last = s0 // self.n, (s0 + ns - 1) // self.n
        some = (q_first <= k_last) & (k_first <= q_last)
        return Coverage(some, (q_first == k_last) & (k_first == q_last))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """q_ids[b, t] == kv_ids[b, s]. See `segments`."""

    q_ids_BT: Any
    kv_ids_BS: Any

    def allows(self, b, n, t, s, p):
        return at_index(self.q_ids_BT, b, t) == at_index(self.kv_ids_BS, b, s)

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        q_ids = _slice(jnp.asarray(self.q_ids_BT), t0, nt, axis=1)
        kv_ids = _slice(jnp.asarray(self.kv_ids_BS), s0, ns, axis=1)
        q_low, q_high = q_ids.min(axis=1), q_ids.max(axis=1)
        k_low, k_high = kv_ids.min(axis=1), kv_ids.max(axis=1)
        some = jnp.any((q_low <= k_high) & (k_low <= q_high))
        return Coverage(some, jnp.all((q_low == k_high) & (k_low == q_high)))

    def check(self, sizes):
        fits(sizes, q_ids_BT=self.q_ids_BT, kv_ids_BS=self.kv_ids_BS)
        # B may be 1, but one id is no id for every key: a decoding step that forgets kv_ids_BS.
        for name, ids, letter in (
            ("q_ids_BT", self.q_ids_BT, "T"),
            ("kv_ids_BS", self.kv_ids_BS, "S"),
        ):
            if ids.shape[1:] != sizes[letter]:
                raise ValueError(
                    f"{name} has {letter}={ids.shape[1]} but the other arguments have "
                    f"{letter}={sizes[letter][0]}"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """t < q[b] and s < kv[b]; None is unbounded. See `lengths`."""

    q_B: Any
    kv_B: Any

    def allows(self, b, n, t, s, p):
        inside = (t == t) & (s == s)
        if self.q_B is not None:
            inside = inside & (t < at_index(self.q_B, b))
        if self.kv_B is not None:
            inside = inside & (s < at_index(self.kv_B, b))
        return inside

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        some, every = True, True
        for first, size, length in ((t0, nt, self.q_B), (s0, ns, self.kv_B)):
            if length is not None:
                some = some & (first < _largest(length))
                every = every & (first + size <= _smallest(length))
        return Coverage(some, every)

    def check(self, sizes):
        fits(sizes, q_B=self.q_B, kv_B=self.kv_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Where(Mask):
    """A user's function of the indices. See `where`."""

    fn: Callable[..., Any] = field(metadata=_STATIC)
    args: tuple[Any, ...]

    def allows(self, b, n, t, s, p):
        allowed = jnp.asarray(self.fn(b, n, p, s, *self.args))
        if allowed.dtype != jnp.bool_:
            raise ValueError(f"where(fn): fn must return bool, got {allowed.dtype}")
        if allowed.ndim != 4:
            raise ValueError(
                f"where(fn): fn must return rank 4, broadcastable to B N T S, got {allowed.shape}"
            )
        return allowed

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        return Coverage(True, False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """mask[b, n, t, s]; axes of size 1 broadcast. See `dense`."""

    mask_BNTS: Any

    def allows(self, b, n, t, s, p):
        return at_index(self.mask_BNTS, b, n, t, s)

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        block = jnp.asarray(self.mask_BNTS)
        block = _slice(_slice(block, t0, nt, axis=2), s0, ns, axis=3)
        return Coverage(jnp.any(block), jnp.all(block))

    def check(self, sizes):
        fits(sizes, mask_BNTS=self.mask_BNTS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class And(Mask):
    """Both masks allow it."""

    left: Mask
    right: Mask

    def allows(self, b, n, t, s, p):
        return self.left.allows(b, n, t, s, p) & self.right.allows(b, n, t, s, p)

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        left = self.left.coverage(t0, nt, s0, ns, q_offset)
        right = self.right.coverage(t0, nt, s0, ns, q_offset)
        return Coverage(left.some & right.some, left.every & right.every)

    def check(self, sizes):
        self.left.check(sizes)
        self.right.check(sizes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Or(Mask):
    """Either mask allows it."""

    left: Mask
    right: Mask

    def allows(self, b, n, t, s, p):
        return self.left.allows(b, n, t, s, p) | self.right.allows(b, n, t, s, p)

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        left = self.left.coverage(t0, nt, s0, ns, q_offset)
        right = self.right.coverage(t0, nt, s0, ns, q_offset)
        return Coverage(left.some | right.some, left.every | right.every)

    def check(self, sizes):
        self.left.check(sizes)
        self.right.check(sizes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Not(Mask):
    """The mask does not allow it."""

    mask: Mask

    def allows(self, b, n, t, s, p):
        return jnp.logical_not(self.mask.allows(b, n, t, s, p))

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        some, every = self.mask.coverage(t0, nt, s0, ns, q_offset)
        return Coverage(_not(every), _not(some))

    def check(self, sizes):
        self.mask.check(sizes)


def _checked(mask: Any) -> Mask:
    if not isinstance(mask, Mask):
        raise ValueError(
            f"a mask composes with masks, got {type(mask).__name__}; wrap a bool array in dense()"
        )
    return mask


def at_index(array: Any, *index: Any) -> jax.Array:
    """Index an array; its axes of size 1 broadcast, and stay 1 in the result."""
    array = jnp.asarray(array)
    zero = jnp.zeros((1,) * jnp.ndim(index[0]), jnp.int32)
    whole = [zero if n == 1 else i for i, n in zip(index, array.shape, strict=True)]
    return array[tuple(whole)]


def _slice(array: jax.Array, first: Any, size: int, axis: int) -> jax.Array:
    """Take [first, first + size) of an axis; an axis of size 1 broadcasts."""
    if array.shape[axis] == 1:
        return array
    return jax.lax.dynamic_slice_in_dim(array, first, size, axis)


def _largest(x: Any) -> Any:
    return jnp.max(x) if jnp.ndim(x) else x


def _smallest(x: Any) -> Any:
    return jnp.min(x) if jnp.ndim(x) else x


def _not(x: Any) -> Any:
    return (not x) if isinstance(x, bool | np.bool_) else jnp.logical_not(x)
