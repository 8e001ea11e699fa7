"""Attention with the scores written out: O(T·S) memory, the plainest form of the formula."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn import dropout, softmax
from jax_attn.mask_types import Mask
from jax_attn.shapes import Sizes


def final_logits(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    sizes: Sizes,
    allowed_BNTS: jax.Array | None,
    bias_BNTS: jax.Array | None,
    score: Callable[..., Any] | None,
    scale: Any,
    softcap: float | None,
    q_offset: Any,
) -> jax.Array:
    """Compute the logits that the softmax sees: scale, soft-cap, bias, score, mask, in this order.

    Arguments as in `dot_product_attention`, checked there; `sizes` holds its B, T, S, N, K, G.
    Returns: [B,N,T,S], float32 or wider; -inf where a pair is masked.
    """
    wide = jnp.promote_types(jnp.promote_types(q_BTNH.dtype, k_BSKH.dtype), jnp.float32)
    q_BTKGH = q_BTNH.reshape(sizes["BTKGH"])
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    s_BNTS = s_BKGTS.reshape(sizes["BNTS"]) * jnp.asarray(scale, wide)
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    if bias_BNTS is not None:
        s_BNTS = s_BNTS + bias_BNTS.astype(wide)
    if score is not None:
        b, n, t, s = indices(sizes)
        scored = score(s_BNTS, b, n, t + q_offset, s)
        if getattr(scored, "shape", None) != s_BNTS.shape:
            raise ValueError(
                f"score must return logits of the shape it was given, {s_BNTS.shape}, "
                f"got {getattr(scored, 'shape', type(scored).__name__)}"
            )
        s_BNTS = scored.astype(wide)
    if allowed_BNTS is not None:
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, -jnp.inf)
    return s_BNTS


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    *,
    sizes: Sizes,
    mask: Mask | None,
    bias_BNTS: jax.Array | None,
    score: Callable[..., Any] | None,
    scale: Any,
    softcap: float | None,
    sinks_N: jax.Array | None,
    q_offset: Any,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Run attention as one part of the softmax algebra. Arguments as in `dot_product_attention`."""
    poison_BNT, allowed_BNTS = None, None
    if mask is not None:
        b, n, t, s = indices(sizes)
        allowed_BNTS = jnp.asarray(mask.allows(b, n, t, s, t + q_offset))
        allowed_BNTS = jnp.broadcast_to(allowed_BNTS, sizes["BNTS"])
        # 0 · NaN is NaN, forward and backward: replace what is not finite before it meets a zero
        # probability, and give the NaN back to the rows that do attend to it.
        bad_q_BTN = ~jnp.isfinite(q_BTNH).all(axis=-1)
        bad_kv_BSK = ~(jnp.isfinite(k_BSKH).all(axis=-1) & jnp.isfinite(v_BSKE).all(axis=-1))
        q_BTNH, k_BSKH, v_BSKE = (
            jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in (q_BTNH, k_BSKH, v_BSKE)
        )
        bad_kv_BSN = jnp.repeat(bad_kv_BSK, sizes.G, axis=2)
        bad_BNTS = (
            bad_q_BTN.transpose(0, 2, 1)[:, :, :, None] | bad_kv_BSN.transpose(0, 2, 1)[:, :, None]
        )
        poison_BNT = jnp.where((allowed_BNTS & bad_BNTS).any(axis=-1), jnp.nan, 0.0)

    with jax.named_scope("scores"):
        s_BNTS = final_logits(
            q_BTNH,
            k_BSKH,
            sizes=sizes,
            allowed_BNTS=allowed_BNTS,
            bias_BNTS=bias_BNTS,
            score=score,
            scale=scale,
            softcap=softcap,
            q_offset=q_offset,
        )

    def contract(e_BNTS: jax.Array) -> jax.Array:
        if dropout_key is not None and dropout_rate > 0.0:
            b, n, t, s = indices(sizes)
            kept = dropout.keep(dropout_key, dropout_rate, b, n, t + q_offset, s)
            e_BNTS = jnp.where(kept, e_BNTS / (1.0 - dropout_rate), 0.0)
        e_BKGTS = e_BNTS.reshape(sizes["BKGTS"])
        # In the probabilities' dtype: rounding them to bfloat16 would round their cotangents too,
        # and the rows of the logits' gradient would no longer sum to 0.
        o_BKGTE = jnp.einsum("BKGTS,BSKE->BKGTE", e_BKGTS, v_BSKE.astype(e_BKGTS.dtype))
        return o_BKGTE.reshape(sizes["BNTE"])

    with jax.named_scope("mix"):
        row = softmax.summarize(s_BNTS, contract)
        if sinks_N is not None:
            row = softmax.merge(row, softmax.sink(sinks_N[None, :, None], row))
        o_BNTE = softmax.finish(row).value
        if poison_BNT is not None:
            # Added, not selected: the gradient passes to the clean values, so that a poisoned
            # row which the loss does not use cannot reach them either.
            o_BNTE = o_BNTE + poison_BNT[..., None]
    return o_BNTE.transpose(0, 2, 1, 3).astype(v_BSKE.dtype)


def indices(sizes: Sizes) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return index arrays of b, n, t, s, shaped to broadcast to [B,N,T,S]."""
    return (
        jnp.arange(sizes.B)[:, None, None, None],
        jnp.arange(sizes.N)[None, :, None, None],
        jnp.arange(sizes.T)[None, None, :, None],
        jnp.arange(sizes.S)[None, None, None, :],
    )
