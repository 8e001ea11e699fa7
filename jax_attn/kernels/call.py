"""One call of attention, checked: what every implementation is handed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import dropout
from jax_attn.mask_types import Mask
from jax_attn.masks import dense as dense_mask
from jax_attn.observe import Mean, check_observe
from jax_attn.shapes import Sizes, axes, dims, fits, floating, integer

_LARGEST = 1e308  # about that of float64; an int may be larger
_DTYPES = ("float16", "bfloat16", "float32", "float64")
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
    whole: Mapping[str, int] | None = None,
) -> Call:
    """Return the call, or raise the ValueError that names what does not fit.

    Args:
      whole: how many times as long an axis of the whole call is, if this is the part of a device.
    """
    sizes = check_sizes(q_BTNH, k_BSKH, v_BSKE, None if whole else bias_BNTS, sinks_N)
    if whole:
        here: dict[str, int] = {letter: sizes.size(letter) for letter in "BTSNKGHE"}
        fits(Sizes(**here | {"S": sizes.S * whole["S"]}), bias_BNTS=bias_BNTS)
        sizes = Sizes(**{letter: n * whole.get(letter, 1) for letter, n in here.items()})
    # NumPy arrays take the dtype that JAX would give them: float64 is float32 unless enabled.
    q_BTNH, k_BSKH, v_BSKE, bias_BNTS, sinks_N = (
        jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for x in (q_BTNH, k_BSKH, v_BSKE, bias_BNTS, sinks_N)
    )
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
    arrays = {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKE": v_BSKE}
    for name, array in arrays.items():
        if array is None:
            raise ValueError(f"{name} must be an array with axes {axes(name)}, got None")
    sizes = dims(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, sinks_N=sinks_N)
    floating(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKE=v_BSKE, bias_BNTS=bias_BNTS, sinks_N=sinks_N)
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {array.dtype}: cast it to float16, bfloat16, float32 or float64"
            )
    if sizes.H == 0:
        raise ValueError("q_BTNH has H=0: there is nothing to compare queries and keys by")
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
        if isinstance(value, bool) or (number and not abs(value) < _LARGEST):
            raise ValueError(f"{name} must be a finite number, got {value!r:.40}")
        if value is not None and not number:
            if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"{name} must be a real scalar, got {value!r}")
            if value.ndim:
                raise ValueError(f"{name} must be a real scalar, got shape {value.shape}")
    if isinstance(softcap, int | float | np.number) and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    if not isinstance(q_offset, int) and not hasattr(q_offset, "dtype"):
        raise ValueError(f"q_offset must be an int, got {q_offset!r}")
    if jnp.ndim(q_offset) != 0:
        raise ValueError(f"q_offset must be a scalar, got shape {jnp.shape(q_offset)}")
    if isinstance(q_offset, int) and not -(2**31) <= q_offset < 2**31:
        raise ValueError(f"q_offset must fit into int32, got {q_offset}")
    integer(q_offset=jnp.asarray(q_offset) if isinstance(q_offset, int) else q_offset)
    if score is None:
        return
    if not callable(score):
        raise ValueError(f"score must be a function (logits, b, n, t, s), got {score!r}")
    if hasattr(score, "check"):
        score.check(sizes)
    for shape in (sizes["BNTS"], (1, 1, 1, 1)):  # an array of all pairs would fit the first alone
        try:
            made = jax.eval_shape(
                score,
                jax.ShapeDtypeStruct(shape, jnp.float32),
                *(
                    jax.ShapeDtypeStruct([n if i == axis else 1 for i in range(4)], jnp.int32)
                    for axis, n in enumerate(shape)
                ),
            )
        except TypeError as error:
            raise ValueError(f"score(logits, b, n, t, s) failed: {error}") from error
        if getattr(made, "shape", None) != shape:
            raise ValueError(
                f"score must return logits of the shape it was given, {shape} (it is called on "
                f"blocks of pairs), got {getattr(made, 'shape', type(made).__name__)}"
            )
        if not jnp.issubdtype(made.dtype, jnp.floating):
            raise ValueError(f"score must return floating-point logits, got {made.dtype}")
