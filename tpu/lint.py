"""What a plan's program does that its author most likely did not want."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from tpu.estimate import Transfer
from tpu.hlo import size

_LARGE = 2**20  # bytes below which a transfer is not worth a line
_MOST = 4  # transfers that have a line of their own
_TILE = (8, 128)
_PADDED = (
    1 / 8
)  # of a gradient: what the compiler pads to spread it evenly; 1/64 and 3/32 were seen


def lint(facts: dict[str, Any], transfers: Sequence[Transfer]) -> list[str]:
    """List findings, each a line that says what it is and what to do.

    Args:
      facts: of the compiled program: `arguments`, each with path, shape (of a device), itemsize and
        axes (mesh axes that split it); aliased and returned bytes; flops and how many of them are
        narrow; host transfers; the mesh.
      transfers: from the schedule.
    Returns: findings; none is good.
    """
    return (
        unexplained(facts["arguments"], transfers, facts["mesh"])
        + padding(facts["arguments"])
        + donation(facts)
        + wide_products(facts)
        + [f"a transfer to the host in the step: {text}" for text in facts["host_transfers"]]
    )


def unexplained(
    arguments: Sequence[dict[str, Any]], transfers: Sequence[Transfer], mesh: dict[str, int]
) -> list[str]:
    """Find transfers over data and fsdp that move no parameter and no gradient.

    Over these axes only parameters, gradients and scalars have to travel. Over model and context
    activations do. What a transfer moves is read from the place in the program that it came from;
    where that does not say, from its number of elements.
    """
    state = [leaf for leaf in arguments if leaf["role"] == "state"]
    found: dict[tuple[str, str, float, str], Transfer] = {}
    for one in transfers:
        axes = set(one.axes.split("·"))
        if not {"data", "fsdp"} & axes or one.bytes < _LARGE:
            continue
        if not _activation(one, state):
            sizes = _sizes(state, axes & {"data", "fsdp"}, mesh, one.kind)
            large = [shape for shape in one.shapes if size(shape) >= _LARGE]
            if _named(one, state) or all(_matches(one, shape, sizes) for shape in large):
                continue
        key = (one.kind, one.axes, one.bytes, one.source)
        if key not in found or found[key].times < one.times:
            found[key] = one
    whole = max((_whole(leaf, mesh) for leaf in state), default=0)
    rows = sorted(found.values(), key=lambda x: -x.bytes * x.times)
    said = [
        f"{one.kind} of {one.bytes / 1e6:,.1f} MB over {one.axes}, {one.times:g} × a step, is no "
        f"parameter and no gradient: an activation travels; look at the sharding around "
        f"{_short(one.source)}"
        + (" (or the compiler preferred it to a larger parameter)" if one.bytes < whole else "")
        for one in rows[:_MOST]
    ]
    if more := rows[_MOST:]:
        said.append(f"{len(more)} smaller transfers of activations more")
    return said


def _whole(leaf: dict[str, Any], mesh: dict[str, int]) -> float:
    """Bytes of an array on all devices together."""
    parts = math.prod(mesh[axis] for axis in leaf["axes"])
    return math.prod(leaf["shape"]) * leaf["itemsize"] * parts


def _named(one: Transfer, state: Sequence[dict[str, Any]]) -> bool:
    """Whether the source names an array of the state, as in `p['w']`."""
    return "/" not in one.source and any(
        leaf["path"] and one.source.endswith(leaf["path"]) for leaf in state
    )


def _activation(one: Transfer, state: Sequence[dict[str, Any]]) -> bool:
    """Whether the source says that an activation travels, whatever its size.

    An array of the batch is named by its argument. What is gathered is no parameter if a product
    made it. A sum over devices is no gradient if it is part of the forward pass.
    """
    source = one.source
    if source and "/" not in source:
        return not _named(one, state)
    if one.kind == "all-gather":
        return source.endswith("/dot_general")
    forward = "jvp(" in source and "transpose(" not in source
    return one.kind in ("all-reduce", "reduce-scatter") and forward


def _sizes(
    state: Sequence[dict[str, Any]], axes: set[str], mesh: dict[str, int], kind: str
) -> set[int]:
    """List how many elements of a parameter, or of its gradient, a device may send or get.

    Gathered and summed arrays are whole over the axes that they travel over; pieces travel else.
    """
    whole = kind in ("all-gather", "all-reduce", "reduce-scatter")
    sizes: set[int] = set()
    for leaf in state:
        local = math.prod(leaf["shape"])
        # A stack of layers travels a layer at a time.
        for base in {local, local // max(leaf["shape"][0], 1) if leaf["shape"] else local}:
            for n in range(len(leaf["axes"]) + 1):
                for chosen in itertools.combinations(leaf["axes"], n):
                    if not whole or axes & set(leaf["axes"]) <= set(chosen):
                        sizes.add(base * math.prod(mesh[axis] for axis in chosen))
    return sizes


def _matches(one: Transfer, shape: str, sizes: set[int]) -> bool:
    n = math.prod(int(d) for d in re.findall(r"\d+", shape[shape.index("[") :]))
    if n in sizes:
        return True
    # The compiler pads gradients before it sums them, and shifts rows by as much afterwards.
    if one.kind in ("all-reduce", "reduce-scatter"):
        return any(whole <= n <= whole * (1 + _PADDED) for whole in sizes)
    shifted = one.kind == "collective-permute" and not one.source
    return shifted and any(n <= whole * _PADDED for whole in sizes)


def padding(arguments: Sequence[dict[str, Any]]) -> list[str]:
    """Find arrays whose last two sizes fill their tiles of 8 × 128 badly."""
    wasted = []
    for leaf in arguments:
        shape = leaf["shape"]
        if len(shape) < 2:
            continue
        padded = list(shape)
        padded[-2:] = [-(-n // t) * t for n, t in zip(shape[-2:], _TILE, strict=True)]
        more = (math.prod(padded) - math.prod(shape)) * leaf["itemsize"]
        if more > _LARGE and math.prod(padded) > 1.1 * math.prod(shape):
            wasted.append((more, leaf["path"], shape))
    return [
        f"{path} is {'×'.join(map(str, shape))} on a device: tiles of 8 × 128 may take "
        f"{more / 1e6:,.0f} MB more (the compiler may turn it); choose multiples of 128"
        for more, path, shape in sorted(wasted, reverse=True)[:3]
    ]


def donation(facts: dict[str, Any]) -> list[str]:
    """Find a state that is returned beside the one that came in."""
    missing = facts["returned_bytes"] - facts["aliased_bytes"]
    if missing <= max(_LARGE, 0.05 * facts["returned_bytes"]):
        return []
    return [
        f"{missing / 1e6:,.0f} MB of the step's results have memory of their own: donate the state "
        f"(jax.jit(step, donate_argnums=0))"
    ]


def wide_products(facts: dict[str, Any]) -> list[str]:
    """Find matrix products of float32."""
    wide = facts["flops"] - facts["narrow_flops"]
    if wide <= 0.05 * facts["flops"]:
        return []
    return [
        f"{wide / facts['flops']:.0%} of the products' operations have float32 factors: compute in "
        f"bfloat16 (jax_attn.train.compute_in), which the matrix units take directly"
    ]


def _short(source: str) -> str:
    parts = [
        p for p in source.split("/") if not re.fullmatch(r"while|body|eval_jaxpr|closed_call", p)
    ]
    return "/".join(parts[-3:]) or "?"
