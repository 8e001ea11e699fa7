"""Attention in blocks, for any backend: pads and cuts the inputs, for the folds of `folds.py`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels import blocks, dense, folds, observations, spread
from jax_attn.kernels.blocks import At, Data, Part, Plan, Point, Value
from jax_attn.kernels.call import Call
from jax_attn.kernels.hoist import hoist, vary, vary_together, varying_axes
from jax_attn.kernels.processor import backend, processor

# Measured on two CPU cores: smaller blocks pay for each step of a loop, larger ones for leaving
# the cache.
QUERIES, KEYS = 512, 512
# Other limits (queries, keys), for measurements and tests; part of the key of JAX's caches.
block_limits = jax.make_user_context(default_value=None)
# True multiplies bfloat16 as it is on any device, for tests.
multiply_narrow = jax.make_user_context(default_value=False)


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here; it always can."""
    return None


def attend(call: Call, part: Part | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run attention block by block; return the output and what was to be observed.

    Args:
      part: what of a call over several devices this is, None for all of it.
    """
    if 0 in call.sizes["BTSN"]:
        out_BTNE = jnp.zeros(call.sizes["BTNE"], call.v_BSKE.dtype)
        return out_BTNE, observations.of_nothing(call)
    if part is None and spread.splits(call):

        def run(call: Call, first: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            zero, (b, n) = jnp.zeros(1, jnp.int32), map(jnp.int32, first)
            return attend(call, Part(call.sizes.T, call.sizes.S, b, n, zero, zero))

        return spread.attend(call, run, queries=None, keys=None)
    asked, call = call, call if part is None else observations.with_masses_as_means(call)
    o_BTNE, lse_BNT, rows = attend_with_lse(call, part)
    out_BTNE = o_BTNE.astype(call.v_BSKE.dtype)
    if not (call.statistics or call.means):
        return out_BTNE, {}
    return out_BTNE, observations.in_order(asked, finish(call, lse_BNT, rows, part))


def observe(call: Call) -> dict[str, jax.Array]:
    """Return what is to be observed alone: a pass without values."""
    return attend(replace(call, v_BSKE=call.v_BSKE[..., :0], dropout_key=None, dropout_rate=0.0))[1]


def finish(
    call: Call, lse_BNT: jax.Array, rows: dict[str, Any], part: Part | None = None
) -> dict[str, jax.Array]:
    """Turn lse and columns of all rows, [B,N,T], into the statistics of a call."""
    if call.mask is None:
        return observations.finish(call, lse_BNT, rows, None)
    poison_BTN = poison(replace(call, v_BSKE=call.v_BSKE[..., :0]), part)
    return observations.finish(finite(call), lse_BNT, rows, poison_BTN)


def finite(call: Call) -> Call:
    """Put 0 for what is not finite in q, k and v."""
    q_BTNH, k_BSKH, v_BSKE = (
        jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))
        for x in (call.q_BTNH, call.k_BSKH, call.v_BSKE)
    )
    return replace(call, q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE)


def attend_with_lse(
    call: Call, part: Part | None = None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Run attention on arrays that are not empty; return the output, lse [B,N,T] and columns, all
    float32 or wider."""
    given = call
    _refuse_explicit_axes(call)
    plan, data, shared = prepare(call, part)
    if call.mask is not None:
        # 0 · NaN is NaN, forward and backward: replace what is not finite before it meets a zero
        # probability, and give the NaN back to the rows that do attend to it.
        call = finite(call)
    point = point_of(call, plan, shared, 1)
    o_BTNE, lse_BNT, rows = rows_of(call, folds.fold(plan, *vary_together((point, data))), 1)
    if call.mask is not None:
        o_BTNE = o_BTNE + _poison(given, plan, data)[..., None]
    return o_BTNE, lse_BNT, rows


def point_of(call: Call, plan: Plan, shared: dict[str, Any], runs: int) -> Point:
    """Put a call's arrays, whose queries and keys lie in so many runs, into whole blocks."""
    sizes = call.sizes
    q_BKGTH = call.q_BTNH.reshape(sizes["BTKGH"]).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSE = (x.transpose(0, 2, 1, 3) for x in (call.k_BSKH, call.v_BSKE))
    bias_BNTS, sinks_N = call.bias_BNTS, call.sinks_N
    if bias_BNTS is not None:
        bias_BNTS = pad(pad(bias_BNTS, 2, plan.queries, runs), 3, plan.keys)
        if bias_BNTS.shape[3] > 1 and (runs > 1 or plan.S > sizes.S):
            # It has all keys: the last block of a run may begin anywhere.
            bias_BNTS = jnp.pad(bias_BNTS, [(0, 0)] * 3 + [(0, plan.keys)])
    return Point(
        pad(q_BKGTH, 3, plan.queries, runs),
        pad(k_BKSH, 2, plan.keys, runs),
        pad(v_BKSE, 2, plan.keys, runs),
        bias_BNTS,
        None if sinks_N is None else sinks_N.reshape(sizes["KG"]),
        shared,
    )


def rows_of(call: Call, value: Value, runs: int) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Take a call's rows out of the blocks: the output, lse [B,N,T] and columns."""
    sizes = call.sizes
    o_BKGTE, lse_BKGT, seen_BKGT = jax.tree.map(lambda x: unpad(x, sizes.T, runs), value)
    o_BTNE = o_BKGTE.transpose(0, 3, 1, 2, 4).reshape(sizes["BTNE"])
    return o_BTNE, *jax.tree.map(lambda x: x.reshape(sizes["BNT"]), (lse_BKGT, seen_BKGT))


def poison(call: Call, part: Part | None = None) -> jax.Array:
    """Return [B,T,N]: NaN for the rows that attend to something not finite, or are and attend at
    all, else 0."""
    plan, data, _ = prepare(call, part)
    return _poison(call, plan, data)


def _poison(call: Call, plan: Plan, data: Data) -> jax.Array:
    q_BTNH, k_BSKH, v_BSKE, data = vary_together((call.q_BTNH, call.k_BSKH, call.v_BSKE, data))

    def look() -> jax.Array:
        sizes = call.sizes
        bad_q_BTN = ~jnp.isfinite(q_BTNH).all(axis=-1)
        bad_q_BKGT = bad_q_BTN.reshape(sizes["BTKG"]).transpose(0, 2, 3, 1)
        bad_kv_BSK = ~(jnp.isfinite(k_BSKH).all(axis=-1) & jnp.isfinite(v_BSKE).all(axis=-1))
        bad_q_BKGT = pad(bad_q_BKGT, 3, plan.queries)
        bad_kv_BKS = pad(bad_kv_BSK.transpose(0, 2, 1), 2, plan.keys)
        hit_BKGT = folds.attends_to(plan, bad_q_BKGT, bad_kv_BKS, data)
        hit_BTN = hit_BKGT[..., : sizes.T].transpose(0, 3, 1, 2).reshape(sizes["BTN"])
        return jnp.where(hit_BTN, jnp.nan, 0.0).astype(plan.wide)

    clean = dense.all_finite(q_BTNH, k_BSKH, v_BSKE)
    return jax.lax.cond(clean, lambda: jnp.zeros_like(q_BTNH[..., 0], plan.wide), look)


def prepare(call: Call, part: Part | None = None) -> tuple[Plan, Data, dict[str, Any]]:
    """Choose the blocks; return the plan, what has no derivative, and the scalars that have one.

    Args:
      part: what of a call over several devices this is, None for all of it.
    """
    sizes, mask = call.sizes, call.mask
    if part is None:
        nothing = jnp.zeros(1, jnp.int32)
        part = Part(sizes.T, sizes.S, jnp.int32(0), jnp.int32(0), nothing, nothing)
    T, S = sizes.T // len(part.t), sizes.S // part.s.shape[-1]
    queries, keys = block_limits.value or (max(QUERIES // sizes.G, 1), KEYS)
    queries, keys = blocks.size_of(T, queries), blocks.size_of(S, keys)
    padded, one_block = S % keys > 0, queries >= part.T and keys >= part.S
    plan = Plan(
        T=part.T,
        S=part.S,
        queries=queries,
        keys=keys,
        one_unit=backend() != "cpu",
        # One block with a mask is not worth a second program for the case that it allows all.
        whole=S // keys > 0 and (mask is None or not one_block),
        mixed=padded or mask is not None,
        mask=None,
        score=None,
        scale=_number(call.scale),
        softcap=_number(call.softcap),
        rate=call.dropout_rate,
        wide=call.wide,
        narrow=_narrow(call),
        columns=observations.columns(call),
        reaches=tuple(mean.reaches for mean in call.means),
    )
    shared: dict[str, Any] = {}
    if plan.scale is None:
        shared["scale"] = call.scale
    if call.softcap is not None and plan.softcap is None:
        shared["softcap"] = call.softcap

    unit = (sizes.B, sizes.N) if plan.one_unit else (1, sizes.G)
    index = blocks.indices(At(0, 0, 0, 0, 0), (*unit, queries, keys))
    logits = jnp.zeros((*unit, queries, keys), plan.wide)
    axes = varying_axes([x for x in jax.tree.leaves(call) if hasattr(x, "dtype")])
    known = None
    while axes != known:  # once more if a function closes over what varies over more
        known, functions, consts = axes, [], []
        for fn, example in (
            (None if mask is None else mask.allows, (*index, index[2])),
            (call.score, (logits, *index)),
            *((mean, index) for mean in call.means),
        ):
            made = (None, []) if fn is None else hoist(fn, axes, *example)
            functions.append(made[0])
            consts.append(made[1])
        axes |= varying_axes(consts)
    (mask_fn, score, *means), (mask_consts, score_consts, *mean_consts) = functions, consts
    plan = plan._replace(mask=mask_fn)
    if score is not None:
        score, shared["score"], score_consts = _parted(score, score_consts)
        plan = plan._replace(score=score)
    for i, hoisted in enumerate(means):
        f, floats, mean_consts[i] = _parted(hoisted, mean_consts[i])
        plan = plan._replace(means=(*plan.means, f))
        shared.setdefault("means", []).append(floats)

    place = blocks.place_of(plan, part, sizes.T, sizes.S)
    visits = blocks.visits(mask, plan, place, call.q_offset)
    key = None if plan.rate == 0.0 else jax.random.key_data(call.dropout_key)
    data = Data(mask_consts, score_consts, key, call.q_offset, *visits, place, mean_consts)
    return plan, jax.tree.map(lambda x: vary(x, axes), data), shared


def _parted(hoisted: Any, consts: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """Part what a function closed over into what may have a derivative and what has none; return
    the function of ((the one, the other), *args), and both."""
    moving = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in consts]

    def fn(consts, *args):
        floats, others = map(iter, consts)
        return hoisted([next(floats if yes else others) for yes in moving], *args)

    floats = [x for x, yes in zip(consts, moving, strict=True) if yes]
    return fn, floats, [x for x, yes in zip(consts, moving, strict=True) if not yes]


def _refuse_explicit_axes(call: Call) -> None:
    for name in ("q_BTNH", "k_BSKH", "v_BSKE"):
        used = [axis for axis in jax.typeof(getattr(call, name)).sharding.spec if axis is not None]
        if used:
            raise ValueError(
                f"{name} is sharded over {used}, axes of type Explicit, along which its blocks "
                f"cannot be cut: call inside jax.shard_map, or make the mesh with Auto axes"
            )


def _narrow(call: Call) -> Any:
    """Choose the dtype of matmul operands: bfloat16 where the device multiplies it faster.

    XLA:CPU does so from JAX 0.12 on, on processors with AMX; others are quicker in float32.
    """
    dtypes = {x.dtype for x in (call.q_BTNH, call.k_BSKH, call.v_BSKE)}
    amx = jax.__version_info__ >= (0, 12) and "amx_bf16" in processor()
    fast = backend() != "cpu" or amx or multiply_narrow.value
    return jnp.bfloat16 if fast and dtypes == {jnp.dtype("bfloat16")} else call.wide


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float | np.number) else None


def pad(x: jax.Array, axis: int, multiple: int, runs: int = 1) -> jax.Array:
    """Pad each of an axis's runs with zeros to a multiple; an axis of size 1 that broadcasts
    stays."""
    length = x.shape[axis] // runs
    more = -length % multiple
    if not more or x.shape[axis] == 1:
        return x
    x = x.reshape(*x.shape[:axis], runs, length, *x.shape[axis + 1 :])
    x = jnp.pad(x, [(0, more if i == axis + 1 else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], runs * (length + more), *x.shape[axis + 2 :])


def unpad(x: jax.Array, T: int, runs: int) -> jax.Array:
    """Take T queries, axis 3, out of runs that are padded."""
    x = x.reshape(*x.shape[:3], runs, x.shape[3] // runs, *x.shape[4:])[:, :, :, :, : T // runs]
    return x.reshape(*x.shape[:3], T, *x.shape[5:])
