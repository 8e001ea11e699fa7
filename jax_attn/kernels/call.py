"""One call of attention, checked: what every implementation is handed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import dropout
from jax_attn.mask_types import Mask
from jax_attn.masks import dense as dense_mask
from jax_attn.observe import Mean, check_observe
from jax_attn.shapes import Sizes, dims, fits, floating, integer

Score = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """The arguments of `dot_product_attention`, with the scale filled in."""

    q_BTNH: Any
    k_BSKH: Any
    v_BSKE: Any
    mask: Mask | None
    bias_BNTS: Any
    score: Any
    scale: Any
    softcap: Any
    sinks_N: Any
    q_offset: Any
    dropout_key: Any
    dropout_rate: float = field(metadata={"static": True})
    statistics: tuple[str, ...] = field(default=(), metadata={"static": True})
    means: tuple[Mean, ...] = ()

    @property
    def sizes(self) -> Sizes:
        (B, T, N, H), (S, K, E) = self.q_BTNH.shape, self.v_BSKE.shape[1:]
        return Sizes(B=B, T=T, N=N, H=H, S=S, K=K, E=E, G=N // K)

    @property
    def wide(self) -> Any:
        """The dtype of logits and sums: float32, or float64 for float64 inputs."""
        return jnp.promote_types(
            jnp.promote_types(self.q_BTNH.dtype, self.k_BSKH.dtype), jnp.float32
        )


def checked(
    q_BTNH: Any,
    k_BSKH: Any,
    v_BSKE: Any,
    mask: Any,
    bias_BNTS: Any,
    score: Any,
    scale: Any,
    softcap: Any,
    sinks_N: Any,
    q_offset: Any,
    dropout_rate: Any,
    dropout_key: Any,
    observe: Any,
) -> Call:
    """Return the call, or raise the ValueError that names what does not fit."""
    sizes = check_sizes(q_BTNH, k_BSKH, v_BSKE, bias_BNTS, sinks_N)
    mask = check_mask(mask, sizes)
    check_options(sizes, score, scale, softcap, q_offset)
    dropout.check(dropout_rate, dropout_key)
    statistics, means = check_observe(observe, sizes)
    scale = sizes.H**-0.5 if scale is None else scale
    rate = float(dropout_rate)
    return Call(
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
        None if rate == 0.0 else dropout_key,
        rate,
        statistics,
        means,
    )


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


def check_options(sizes: Sizes, score: Any, scale: Any, softcap: Any, q_offset: Any) -> None:
    """Raise unless the score is a function that keeps the logits' shape, and scalars are scalars.

    A score may have a method `check(sizes)`: implementations call the score on blocks, whose heads
    do not tell N.
    """
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
    if score is None:
        return
    if not callable(score):
        raise ValueError(f"score must be a function (logits, b, n, t, s), got {score!r}")
    if hasattr(score, "check"):
        score.check(sizes)
    made = jax.eval_shape(
        score,
        jax.ShapeDtypeStruct(sizes["BNTS"], jnp.float32),
        *(
            jax.ShapeDtypeStruct([n if i == axis else 1 for i in range(4)], jnp.int32)
            for axis, n in enumerate(sizes["BNTS"])
        ),
    )
    if getattr(made, "shape", None) != sizes["BNTS"]:
        raise ValueError(
            f"score must return logits of the shape it was given, {sizes['BNTS']}, "
            f"got {getattr(made, 'shape', type(made).__name__)}"
        )
