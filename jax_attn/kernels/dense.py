"""Attention with the scores written out: O(T·S) memory, the plainest form of the formula."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_attn import dropout, softmax
from jax_attn.kernels.call import Call
from jax_attn.shapes import Sizes


def final_logits(call: Call, allowed_BNTS: jax.Array | None) -> jax.Array:
    """Compute the logits that the softmax sees: scale, soft-cap, bias, score, mask, in this order.

    Returns: [B,N,T,S], float32 or wider; -inf where a pair is masked.
    """
    sizes, wide = call.sizes, call.wide
    q_BTKGH, k_BSKH = call.q_BTNH.reshape(sizes["BTKGH"]), call.k_BSKH
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide)
    s_BNTS = s_BKGTS.reshape(sizes["BNTS"])
    if allowed_BNTS is not None:
        # Large junk makes inf - inf of a product, and 0 · NaN is NaN on the way back.
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, 0.0)
    s_BNTS = s_BNTS * jnp.asarray(call.scale, wide)
    if call.softcap is not None:
        s_BNTS = call.softcap * jnp.tanh(s_BNTS / call.softcap)
    if call.bias_BNTS is not None:
        s_BNTS = s_BNTS + call.bias_BNTS.astype(wide)
    if call.score is not None:
        b, n, t, s = indices(sizes)
        s_BNTS = call.score(s_BNTS, b, n, t + call.q_offset, s).astype(wide)
    if allowed_BNTS is not None:
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, -jnp.inf)
    return s_BNTS


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here; it always can."""
    return None


def attend(call: Call) -> jax.Array:
    """Run attention as one part of the softmax algebra."""
    sizes, mask, q_offset, wide = call.sizes, call.mask, call.q_offset, call.wide
    q_BTNH, k_BSKH, v_BSKE = call.q_BTNH, call.k_BSKH, call.v_BSKE
    poison_BNT, allowed_BNTS = None, None
    if mask is not None:
        b, n, t, s = indices(sizes)
        allowed_BNTS = jnp.asarray(mask.allows(b, n, t, s, t + q_offset))
        # 0 · NaN is NaN, forward and backward: replace what is not finite before it meets a zero
        # probability, and give the NaN back to the rows that do attend to it.
        poison_BNT = jax.lax.cond(
            all_finite(q_BTNH, k_BSKH, v_BSKE),
            lambda: jnp.zeros_like(q_BTNH[..., 0], wide).transpose(0, 2, 1),
            lambda: _poison(call, allowed_BNTS),
        )
        q_BTNH, k_BSKH, v_BSKE = (
            jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in (q_BTNH, k_BSKH, v_BSKE)
        )

    with jax.named_scope("scores"):
        call = replace(call, q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE)
        s_BNTS = final_logits(call, allowed_BNTS)

    def contract(e_BNTS: jax.Array) -> jax.Array:
        if call.dropout_rate > 0.0:
            b, n, t, s = indices(sizes)
            kept = dropout.keep(call.dropout_key, call.dropout_rate, b, n, t + q_offset, s)
            e_BNTS = jnp.where(kept, e_BNTS / (1.0 - call.dropout_rate), 0.0)
        e_BKGTS = e_BNTS.reshape(sizes["BKGTS"])
        # In the probabilities' dtype: rounding them to bfloat16 would round their cotangents too,
        # and the rows of the logits' gradient would no longer sum to 0.
        o_BKGTE = jnp.einsum("BKGTS,BSKE->BKGTE", e_BKGTS, v_BSKE.astype(e_BKGTS.dtype))
        return o_BKGTE.reshape(sizes["BNTE"])

    with jax.named_scope("mix"):
        row = softmax.summarize(s_BNTS, contract)
        if call.sinks_N is not None:
            row = softmax.merge(row, softmax.sink(call.sinks_N[None, :, None], row))
        o_BNTE = softmax.finish(row).value
        if poison_BNT is not None:
            # Added, not selected: the gradient passes to the clean values, so that a poisoned
            # row which the loss does not use cannot reach them either.
            o_BNTE = o_BNTE + poison_BNT[..., None]
    return o_BNTE.transpose(0, 2, 1, 3).astype(v_BSKE.dtype)


def all_finite(*arrays: jax.Array) -> jax.Array:
    """Say whether no array holds NaN or inf, at the price of one sum each: 0·inf is NaN."""
    zeros = [jnp.sum(jax.lax.stop_gradient(x) * 0, dtype=jnp.float32) for x in arrays]
    return jnp.stack(zeros).sum() == 0.0


def _poison(call: Call, allowed_BNTS: jax.Array) -> jax.Array:
    """Return NaN for the rows that attend to something not finite, or are and attend at all."""
    q_BTNH, k_BSKH, v_BSKE = call.q_BTNH, call.k_BSKH, call.v_BSKE
    bad_q_BTN = ~jnp.isfinite(q_BTNH).all(axis=-1)
    bad_kv_BSK = ~(jnp.isfinite(k_BSKH).all(axis=-1) & jnp.isfinite(v_BSKE).all(axis=-1))
    bad_kv_BNS = jnp.repeat(bad_kv_BSK, call.sizes.G, axis=2).transpose(0, 2, 1)
    bad_BNTS = bad_q_BTN.transpose(0, 2, 1)[..., None] | bad_kv_BNS[:, :, None]
    return jnp.where((allowed_BNTS & bad_BNTS).any(axis=-1), jnp.nan, 0.0).astype(call.wide)


def indices(sizes: Sizes) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return index arrays of b, n, t, s, shaped to broadcast to [B,N,T,S]."""
    return (
        jnp.arange(sizes.B)[:, None, None, None],
        jnp.arange(sizes.N)[None, :, None, None],
        jnp.arange(sizes.T)[None, None, :, None],
        jnp.arange(sizes.S)[None, None, None, :],
    )
