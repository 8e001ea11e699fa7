"""Attention with the scores written out: O(T·S) memory, the plainest form of the formula."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jax_attn import dropout, softmax
from jax_attn.kernels import observations
from jax_attn.kernels.call import Call
from jax_attn.kernels.pairs import final_logits, indices


def logits(call: Call, allowed_BNTS: jax.Array | None) -> jax.Array:
    """Compute the logits that the softmax sees: [B,N,T,S], float32 or wider; -inf where masked."""
    sizes = call.sizes
    q_BTKGH, k_BSKH = call.q_BTNH.reshape(sizes["BTKGH"]), call.k_BSKH
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=call.wide)
    s_BNTS = s_BKGTS.reshape(sizes["BNTS"])
    return final_logits(call, s_BNTS, allowed_BNTS, call.bias_BNTS, indices(sizes))


def refuses(call: Call) -> str | None:
    """Say why the call cannot run here; it always can."""
    return None


def attend(call: Call) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run attention as one part of the softmax algebra; return the output and what was to be
    observed."""
    sizes, mask, q_offset, wide = call.sizes, call.mask, call.q_offset, call.wide
    given, observed = call, bool(call.statistics or call.means)
    if observed and 0 in sizes["BTSN"]:
        out_BTNE = jnp.zeros(sizes["BTNE"], call.v_BSKE.dtype)
        return out_BTNE, observations.of_nothing(call)
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

    call = replace(call, q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE)
    with jax.named_scope("scores"):
        s_BNTS = logits(call, allowed_BNTS)

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
    out_BTNE = o_BNTE.transpose(0, 2, 1, 3).astype(v_BSKE.dtype)
    if not observed:
        return out_BTNE, {}
    with jax.named_scope("observe"):
        poison_BTN = None
        if allowed_BNTS is not None:
            no_values = replace(given, v_BSKE=v_BSKE[..., :0])
            poison_BTN = jax.lax.cond(
                all_finite(given.q_BTNH, given.k_BSKH),
                lambda: jnp.zeros_like(q_BTNH[..., 0], wide),
                lambda: _poison(no_values, allowed_BNTS).transpose(0, 2, 1),
            )
        # Lest the output be compiled otherwise, by a rounding, because something looks at it.
        s_BNTS, sinks_N = jax.lax.optimization_barrier((s_BNTS, call.sinks_N))
        call = replace(call, sinks_N=sinks_N)
        lse_BNT, rows = _columns(call, s_BNTS)
        return out_BTNE, observations.finish(call, lse_BNT, rows, poison_BTN)


def _columns(call: Call, s_BNTS: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return lse and, for `observations.finish`, what it needs of each row, [B,N,T]."""
    b, n, t, s = indices(call.sizes)

    def contract(e_BNTS: jax.Array) -> dict[str, jax.Array]:
        distance = (s - t - call.q_offset).astype(call.wide)
        made = {"distance": jnp.sum(e_BNTS * distance, axis=-1)}
        for i, mean in enumerate(call.means):
            f_BNTS = jnp.broadcast_to(mean(b, n, t + call.q_offset, s), e_BNTS.shape)
            f_BNTS = jnp.where(s_BNTS > -jnp.inf, f_BNTS.astype(call.wide), 0.0)
            made[f"mean.{i}"] = jnp.sum(e_BNTS * f_BNTS, axis=-1)
        return made

    row = softmax.summarize(s_BNTS, contract)
    if call.sinks_N is not None:
        row = softmax.merge(row, softmax.sink(call.sinks_N[None, :, None], row))
    done = softmax.finish(row)
    first_BNT = jnp.argmax(s_BNTS, axis=-1)
    max_BNT = jnp.take_along_axis(s_BNTS, first_BNT[..., None], axis=-1)[..., 0]
    argmax_BNT = jnp.where(max_BNT == -jnp.inf, -1, first_BNT).astype(call.wide)
    rows = {"max": max_BNT, "argmax": argmax_BNT, "entropy": done.entropy, "square": done.square}
    return done.lse, rows | done.value


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
