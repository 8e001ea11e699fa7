"""Final logits and probabilities of chosen pairs of a query and a key."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels.call import Call
from jax_attn.mask_types import at_index
from jax_attn.shapes import Sizes


def final_logits(
    call: Call, s_BNTS: jax.Array, allowed_BNTS: Any, bias_BNTS: Any, index: Any
) -> jax.Array:
    """Turn products q·k of any pairs into final logits: scale, soft-cap, bias, score, mask, in
    this order.

    Args:
      s_BNTS: products of the pairs at `index`, index arrays b, n, t, s that broadcast to them.
      allowed_BNTS: whether a pair may attend; None if all may.
      bias_BNTS: that of the pairs, or None.
    """
    b, n, t, s = index
    if allowed_BNTS is not None:
        # Large junk makes inf - inf of a product, and 0 · NaN is NaN on the way back.
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, 0.0)
    s_BNTS = s_BNTS * jnp.asarray(call.scale, call.wide)
    if call.softcap is not None:
        s_BNTS = call.softcap * jnp.tanh(s_BNTS / call.softcap)
    if bias_BNTS is not None:
        if allowed_BNTS is not None:
            bias_BNTS = jnp.where(allowed_BNTS, bias_BNTS, jnp.zeros_like(bias_BNTS))
        s_BNTS = s_BNTS + bias_BNTS.astype(call.wide)
    if call.score is not None:
        s_BNTS = call.score(s_BNTS, b, n, t + call.q_offset, s).astype(call.wide)
    if allowed_BNTS is not None:
        s_BNTS = jnp.where(allowed_BNTS, s_BNTS, -jnp.inf)
    return s_BNTS


def mass(call: Call, lse_BNT, at_T) -> jax.Array:
    """Return p of one key a query, the one at index at_T: e^(s - lse), and 0 where it has none."""
    z, wide = call.sizes, call.wide
    if z.S == 0 or z.T == 0:
        return jnp.zeros(z["BNT"], wide)
    there_T = (at_T >= 0) & (at_T < z.S)
    at_T = jnp.clip(at_T, 0, z.S - 1)
    # As a matmul it would be one for each query, which a CPU takes several times as long for.
    q_BTKGH = call.q_BTNH.reshape(z["BTKGH"]).astype(wide)
    k_BTKH = jnp.take(call.k_BSKH, at_T, axis=1).astype(wide)
    s_BTKG = jnp.sum(q_BTKGH * k_BTKH[:, :, :, None], axis=-1)
    index = (
        jnp.arange(z.B)[:, None, None, None],
        jnp.arange(z.N)[None, :, None, None],
        jnp.arange(z.T)[None, None, :, None],
        at_T[None, None, :, None],
    )
    allowed_BNTS = there_T[None, None, :, None]
    if call.mask is not None:
        b, n, t, s = index
        allowed_BNTS = allowed_BNTS & call.mask.allows(b, n, t, s, t + call.q_offset)
    bias_BNTS = None if call.bias_BNTS is None else at_index(call.bias_BNTS, *index)
    s_BNTS = s_BTKG.reshape(z["BTN"]).transpose(0, 2, 1)[..., None]
    s_BNTS = final_logits(call, s_BNTS, allowed_BNTS, bias_BNTS, index)
    some = lse_BNT != -jnp.inf
    p_BNT = jnp.exp(s_BNTS[..., 0] - jnp.where(some, lse_BNT, 0.0))
    return jnp.where(some, p_BNT, 0.0)


def indices(sizes: Sizes) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return index arrays of b, n, t, s, shaped to broadcast to [B,N,T,S]."""
    return (
        jnp.arange(sizes.B)[:, None, None, None],
        jnp.arange(sizes.N)[None, :, None, None],
        jnp.arange(sizes.T)[None, None, :, None],
        jnp.arange(sizes.S)[None, None, None, :],
    )
