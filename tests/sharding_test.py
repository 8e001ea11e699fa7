"""A mesh changes where numbers lie and what travels, not the numbers."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jax_attn as a
from jax_attn import train
from tests import sharded_model as small

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def traffic(hlo: str) -> Counter[tuple[str, str]]:
    """(collective, shape) of each array that travels, scalars left out; a loop counts once."""
    found = Counter()
    for line in hlo.splitlines():
        made = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if made:
            shapes = re.findall(r"\w+\[([\d,]+)\]", made[1])
            found.update((made[2], shape) for shape in shapes)
    return found


def totals(found: Counter[tuple[str, str]]) -> dict[str, int]:
    return {kind: n for kind in COLLECTIVES if (n := sum(found[k] for k in found if k[0] == kind))}


def compiled(mesh: Any, moe: bool, L: int = 3) -> tuple[Any, Any]:
    state = a.shard_init(partial(small.init_state, moe=moe, L=L), jax.random.key(0), mesh)
    batch = a.global_batch(partial(small.rows, 0), mesh, B=small.B)
    lowered = a.shard_step(small.make_step(moe=moe), mesh).lower(state, batch, small.KEY)
    # Half the time to compile; what is parallel is decided before.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0}), state


# (sizes of the mesh, mixture of experts, arrays that travel)
MODES: list[tuple[dict[str, int], bool, dict[str, int]]] = [
    ({"data": 8}, False, {}),
    ({"fsdp": 8}, False, {}),
    ({"model": 8}, False, {}),
    ({"data": 2, "fsdp": 4}, False, {}),
    ({"data": 4, "model": 2}, False, {}),
    ({"fsdp": 4, "model": 2}, False, {}),
    ({"data": 2, "fsdp": 2, "model": 2}, False, {}),
    ({"data": 8}, True, {}),
    ({"model": 8}, True, {}),
    ({"fsdp": 2, "model": 4}, True, {}),
]


def named(mode: tuple[dict[str, int], bool, dict[str, int]]) -> str:
    return "-".join(f"{name}{size}" for name, size in mode[0].items()) + "-moe" * mode[1]


@pytest.mark.parametrize("mode", MODES, ids=named)
def test_numbers_are_those_of_one_device_and_traffic_is_what_is_declared(mode: Any) -> None:
    sizes, moe, declared = mode
    mesh = a.make_mesh(**sizes)
    losses, before, after = small.on_one_device(moe=moe)
    step_fn, state = compiled(mesh, moe)
    small.assert_close(state, before)

    def batch(step: int) -> Any:
        return a.global_batch(partial(small.rows, step), mesh, B=small.B)

    got, state = small.run(step_fn, state, batch)
    small.assert_close(got, losses)
    small.assert_close(state, after)

    found = traffic(step_fn.as_text())
    print(named(mode), totals(found), {k: v for k, v in found.items() if k[0] != "all-reduce"})
