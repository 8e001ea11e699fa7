"""Training controls on top of what is observed: a few lines each, none of them hidden in a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_attn.attention import OPTIONAL, REQUIRED
from jax_attn.params import Params, check_leaves
from jax_attn.shapes import floating

__all__ = ["entropy_floor", "qk_clip", "z_loss"]


def qk_clip(params: Params, max_logit_N: jax.Array, *, tau: float) -> Params:
    """Rescale Wq and Wk of heads whose largest logit exceeds a bound, after an optimizer step.

        γ_n = min(1, τ / max_logit_n),  Wq_n ← γ_n / √γ_k · Wq_n,  Wk_k ← √γ_k · Wk_k

    (QK-Clip, arXiv:2507.20534.) γ_k is the largest γ among the query heads that read key head k;
    with N = K both are scaled by √γ. The same input would then give logits at most τ, as long as
    they are q·k times a scale: without QK-norm, soft-cap, and biases or scores on logits.

    Args:
      params: of attention, from `init_attention`; or of a stack's layers, leaves with a leading L.
      max_logit_N: the largest logit of each head over a batch, [N] or [L,N]: that of
        `head_summary(seen)["max_logit"]["max"]`. Heads without keys (-inf) are left alone; where it
        is NaN or inf no rescaling helps, and the weights become NaN.
      tau: bound of the logits, > 0; may be traced.
    Returns: params with wq_DNH, wk_DKH and their biases bq_NH, bk_KH rescaled; heads within the
      bound, and keys that one of them reads, stay bit-equal.
    Raises: ValueError naming a leaf that is missing or unknown, if params has QK-norm, max_logit_N
      does not fit wq_DNH, or tau is not > 0.
    Example:
      >>> from jax_attn import init_attention
      >>> params = init_attention(jax.random.key(0), D=6, N=2)
      >>> clipped = qk_clip(params, jnp.array([50.0, 400.0]), tau=100.0)
      >>> ratio = clipped["wq_DNH"] / params["wq_DNH"]
      >>> [round(float(x), 3) for x in ratio[0, :, 0]]
      [1.0, 0.5]
    """
    _check_bound("qk_clip", "tau", tau, zero=False)
    check_leaves("qk_clip", params, REQUIRED, OPTIONAL)
    for name in ("q_scale_H", "k_scale_H"):
        if name in params:
            raise ValueError(
                f"qk_clip: {name} undoes what the clip does; QK-norm bounds logits itself"
            )
    wq, wk = params["wq_DNH"], params["wk_DKH"]
    (*L, _, N, _), K = wq.shape, wk.shape[-2]
    got = getattr(max_logit_N, "shape", type(max_logit_N).__name__)
    if got != (*L, N):
        wanted = f"[L,N] = {(*L, N)}" if L else f"[N], N={N}"
        raise ValueError(
            f"qk_clip: max_logit_N has shape {got} but wq_DNH asks for {wanted}; reduce what is "
            f"observed by head_summary"
        )
    floating(max_logit_N=max_logit_N)
    above = max_logit_N > tau
    gamma_N = jnp.where(above, tau / jnp.where(above, max_logit_N, 1.0), 1.0)
    lost = jnp.isnan(max_logit_N) | jnp.isposinf(max_logit_N)
    gamma_N = jnp.where(lost, jnp.nan, gamma_N)
    root_K = jnp.sqrt(jnp.max(gamma_N.reshape(*L, K, N // K), axis=-1))
    rest_N = gamma_N / jnp.repeat(root_K, N // K, axis=-1)
    made = dict(params)
    for weight, bias, factor in (("wq_DNH", "bq_NH", rest_N), ("wk_DKH", "bk_KH", root_K)):
        scaled = params[weight] * factor[..., None, :, None]
        made[weight] = scaled.astype(params[weight].dtype)
        if bias in params:
            made[bias] = (params[bias] * factor[..., None]).astype(params[bias].dtype)
    return made


def z_loss(lse: jax.Array) -> jax.Array:
    """Penalise large normalisers: mean lse², in nats² (of router logits in arXiv:2202.08906).

    Args:
      lse: any shape, from `seen["lse"]`; rows without keys (-inf) are left out.
    Returns: a scalar, to be added to the loss times a small coefficient; 0 of no rows.
    Raises: ValueError if lse is no floating array.
    Example:
      >>> float(z_loss(jnp.array([3.0, -jnp.inf, 1.0])))
      5.0
    """
    _check_array("z_loss", "lse", lse)
    return _mean_over(~jnp.isneginf(lse), lse, jnp.square)  # NaN shall stay NaN


def entropy_floor(entropy: jax.Array, *, floor: float, where: jax.Array | None = None) -> jax.Array:
    """Penalise rows whose entropy falls below a floor: mean max(floor - H, 0)², in nats².

    Args:
      entropy: any shape, from `seen["entropy"]`.
      floor: nats, >= 0.
      where: bool, broadcasts to entropy: the rows that count, default all. Leave out those that
        cannot reach the floor, for they are penalised in vain: a causal row t has at most
        log(t + 1), a row without keys 0.
    Returns: a scalar, to be added to the loss times a coefficient; 0 of no rows.
    Raises: ValueError if entropy is no floating array, floor is negative, or where does not fit.
    Example:
      >>> entropy_BTN = jnp.array([0.0, 0.5, 3.0]).reshape(1, 3, 1)
      >>> late_BTN = jnp.arange(3)[None, :, None] >= 1
      >>> float(entropy_floor(entropy_BTN, floor=1.5, where=late_BTN))
      0.5
    """
    _check_bound("entropy_floor", "floor", floor, zero=True)
    _check_array("entropy_floor", "entropy", entropy)
    there = jnp.ones(entropy.shape, bool)
    if where is not None:
        if getattr(where, "dtype", None) != np.bool_:
            got = getattr(where, "dtype", type(where).__name__)
            raise ValueError(f"entropy_floor: where must be a bool array, got {got}")
        ones = (1,) * (entropy.ndim - where.ndim) + where.shape
        if len(ones) > entropy.ndim or any(
            m not in (1, n) for m, n in zip(ones, entropy.shape, strict=True)
        ):
            raise ValueError(
                f"entropy_floor: where has shape {where.shape}, which does not broadcast to "
                f"{entropy.shape} of entropy"
            )
        there = jnp.broadcast_to(where.reshape(ones), entropy.shape)
    return _mean_over(there, entropy, lambda x: jnp.square(jnp.maximum(floor - x, 0.0)))


def _mean_over(there: jax.Array, x: jax.Array, penalty: Callable[[jax.Array], Any]) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    made = jnp.where(there, penalty(jnp.where(there, x, 0.0)), 0.0)
    return jnp.sum(made) / jnp.maximum(jnp.sum(there), 1)


def _check_bound(owner: str, name: str, value: Any, *, zero: bool) -> None:
    """Raise unless a number is > 0, or >= 0; one that is traced is not known."""
    if isinstance(value, Tracer) and not value.ndim:
        return
    number = isinstance(value, int | float | np.number | jax.Array) and np.ndim(value) == 0
    number = number and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0):
        raise ValueError(f"{owner}: {name} must be {'>=' if zero else '>'} 0, got {value!r}")


def _check_array(owner: str, name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"{owner}: {name} must be a floating array, got {got}")
