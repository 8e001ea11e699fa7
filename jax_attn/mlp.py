"""Feed-forward layers: weights, learned and then the same for every input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.kernels import spread
from jax_attn.params import Leaves, Params, check_leaves, draw, fan_in, zeros
from jax_attn.shapes import dims, floating

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def activate(name: str, x: jax.Array) -> jax.Array:
    """Apply a nonlinearity by name.

    Args:
      name: "relu"; "gelu", exact, x·Φ(x); "gelu_tanh", its tanh approximation (both
        arXiv:1606.08415); "silu", x·sigmoid(x).
      x: any shape.
    Returns: shape and dtype of x.
    Raises: ValueError listing the known names.
    Example:
      >>> activate("relu", jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](x)


def mlp_leaves(D: int, F: int, *, bias: bool = False) -> Leaves:
    """Declare the leaves of an MLP; arguments as in `init_mlp`."""
    biases = {"b_in_F": zeros, "b_out_D": zeros} if bias else {}
    return {"w_in_DF": fan_in(D), "w_out_FD": fan_in(F)} | biases


def init_mlp(
    key: jax.Array, D: int, F: int, *, bias: bool = False, dtype: Any = jnp.float32
) -> Params:
    """Draw the weights of a two-layer MLP, variance 1 / fan-in.

    Args:
      key: a jax.random key.
      D: model width.
      F: hidden width.
      bias: add leaves b_in_F and b_out_D, zero.
      dtype: of the leaves.
    Returns: {"w_in_DF", "w_out_FD"} and the biases.
    Raises: ValueError naming a size that is no int >= 1.
    Example:
      >>> init_mlp(jax.random.key(0), D=768, F=3072)["w_in_DF"].shape
      (768, 3072)
    """
    return draw(key, mlp_leaves(D, F, bias=bias), {"D": D, "F": F}, dtype)


def mlp(params: Params, x_BTD: jax.Array, *, activation: str = "gelu") -> jax.Array:
    """Process each token on its own, by the same two matrices for every input.

        y = activation(x W_in + b_in) W_out + b_out

    Args:
      params: from `init_mlp`; biases apply if present.
      x_BTD: tokens.
      activation: see `activate`.
    Returns: [B,T,D].
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_mlp(jax.random.key(0), D=768, F=3072)
      >>> mlp(params, jnp.ones((1, 2, 768))).shape
      (1, 2, 768)
    """
    check_leaves("mlp", params, ("w_in_DF", "w_out_FD"), ("b_in_F", "b_out_D"))
    dims(x_BTD=x_BTD, **params)
    floating(x_BTD=x_BTD, **params)

    def feed(x_TD: jax.Array) -> jax.Array:
        h_TF = jnp.einsum("TD,DF->TF", x_TD, params["w_in_DF"])
        if "b_in_F" in params:
            h_TF = h_TF + params["b_in_F"][None]
        h_TF = activate(activation, h_TF)
        y_TD = jnp.einsum("TF,FD->TD", h_TF, params["w_out_FD"])
        return y_TD + params["b_out_D"][None] if "b_out_D" in params else y_TD

    with jax.named_scope("mlp"):
        return each_token(feed, x_BTD)


def each_token(feed: Callable[[jax.Array], jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Apply a function of tokens [T,D] to all of a batch.

    As one long row of tokens, unless a mesh splits them by T: the gradient of a weight is then a
    plain product of matrices. With B and T apart XLA fuses the nonlinearity into transposed copies
    of what it sums over, which on a CPU takes longer than the products themselves.

    Args:
      feed: [T,D] -> [T,D] for any T.
      x_BTD: tokens.
    Returns: [B,T,D].
    Example:
      >>> each_token(lambda x_TD: 2 * x_TD, jnp.ones((2, 3, 5))).shape
      (2, 3, 5)
    """
    found = spread.mesh()
    if found is not None and found.shape.get(spread.CONTEXT, 1) > 1:
        return jax.vmap(feed)(x_BTD)
    B, T, D = x_BTD.shape
    return feed(x_BTD.reshape(B * T, D)).reshape(B, T, D)


def gated_mlp_leaves(D: int, F: int) -> Leaves:
    """Declare the leaves of a gated MLP; arguments as in `init_gated_mlp`."""
    return {
        "w_gate_DF": fan_in(D),
        "w_in_DF": fan_in(D),
        "w_out_FD": fan_in(F),
    }


def init_gated_mlp(key: jax.Array, D: int, F: int, *, dtype: Any = jnp.float32) -> Params:
    """Draw the weights of a gated MLP, variance 1 / fan-in.

    Args:
      key: a jax.random key.
      D: model width.
      F: hidden width; 2/3 of a plain MLP's gives as many parameters.
      dtype: of the leaves.
    Returns: {"w_gate_DF", "w_in_DF", "w_out_FD"}.
    Raises: ValueError naming a size that is no int >= 1.
    Example:
      >>> sorted(init_gated_mlp(jax.random.key(0), D=6, F=16))
      ['w_gate_DF', 'w_in_DF', 'w_out_FD']
    """
    return draw(key, gated_mlp_leaves(D, F), {"D": D, "F": F}, dtype)


def gated_mlp(params: Params, x_BTD: jax.Array, *, activation: str = "silu") -> jax.Array:
    """Process each token by an MLP whose hidden units are gated (arXiv:2002.05202).

        y = (activation(x W_gate) · x W_in) W_out

    Args:
      params: from `init_gated_mlp`.
      x_BTD: tokens.
      activation: of the gate: "silu" is SwiGLU, "gelu" GEGLU, "relu" ReGLU.
    Returns: [B,T,D].
    Raises: ValueError naming the argument or leaf, the axis letter and both sizes.
    Example:
      >>> params = init_gated_mlp(jax.random.key(0), D=6, F=16)
      >>> gated_mlp(params, jnp.ones((1, 2, 6))).shape
      (1, 2, 6)
    """
    check_leaves("gated_mlp", params, ("w_gate_DF", "w_in_DF", "w_out_FD"))
    dims(x_BTD=x_BTD, **params)
    floating(x_BTD=x_BTD, **params)

    def feed(x_TD: jax.Array) -> jax.Array:
        gate_TF = jnp.einsum("TD,DF->TF", x_TD, params["w_gate_DF"])
        h_TF = activate(activation, gate_TF) * jnp.einsum("TD,DF->TF", x_TD, params["w_in_DF"])
        return jnp.einsum("TF,FD->TD", h_TF, params["w_out_FD"])

    with jax.named_scope("gated_mlp"):
        return each_token(feed, x_BTD)
