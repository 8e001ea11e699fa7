"""Compile one kernel for one TPU and write down what is known of it; a process of its own.

Command: python -m tpu._cycles_child REQUEST.json, with the environment that tpu.cycles makes. The
request names the kernel, its options, the topology, and the file for the answer. The compiler may
end this process without a word: what was found before is in the file then.
"""

import importlib
import inspect
import json
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core

LARGEST_GRID = 4_000_000  # steps; beyond, bytes are a lower bound


class Usage(ValueError):
    """The request itself is wrong, whatever the block sizes."""


def load(name: str) -> Callable[..., Any]:
    """Find the function that makes a kernel: `module:function`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise Usage(
            f"--kernel={name}: cannot import {module} ({type(error).__name__}: {error}); it must "
            f"be importable from this folder"
        ) from error
    if not callable(found):
        raise Usage(f"--kernel={name}: module {module} has no function {attribute!r}")
    return found


def build(name: str, options: dict[str, Any]) -> tuple[Callable[..., Any], tuple, int | None]:
    """Call the user's function: what to compile, its arguments, runs of the inner block."""
    make = load(name)
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise Usage(
                f"--sweep: {name} has no option {option!r}; it takes {', '.join(known) or 'none'}"
            )
    missing = [p for p, v in known.items() if v.default is v.empty and p not in options]
    if missing:
        raise Usage(f"--sweep: {name} needs {', '.join(missing)}, as in --sweep={missing[0]}=512")
    made = make(**options)
    if not (isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0])):
        raise Usage(f"{name} must return (function, abstract arguments), got {type(made).__name__}")
    runs = made[2] if len(made) == 3 else None
    if runs is not None and not (isinstance(runs, int) and runs > 0):
        raise Usage(f"{name} returned runs={runs!r}; it must be a positive int")
    if not isinstance(made[1], tuple | list):
        raise Usage(f"{name} must return its abstract arguments as a tuple")
    return made[0], tuple(made[1]), runs


def _inner(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def pallas_calls(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr, and of those inside it, that are Pallas kernels."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_inner):
            if _inner(value):
                yield from pallas_calls(getattr(value, "jaxpr", value))


def describe(equation: Any) -> dict[str, Any]:
    """Say of a Pallas call what its blocks tell: bytes moved, inputs that the compiler cannot see.

    A block is moved when the index of the next step differs from the last one's, as Pallas's
    pipeline does it. Where index maps depend on data, every array is counted once: a lower bound.
    """
    grid = equation.params["grid_mapping"]
    static = grid.num_index_operands == 0 and grid.num_dynamic_grid_bounds == 0
    moved, exact = 0, static
    for block in grid.block_mappings:
        array = block.array_aval
        width = array.dtype.itemsize
        space = str(getattr(block.transformed_block_aval, "memory_space", "")).lower()
        steps = math.prod(grid.grid) if static else 0
        if not static or "any" in space or "hbm" in space or steps > LARGEST_GRID:
            moved, exact = moved + array.size * width, False
            continue
        sizes = [
            getattr(d, "block_size", d if isinstance(d, int) else 1) for d in block.block_shape
        ]
        index = block.index_map_jaxpr
        ids = np.indices(grid.grid, dtype=np.int32).reshape(len(grid.grid), steps)
        if steps > 1 and ids.size:
            parts = jax.vmap(core.jaxpr_as_fun(index))(*ids)
            places = np.stack([np.broadcast_to(part, steps) for part in parts])
            fetches = 1 + int((np.diff(places, axis=1) != 0).any(axis=0).sum())
        else:
            fetches = 1
        moved += fetches * math.prod(sizes) * width
    return {
        "name": equation.params["name"] or "",
        "bytes": moved,
        "bytes_exact": exact,
        "reads_scalars": not static,
    }


def kernels(hlo: str) -> list[str]:
    """Return the names of the Pallas kernels in an optimised program."""
    return re.findall(
        r'%([\w.<>-]+) = [^\n]*? custom-call\([^\n]*custom_call_target="tpu_custom_call"', hlo
    )


def main(request: dict[str, Any]) -> None:
    """Answer a request."""
    answer: dict[str, Any] = {}

    def write() -> None:
        pathlib.Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")

    try:
        fn, arguments, answer["runs"] = build(request["kernel"], request["options"])
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=request["topology"], **request["described"]
        )
        mesh = jax.make_mesh(
            (1,), ("x",), devices=topology.devices[:1], axis_types=(jax.sharding.AxisType.Auto,)
        )
        place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
        )
        with jax.set_mesh(mesh):  # by which code that asks for the backend sees a TPU
            traced = jax.jit(fn).trace(*arguments)
        # Outside the mesh, for index maps are evaluated, and there is no TPU to do it.
        answer["calls"] = [describe(call) for call in pallas_calls(traced.jaxpr.jaxpr)]
        if not answer["calls"]:
            raise Usage(f"--kernel={request['kernel']}: no Pallas kernel is in what it returns")
        write()
        with jax.set_mesh(mesh):
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        answer["kernels"] = kernels(compiled.as_text() or "")
    except Usage as error:
        answer["usage"] = str(error)
    except Exception as error:  # whatever the compiler or the user's function raises
        traceback.print_exc()
        answer["error"] = f"{type(error).__name__}: {error}"
    write()


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
