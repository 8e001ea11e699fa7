"""The strongest links of every row, found block by block: O(T·k) memory."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn.kernels import blocks, blockwise, chosen, pairs
from jax_attn.kernels.blocks import Data, Plan, Point, cut, cut_bias, find
from jax_attn.kernels.call import Call
from jax_attn.kernels.hoist import vary_together
from jax_attn.kernels.walk import join, over_units, rows
from jax_attn.mask_types import at_index

# Keys gathered at a time to weigh what was found: a block's worth for each head.
GATHERED = 512


def top(k: int, call: Call) -> tuple[jax.Array, jax.Array]:
    """Return the k largest weights of each row in falling order and their keys, [B,T,N,k] each."""
    call = chosen.whole(call)
    lse_BTN = chosen.lse(call)
    call = blockwise.finite(call)
    logits_BNTk, keys_BNTk = _strongest(call, k)
    lse_BNT = lse_BTN.transpose(0, 2, 1)
    p_BNTk, keys_BNTk = _weigh(call, logits_BNTk, keys_BNTk, lse_BNT)
    return p_BNTk.transpose(0, 2, 1, 3), keys_BNTk.transpose(0, 2, 1, 3)


def _strongest(call: Call, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k largest logits of each row and their keys, [B,N,T,k], of equal ones the first;
    -inf and -1 where there are fewer. They have no derivative. q and k are finite."""
    z = call.sizes
    call = replace(call, v_BSKE=call.v_BSKE[..., :0])
    plan, data, shared = blockwise.prepare(call)
    q_BKGTH = call.q_BTNH.reshape(z["BTKGH"]).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSE = (x.transpose(0, 2, 1, 3) for x in (call.k_BSKH, call.v_BSKE))
    bias_BNTS = call.bias_BNTS
    if bias_BNTS is not None:
        bias_BNTS = blockwise.pad(blockwise.pad(bias_BNTS, 2, plan.queries), 3, plan.keys)
    point = Point(
        blockwise.pad(q_BKGTH, 3, plan.queries),
        blockwise.pad(k_BKSH, 2, plan.keys),
        blockwise.pad(v_BKSE, 2, plan.keys),
        bias_BNTS,
        None,
        shared,
    )
    # After hoisting: mask and score may close over what is differentiated.
    point, data = jax.lax.stop_gradient(vary_together((point, data)))
    made = _fold(plan, point, data, k)
    logits_BNTk, keys_BNTk = (x[:, :, :, : z.T].reshape(*z["BNT"], k) for x in made)
    return logits_BNTk, jnp.where(logits_BNTk == -jnp.inf, -1, keys_BNTk)


def _fold(plan: Plan, point: Point, data: Data, k: int) -> tuple[jax.Array, jax.Array]:
    def unit(carry, at, point):
        b, kv = at
        B, K, G, T = point.q_BKGTH.shape[:4]
        count = point.k_BKSH.shape[2] // plan.keys

        def row(i):
            q_BKGTH = cut(point.q_BKGTH, i * plan.queries, plan.queries, 3)
            visits = data.by_query
            # In the order of keys, so that the first of equals is met first.
            there = jnp.arange(count) < visits.some[i]
            order = jnp.sort(jnp.where(there, visits.order[i], count))

            def step(at, best):
                j = order[at]
                at = find(data, b, kv * G, i, j)
                k_BKSH = cut(point.k_BKSH, j * plan.keys, plan.keys, 2)
                s_BKGTS = jnp.einsum(
                    "BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=plan.wide
                )
                s_BNTS = s_BKGTS.reshape(B, K * G, *s_BKGTS.shape[3:])
                bias_BNTS = cut_bias(plan, point.bias_BNTS, at[:4], (B, K * G))
                s_BNTS = blocks.final(plan, data, at, True, s_BNTS, bias_BNTS, point.shared)
                key = (at.s + jnp.arange(plan.keys)).astype(jnp.int32)
                key = jnp.broadcast_to(key, s_BKGTS.shape)
                logits, keys = (
                    jnp.concatenate([old, new], axis=-1)
                    for old, new in zip(best, (s_BNTS.reshape(s_BKGTS.shape), key), strict=True)
                )
                logits, index = jax.lax.top_k(logits, k)
                return logits, jnp.take_along_axis(keys, index, axis=-1)

            none = jnp.zeros_like(q_BKGTH[..., :1], plan.wide)
            none = jnp.broadcast_to(none - jnp.inf, (*none.shape[:-1], k))
            best = none, jnp.zeros_like(none, jnp.int32)
            return jax.lax.fori_loop(0, visits.some[i], step, best)

        return carry, rows(row, T // plan.queries)

    return over_units(plan, point, unit, None)[1]


def _weigh(call: Call, logits_BNTk, keys_BNTk, lse_BNT) -> tuple[jax.Array, jax.Array]:
    """Return weights and keys of links, sorted by falling weight, with gradients to q and k.

    Those go through logits computed again from the keys alone, some rows at a time, so that no
    more than a row's links is held of it.
    """
    z, k = call.sizes, keys_BNTk.shape[-1]
    if isinstance(call.scale, int | float | np.number):
        # Queries are scaled first, as in the folds: what is rounded alike cancels, in s - lse.
        call = replace(call, q_BTNH=call.q_BTNH.astype(call.wide) * call.scale, scale=1.0)
    size = min(blocks.size_of(z.T, max(GATHERED // k, 1)), z.T)

    @jax.checkpoint
    def some(first: Any) -> tuple[jax.Array, jax.Array]:
        t_T = jnp.minimum(first + jnp.arange(size), z.T - 1)
        q_BNTH = jnp.take(call.q_BTNH, t_T, axis=1).transpose(0, 2, 1, 3)
        keys_BNTS, found_BNTS, lse_BNT1 = (
            jnp.take(x, t_T, axis=2) for x in (keys_BNTk, logits_BNTk, lse_BNT[..., None])
        )
        bad_BNT1 = jnp.isnan(lse_BNT1)
        there_BNTS = (keys_BNTS >= 0) & ~bad_BNT1
        index = (
            jnp.arange(z.B)[:, None, None, None],
            jnp.arange(z.N)[None, :, None, None],
            t_T[None, None, :, None],
            jnp.maximum(keys_BNTS, 0),
        )
        k_BNTSH = call.k_BSKH[index[0], index[3], index[1] // z.G]
        s_BNTS = jnp.einsum("BNTH,BNTSH->BNTS", q_BNTH, k_BNTSH, preferred_element_type=call.wide)
        bias_BNTS = None if call.bias_BNTS is None else at_index(call.bias_BNTS, *index)
        s_BNTS = pairs.final_logits(call, s_BNTS, there_BNTS, bias_BNTS, index)
        # The value found, as rounded as lse is: its error cancels that of lse.
        s_BNTS += jax.lax.stop_gradient(jnp.where(there_BNTS, found_BNTS - s_BNTS, 0.0))
        lse_BNT1 = jnp.where(bad_BNT1 | (lse_BNT1 == -jnp.inf), 0.0, lse_BNT1)
        p_BNTS = jnp.where(bad_BNT1, jnp.nan, jnp.exp(s_BNTS - lse_BNT1))
        last_BNTS = jnp.where(there_BNTS, keys_BNTS, z.S)
        minus_BNTS, keys_BNTS = jax.lax.sort((-p_BNTS, last_BNTS), num_keys=2)
        return -minus_BNTS, jnp.where(keys_BNTS == z.S, -1, keys_BNTS)

    if size >= z.T:
        return some(0)
    made = jax.lax.map(some, jnp.arange(0, z.T, size))
    return jax.tree.map(lambda x: join(x, 2)[:, :, : z.T], made)
