"""What the blockwise folds share: blocks of queries by keys, their logits, and which to visit.

Arrays are padded to whole blocks. A *unit* is the part of the batch and the key/value heads that
is worked on at a time: one (b, k) on a CPU, whose matmuls are fastest one head at a time, and all
of them elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_attn import dropout
from jax_attn.mask_types import Mask


class Plan(NamedTuple):
    """What is static in a call."""

    T: int
    S: int
    queries: int  # in a block
    keys: int  # in a block
    one_unit: bool  # all of B and K at a time
    whole: bool  # a block may need no mask
    mixed: bool  # a block may need one
    mask: Callable[..., Any] | None  # (consts, b, n, t, s, p) -> bool
    score: Callable[..., Any] | None  # (consts, logits, b, n, t, s) -> logits
    scale: float | None
    softcap: float | None
    rate: float
    wide: Any  # dtype of logits and sums
    narrow: Any  # dtype of matmul operands
    columns: tuple[str, ...] = ()  # see columns.py
    means: tuple[Callable[..., Any], ...] = ()  # (consts, b, n, t, s) -> number
    reaches: tuple[Callable[..., Any] | None, ...] = ()  # of each mean: False of blocks of zeros

    @property
    def scales_q(self) -> bool:
        """T·H products instead of T·S; not where q is rounded to a narrow dtype after."""
        return self.scale is not None and self.narrow == self.wide


class Point(NamedTuple):
    """What has a derivative. `shared` holds scale and softcap if traced, and the arrays that the
    score and the means close over."""

    q_BKGTH: Any
    k_BKSH: Any
    v_BKSE: Any
    bias_BNTS: Any
    sinks_KG: Any
    shared: dict[str, Any]


class Value(NamedTuple):
    o_BKGTE: Any
    lse_BKGT: Any
    seen_BKGT: dict[str, Any]  # columns of the plan


class Data(NamedTuple):
    """What has no derivative."""

    mask: Any
    score: Any
    key: Any  # of dropout, raw
    q_offset: Any
    by_query: Any  # Visits
    by_key: Any
    place: Any  # Place
    means: Any = ()


class Place(NamedTuple):
    """Where in a call its blocks are: a device may hold a part of the batch, the heads, the queries
    and the keys, and masks, scores and dropout are functions of indices in the whole.

    First batch entry and head; of each block of queries and of keys the index of its first; of each
    block of keys the end of those that are there, the rest being padding.
    """

    b: Any
    n: Any
    t: Any
    s: Any
    end: Any


class Part(NamedTuple):
    """The part of a call that a device holds, in runs of consecutive queries and keys.

    Lengths of the whole call; first batch entry and head; first query of each run, first key of
    each run: [runs], or [steps, runs] where keys of other devices come by, step by step.
    """

    T: int
    S: int
    b: Any
    n: Any
    t: jax.Array
    s: jax.Array


class Visits(NamedTuple):
    """For each block of one side the blocks of the other: those that need no mask come first,
    `order[i, : whole[i]]`, then those that do, up to `some[i]`; the rest is skipped."""

    order: jax.Array
    whole: jax.Array
    some: jax.Array


class At(NamedTuple):
    """First batch entry, head, query and key of a block, in the whole call; end of its keys."""

    b: Any
    n: Any
    t: Any
    s: Any
    end: Any


def find(data: Data, b: Any, n: Any, i: Any, j: Any) -> At:
    """Say where the block of queries i and keys j is, its first batch entry and head being b, n of
    what is at hand."""
    place = data.place
    return At(place.b + b, place.n + n, place.t[i], place.s[j], place.end[j])


def size_of(length: int, limit: int) -> int:
    """Return the size of the blocks that cut a length into as few as the limit allows."""
    size = -(-length // -(-length // limit))
    return -(-size // 16) * 16 if size > 16 else size


def place_of(plan: Plan, part: Part, T: int, S: int) -> Place:
    """Say where the blocks of a part are that holds T queries and S keys."""
    T, S = T // len(part.t), S // part.s.shape[-1]

    def starts(first, length, size):
        count = -(-length // size)
        steps = jnp.tile(jnp.arange(count, dtype=jnp.int32) * size, first.shape[-1])
        return jnp.repeat(first, count, axis=-1) + steps.reshape(*[1] * (first.ndim - 1), -1)

    t, s = starts(part.t, T, plan.queries), starts(part.s, S, plan.keys)
    return Place(part.b, part.n, t, s, jnp.repeat(part.s + S, -(-S // plan.keys), axis=-1))


def visits(mask: Mask | None, plan: Plan, place: Place, q_offset: Any) -> tuple[Visits, Visits]:
    """Ask the mask about every block; return the order by query blocks and by key blocks."""
    if place.s.ndim == 2:

        def step(s, end):
            return visits(mask, plan, place._replace(s=s, end=end), q_offset)

        return jax.vmap(step)(place.s, place.end)
    T, S = max(plan.T, 1), max(plan.S, 1)
    nt, ns = min(plan.queries, T), min(plan.keys, S)
    padded = (place.s + plan.keys > place.end)[None, :]

    def block(t0, s0):
        # The last block overlaps the one before it instead of leaving the mask's arrays: what is
        # said of more pairs than are in it is still a bound.
        if mask is None:
            return jnp.bool_(True), jnp.bool_(True)
        some, every = mask.coverage(
            jnp.minimum(t0, T - nt), nt, jnp.minimum(s0, S - ns), ns, q_offset
        )
        return jnp.asarray(some), jnp.asarray(every)

    over_keys = jax.vmap(block, in_axes=(None, 0), out_axes=0)
    some, every = jax.vmap(over_keys, in_axes=(0, None), out_axes=0)(place.t, place.s)
    kind = jnp.where(some, jnp.where(every & ~padded, 0, 1), 2)
    return _visits(kind), _visits(kind.T)


def _visits(kind: jax.Array) -> Visits:
    order = jnp.argsort(kind, axis=1, stable=True).astype(jnp.int32)
    return Visits(order, jnp.sum(kind == 0, axis=1), jnp.sum(kind < 2, axis=1))


def indices(at: At, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return index arrays b, n, t, s of a block [B,N,T,S]."""
    made = []
    for axis, (first, size) in enumerate(zip(at[:4], shape, strict=True)):
        made.append((first + jnp.arange(size)).reshape([-1 if i == axis else 1 for i in range(4)]))
    return tuple(made)


def real_indices(plan: Plan, at: At, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Return index arrays for functions of users: padding repeats the last query or key, lest they
    answer NaN for what is not there, which 0 · NaN would spread."""
    b, n, t, s = indices(at, shape)
    return b, n, jnp.minimum(t, plan.T - 1), jnp.minimum(s, plan.S - 1)


def final(plan: Plan, data: Data, at: At, masked: bool, s_BNTS, bias_BNTS, shared) -> jax.Array:
    """Turn products q·k of a block into the logits that the softmax sees."""
    softcap = shared.get("softcap", plan.softcap)
    if masked:
        # Large junk makes inf - inf of a product, and 0 · NaN is NaN on the way back.
        allowed_BNTS = allowed(plan, data, at, s_BNTS.shape)
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, 0.0)
    if plan.scale is None:
        s_BNTS = s_BNTS * shared["scale"].astype(plan.wide)
    elif not plan.scales_q:
        s_BNTS = s_BNTS * plan.scale
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    if bias_BNTS is not None:
        if masked:
            bias_BNTS = jnp.where(allowed_BNTS, bias_BNTS, jnp.zeros_like(bias_BNTS))
        s_BNTS = s_BNTS + bias_BNTS.astype(plan.wide)
    if plan.score is not None:
        b, n, t, s = real_indices(plan, at, s_BNTS.shape)
        consts = (shared["score"], data.score)
        s_BNTS = plan.score(consts, s_BNTS, b, n, t + data.q_offset, s).astype(plan.wide)
    if masked:
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, -jnp.inf)
    return s_BNTS


def allowed(plan: Plan, data: Data, at: At, shape: tuple[int, ...]) -> jax.Array:
    """Say which pairs of a block may attend; broadcasts to the block."""
    there = indices(at, shape)[3] < at.end
    if plan.mask is None:
        return there
    b, n, t, s = real_indices(plan, at, shape)
    return there & plan.mask(data.mask, b, n, t, s, t + data.q_offset)


def has_holes(plan: Plan, masked: bool, bias_BNTS: Any) -> bool:
    """Say whether final logits of a block may be -inf, be it by the mask, the bias or the score."""
    return masked or bias_BNTS is not None or plan.score is not None


def kept(plan: Plan, data: Data, at: At, shape: tuple[int, ...]) -> jax.Array:
    """Say which pairs of a block survive dropout."""
    b, n, t, s = indices(at, shape)
    return dropout.keep(data.key, plan.rate, b, n, t + data.q_offset, s)


def cut(x: jax.Array, first: Any, size: int, axis: int) -> jax.Array:
    """Take [first, first + size) of an axis; an axis of size 1 stays, it broadcasts."""
    if x.shape[axis] == 1 or x.shape[axis] == size:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def cut_bias(plan: Plan, bias_BNTS: Any, first: tuple[Any, ...], units: tuple[int, int]) -> Any:
    """Take the block's part of the bias: of the queries at hand and all keys of the call."""
    if bias_BNTS is None:
        return None
    for axis, size in enumerate((*units, plan.queries, plan.keys)):
        bias_BNTS = cut(bias_BNTS, first[axis], size, axis)
    return bias_BNTS


def add_at(x: jax.Array, part: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """Add a part to x where `at` says; axes on which both agree, or x has size 1, begin at 0."""
    sizes = zip(x.shape, part.shape, at, strict=True)
    first = [jnp.int32(0 if m == n else i) for m, n, i in sizes]
    old = jax.lax.dynamic_slice(x, first, part.shape)
    return jax.lax.dynamic_update_slice(x, old + part.astype(x.dtype), first)


def loop(first, end, bound: int, step: Callable[..., Any], carry: Any, reversible: bool) -> Any:
    """Run carry = step(i, carry) for first <= i < end <= bound; `end` may be traced.

    The reversible form visits all of `bound`, so that JAX can run it backwards, and recomputes a
    step there instead of storing what it held.
    """
    if not reversible:
        return jax.lax.fori_loop(first, end, step, carry)

    @jax.checkpoint
    def visit(carry, i):
        there = (first <= i) & (i < end)
        return jax.lax.cond(there, lambda c: step(i, c), lambda c: c, carry), None

    return jax.lax.scan(visit, carry, jnp.arange(bound))[0]
