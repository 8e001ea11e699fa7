"""Under jit and a mesh, let each device attend for its own batch entries and heads.

Left to itself the compiler cannot split the loops of the blockwise folds: it gathers q, k and v,
and every device does all work.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jax_attn.kernels.call import Call
from jax_attn.shapes import axes

BATCH, HEADS, CONTEXT = ("data", "fsdp"), "model", "context"
_ARRAYS = ("q_BTNH", "k_BSKH", "v_BSKE", "bias_BNTS", "sinks_N")
Run = Callable[[Call, tuple[Any, Any]], tuple[jax.Array, dict[str, jax.Array]]]


def mesh() -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh`, unless it has no axis that the compiler splits."""
    found = jax.sharding.get_abstract_mesh()
    modes = dict(zip(found.axis_names, found.axis_types, strict=True))
    known = [modes[name] for name in (*BATCH, HEADS, CONTEXT) if name in modes]
    return found if known and all(mode == AxisType.Auto for mode in known) else None


def splits(call: Call) -> bool:
    """Say whether there is a mesh that splits the call's batch entries or heads evenly."""
    found = mesh()
    if found is None:
        return False
    batch, heads = _count(found, BATCH), _count(found, (HEADS,))
    z = call.sizes
    fits = batch * heads > 1 and z.B % batch == z.K % heads == 0
    return fits and closes_over(call) is None


def closes_over(call: Call) -> str | None:
    """Name what of a call closes over traced arrays, which cannot enter a `shard_map`."""
    index = [jax.ShapeDtypeStruct((1, 1, 1, 1), "int32") for _ in "bnts"]
    logits = jax.ShapeDtypeStruct((1, 1, 1, 1), call.wide)
    functions: dict[str, Callable[..., Any]] = {
        "mask": lambda call, logits, b, n, t, s: call.mask.allows(b, n, t, s, t),
        "score": lambda call, logits, b, n, t, s: call.score(logits, b, n, t, s),
    }
    for i in range(len(call.means)):
        functions[f"observe[{i}]"] = lambda call, logits, *index, i=i: call.means[i](*index)
    arrays, rebuild = _parted(call)
    for name, fn in functions.items():
        if getattr(call, name, True) is None:
            continue

        def apart(arrays, *args, fn=fn):
            return fn(rebuild(arrays), *args)

        closed = jax.make_jaxpr(apart)(arrays, logits, *index)
        if any(isinstance(x, Tracer) for x in closed.consts):
            return name
    return None


def _parted(call: Call) -> tuple[list[Any], Callable[[list[Any]], Call]]:
    """Part a call into its arrays, and the function that puts them, or others, back."""
    leaves, tree = jax.tree.flatten(call)
    moving = [hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays: list[Any]) -> Call:
        given = iter(arrays)
        return jax.tree.unflatten(
            tree, [next(given) if yes else x for x, yes in zip(leaves, moving, strict=True)]
        )

    return [leaf for leaf, yes in zip(leaves, moving, strict=True) if yes], rebuild


def attend(
    call: Call, run: Run, *, queries: str | None, keys: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run `run(its part of the call, first batch entry and head)` on every device of the mesh.

    Args:
      queries, keys: the mesh axis over which T and S are split, if any.
    """
    found, batch, heads = _split()
    rules = {"B": batch or None, "N": heads, "K": heads, "T": queries, "S": keys}
    arrays = {name: x for name in _ARRAYS if (x := getattr(call, name)) is not None}
    bias_rules = rules | {"S": None}  # a bias has all keys
    specs = {
        name: _place(found, name, x, bias_rules if name == "bias_BNTS" else rules)
        for name, x in arrays.items()
    }
    # Masks and all that is not split come whole: an array that is closed over could not enter.
    others, rebuild = _parted(replace(call, **dict.fromkeys(arrays)))

    def part(arrays: dict[str, jax.Array], others: list[Any]) -> Any:
        mine = replace(rebuild(others), **arrays)
        b = jax.lax.axis_index(batch) * mine.sizes.B if batch else 0
        n = jax.lax.axis_index(heads) * mine.sizes.N if heads else 0
        return run(mine, (b, n))

    out = PartitionSpec(rules["B"], queries, heads)
    places = (specs, PartitionSpec())
    return jax.shard_map(part, mesh=found, in_specs=places, out_specs=out)(arrays, others)


def change(
    part: Callable[..., jax.Array], held: str, arrays: dict[str, jax.Array], *others: Any
) -> jax.Array:
    """Change an array where it lies: run `part(*its parts of the arrays, *others)` on every device.

    Args:
      held: which of the arrays is changed; its S is split over "context", that of others is whole.
    """
    found, batch, heads = _split()
    rules = {"B": batch or None, "N": heads, "K": heads}
    specs = {
        name: _place(found, name, x, rules | {"S": CONTEXT} if name == held else rules)
        for name, x in arrays.items()
    }
    places = (*specs.values(), *(PartitionSpec() for _ in others))
    mapped = jax.shard_map(part, mesh=found, in_specs=places, out_specs=specs[held])
    return mapped(*arrays.values(), *others)


def _split() -> tuple[AbstractMesh, tuple[str, ...], str | None]:
    """Return the mesh, and its axes of more than one device for batch entries and for heads."""
    found = mesh()
    assert found is not None
    batch = tuple(name for name in BATCH if found.shape.get(name, 1) > 1)
    return found, batch, HEADS if found.shape.get(HEADS, 1) > 1 else None


def _place(found: AbstractMesh, name: str, x: jax.Array, rules: dict[str, Any]) -> PartitionSpec:
    """Place an array by its letters; an axis of one entry is not split."""
    parts = [rules.get(c) if n > 1 else None for c, n in zip(axes(name), x.shape, strict=True)]
    for letter, size, over in zip(axes(name), x.shape, parts, strict=True):
        over = (over,) if isinstance(over, str) else over or ()
        if size % _count(found, over):
            raise ValueError(
                f"{name} has {letter}={size}, which the {_count(found, over)} devices of mesh "
                f"axis {' * '.join(over)} do not divide"
            )
    return PartitionSpec(*parts)


def _count(found: AbstractMesh, names: tuple[str, ...]) -> int:
    return math.prod(found.shape.get(name, 1) for name in names)
