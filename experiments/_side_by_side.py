"""Layers under keys of their own, and models side by side in one program.

`train.make_train_step` measures parts by the keys of their leaves; stacked layers share theirs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

LEAVES = ("attention", "attention_norm", "mlp", "mlp_norm")


def keys(part: str, L: int) -> tuple[str, ...]:
    """Name a part in each of L layers, once they are apart."""
    return tuple(f"{part}_{layer}" for layer in range(L))


def apart(params: Any) -> Any:
    """Give the parts of each layer a key of their own; nothing else changes."""
    L = params["layers"]["attention"]["wq_DNH"].shape[0]
    layers = {
        key: jax.tree.map(lambda leaf, at=layer: leaf[at], params["layers"][name])
        for name in LEAVES
        for layer, key in enumerate(keys(name, L))
    }
    return params | {"layers": layers}


def together(params: Any) -> Any:
    """Stack layers that are apart, as the model reads them."""
    layers = params["layers"]
    L = len(layers) // len(LEAVES)

    def stacked(name: str) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[k] for k in keys(name, L)))

    return params | {"layers": {name: stacked(name) for name in LEAVES}}


def replaced(part: str, params: Any, other: Any) -> Any:
    """Take a part of every layer from other parameters; layers of both are apart."""
    L = len(params["layers"]) // len(LEAVES)
    taken = {name: other["layers"][name] for name in keys(part, L)}
    return params | {"layers": params["layers"] | taken}


def stacked(trees: Sequence[Any]) -> Any:
    """Put models beside one another: leaves gain a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def beside(
    tx: optax.GradientTransformation, frozen: Sequence[Sequence[str]]
) -> optax.GradientTransformation:
    """Optimise models side by side, each by itself: one program instead of as many as there are.

    Args:
      tx: the optimizer of one.
      frozen: keys of each model; a leaf stays as it is if its path contains one.
    Returns: the optimizer of parameters that lead with an axis of models.
    """

    def kept(tree: Any) -> Any:
        def of_leaf(path: Any, leaf: jax.Array) -> jax.Array:
            names = {entry.key for entry in path}
            trains = np.array([names.isdisjoint(keys) for keys in frozen])
            return jnp.where(trains.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = jax.vmap(tx.update)(kept(updates), state, params)
        return kept(updates), state

    return optax.GradientTransformation(jax.vmap(tx.init), update)
