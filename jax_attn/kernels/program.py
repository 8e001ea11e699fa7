"""One compiled program a call, also for a caller who does not use jit."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def run(fn: Callable[..., Any], static: tuple[Any, ...], *args: Any) -> Any:
    """Return fn(*static, *args), compiled once for each kind of arguments.

    Args:
      fn: a function of a module, not one made for this call: it is part of the key.
      static: hashable.
      args: pytrees. Numbers in them are static; functions, which may close over anything, tracers
        too, leave the compiling to the caller's own jit.
    """
    leaves, tree = jax.tree.flatten(args)
    if any(callable(leaf) for leaf in leaves):
        return fn(*static, *args)
    numbers = tuple(leaf if _is_number(leaf) else None for leaf in leaves)
    arrays = [None if _is_number(leaf) else leaf for leaf in leaves]
    return _run(arrays, numbers, tree, fn, static)


def _run_flat(arrays, numbers, tree, fn, static):
    leaves = [a if x is None else x for a, x in zip(arrays, numbers, strict=True)]
    return fn(*static, *jax.tree.unflatten(tree, leaves))


_run = jax.jit(_run_flat, static_argnums=(1, 2, 3, 4), inline=True)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | np.number)
