"""Ring attention: keys and values go round the devices of a mesh axis, queries stay.

Each device attends its queries to the keys that are with it and passes them on while it does; what
the parts make of a row merges by the softmax algebra (arXiv:2310.01889). Backward, keys and values
go round once more, and their gradients with them, one device behind: per device nothing is larger
than its own part of the arrays. In the zigzag layout a device holds one run of tokens from the
front and one from the back, so that causal attention costs every device the same.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_attn.kernels import blockwise, columns, derivative, folds, observations
from jax_attn.kernels.blocks import Data, Part, Plan, Point, Value
from jax_attn.kernels.call import Call
from jax_attn.kernels.hoist import vary_together


class Ring(NamedTuple):
    """A mesh axis and how many devices are on it."""

    axis: str
    size: int


def runs(index: Any, size: int, length: int, zigzag: bool) -> jax.Array:
    """Return where the runs of tokens begin that device `index` of `size` holds, of a sequence of
    which each device holds `length`."""
    if not zigzag:
        return jnp.asarray(index * length)[None]
    half = length // 2
    return jnp.stack([index * half, (2 * size - 1 - index) * half])


def attend(
    call: Call, ring: Ring, zigzag: bool, first: tuple[Any, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attend this device's queries to the keys of all; return the output and what was to be
    observed.

    Args:
      call: this device's queries, keys and values; masks, scores and the keys of a bias are of the
        whole sequence.
      first: batch entry and head at which this device's begin.
    """
    sizes = call.sizes
    if 0 in sizes["BTSN"]:
        out_BTNE = jnp.zeros(sizes["BTNE"], call.v_BSKE.dtype)
        return out_BTNE, observations.of_nothing(call)
    part = part_of(ring, zigzag, sizes.T, sizes.S, first)
    asked, call = call, observations.with_masses_as_means(call)
    plan, data, shared = blockwise.prepare(call, part)
    clean = call if call.mask is None else blockwise.finite(call)
    count = len(part.t)
    point = blockwise.point_of(clean, plan, shared, count)
    value = fold(plan, ring, *vary_together((point, data)))
    o_BTNE, lse_BNT, rows = blockwise.rows_of(call, value, count)
    poison_BTN = None
    if call.mask is not None:
        poison_BTN = _poison(call, plan, data, ring, count)
        o_BTNE = o_BTNE + poison_BTN[..., None]
        without_values = replace(call, v_BSKE=call.v_BSKE[..., :0])
        poison_BTN = _poison(without_values, plan, data, ring, count)
    seen = {}
    if call.statistics or call.means:
        seen = observations.in_order(asked, observations.finish(call, lse_BNT, rows, poison_BTN))
    return o_BTNE.astype(call.v_BSKE.dtype), seen


def part_of(ring: Ring, zigzag: bool, T: int, S: int, first: tuple[Any, Any]) -> Part:
    """Say which queries this device holds, and which keys are here at each step."""
    me, size = jax.lax.axis_index(ring.axis), ring.size
    here = runs(me, size, T, zigzag).astype(jnp.int32)
    there = jax.vmap(lambda r: runs((me - r) % size, size, S, zigzag))(jnp.arange(size))
    b, n = map(jnp.int32, first)
    return Part(T * size, S * size, b, n, here, there.astype(jnp.int32))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def fold(plan: Plan, ring: Ring, point: Point, data: Data) -> Value:
    """Return output, lse and columns of every row, float32 or wider. Of `data` the visits and the
    places of keys have an axis more, of steps."""
    return _forward(plan, ring, point, data)


@fold.defjvp
def _fold_jvp(plan, ring, primals, tangents):
    point, data = primals
    value = fold(plan, ring, point, data)
    rules = derivative.Rules(partial(_push, plan, ring), partial(_pull, plan, ring))
    return value, derivative.push(rules, point, value, data, tangents[0])


def _forward(plan: Plan, ring: Ring, point: Point, data: Data) -> Value:
    def step(carry, r):
        k_BKSH, v_BKSE, value = carry
        here = point._replace(k_BKSH=k_BKSH, v_BKSE=v_BKSE, sinks_KG=None)
        passed = _pass_on(ring, (k_BKSH, v_BKSE))
        value = merge(value, folds.forward(plan, here, _at_step(data, r)))
        return (*passed, value), None

    lse_BKGT = jnp.full_like(point.q_BKGTH[..., 0], -jnp.inf, plan.wide)
    o_BKGTE = jnp.zeros((*lse_BKGT.shape, point.v_BKSE.shape[3]), plan.wide)
    nothing = Value(o_BKGTE, lse_BKGT, columns.none(plan, lse_BKGT))
    carry = vary_together((point.k_BKSH, point.v_BKSE, nothing))
    value = jax.lax.scan(step, carry, jnp.arange(ring.size))[0][2]
    if point.sinks_KG is None:
        return value
    return merge(value, sink(value, point.sinks_KG.astype(plan.wide)[None, :, :, None]))


def sink(like: Value, z: jax.Array) -> Value:
    """Return what a sink with logit z, which broadcasts to the rows, makes of them by itself."""
    o, lse, seen = jax.tree.map(jnp.zeros_like, like)
    of_seen = {"square": 1.0, "max": -jnp.inf, "argmax": -1.0}
    seen = {name: x + of_seen.get(name, 0.0) for name, x in seen.items()}
    return Value(o, jnp.broadcast_to(z, lse.shape), seen)


def merge(left: Value, right: Value) -> Value:
    """Merge what two parts of the keys make of a row."""
    lse_BKGT = jnp.logaddexp(left.lse_BKGT, right.lse_BKGT)
    base_BKGT = jnp.where(lse_BKGT == -jnp.inf, 0.0, lse_BKGT)
    o_BKGTE = sum(jnp.exp(x.lse_BKGT - base_BKGT)[..., None] * x.o_BKGTE for x in (left, right))
    parts = (left.seen_BKGT, right.seen_BKGT, left.lse_BKGT, right.lse_BKGT)
    return Value(o_BKGTE, lse_BKGT, columns.merge(*parts, base_BKGT))


def _pull(
    plan: Plan, ring: Ring, point: Point, value: Value, data: Data, d: Value, reversible: bool
) -> Point:
    def step(carry, r):
        kv, d_kv, sums = carry
        # What came by one device earlier has its part of the gradients there still.
        d_kv = _pass_on(ring, d_kv)
        here = point._replace(k_BKSH=kv[0], v_BKSE=kv[1], sinks_KG=None)
        kv = _pass_on(ring, kv)
        made = folds.pull(plan, here, value, _at_step(data, r), d, reversible)
        d_kv, sums = jax.tree.map(jnp.add, (d_kv, sums), ((made.k_BKSH, made.v_BKSE), _still(made)))
        return (kv, d_kv, sums), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, plan.wide)), point)
    kv, d_kv = (point.k_BKSH, point.v_BKSE), (zeros.k_BKSH, zeros.v_BKSE)
    carry = vary_together((kv, d_kv, _still(zeros)))
    step = jax.checkpoint(step) if reversible else step
    _, d_kv, (dq_BKGTH, d_bias_BNTS, d_shared) = jax.lax.scan(step, carry, jnp.arange(ring.size))[0]
    dk_BKSH, dv_BKSE = _pass_on(ring, d_kv)
    sinks_KG = point.sinks_KG
    d_sinks_KG = None if sinks_KG is None else folds.pull_sinks(plan, sinks_KG, value, d)
    made = Point(dq_BKGTH, dk_BKSH, dv_BKSE, d_bias_BNTS, d_sinks_KG, d_shared)
    return jax.tree.map(lambda made, x: made.astype(x.dtype), made, point)


def _still(made: Point) -> tuple[Any, Any, Any]:
    return made.q_BKGTH, made.bias_BNTS, made.shared


def _push(
    plan: Plan, ring: Ring, point: Point, value: Value, data: Data, d: Point, reversible: bool
) -> Value:
    def step(carry, r):
        moving, total = carry
        here, d_here = (
            x._replace(k_BKSH=k_BKSH, v_BKSE=v_BKSE, sinks_KG=None)
            for x, (k_BKSH, v_BKSE) in zip((point, d), moving, strict=True)
        )
        moving = _pass_on(ring, moving)
        made = folds.push(plan, here, value, _at_step(data, r), d_here, reversible)
        return (moving, jax.tree.map(jnp.add, total, made)), None

    moving = ((point.k_BKSH, point.v_BKSE), (d.k_BKSH, d.v_BKSE))
    carry = vary_together((moving, jax.tree.map(jnp.zeros_like, value)))
    step = jax.checkpoint(step) if reversible else step
    total = jax.lax.scan(step, carry, jnp.arange(ring.size))[0][1]
    if point.sinks_KG is None:
        return total
    of_sinks = folds.push_sinks(plan, point.sinks_KG, value, d.sinks_KG)
    return jax.tree.map(jnp.add, total, of_sinks)


def _pass_on(ring: Ring, tree: Any) -> Any:
    """Hand arrays, alike but for their last axis, to the next device of the ring: in one message,
    since of several the TPU's compiler starts some only when there is nothing left to compute.
    Arrays of two dtypes take two."""
    pairs = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    leaves, treedef = jax.tree.flatten(tree)
    if len({x.dtype for x in leaves}) > 1:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, pairs), tree)
    packed = jax.lax.ppermute(jnp.concatenate(leaves, axis=-1), ring.axis, pairs)
    ends = [sum(x.shape[-1] for x in leaves[:i]) for i in range(1, len(leaves))]
    return jax.tree.unflatten(treedef, jnp.split(packed, ends, axis=-1))


def _at_step(data: Data, r: Any) -> Data:
    """Take what belongs to the keys that are here after r steps."""
    visits = jax.tree.map(lambda x: x[r], (data.by_query, data.by_key))
    place = data.place._replace(s=data.place.s[r], end=data.place.end[r])
    return data._replace(by_query=visits[0], by_key=visits[1], place=place)


def _poison(call: Call, plan: Plan, data: Data, ring: Ring, count: int) -> jax.Array:
    """Return [B,T,N]: NaN for the rows that attend to something not finite, on any device, or are
    and attend at all, else 0."""
    sizes = call.sizes
    bad_q_BTN = ~jnp.isfinite(call.q_BTNH).all(axis=-1)
    bad_kv_BSK = ~(jnp.isfinite(call.k_BSKH).all(axis=-1) & jnp.isfinite(call.v_BSKE).all(axis=-1))
    bad_q_BKGT = bad_q_BTN.reshape(sizes["BTKG"]).transpose(0, 2, 3, 1)
    bad_q_BKGT = blockwise.pad(bad_q_BKGT, 3, plan.queries, count)
    bad_kv_BKS = blockwise.pad(bad_kv_BSK.transpose(0, 2, 1), 2, plan.keys, count)
    every_BKS = jax.lax.all_gather(bad_kv_BKS, ring.axis)
    bad_q_BKGT, every_BKS, data = vary_together((bad_q_BKGT, every_BKS, data))
    me = jax.lax.axis_index(ring.axis)

    def look() -> jax.Array:
        def step(hit_BKGT, r):
            bad_kv_BKS = every_BKS[(me - r) % ring.size]
            hit = folds.attends_to(plan, bad_q_BKGT, bad_kv_BKS, _at_step(data, r))
            return hit_BKGT | hit, None

        nothing = jnp.zeros_like(bad_q_BKGT)
        hit_BKGT = jax.lax.scan(step, nothing, jnp.arange(ring.size))[0]
        hit_BKGT = blockwise.unpad(hit_BKGT, sizes.T, count)
        hit_BTN = hit_BKGT.transpose(0, 3, 1, 2).reshape(sizes["BTN"])
        return jnp.where(hit_BTN, jnp.nan, 0.0).astype(plan.wide)

    some = jnp.any(bad_q_BKGT) | jnp.any(every_BKS)
    nothing = jnp.zeros_like(bad_q_BKGT, plan.wide)
    nothing = blockwise.unpad(nothing, sizes.T, count).transpose(0, 3, 1, 2)
    return jax.lax.cond(some, look, lambda: nothing.reshape(sizes["BTN"]))
