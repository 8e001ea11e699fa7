"""Split-KV attention: every device has all queries and a part of the keys, as in decoding."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels import blockwise, columns, observations, ring
from jax_attn.kernels.blocks import Part, Value
from jax_attn.kernels.call import Call


def attend(call: Call, axis: str, first: tuple[Any, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attend to the keys that are here, and sum over devices what the parts make of each row.

    Args:
      call: all queries, this device's keys and values; masks, scores and the keys of a bias are of
        all keys.
      first: batch entry and head at which this device's begin.
    """
    sizes, size, me = call.sizes, jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    if 0 in sizes["BTSN"]:
        out_BTNE = jnp.zeros(sizes["BTNE"], call.v_BSKE.dtype)
        return out_BTNE, observations.of_nothing(call)
    zero = jnp.zeros(1, jnp.int32)
    b, n = map(jnp.int32, first)
    part = Part(sizes.T, sizes.S * size, b, n, zero, (me * sizes.S).astype(jnp.int32)[None])
    asked, call = call, observations.with_masses_as_means(call)
    o_BTNE, lse_BNT, rows = blockwise.attend_with_lse(replace(call, sinks_N=None), part)
    # NaN, given to rows that attend to something not finite, has to stay one in the sum.
    top_BNT = jax.lax.pmax(jax.lax.stop_gradient(lse_BNT), axis)
    top_BNT = jnp.where(top_BNT == -jnp.inf, 0.0, top_BNT)
    l_BNT = jax.lax.psum(jnp.exp(lse_BNT - top_BNT), axis)
    base_BNT = jnp.where(l_BNT == 0.0, 0.0, top_BNT + jnp.log(jnp.where(l_BNT == 0.0, 1.0, l_BNT)))
    share_BNT = jnp.exp(lse_BNT - base_BNT)
    o_BNTE = jax.lax.psum(share_BNT[..., None] * o_BTNE.transpose(0, 2, 1, 3), axis)
    rows = columns.gather(rows, lse_BNT, base_BNT, axis)
    value = Value(o_BNTE, jnp.where(l_BNT == 0.0, -jnp.inf, base_BNT), rows)
    if call.sinks_N is not None:
        z_BNT = call.sinks_N.astype(call.wide)[None, :, None]
        value = ring.merge(value, ring.sink(value, z_BNT))
    poison_BTN = None
    if call.mask is not None:
        without_values = replace(call, v_BSKE=call.v_BSKE[..., :0])
        poison_BTN = jax.lax.psum(blockwise.poison(without_values, part), axis)
    out_BTNE = value.o_BKGTE.transpose(0, 2, 1, 3).astype(call.v_BSKE.dtype)
    if not (call.statistics or call.means):
        return out_BTNE, {}
    seen = observations.finish(call, value.lse_BKGT, value.seen_BKGT, poison_BTN)
    return out_BTNE, observations.in_order(asked, seen)
