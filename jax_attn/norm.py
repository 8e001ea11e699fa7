"""Normalisation over the model width: RMSNorm, or LayerNorm where a bias leaf is present."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.params import Params, check_leaves, draw, ones, zeros
from jax_attn.shapes import dims, floating


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """Scale vectors on the last axis to a root mean square of `scale` (arXiv:1910.07467).

        x / sqrt(mean(x²) + epsilon) · scale

    Args:
      x: any rank.
      scale: one factor for each entry of the last axis.
      epsilon: added to the mean square.
    Returns: shape and dtype of x; computed in float32 or wider.
    Raises: ValueError naming both sizes.
    Example:
      >>> rms_norm(jnp.full((1, 4), 7.0), jnp.ones(4)).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    floating(x=x, scale=scale)
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale has shape {scale.shape} but x ends in {x.shape[-1:]}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    rows = (1,) * (x.ndim - 1)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale.reshape(*rows, -1)).astype(x.dtype)


def norm(params: Params, x_BTD: jax.Array) -> jax.Array:
    """Normalise tokens: RMSNorm with {"scale_D"}, LayerNorm with {"scale_D", "bias_D"}.

        LayerNorm: (x - mean x) / sqrt(var x + 1e-6) · scale + bias    (arXiv:1607.06450)

    Args:
      params: from `init_rms_norm` or `init_layer_norm`.
      x_BTD: tokens.
    Returns: [B,T,D], dtype of x; computed in float32 or wider.
    Raises: ValueError naming the leaf or argument, the axis letter and both sizes.
    Example:
      >>> y_BTD = norm(init_layer_norm(4), jnp.arange(4.0)[None, None])
      >>> [round(float(y), 2) for y in y_BTD[0, 0]]
      [-1.34, -0.45, 0.45, 1.34]
    """
    check_leaves("norm", params, ("scale_D",), ("bias_D",))
    dims(x_BTD=x_BTD, **params)
    floating(x_BTD=x_BTD, **params)
    with jax.named_scope("norm"):
        if "bias_D" not in params:
            return rms_norm(x_BTD, params["scale_D"])
        wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        centred_BTD = wide_BTD - jnp.mean(wide_BTD, axis=-1, keepdims=True)
        y_BTD = rms_norm(centred_BTD, params["scale_D"]) + params["bias_D"][None, None]
        return y_BTD.astype(x_BTD.dtype)


def init_rms_norm(D: int, dtype: Any = jnp.float32) -> Params:
    """Make the leaf of an RMSNorm: scale 1.

    Args:
      D: model width.
      dtype: of the leaf.
    Returns: {"scale_D"}.
    Example:
      >>> init_rms_norm(3)["scale_D"].tolist()
      [1.0, 1.0, 1.0]
    """
    return draw(jax.random.key(0), {"scale_D": ones}, {"D": D}, dtype)


def init_layer_norm(D: int, dtype: Any = jnp.float32) -> Params:
    """Make the leaves of a LayerNorm: scale 1, bias 0.

    Args:
      D: model width.
      dtype: of the leaves.
    Returns: {"scale_D", "bias_D"}.
    Example:
      >>> init_layer_norm(3)["bias_D"].tolist()
      [0.0, 0.0, 0.0]
    """
    return draw(jax.random.key(0), {"scale_D": ones, "bias_D": zeros}, {"D": D}, dtype)
