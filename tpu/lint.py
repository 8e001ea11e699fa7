"""What a plan's program does that its author most likely did not want."""

import math
import re
from collections.abc import Sequence
from typing import Any

from tpu.estimate import Transfer

_LARGE = 2**20  # bytes below which a transfer is not worth a line
_TILE = (8, 128)


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
    activations do.
    """
    sizes: set[int] = set()
    for leaf in arguments:
        if leaf["role"] != "state":
            continue
        local = math.prod(leaf["shape"])
        # A stack of layers travels a layer at a time.
        for base in {local, local // max(leaf["shape"][0], 1) if leaf["shape"] else local}:
            sizes.add(base)
            splits = [mesh[axis] for axis in leaf["axes"]]
            for chosen in range(1, 2 ** len(splits)):
                whole = math.prod(n for i, n in enumerate(splits) if chosen >> i & 1)
                sizes.add(base * whole)
    found: dict[tuple[str, str, float], Transfer] = {}
    for one in transfers:
        if not {"data", "fsdp"} & set(one.axes.split("·")) or one.bytes < _LARGE:
            continue
        if all(any(n / width in sizes for width in (1, 2, 4, 8)) for n in one.parts if n >= _LARGE):
            continue
        key = (one.kind, one.axes, one.bytes)
        if key not in found or found[key].times < one.times:
            found[key] = one
    return [
        f"{one.kind} of {one.bytes / 1e6:,.1f} MB over {one.axes}, {one.times:g} × a step, is no "
        f"parameter and no gradient: an activation travels; look at the sharding around "
        f"{_short(one.source)}"
        for one in sorted(found.values(), key=lambda x: -x.bytes * x.times)
    ]


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
        f"{missing / 1e9:,.2f} GB of the step's results have memory of their own: donate the state "
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
