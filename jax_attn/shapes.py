"""One alphabet: an array's name ends in its axes, and everything about its shape follows.

From the suffix of `q_BTNH` come its rank, the check of its sizes (`dims`), its sharding (`spec`)
and, in a parameter tree, its initial shape (`shape`).
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

ALPHABET: Mapping[str, str] = {
    "B": "batch",
    "T": "query length",
    "S": "key/value length",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head, N / K",
    "H": "head width of queries and keys",
    "E": "head width of values",
    "F": "MLP hidden width",
    "V": "vocabulary",
    "L": "layers",
    "X": "experts",
}


class Sizes(chex.Dimensions):
    """The size of every letter: `sizes.H` is an int, `sizes["BTKGH"]` a shape.

    A letter keeps its size: binding it to another raises ValueError, where `chex.Dimensions`
    would silently rebind it.

    Example:
      >>> Sizes(B=2, T=3)["TB"]
      (3, 2)
    """

    B: int
    T: int
    S: int
    D: int
    N: int
    K: int
    G: int
    H: int
    E: int
    F: int
    V: int
    L: int
    X: int

    def __setattr__(self, dim: str, size: int) -> None:
        # Every way to bind a letter ends here: Sizes(B=2), sizes["B"] = (2,), sizes.B = 2.
        known = getattr(self, dim, size)
        if known != size:
            raise ValueError(f"{dim}={size} but {dim}={known} is known already")
        super().__setattr__(dim, size)


def axes(name: str) -> str:
    """Return the axis letters that a name ends in.

    Args:
      name: `"wq_DNH"`, `"x_BTD"`; a name without a suffix has no axes.
    Returns: the letters, `"DNH"`; `""` where the name has no suffix.
    Example:
      >>> axes("wq_DNH"), axes("length")
      ('DNH', '')
    """
    suffix = name.rpartition("_")[2]
    return suffix if suffix and all(letter in ALPHABET for letter in suffix) else ""


def dims(**arrays: Any) -> Sizes:
    """Check arrays against the axes in their names and return the size of every letter.

    Args:
      **arrays: `name_AXES=array`; anything with a `.shape`. None is skipped, so optional
        arguments can be passed as they are.
    Returns: Sizes: `d.H` is a size, `d["BTKGH"]` a shape.
    Raises: ValueError naming the arguments, the letter and both sizes, or the ranks.
    Example:
      >>> import numpy as np
      >>> d = dims(q_BTNH=np.ones((2, 3, 5, 7)), k_BSKH=np.ones((2, 11, 5, 7)))
      >>> d.S, d["BNT"]
      (11, (2, 5, 3))
      >>> dims(q_BTNH=np.ones((2, 3, 5, 7)), k_BSKH=np.ones((2, 11, 5, 8)))
      Traceback (most recent call last):
      ValueError: k_BSKH has H=8 but q_BTNH has H=7
    """
    found: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        letters = axes(name)
        shape = _shape(name, array)
        if len(shape) != len(letters):
            raise ValueError(
                f"{name} needs rank {len(letters)}, one axis for each of {' '.join(letters)}, "
                f"but has rank {len(shape)}: shape {shape}"
            )
        for letter, size in zip(letters, shape, strict=True):
            first_size, first_name = found.setdefault(letter, (size, name))
            if size != first_size:
                raise ValueError(
                    f"{name} has {letter}={size} but {first_name} has {letter}={first_size}"
                )
    return Sizes(**{letter: size for letter, (size, _) in found.items()})


def fits(sizes: Sizes, **arrays: Any) -> None:
    """Check that each array broadcasts to known sizes: every axis has its size or 1.

    Args:
      sizes: what `dims` returned.
      **arrays: `name_AXES=array`, full rank; None is skipped.
    Raises: ValueError naming the argument, the letter and both sizes.
    Example:
      >>> import numpy as np
      >>> d = dims(q_BTNH=np.ones((2, 3, 5, 7)), k_BSNH=np.ones((2, 11, 5, 7)))
      >>> fits(d, bias_BNTS=np.ones((1, 5, 3, 11)))
    """
    for name, array in arrays.items():
        if array is None:
            continue
        letters = axes(name)
        shape = _shape(name, array)
        if len(shape) != len(letters):
            raise ValueError(
                f"{name} needs rank {len(letters)} ({' '.join(letters)}, size 1 to broadcast), "
                f"but has rank {len(shape)}: shape {shape}"
            )
        for letter, size in zip(letters, shape, strict=True):
            (known,) = sizes[letter]  # not sizes.size(letter), which refuses 0
            if size not in (1, known):
                raise ValueError(
                    f"{name} has {letter}={size}, which neither is 1 nor equals "
                    f"{letter}={known} of the other arguments"
                )


def _shape(name: str, array: Any) -> tuple[int, ...]:
    if not axes(name):
        letters = "".join(ALPHABET)
        raise ValueError(f"{name} has no axis suffix such as _BTD; known letters: {letters}")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        kind = type(array).__name__
        raise ValueError(f"{name} must be an array with axes {axes(name)}, got {kind}")
    return tuple(array.shape)


def floating(**arrays: Any) -> None:
    """Check that arrays hold floating-point numbers.

    Args:
      **arrays: `name=array`; None is skipped.
    Raises: ValueError naming the argument and its dtype.
    Example:
      >>> import numpy as np
      >>> floating(x_D=np.arange(3))
      Traceback (most recent call last):
      ValueError: x_D must be floating point, got int64
    """
    for name, array in arrays.items():
        if array is not None and not hasattr(array, "dtype"):
            raise ValueError(f"{name} must be a floating-point array, got {type(array).__name__}")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}")


def integer(**arrays: Any) -> None:
    """Check that arrays hold integers.

    Args:
      **arrays: `name=array`; None is skipped.
    Raises: ValueError naming the argument and its dtype.
    Example:
      >>> import numpy as np
      >>> integer(tokens_BT=np.zeros((2, 3)))
      Traceback (most recent call last):
      ValueError: tokens_BT must be integers, got float64
    """
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")


def shape(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape that a name's axes stand for.

    Args:
      name: a name with a suffix, `"wq_DNH"`.
      sizes: letter to size.
    Returns: the shape, in the order of the letters.
    Raises: ValueError naming the leaf and the letter without a size, or a size below 1.
    Example:
      >>> shape("wq_DNH", {"D": 768, "N": 12, "H": 64})
      (768, 12, 64)
    """
    if not axes(name):
        raise ValueError(f"{name} has no axis suffix such as _DF, so it has no shape")
    for letter in axes(name):
        size = sizes.get(letter)
        if size is None:
            raise ValueError(f"{name} needs a size for {letter} ({ALPHABET[letter]})")
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{letter} ({ALPHABET[letter]}) must be an int >= 1, got {size!r}")
    return tuple(sizes[letter] for letter in axes(name))


def spec(letters: str, rules: Mapping[str, str | tuple[str, ...] | None]) -> PartitionSpec:
    """Derive a PartitionSpec from axis letters.

    Args:
      letters: the axes of the array, `"DNH"`.
      rules: letter to mesh axis (or axes); a letter without a rule is replicated.
    Returns: a PartitionSpec with one entry for each letter.
    Raises: ValueError for an unknown letter, or if one mesh axis would shard two letters.
    Example:
      >>> tuple(spec("DNH", {"D": "fsdp", "N": "model"}))
      ('fsdp', 'model', None)
    """
    for letter in (*letters, *rules):
        if letter not in ALPHABET:
            raise ValueError(f"unknown axis letter {letter!r}; the alphabet is {''.join(ALPHABET)}")
    user: dict[str, str] = {}
    for letter in letters:
        rule = rules.get(letter)
        for mesh_axis in (rule,) if isinstance(rule, str) else rule or ():
            if mesh_axis in user:
                raise ValueError(
                    f"mesh axis {mesh_axis!r} would shard both {user[mesh_axis]} and {letter} "
                    f"of {letters}; map one of them to another axis or to None"
                )
            user[mesh_axis] = letter
    return PartitionSpec(*(rules.get(letter) for letter in letters))
