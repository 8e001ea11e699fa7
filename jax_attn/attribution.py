"""From weights towards what a token adds: rollout over layers, norms of what heads write."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_attn.kernels import program
from jax_attn.kernels.call import Call, Score
from jax_attn.kernels.received import received, vary_with
from jax_attn.mask_types import Mask
from jax_attn.readers import call_of, indices, weights_of_rows
from jax_attn.shapes import dims, floating

__all__ = ["head_norms", "rollout", "value_weighted_rows"]


def rollout(
    q_LBTNH: jax.Array,
    k_LBSKH: jax.Array,
    *,
    rows: int | Sequence[int] | jax.Array,
    residual: Any = 0.5,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_LN: jax.Array | None = None,
) -> jax.Array:
    """Roll attention out from chosen tokens of the top layer to the input: O(R·N·T) memory.

        A'_l = residual·I + (1 - residual)·mean_n A_ln,   out = rows of A'_L … A'_2 A'_1

    (Abnar & Zuidema, arXiv:2005.00928.) Rows are taken through one layer at a time as what its
    keys receive, so no T x T array is made. It treats heads alike and values as equal; `head_norms`
    says how far they are from it.

    Args:
      q_LBTNH, k_LBSKH: queries and keys of every layer, the first layer first; T = S.
      rows: indices of R tokens, as in `attention_rows`.
      residual: share of the residual stream, a number from 0 to 1 or a traced scalar.
      mask, bias_BNTS, score, scale, softcap: as in `dot_product_attention`, those of each layer.
      sinks_LN: sinks of each layer; their share is lost, so that rows sum to less than 1.
    Returns: [B,R,S], float32 or wider: the share of each input token.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_LBTNH = jnp.zeros((2, 1, 3, 1, 2))
      >>> rollout(x_LBTNH, x_LBTNH, rows=[1], mask=causal())[0].tolist()
      [[0.4375, 0.5625, 0.0]]
    """
    z = dims(q_LBTNH=q_LBTNH, k_LBSKH=k_LBSKH, sinks_LN=sinks_LN)
    floating(q_LBTNH=q_LBTNH, k_LBSKH=k_LBSKH, sinks_LN=sinks_LN)
    if z.T != z.S:
        raise ValueError(f"k_LBSKH has S={z.S} but q_LBTNH has T={z.T}; rollout needs T = S")
    traced = isinstance(residual, Tracer)
    number = isinstance(residual, int | float | np.number | jax.Array)
    number = number and not isinstance(residual, bool) and np.ndim(residual) == 0
    if not number or not (traced or 0.0 <= residual <= 1.0):
        raise ValueError(f"residual must be a number from 0 to 1, got {residual!r}")
    q_BTNH, k_BSKH, sinks_N = (
        None if x is None else jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        for x in (q_LBTNH, k_LBSKH, sinks_LN)
    )
    call = call_of(q_BTNH, k_BSKH, mask, bias_BNTS, score, scale, softcap, sinks_N, 0)
    call = replace(call, q_BTNH=q_LBTNH, k_BSKH=k_LBSKH, sinks_N=sinks_LN)
    t_T = indices("rows", rows, "T", z.T)
    return program.run(_rollout, (), call, t_T, jnp.asarray(residual, call.wide))


def _rollout(layers: Call, t_T: jax.Array, residual: jax.Array) -> jax.Array:
    B, T, N = layers.q_BTNH.shape[1:4]

    def layer(r_BTE, arrays):
        q_BTNH, k_BSKH, sinks_N = arrays
        call = replace(layers, q_BTNH=q_BTNH, k_BSKH=k_BSKH, sinks_N=sinks_N)
        w_BTNE = jnp.broadcast_to(r_BTE[:, :, None], (B, T, N, len(t_T))) / N
        mixed_BTE = jnp.sum(received(call, w_BTNE), axis=2)
        return residual * r_BTE + (1.0 - residual) * mixed_BTE, None

    rows_TE = jax.nn.one_hot(t_T, T, dtype=layers.wide, axis=0)
    (r_BTE,) = vary_with(layers, jnp.broadcast_to(rows_TE[None], (B, *rows_TE.shape)))
    arrays = (layers.q_BTNH, layers.k_BSKH, layers.sinks_N)
    r_BTE = jax.lax.scan(layer, r_BTE, arrays, reverse=True)[0]
    there_T = (t_T >= 0) & (t_T < T)
    return jnp.where(there_T[None, :, None], r_BTE.transpose(0, 2, 1), jnp.nan)


def head_norms(x_BTKE: jax.Array, wo_NED: jax.Array) -> jax.Array:
    """Measure what each head writes into the residual stream: the norm after its part of Wo.

        norm_tn = ‖x_t Wo_n‖₂

    Attention weights alone mislead: a head may look hard at a token whose value is small
    (Kobayashi et al., arXiv:2004.10102). [B,T,N,D] is never held: heads are done one by one.

    Args:
      x_BTKE: outputs o_BTNE of attention, or its values v_BSKE, where head n reads n // (N / K).
      wo_NED: output projection, as in `init_attention`.
    Returns: [B,T,N] (of values [B,S,N]), float32 or wider; gradients of a norm of 0 are 0.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> v_BSKE, wo_NED = jnp.ones((1, 3, 1, 2)), jnp.ones((2, 2, 4))
      >>> head_norms(v_BSKE, wo_NED)[0].tolist()
      [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    z = dims(x_BTKE=x_BTKE, wo_NED=wo_NED)
    floating(x_BTKE=x_BTKE, wo_NED=wo_NED)
    if z.K == 0 or z.N % z.K:
        raise ValueError(f"wo_NED has N={z.N}, no multiple of K={z.K} of x_BTKE")
    return program.run(_head_norms, (), x_BTKE, wo_NED)


def _head_norms(x_BTKE: jax.Array, wo_NED: jax.Array) -> jax.Array:
    N, K = wo_NED.shape[0], x_BTKE.shape[2]
    wide = jnp.promote_types(jnp.promote_types(x_BTKE.dtype, wo_NED.dtype), jnp.float32)

    @jax.checkpoint
    def norm(head):
        n, wo_ED = head
        x_BTE = jax.lax.dynamic_index_in_dim(x_BTKE, n * K // N, axis=2, keepdims=False)
        y_BTD = jnp.einsum("BTE,ED->BTD", x_BTE, wo_ED, preferred_element_type=wide)
        total_BT = jnp.sum(jnp.square(y_BTD), axis=-1)
        # The derivative of a root at 0 is infinite, and NaN by the time it meets y = 0.
        none_BT = total_BT == 0.0
        return jnp.where(none_BT, 0.0, jnp.sqrt(jnp.where(none_BT, 1.0, total_BT)))

    return jnp.moveaxis(jax.lax.map(norm, (jnp.arange(N), wo_NED)), 0, 2)


def value_weighted_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    wo_NED: jax.Array,
    *,
    rows: int | Sequence[int] | jax.Array,
    heads: int | Sequence[int] | jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
) -> jax.Array:
    """Weigh the attention of chosen queries by what each key's value writes.

        out_nrs = p_nrs · ‖v_s Wo_n‖₂

    (Kobayashi et al., arXiv:2004.10102.) The product of `attention_rows` and `head_norms`, but
    values that are masked out may hold anything.

    Args:
      v_BSKE, wo_NED: values and output projection.
      q_BTNH and the others: as in `attention_rows`.
    Returns: [B,N',R,S], float32 or wider.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_BTNH, wo_NED = jnp.ones((1, 3, 1, 4)), jnp.eye(4)[None]
      >>> value_weighted_rows(x_BTNH, x_BTNH, x_BTNH, wo_NED, rows=1, mask=causal())[0, 0].tolist()
      [[1.0, 1.0, 0.0]]
    """
    z = dims(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, wo_NED=wo_NED)
    floating(v_BSKE=v_BSKE, wo_NED=wo_NED)
    call = call_of(q_BTNH, k_BSKH, mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    p_BNTS, allowed_BNTS = weights_of_rows(call, rows, heads)
    bad_BSKE = ~jnp.isfinite(v_BSKE)
    norm_BSN = head_norms(jnp.where(bad_BSKE, 0.0, v_BSKE), wo_NED)
    bad_BSN = jnp.repeat(bad_BSKE.any(axis=-1), z.N // z.K, axis=2)
    # Added, not left in: the gradient passes to clean values, as in attention.
    norm_BNS = (norm_BSN + jnp.where(bad_BSN, jnp.nan, 0.0)).transpose(0, 2, 1)
    if heads is not None:
        norm_BNS = jnp.take(norm_BNS, indices("heads", heads, "N", z.N), axis=1, mode="clip")
    return jnp.where(allowed_BNTS, p_BNTS * norm_BNS[:, :, None], 0.0)
