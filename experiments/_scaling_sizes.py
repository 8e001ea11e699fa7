"""The models of `scaling`: their sizes, their operations, and the mean of weights measured."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_attn import (
    count,
    data,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
)

RECENT = 8.0  # the mean reaches back over about a tenth of the steps made: 1 / (RECENT + 2)


class Shape(NamedTuple):
    """A model: width, layers, heads of width H, hidden width of the MLP."""

    D: int
    L: int
    N: int
    F: int
    H: int


def shape(name: str, text: str, H: int) -> Shape:
    """Read "64x3", width and layers, of an option; heads of width H, F = 4 D."""
    width, x, layers = text.partition("x")
    if not (x and width.isdecimal() and layers.isdecimal() and int(width) and int(layers)):
        raise ValueError(f"--{name}: a size looks like 64x3, width x layers; got {text!r}")
    D = int(width)
    if D % H:
        raise ValueError(f"--{name}: the width of {text} is no multiple of --H={H}")
    return Shape(D, int(layers), D // H, 4 * D, H)


def shapes(sizes: str, H: int) -> list[Shape]:
    """List the sizes of --sizes, the smallest first."""
    found = {shape("sizes", text, H) for text in sizes.split(",")}
    return sorted(found, key=parameters)


def operations(made: Shape, T: int) -> tuple[int, int]:
    """Count those of attention and of the MLP a token and layer, forward, two a multiplication."""
    # A query sees (T + 1) / 2 keys on average, for scores and for values.
    attends = made.N * (8 * made.D * made.H + 2 * made.H * (T + 1))
    return attends, 4 * made.D * made.F


def splits(size: str, heads: str, H: int, T: int) -> dict[int, Shape]:
    """Give the MLP what other numbers of heads leave of the usual model's operations, by heads."""
    if not all(part.isdecimal() and int(part) for part in heads.split(",")):
        raise ValueError(f"--heads looks like 1,2,4, got {heads!r}")
    usual, made = shape("split", size, H), {}
    for N in sorted({int(part) for part in heads.split(",")} | {usual.N}):
        attends, _ = operations(usual._replace(N=N), T)
        F = round((sum(operations(usual, T)) - attends) / (4 * usual.D))
        if F < 1:
            raise ValueError(f"--heads: {N} heads leave nothing to the MLP of --split={size}")
        made[N] = usual._replace(N=N, F=F)
    if len(made) < 2:
        raise ValueError(f"--heads={heads} is the usual number alone: nothing to compare")
    return made


def draw(made: Shape, key: jax.Array) -> Any:
    """Draw the parameters of a model."""
    layer = partial(
        init_block,
        D=made.D,
        attention=partial(init_attention, D=made.D, N=made.N, H=made.H),
        mlp=partial(init_mlp, D=made.D, F=made.F),
    )
    return init_language_model(key, V=data.VOCABULARY, D=made.D, L=made.L, layer=layer)


def init(made: Shape, key: jax.Array) -> Any:
    """Draw what is trained: the model, and the mean of its weights beside it."""
    model = draw(made, key)
    return {"model": model, "mean": model}


def parameters(made: Shape) -> int:
    """Count the parameters of a model."""
    return count(jax.eval_shape(partial(draw, made), jax.random.key(0)))


def with_mean(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let an optimizer of the model also move the mean of its weights.

        mean_t = mean_(t-1) + w_t (model_t - mean_(t-1)),  w_t = (r + 1) / (r + t),  t from 1

    Its memory grows with t, so it is as good a mean after few steps as after many: polynomial-decay
    averaging (Shamir and Zhang 2013).
    """

    # With its name, so that what the optimizer keeps is found to lie where the model does.
    def model(tree: Any) -> Any:
        return {"model": tree["model"]}

    def init(params: Any) -> Any:
        return tx.init(model(params)), jnp.zeros((), jnp.int32)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        inner, made = state
        moves: Any
        moves, inner = tx.update(model(updates), inner, model(params))
        new = optax.apply_updates(params["model"], moves["model"])
        weight = (RECENT + 1) / (RECENT + 1 + made)
        mean = jax.tree.map(lambda m, p: weight * (p - m), params["mean"], new)
        return {**moves, "mean": mean}, (inner, made + 1)

    return optax.GradientTransformation(init, update)
