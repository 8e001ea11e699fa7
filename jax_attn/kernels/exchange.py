"""All-to-all attention: devices exchange parts of the sequence for parts of the heads."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels import blockwise
from jax_attn.kernels.blocks import Part
from jax_attn.kernels.call import Call


def attend(
    call: Call, axis: str, size: int, first: tuple[Any, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attend with the whole sequence to a part of the heads; return this device's queries' output
    and what was to be observed (arXiv:2309.14509).

    Args:
      call: this device's queries, keys and values; masks, scores and the keys of a bias are of the
        whole sequence.
      first: batch entry and head at which this device's begin.
    """
    sizes, me = call.sizes, jax.lax.axis_index(axis)
    heads = sizes.N // size

    def of_my_heads(x):
        return jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    def of_my_queries(x):
        return jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

    q_BTNH, k_BSKH, v_BSKE = map(of_my_heads, (call.q_BTNH, call.k_BSKH, call.v_BSKE))
    bias_BNTS, sinks_N = call.bias_BNTS, call.sinks_N
    if bias_BNTS is not None:
        split_N, split_T = bias_BNTS.shape[1] > 1, bias_BNTS.shape[2] > 1
        if split_N and split_T:
            bias_BNTS = jax.lax.all_to_all(bias_BNTS, axis, split_axis=1, concat_axis=2, tiled=True)
        elif split_T:
            bias_BNTS = jax.lax.all_gather(bias_BNTS, axis, axis=2, tiled=True)
        elif split_N:
            bias_BNTS = jax.lax.dynamic_slice_in_dim(bias_BNTS, me * heads, heads, axis=1)
    if sinks_N is not None:
        sinks_N = jax.lax.dynamic_slice_in_dim(sinks_N, me * heads, heads)
    call = replace(
        call, q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, bias_BNTS=bias_BNTS, sinks_N=sinks_N
    )
    b, n = first
    zero = jnp.zeros(1, jnp.int32)
    part = Part(call.sizes.T, call.sizes.S, jnp.int32(b), jnp.int32(n + me * heads), zero, zero)
    return jax.tree.map(of_my_queries, blockwise.attend(call, part))
