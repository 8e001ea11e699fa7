"""The transpose of attention: what queries hold, handed to the keys that they attend to."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_attn.kernels import blockwise, chosen
from jax_attn.kernels.blocks import allowed, cut, find
from jax_attn.kernels.call import Call
from jax_attn.kernels.hoist import vary, vary_together, varying_axes
from jax_attn.kernels.walk import over_units, rows


def received(call: Call, w_BTNE: jax.Array) -> jax.Array:
    """Return Σ over queries t, and the query heads of a key head, of p_ts · w_t: [B,S,K,E].

    It is the derivative with respect to values, at O(T + S) memory. A query whose weight is 0 is
    left out, whatever it holds; what is not finite reaches the keys that its query may attend to.
    """
    z, wide = call.sizes, call.wide
    shape = (z.B, z.S, z.K, w_BTNE.shape[-1])
    w_BTNE = w_BTNE.astype(wide)
    if 0 in (*shape, z.T, z.N):
        return jnp.zeros(shape, wide)
    call = replace(chosen.whole(call), v_BSKE=jnp.zeros(shape, wide))
    # Without values: whether constants are finite XLA would find out while it compiles.
    bad_BTN = jnp.isnan(blockwise.poison(replace(call, v_BSKE=call.v_BSKE[..., :0])))
    bad_BTNE = (bad_BTN[..., None] | ~jnp.isfinite(w_BTNE)) & (w_BTNE != 0.0)
    finite = blockwise.finite(call)
    # Of values that were the same on all devices the derivative would be a sum over devices.
    v_BSKE, bad_BTNE, w_BTNE = vary_with(call, call.v_BSKE, bad_BTNE, w_BTNE)

    def attend(v_BSKE: jax.Array) -> jax.Array:
        return blockwise.attend_with_lse(replace(finite, v_BSKE=v_BSKE))[0]

    made_BSKE = jax.vjp(attend, v_BSKE)[1](jnp.where(bad_BTNE, 0.0, w_BTNE))[0]
    return made_BSKE + jax.lax.cond(
        jnp.any(bad_BTNE),
        lambda: jnp.where(_reached(call, bad_BTNE), jnp.nan, jnp.zeros_like(made_BSKE)),
        lambda: jnp.zeros_like(made_BSKE),
    )


def vary_with(call: Call, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Let arrays vary over the mesh axes over which anything in the call or among them does."""
    axes = varying_axes([x for x in jax.tree.leaves((call, arrays)) if not callable(x)])
    return tuple(vary(x, axes) for x in arrays)


def _reached(call: Call, bad_BTNE: jax.Array) -> jax.Array:
    """Say which keys a bad query may attend to: bool [B,S,K,E]."""
    z, E = call.sizes, bad_BTNE.shape[-1]
    plan, data, _ = blockwise.prepare(replace(call, score=None))
    bad_BKGTE = bad_BTNE.reshape(*z["BTKG"], E).transpose(0, 2, 3, 1, 4).astype(plan.wide)
    bad_BKGTE, data = vary_together((blockwise.pad(bad_BKGTE, 3, plan.queries), data))

    def unit(carry, at, bad_BKGTE):
        b, k = at
        B, K, G = bad_BKGTE.shape[:3]

        def column(j):
            def step(at, hit_BK1SE):
                i = data.by_key.order[j, at]
                at = find(data, b, k * G, i, j)
                shape = (B, K * G, plan.queries, plan.keys)
                allowed_BNTS = jnp.broadcast_to(allowed(plan, data, at, shape), shape)
                allowed_BKGTS = allowed_BNTS.reshape(B, K, G, *shape[2:]).astype(plan.wide)
                bad_rows_BKGTE = cut(bad_BKGTE, i * plan.queries, plan.queries, 3)
                count_BKSE = jnp.einsum("BKGTS,BKGTE->BKSE", allowed_BKGTS, bad_rows_BKGTE)
                return hit_BK1SE | (count_BKSE > 0.0)[:, :, None]

            none = jnp.zeros_like(bad_BKGTE[:, :, :1, :1], bool)
            none = jnp.broadcast_to(none, (B, K, 1, plan.keys, E))
            return jax.lax.fori_loop(0, data.by_key.some[j], step, none)

        return carry, rows(column, len(data.by_key.some))

    hit_BK1SE = over_units(plan, bad_BKGTE, unit, None)[1]
    return hit_BK1SE[:, :, 0, : z.S].transpose(0, 2, 1, 3)
