"""Scaled dot-product attention: one signature, checked by name, for every implementation."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import dropout, softmax
from jax_attn.kernels import dense
from jax_attn.mask_types import Mask
from jax_attn.masks import dense as dense_mask
from jax_attn.shapes import Sizes, dims, fits, floating, integer

IMPLEMENTATIONS = ("dense",)
Score = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


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
    implementation: str | None = None,
) -> jax.Array:
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
      score: function (logits, b, n, t, s) -> logits, [B,N,T,S], applied before the mask; t is the
        query's position q_offset + index. See `alibi`.
      scale: logit multiplier; default H**-0.5.
      softcap: bound c of the logits, c·tanh(x / c); None for none (arXiv:2408.00118).
      sinks_N: per head the logit of one more key without a value (arXiv:2309.17453).
      q_offset: position of query 0, int or traced scalar; decoding passes the cache length.
      dropout_rate: share of probabilities set to 0, the rest divided by 1 - rate; a pure function
        of (dropout_key, b, n, t, s).
      dropout_key: needed if dropout_rate > 0.
      implementation: "dense", O(T·S) memory, or None to let the library pick. A named one runs or
        raises; nothing falls back.
    Returns: [B,T,N,E], dtype of v.
    Raises: ValueError naming the argument, the axis letter and both sizes.
    Example:
      >>> from jax_attn import causal
      >>> q_BTNH, k_BSKH, v_BSKE = (jnp.ones((2, 3, n, 5)) for n in (4, 2, 2))
      >>> dot_product_attention(q_BTNH, k_BSKH, v_BSKE, mask=causal()).shape
      (2, 3, 4, 5)
    """
    sizes = check_sizes(q_BTNH, k_BSKH, v_BSKE, bias_BNTS, sinks_N)
    mask = check_mask(mask, sizes)
    _check_options(score, scale, softcap, q_offset)
    dropout.check(dropout_rate, dropout_key)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"got {implementation!r}"
        )
    return dense.attend(
        q_BTNH,
        k_BSKH,
        v_BSKE,
        sizes=sizes,
        mask=mask,
        bias_BNTS=bias_BNTS,
        score=score,
        scale=sizes.H**-0.5 if scale is None else scale,
        softcap=softcap,
        sinks_N=sinks_N,
        q_offset=q_offset,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )


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
      >>> from jax_attn import causal
      >>> x_BTNH = jnp.zeros((1, 2, 1, 3))
      >>> dense_weights(x_BTNH, x_BTNH, mask=causal())[0, 0].tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    sizes = check_sizes(q_BTNH, k_BSKH, None, bias_BNTS, sinks_N)
    mask = check_mask(mask, sizes)
    _check_options(score, scale, softcap, q_offset)
    b, n, t, s = dense.indices(sizes)
    s_BNTS = dense.final_logits(
        q_BTNH,
        k_BSKH,
        sizes=sizes,
        allowed_BNTS=None if mask is None else mask.allows(b, n, t, s, t + q_offset),
        bias_BNTS=bias_BNTS,
        score=score,
        scale=sizes.H**-0.5 if scale is None else scale,
        softcap=softcap,
        q_offset=q_offset,
    )
    row = softmax.summarize(s_BNTS, lambda e_BNTS: e_BNTS)
    if sinks_N is not None:
        row = softmax.merge(row, softmax.sink(sinks_N[None, :, None], row))
    return softmax.finish(row).value


def check_sizes(q_BTNH: Any, k_BSKH: Any, v_BSKE: Any, bias_BNTS: Any, sinks_N: Any) -> Sizes:
    """Return the sizes B, T, S, N, K, G, H, E of a call, or raise the error that names a misfit."""
    sizes = dims(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, sinks_N=sinks_N)
    floating(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, bias_BNTS=bias_BNTS, sinks_N=sinks_N)
    if sizes.K == 0 or sizes.N % sizes.K:
        raise ValueError(f"q_BTNH has N={sizes.N}, no multiple of K={sizes.K} of k_BSKH")
    sizes.G = sizes.N // sizes.K
    fits(sizes, bias_BNTS=bias_BNTS)
    return sizes


def check_mask(mask: Any, sizes: Sizes) -> Mask | None:
    """Return the mask as a Mask whose arrays fit the sizes, or raise."""
    if mask is not None and not isinstance(mask, Mask):
        if not hasattr(mask, "dtype"):
            raise ValueError(
                f"mask must be a mask from jax_attn.masks or a bool array [B,N,T,S], "
                f"got {type(mask).__name__}"
            )
        mask = dense_mask(mask)
    if mask is not None:
        mask.check(sizes)
    return mask


def _check_options(score: Any, scale: Any, softcap: Any, q_offset: Any) -> None:
    if score is not None and not callable(score):
        raise ValueError(f"score must be a function (logits, b, n, t, s), got {score!r}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        number = isinstance(value, int | float | np.number)
        if isinstance(value, bool) or (number and not math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if value is not None and not number:
            if not jnp.isrealobj(value) or not hasattr(value, "dtype"):
                raise ValueError(f"{name} must be a real scalar, got {value!r}")
            if value.ndim:
                raise ValueError(f"{name} must be a real scalar, got shape {value.shape}")
    if isinstance(softcap, int | float | np.number) and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    if not isinstance(q_offset, int) and not hasattr(q_offset, "dtype"):
        raise ValueError(f"q_offset must be an int, got {q_offset!r}")
    if jnp.ndim(q_offset) != 0:
        raise ValueError(f"q_offset must be a scalar, got shape {jnp.shape(q_offset)}")
    integer(q_offset=jnp.asarray(q_offset))
