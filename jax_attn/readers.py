"""Second-pass readers: exact weights of chosen rows, tiles and links, and what keys receive.

What one pass cannot add up beside the values is read from (q, k) again, at the memory of what is
chosen and never at T·S.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_attn.kernels import chosen, links, program
from jax_attn.kernels.call import Call, Score, checked
from jax_attn.kernels.received import received
from jax_attn.mask_types import Mask
from jax_attn.shapes import dims, fits, floating, integer

__all__ = ["attention_block", "attention_rows", "received_mass", "top_links"]


def attention_rows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
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
    """Write out the attention weights of chosen queries: O(B·N'·R·S) memory.

        p_rs = e^(s_rs - lse_r),  s the final logits of `dot_product_attention`

    Args:
      rows: indices of R queries, not positions; int, sequence or int array [R], which may be
        traced: a traced index that does not exist gives NaN.
      heads: indices of N' query heads, likewise; None for all. No other head is read.
      q_BTNH and the others: as in `dot_product_attention`; weights are those before dropout.
    Returns: [B,N',R,S], float32 or wider. Rows sum to 1 less the sink's share, or to 0 where no
      key is allowed; masked pairs are 0 in rows that meet NaN, too.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 4, 2, 3))
      >>> attention_rows(x_BTNH, x_BTNH, rows=1, mask=causal())[0, 0].tolist()
      [[0.5, 0.5, 0.0, 0.0]]
    """
    options = (mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    call = call_of(q_BTNH, k_BSKH, *options)
    return weights_of_rows(call, rows, heads)[0]


def attention_block(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    queries: tuple[int, int],
    keys: tuple[int, int],
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
) -> jax.Array:
    """Write out a tile of the attention weights: one pass over the keys of its rows alone.

        p_ts for t0 <= t < t1 and s0 <= s < s1, normalised over all keys

    Args:
      queries, keys: (first, end) of query and key indices, ints. Tiles of one size share one
        program.
      q_BTNH and the others: as in `dot_product_attention`; weights are those before dropout.
    Returns: [B,N,t1-t0,s1-s0], float32 or wider.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 4, 2, 3))
      >>> attention_block(x_BTNH, x_BTNH, queries=(1, 4), keys=(2, 4), mask=causal()).shape
      (1, 2, 3, 2)
    """
    options = (mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    call = call_of(q_BTNH, k_BSKH, *options)
    t0, t1 = _range("queries", queries, "T", call.sizes.T)
    s0, s1 = _range("keys", keys, "S", call.sizes.S)
    return program.run(chosen.tile, (t1 - t0, s1 - s0), call, jnp.int32(t0), jnp.int32(s0))


def top_links(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    k: int = 8,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
) -> tuple[jax.Array, jax.Array]:
    """Find the k largest weights of every row and the keys they belong to: O(T·k) memory.

        keys_i = the k largest s of p_is;  weights_i = p_i,keys_i

    Args:
      k: links a row, an int from 1 to S.
      q_BTNH and the others: as in `dot_product_attention`; weights are those before dropout.
    Returns: (weights [B,T,N,k], float32 or wider; keys [B,T,N,k], int32), in falling order of the
      weight, of equal weights the first key first. A row with fewer keys ends in weight 0, key -1;
      one that meets NaN has weights NaN and keys -1. Gradients flow through the weights.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 3, 1, 2))
      >>> weights, keys = top_links(x_BTNH, x_BTNH, k=2, mask=causal())
      >>> weights[0, :2, 0].tolist(), keys[0, :, 0].tolist()
      ([[1.0, 0.0], [0.5, 0.5]], [[0, -1], [0, 1], [0, 1]])
    """
    options = (mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    call = call_of(q_BTNH, k_BSKH, *options)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= call.sizes.S:
        raise ValueError(f"top_links: k must be an int from 1 to S={call.sizes.S} keys, got {k!r}")
    return program.run(_top_links, (int(k),), call)


def _top_links(k: int, call: Call) -> tuple[jax.Array, jax.Array]:
    B, T, N = call.sizes["BTN"]
    if 0 in (B, T, N):
        return jnp.zeros((B, T, N, k), call.wide), jnp.zeros((B, T, N, k), jnp.int32)
    return links.top(k, call)


def received_mass(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    queries_BTN: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
) -> jax.Array:
    """Add up what every key receives from the queries: O(T + S) memory.

        mass_s = Σ_t w_t p_ts

    Args:
      queries_BTN: weights w of the queries, axes of size 1 broadcast; default 1. A query of weight
        0 is left out, whatever it holds.
      q_BTNH and the others: as in `dot_product_attention`; p is that before dropout.
    Returns: [B,S,N], float32 or wider. Where w is 1 the sum over S is T, less the sinks' share and
      the rows without keys.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 2, 1, 3))
      >>> received_mass(x_BTNH, x_BTNH, mask=causal())[0, :, 0].tolist()
      [1.5, 0.5]
    """
    options = (mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    call = call_of(q_BTNH, k_BSKH, *options)
    fits(call.sizes, queries_BTN=queries_BTN)
    floating(queries_BTN=queries_BTN)
    return program.run(_received_mass, (), call, queries_BTN)


def _received_mass(call: Call, queries_BTN: jax.Array | None) -> jax.Array:
    z = call.sizes
    w_BTN = jnp.ones((1, 1, 1), call.wide) if queries_BTN is None else queries_BTN
    w_BTNE = jnp.broadcast_to(w_BTN, z["BTN"])[..., None]
    k_BSNH = jnp.repeat(call.k_BSKH, z.G, axis=2)
    v_BSNE = jnp.zeros((*z["BSN"], 1), call.wide)
    return received(replace(call, k_BSKH=k_BSNH, v_BSKE=v_BSNE), w_BTNE)[..., 0]


def call_of(
    q_BTNH: Any, k_BSKH: Any, mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset
) -> Call:
    """Return the checked call of queries and keys without values."""
    dims(q_BTNH=q_BTNH, k_BSKH=k_BSKH)
    no_values = jnp.zeros((*k_BSKH.shape[:3], 0), jnp.float32)
    options = (mask, bias_BNTS, score, scale, softcap, sinks_N, q_offset)
    call = checked(q_BTNH, k_BSKH, no_values, *options, 0.0, None, None)
    # An array, lest every step of a decoding loop be a program of its own.
    return replace(call, q_offset=jnp.asarray(q_offset))


def weights_of_rows(call: Call, rows: Any, heads: Any) -> tuple[jax.Array, jax.Array]:
    """Return the weights [B,N',R,S] of rows, and which pairs may attend."""
    z = call.sizes
    t_T = indices("rows", rows, "T", z.T)
    n_N = jnp.arange(z.N) if heads is None else indices("heads", heads, "N", z.N)
    if 0 in (z.B, len(t_T), len(n_N)):
        shape = (z.B, len(n_N), len(t_T), z.S)
        return jnp.zeros(shape, call.wide), jnp.zeros(shape, bool)
    return program.run(chosen.rows, (), call, n_N, t_T)


def indices(name: str, given: Any, letter: str, size: int) -> jax.Array:
    """Return indices of an axis as an int array of rank 1, or raise the error that names them."""
    if not isinstance(given, jax.Array):
        given = np.asarray(given, np.int32 if np.size(given) == 0 else None)
    integer(**{name: given})
    if given.ndim > 1:
        raise ValueError(f"{name} must be an int or indices of rank 1, got shape {given.shape}")
    if not isinstance(given, Tracer):
        outside = [int(i) for i in np.ravel(given) if not 0 <= i < size]
        if outside:
            raise ValueError(f"{name} must be from 0 to {letter}={size} - 1, got {outside[0]}")
    return jnp.atleast_1d(jnp.asarray(given.astype(np.int32)))


def _range(name: str, given: Any, letter: str, size: int) -> tuple[int, int]:
    match given:
        case (int() | np.integer() as first, int() | np.integer() as end):
            if 0 <= first <= end <= size:
                return int(first), int(end)
    raise ValueError(
        f"{name} must be two ints (first, end), 0 <= first <= end <= {letter}={size}, got {given!r}"
    )
