"""The leaves of a state: described, hashed, made fit for a file and back."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def describe(tree: PyTree) -> dict[str, str]:
    """Describe every leaf by its path: its dtype and shape, "float32[3,5]"."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, np.shape(x)))}]"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def digest(tree: PyTree) -> str:
    """Hash all of a tree: paths, dtypes, shapes and bytes. Equal digests, equal states.

    Args:
      tree: arrays, possibly over the devices of all processes: then every process calls it.
    Returns: SHA-256 in hex.
    Example:
      >>> digest({"w": np.ones(3)}) == digest({"w": np.ones(3)}) != digest({"w": np.zeros(3)})
      True
    """
    from jax.experimental import multihost_utils

    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(without_key, tree)):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        value = np.asarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}"
        sha.update(name.encode() + b"\0" + value.tobytes())
    return sha.hexdigest()


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def without_key(x: Any) -> Any:
    """Return the numbers of a random key, and any other array as it is."""
    if not _is_key(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError("restore: give a real array, not a ShapeDtypeStruct, for a random key")
    return jax.random.key_data(x)


def like(given: Any, read: Any) -> Any:
    """Make what was read the same kind of array: a key, or one that is on no device in particular.

    The latter matters: `jit` compiles again for an array that is bound to a device.
    """
    if isinstance(given, jax.Array) and not given.committed:
        read = jnp.asarray(np.asarray(read))
    if not _is_key(given):
        return read
    return jax.random.wrap_key_data(read, impl=jax.random.key_impl(given))


def unlike(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Compare two descriptions: a line for each leaf that differs."""
    return [
        f"{name}: saved {saved.get(name, 'not at all')}, here {here.get(name, 'not at all')}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
