"""Parameter leaves: declared once by name, drawn, counted and checked.

A block declares its leaves as `{name: initializer}`; a leaf's shape follows from the letters of
its name. The functions and the Flax shells read the same table, so one tree serves both.
"""

import difflib
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_attn.shapes import floating, shape

Params = dict[str, Any]
Initializer = Callable[..., jax.Array]
Leaves = Mapping[str, Initializer]

ones: Initializer = jax.nn.initializers.ones
zeros: Initializer = jax.nn.initializers.zeros


def normal(std: float) -> Initializer:
    """Return an initializer that draws from a normal distribution.

    Args:
      std: standard deviation.
    Returns: a function (key, shape, dtype) -> array.
    Example:
      >>> normal(0.02)(jax.random.key(0), (3, 5), jnp.float32).shape
      (3, 5)
    """
    return jax.nn.initializers.normal(std)


def fan_in(*sizes: int) -> Initializer:
    """Return an initializer that draws from a normal distribution of variance 1 / fan-in.

    Args:
      sizes: of the axes that are summed over. One below 1 is left to `draw` to name.
    Returns: a function (key, shape, dtype) -> array.
    Example:
      >>> fan_in(3)(jax.random.key(0), (3, 5), jnp.float32).shape
      (3, 5)
    """
    return normal(max(math.prod(sizes), 1) ** -0.5)


def draw(
    key: jax.Array, leaves: Leaves, sizes: Mapping[str, int], dtype: Any = jnp.float32
) -> Params:
    """Draw every declared leaf, each from its own key.

    A leaf's key depends on `key` and the leaf's name alone, so adding an optional leaf leaves
    the others bit-equal.

    Args:
      key: a jax.random key.
      leaves: name to initializer; the name's letters give the shape.
      sizes: letter to size.
      dtype: of every leaf, floating.
    Returns: name to array.
    Raises: ValueError naming the letter without a size.
    Example:
      >>> tree = draw(jax.random.key(0), {"w_DF": normal(1.0), "b_F": zeros}, {"D": 3, "F": 5})
      >>> {name: leaf.shape for name, leaf in tree.items()}
      {'w_DF': (3, 5), 'b_F': (5,)}
    """
    floating(dtype=jax.ShapeDtypeStruct((), dtype))
    return {
        name: init(jax.random.fold_in(key, zlib.crc32(name.encode())), shape(name, sizes), dtype)
        for name, init in leaves.items()
    }


def check_leaves(
    owner: str, params: Any, required: Collection[str], optional: Collection[str] = ()
) -> None:
    """Check that a parameter dict has the required leaves and no unknown one.

    An optional leaf applies by being present, so a misspelt one would silently do nothing:
    unknown names are errors.

    Args:
      owner: the function that asks, for the message.
      params: a dict of leaves.
      required: names that must be there.
      optional: names that may be there.
    Raises: ValueError naming the missing leaf, or the unknown one and the nearest known name.
    Example:
      >>> check_leaves("mlp", {"w_in_DF": 0, "b_inF": 0}, ["w_in_DF"], ["b_in_F"])
      Traceback (most recent call last):
      ValueError: mlp: unknown leaf 'b_inF', did you mean 'b_in_F'? Known: w_in_DF, b_in_F
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"{owner}: params must be a dict of leaves, got {type(params).__name__}")
    known = [*required, *optional]
    for name in params:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{owner}: unknown leaf {name!r}{hint} Known: {', '.join(known)}")
    for name in required:
        if name not in params:
            raise ValueError(f"{owner}: leaf {name!r} is missing; params has: {', '.join(params)}")


def count(params: Any) -> int:
    """Count the numbers in a parameter tree.

    Args:
      params: a pytree of arrays or ShapeDtypeStructs.
    Returns: the sum of the leaves' sizes.
    Example:
      >>> count({"w_DF": jnp.ones((3, 5)), "b_F": jnp.ones(5)})
      20
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))
