"""Exact weights of chosen queries: whole rows, written out, and tiles of rows and keys."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn import softmax
from jax_attn.kernels import blockwise, pairs
from jax_attn.kernels.call import Call
from jax_attn.mask_types import Coverage, Mask, Window, at_index


def rows(call: Call, n_N: jax.Array, t_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weights [B,N',T',S] of chosen heads and queries, and which pairs are allowed.

    A head or query that does not exist has NaN.
    """
    z = call.sizes
    n, t = jnp.clip(n_N, 0, z.N - 1), jnp.clip(t_T, 0, z.T - 1)
    q_BTNH = jnp.take(jnp.take(call.q_BTNH, t, axis=1), n, axis=2)
    k_BSNH = jnp.take(call.k_BSKH, n // z.G, axis=2)
    s_BNTS, allowed_BNTS, bad_BNTS = _logits(call, q_BTNH, k_BSNH, n, t, jnp.arange(z.S))
    row = softmax.summarize(s_BNTS, lambda e_BNTS: e_BNTS)
    if call.sinks_N is not None:
        row = softmax.merge(row, softmax.sink(call.sinks_N[n][None, :, None], row))
    bad_BNT = jnp.any(bad_BNTS, axis=-1)
    bad_BNT |= ((n_N != n)[:, None] | (t_T != t)[None])[None]
    p_BNTS = softmax.finish(row).value
    p_BNTS = jnp.where(bad_BNT[..., None], jnp.nan, p_BNTS)
    return jnp.where(allowed_BNTS, p_BNTS, 0.0), allowed_BNTS


def tile(queries: int, keys: int, call: Call, t0: Any, s0: Any) -> jax.Array:
    """Return the weights of `queries` rows from t0 on and `keys` keys from s0 on.

    All other keys are one more key to the tile, whose logit is their log Σ e^s.
    """
    z = call.sizes
    q_BTNH = jax.lax.dynamic_slice_in_dim(call.q_BTNH, t0, queries, axis=1)
    k_BSKH = jax.lax.dynamic_slice_in_dim(call.k_BSKH, s0, keys, axis=1)
    k_BSNH = jnp.repeat(k_BSKH, z.G, axis=2)
    t_T, s_S = t0 + jnp.arange(queries), s0 + jnp.arange(keys)
    s_BNTS, allowed_BNTS, bad_BNTS = _logits(call, q_BTNH, k_BSNH, jnp.arange(z.N), t_T, s_S)
    bias_BNTS = call.bias_BNTS
    if bias_BNTS is not None and bias_BNTS.shape[2] > 1:
        bias_BNTS = jax.lax.dynamic_slice_in_dim(bias_BNTS, t0, queries, axis=2)
    others = replace(
        call,
        q_BTNH=q_BTNH,
        mask=_Beside(_mask(call), t0, s0, s0 + keys),
        bias_BNTS=bias_BNTS,
        q_offset=call.q_offset + t0,
    )
    rest_BNT = lse(others).transpose(0, 2, 1)
    bad_BNT = jnp.isnan(rest_BNT) | jnp.any(bad_BNTS, axis=-1)
    row = softmax.summarize(s_BNTS, lambda e_BNTS: e_BNTS)
    rest_BNT = jnp.where(jnp.isnan(rest_BNT), -jnp.inf, rest_BNT)
    p_BNTS = softmax.finish(softmax.merge(row, softmax.sink(rest_BNT, row))).value
    p_BNTS = jnp.where(bad_BNT[..., None], jnp.nan, p_BNTS)
    return jnp.where(allowed_BNTS, p_BNTS, 0.0)


def lse(call: Call) -> jax.Array:
    """Return log Σ e^s of every row, [B,T,N]: NaN where it attends to something not finite."""
    return blockwise.observe(replace(whole(call), statistics=("lse",)))["lse"]


def whole(call: Call) -> Call:
    """Return the call with a mask in any case: with one, only rows that attend to something not
    finite are NaN, whatever the keys of the others hold."""
    return replace(call, mask=_mask(call))


def _mask(call: Call) -> Mask:
    return Window(None, None) if call.mask is None else call.mask


def _logits(call: Call, q_BTNH, k_BSNH, n_N, t_T, s_S) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return final logits of all pairs of the given rows and keys, which are allowed, and which of
    those meet something not finite."""
    B = q_BTNH.shape[0]
    shape = (B, len(n_N), len(t_T), len(s_S))
    index = (
        jnp.arange(B)[:, None, None, None],
        n_N[None, :, None, None],
        t_T[None, None, :, None],
        s_S[None, None, None, :],
    )
    b, n, t, s = index
    allowed_BNTS = _mask(call).allows(b, n, t, s, t + call.q_offset)
    allowed_BNTS = jnp.broadcast_to(allowed_BNTS, shape)
    bad_q_BNT = ~jnp.isfinite(q_BTNH).all(axis=-1).transpose(0, 2, 1)
    bad_k_BNS = ~jnp.isfinite(k_BSNH).all(axis=-1).transpose(0, 2, 1)
    bad_BNTS = allowed_BNTS & (bad_q_BNT[..., None] | bad_k_BNS[:, :, None])
    q_BTNH, k_BSNH = (jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in (q_BTNH, k_BSNH))
    s_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=call.wide)
    bias_BNTS = None if call.bias_BNTS is None else at_index(call.bias_BNTS, *index)
    return pairs.final_logits(call, s_BNTS, allowed_BNTS, bias_BNTS, index), allowed_BNTS, bad_BNTS


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class _Beside(Mask):
    """A mask, asked about the queries from `first` on, without the keys s0 <= s < s1."""

    mask: Mask
    first: Any
    s0: Any
    s1: Any

    def allows(self, b, n, t, s, p):
        return self.mask.allows(b, n, self.first + t, s, p) & ((s < self.s0) | (s >= self.s1))

    def coverage(self, t0, nt, s0, ns, q_offset=0):
        inner = self.mask.coverage(self.first + t0, nt, s0, ns, q_offset - self.first)
        some = inner.some & ((s0 < self.s0) | (s0 + ns > self.s1))
        return Coverage(some, inner.every & ((s0 + ns <= self.s0) | (s0 >= self.s1)))
