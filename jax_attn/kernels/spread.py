"""Under jit and a mesh, let each device attend for its own batch entries and heads.

Left to itself the compiler cannot split the loops of the blockwise folds: it gathers q, k and v,
and every device does all work.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jax_attn.kernels.call import Call
from jax_attn.shapes import Sizes, axes

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
    """Say whether there is a mesh that splits the call's batch entries or heads.

    Warns where there is one and the call cannot be split: every device then does all of it.
    """
    found = mesh()
    if found is None or count(found, (*BATCH, HEADS)) == 1:
        return False
    try:
        rules = _rules(found, call.sizes)
        why = closes_over(call)
    except ValueError as error:
        rules, why = {}, str(error)
    else:
        why = why and f"{why} closes over traced arrays; make it a class registered as a pytree"
    if why is None:
        return any(rules.values())
    warnings.warn(f"every device attends for all batch entries and heads: {why}", stacklevel=2)
    return False


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
    found = required(mesh())
    rules = _rules(found, call.sizes) | {"T": queries, "S": keys}
    batch, heads = rules["B"], rules["N"]
    arrays = {name: x for name in _ARRAYS if (x := getattr(call, name)) is not None}
    bias_rules = rules | {"S": None}  # a bias has all keys
    specs = {
        name: _place(found, name, x, bias_rules if name == "bias_BNTS" else rules)
        for name, x in arrays.items()
    }
    # Fewer key/value heads than devices: each device has all of them, and takes the one it needs.
    share = call.sizes.K if heads and not rules["K"] else 0
    # Masks and all that is not split come whole: an array that is closed over could not enter.
    others, rebuild = _parted(replace(call, **dict.fromkeys(arrays)))

    def part(arrays: dict[str, jax.Array], others: list[Any]) -> Any:
        if share > 1:
            arrays = arrays | {
                name: _own_head(arrays[name], share) for name in ("k_BSKH", "v_BSKE")
            }
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
    found = required(mesh())
    sizes = dict(zip(axes(held), arrays[held].shape, strict=True))
    batch, heads = count(found, BATCH), count(found, (HEADS,))
    rules: dict[str, Any] = {
        "B": larger(found, BATCH) if sizes["B"] % batch == 0 else None,
        "K": larger(found, (HEADS,)) if sizes["K"] % heads == 0 else None,
    }
    specs = {
        name: _place(found, name, x, rules | {"S": CONTEXT} if name == held else rules)
        for name, x in arrays.items()
    }
    places = (*specs.values(), *(PartitionSpec() for _ in others))
    mapped = jax.shard_map(part, mesh=found, in_specs=places, out_specs=specs[held])
    return mapped(*arrays.values(), *others)


def required(found: AbstractMesh | None) -> AbstractMesh:
    """Raise unless there is a mesh whose axes the compiler splits."""
    if found is None:
        here = jax.sharding.get_abstract_mesh()
        modes = ", ".join(
            f"{name} is {mode}" for name, mode in zip(here.axis_names, here.axis_types, strict=True)
        )
        raise ValueError(
            f"the mesh's axes data, fsdp, context and model must all be of type Auto, as make_mesh "
            f"makes them; here {modes or 'there is no mesh'}. Inside jax.shard_map all of them "
            f"must be manual"
        )
    return found


def _rules(found: AbstractMesh, sizes: Sizes) -> dict[str, Any]:
    """Say over which mesh axes batch entries and heads of a call are split.

    One batch entry, or one query head, is not split: every device has it.
    """
    batch, heads = count(found, BATCH), count(found, (HEADS,))
    if sizes.B > 1 and sizes.B % batch:
        raise ValueError(
            f"q_BTNH has B={sizes.B}, which the {batch} devices of mesh axes data * fsdp do not "
            f"divide: take a multiple"
        )
    rules: dict[str, Any] = dict.fromkeys("BNK")
    if sizes.B > 1:
        rules["B"] = larger(found, BATCH)
    if sizes.N == 1 or heads == 1:
        return rules
    if sizes.N % heads or (sizes.K % heads and heads % sizes.K):
        raise ValueError(
            f"q_BTNH has N={sizes.N} and k_BSKH has K={sizes.K}, which the {heads} devices of mesh "
            f"axis model do not divide: N must be a multiple of them, K a multiple or a divisor"
        )
    rules["N"] = larger(found, (HEADS,))
    rules["K"] = rules["N"] if sizes.K % heads == 0 else None
    return rules


def _own_head(x_BSKH: jax.Array, K: int) -> jax.Array:
    """Take the key/value head that this device's query heads attend with."""
    devices = jax.lax.axis_size(HEADS)
    x_BSKH = jax.lax.pcast(x_BSKH, HEADS, to="varying")
    mine = jax.lax.axis_index(HEADS) * K // devices
    return jax.lax.dynamic_slice_in_dim(x_BSKH, mine, 1, axis=2)


def larger(found: AbstractMesh, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return those of the mesh's axes that have more than one device."""
    return tuple(name for name in names if found.shape.get(name, 1) > 1) or None


def _place(found: AbstractMesh, name: str, x: jax.Array, rules: dict[str, Any]) -> PartitionSpec:
    """Place an array by its letters; an axis of one entry of a bias is not split."""
    broadcast = name == "bias_BNTS"
    parts = [
        None if broadcast and n == 1 else rules.get(c)
        for c, n in zip(axes(name), x.shape, strict=True)
    ]
    for letter, size, over in zip(axes(name), x.shape, parts, strict=True):
        over = (over,) if isinstance(over, str) else over or ()
        if size % count(found, over):
            raise ValueError(
                f"{name} has {letter}={size}, which the {count(found, over)} devices of mesh "
                f"axis {' * '.join(over)} do not divide: take a multiple"
                + (", or context='split_kv' for few queries" if letter == "T" else "")
            )
    return PartitionSpec(*parts)


def count(found: AbstractMesh, names: tuple[str, ...]) -> int:
    """Return how many devices the mesh's axes of these names have together."""
    return math.prod(found.shape.get(name, 1) for name in names)
