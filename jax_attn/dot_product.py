"""Scaled dot-product attention: one signature, checked by name, for every implementation."""

from typing import Any

import jax

from jax_attn import dispatch, softmax
from jax_attn.kernels import dense
from jax_attn.kernels.call import Score, checked
from jax_attn.mask_types import Mask
from jax_attn.observe import Mean


def dot_product_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKE: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    observe: tuple[str | Mean, ...] | None = None,
    implementation: str | None = None,
) -> Any:
    """Attend queries to keys and mix values.

        out = softmax(mask(score(softcap·tanh(scale·q k^T / softcap) + bias))) v

    (arXiv:1706.03762.) N = K is multi-head, K = 1 multi-query, else grouped-query attention: head
    n reads key/value head n // G, G = N / K. E may differ from H. Logits and softmax are float32,
    or float64 for float64 inputs. A row without any allowed key gives exactly 0, with gradients 0;
    what masked keys and values hold, NaN included, reaches neither output nor gradients.

    Args:
      q_BTNH, k_BSKH, v_BSKE: queries, keys, values; N a multiple of K. S may be 0.
      mask: from `jax_attn.masks`, or a bool array [B,N,T,S] with axes of size 1 broadcasting;
        True = attend. The query at index t has position q_offset + t, also when T != S.
      bias_BNTS: added to the scaled, capped logits; axes of size 1 broadcast.
      score: function (logits, b, n, t, s) -> logits, applied before the mask, of each pair by
        itself: it is called on blocks [B',N',T',S'] with index arrays that broadcast to them. t is
        the query's position q_offset + index. Gradients reach what it closes over. See `alibi`.
      scale: logit multiplier; default H**-0.5.
      softcap: bound c of the logits, c·tanh(x / c); None for none (arXiv:2408.00118).
      sinks_N: per head the logit of one more key without a value (arXiv:2309.17453).
      q_offset: position of query 0, int or traced scalar; decoding passes the cache length.
      dropout_rate: share of probabilities set to 0, the rest divided by 1 - rate; a pure function
        of (dropout_key, b, n, t, s).
      dropout_key: needed if dropout_rate > 0.
      observe: names of statistics and entries made by `mean_of` and `window_mass`; see below.
      implementation: None to let the library pick (`explain` says what and why), or one by name,
        which runs or raises; nothing falls back. "dense" writes the scores out, O(T·S) memory.
        "blockwise" takes every option at O(T + S) memory, values and derivatives of any order
        alike, temporaries of the gradient of the gradient included; each order recomputes the one
        below. "native" is a C++ kernel for CPUs (`python -m jax_attn.compile`); derivatives other
        than the first in reverse mode are taken through "blockwise". "cudnn", "splash" and
        "tokamax" are the kernels of others and have that first derivative alone.
    Returns: out [B,T,N,E], dtype of v; with `observe` (out, seen), seen a dict of [B,T,N], float32
      or wider whatever the inputs. With s the final logits of a row, after scale, soft-cap, bias,
      score and mask, and p its probabilities before dropout, those of the sink among them:
        "lse": log Σ e^s                       "max_logit": max s, of keys alone
        "entropy": -Σ p log p, nats            "effective_keys": 1 / Σ p²
        "min_entropy": lse - max_logit, nats   "max_prob": e^(max_logit - lse)
        "expected_distance": Σ p·(key - position), positions
        "first_mass": p of key 0               "self_mass": p of the key at the row's own position
        "argmax_key": the first key of the largest logit, int32
      A row without keys has lse and max_logit -inf, argmax_key -1, and otherwise 0; with a sink its
      lse is the sink's logit, and effective_keys 1. All but argmax_key have derivatives: that of
      max_logit goes to the first of the largest keys. They are columns of the same pass: O(T)
      memory, nothing for what is not asked for, and out stays what it is. The
      kernels of others round what extra columns of values could give to the values' dtype, so
      they refuse `observe`; "native" takes a second pass in blocks, except for lse and the masses.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> import jax.numpy as jnp
      >>> from jax_attn import causal
      >>> q_BTNH, k_BSKH, v_BSKE = (jnp.ones((2, 3, n, 5)) for n in (4, 2, 2))
      >>> dot_product_attention(q_BTNH, k_BSKH, v_BSKE, mask=causal()).shape
      (2, 3, 4, 5)
      >>> out, seen = dot_product_attention(
      ...     q_BTNH, k_BSKH, v_BSKE, mask=causal(), observe=("effective_keys",)
      ... )
      >>> [round(float(x), 2) for x in seen["effective_keys"][0, :, 0]]
      [1.0, 2.0, 3.0]
    """
    call = checked(
        q_BTNH,
        k_BSKH,
        v_BSKE,
        mask,
        bias_BNTS,
        score,
        scale,
        softcap,
        sinks_N,
        q_offset,
        dropout_rate,
        dropout_key,
        observe,
    )
    out_BTNE, seen = dispatch.run(call, implementation)
    return out_BTNE if observe is None else (out_BTNE, seen)


def dense_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    score: Score | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    q_offset: Any = 0,
) -> jax.Array:
    """Write the attention probabilities out, for a look at small inputs: O(T·S) memory.

        p_ij = e^(s_ij - lse_i),  s the final logits of `dot_product_attention`

    Args: as in `dot_product_attention`; the probabilities are those before dropout.
    Returns: [B,N,T,S], float32 or wider; rows sum to 1 (less the sink's share), or to 0 where no
      key is allowed.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> import jax.numpy as jnp
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 2, 1, 3))
      >>> dense_weights(x_BTNH, x_BTNH, mask=causal())[0, 0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    no_values = jax.ShapeDtypeStruct((*k_BSKH.shape[:3], 1), k_BSKH.dtype)
    call = checked(
        q_BTNH,
        k_BSKH,
        no_values,
        mask,
        bias_BNTS,
        score,
        scale,
        softcap,
        sinks_N,
        q_offset,
        0.0,
        None,
        None,
    )
    dispatch.forbid_quadratic("dense_weights", call)
    allowed_BNTS = None
    if call.mask is not None:
        b, n, t, s = dense.indices(call.sizes)
        allowed_BNTS = call.mask.allows(b, n, t, s, t + q_offset)
    s_BNTS = dense.logits(call, allowed_BNTS)
    row = softmax.summarize(s_BNTS, lambda e_BNTS: e_BNTS)
    if sinks_N is not None:
        row = softmax.merge(row, softmax.sink(sinks_N[None, :, None], row))
    return softmax.finish(row).value
