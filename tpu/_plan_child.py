"""Compile one step for one slice and one mesh; run by tpu.plan, in a process of its own.

Command: python -m tpu._plan_child REQUEST.json RESULT.json
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from jax_attn import make_mesh
from tpu import flops, schedule
from tpu.hlo import parse
from tpu.topology import Slice, find

_HOST = re.compile(r' (infeed|outfeed|send|recv)\(|custom_call_target="([^"]*callback[^"]*)"')


def load(step: str) -> Callable[..., Any]:
    """Find the function of "module:function".

    Args:
      step: as given.
    Returns: it.
    Raises: ValueError: there is no such module or function.
    """
    module, _, name = step.partition(":")
    sys.path.insert(0, "")  # a researcher's own file lies where the command is given
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--step={step}: {error}") from None
    except AttributeError:
        raise ValueError(f"--step={step}: {module} has no function {name}") from None


def describe_slice(slice_: Slice) -> Any:
    """Ask libtpu for the devices of a slice that nobody has rented."""
    extra: dict[str, Any] = (
        {"chip_config_name": "megacore"} if slice_.generation.name == "v4" else {}
    )
    if slice_.chips_per_host == 8:
        extra["chips_per_host_bounds"] = [2, 4, 1]
    return topologies.get_topology_desc(platform="tpu", topology_name=slice_.compiler_name, **extra)


def build(request: dict[str, Any], slice_: Slice) -> tuple[Any, Any, Any, Any, int]:
    """Call the step's function for the mesh of a slice that nobody has rented."""
    described = describe_slice(slice_)
    function = load(request["step"])
    mesh = make_mesh(**request["mesh"], devices=described.devices)
    takes = inspect.signature(function).parameters
    options = {name: value for name, value in request["options"].items() if value is not None}
    if unknown := [name for name in options if name not in takes]:
        raise ValueError(
            f"{request['step']} takes no {', '.join(unknown)}: it has {', '.join(takes)}"
        )
    made = function(mesh, **options)
    if not isinstance(made, tuple) or len(made) != 3 or not hasattr(made[0], "trace"):
        raise ValueError(
            f"{request['step']} must return (step, arguments, tokens): a jitted step, a tuple of "
            f"its abstract arguments, tokens a step"
        )
    plain = None
    if "remat" in takes and options.get("remat") != "":
        plain = function(mesh, **{**options, "remat": ""})
    return (mesh, *made[:2], plain, made[2])


def describe(arguments: Any) -> list[dict[str, Any]]:
    """List what a device holds of each argument: the first argument is the state."""
    rows = []
    for i, argument in enumerate(arguments):
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]:
            place = getattr(leaf, "sharding", None)
            axes: list[str] = []
            for entry in getattr(place, "spec", ()) or ():
                axes += [entry] if isinstance(entry, str) else list(entry or ())
            rows.append(
                {
                    "path": jax.tree_util.keystr(path) or f"argument {i}",
                    "role": "state" if i == 0 else "input",
                    "shape": list(place.shard_shape(leaf.shape) if place else leaf.shape),
                    "itemsize": getattr(leaf.dtype, "itemsize", 4),
                    "axes": axes,
                }
            )
    return rows


def compiled_facts(lowered: Any, iterations: list[float]) -> dict[str, Any]:
    """Compile, and read off what the compiler made; or how much memory it wanted."""
    began = time.perf_counter()
    try:
        program = lowered.compile()
    except Exception as error:
        wanted = schedule.read_error(str(error))
        if wanted is None:
            raise
        shown = re.findall(r"Size: ([\d.]+[KMGT]).*?(?:\n.*?)?Shape: ([^\n]*)", str(error))
        rows = [
            {"bytes": _unit(n), "shape": shape.split("{")[0], "source": ""} for n, shape in shown
        ]
        return {"fits": False, "compile_s": time.perf_counter() - began, **wanted,
                "largest": rows[:5]}  # fmt: skip
    text, memory = program.as_text() or "", program.memory_analysis()
    module = parse(text)
    mean = math.fsum(iterations) / len(iterations) if iterations else 1.0
    cost = schedule.cost(module, mean)
    # What the compiler holds against its limit. temp_size_in_bytes is more: it takes memory that
    # arguments give back as if it were new. Releases of jaxlib before 0.12 have the peak alone.
    used = getattr(memory, "total_allocation_bytes", memory.peak_memory_in_bytes)
    return {
        "fits": True,
        "compile_s": time.perf_counter() - began,
        "used": used,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": used - memory.argument_size_in_bytes,
        "returned_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "largest": schedule.largest(module),
        "cycles": cost.cycles,
        "most_cycles": cost.most_cycles,
        "hbm_bytes": cost.hbm_bytes,
        "unknown_loops": cost.unknown_loops,
        "unknown_trips": mean,
        "custom_calls": cost.custom_calls,
        "collectives": [dataclasses.asdict(one) for one in cost.collectives],
        "host_transfers": sorted({a or b for a, b in _HOST.findall(text)}),
    }


def _unit(text: str) -> float:
    return float(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[text[-1]]


def plan(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks: trace, count, compile or take from the cache."""
    import libtpu  # pyright: ignore[reportMissingImports]

    slice_ = find(request["target"])
    began = time.perf_counter()
    mesh, step, arguments, plain, tokens = build(request, slice_)
    traced = step.trace(*arguments)
    counted = flops.count(traced.jaxpr)
    model = flops.count(plain[0].trace(*plain[1]).jaxpr).flops if plain else counted.flops
    lowered = traced.lower()
    version = getattr(libtpu, "__version__", "")
    text = lowered.as_text()
    name = [text, version, jax.__version__, slice_.compiler_name, os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", "")]  # fmt: skip
    # What reads the program is part of the result too.
    for source in ("_plan_child.py", "hlo.py", "schedule.py", "traffic.py", "flops.py"):
        name.append(pathlib.Path(__file__).with_name(source).read_text(encoding="utf-8"))
    digest = hashlib.sha256("\n".join(name).encode()).hexdigest()[:32]
    kept = pathlib.Path(request["cache"]) / f"{digest}.json"
    if kept.exists():
        made = {**json.loads(kept.read_text(encoding="utf-8")), "cached": True}
    else:
        made = {**compiled_facts(lowered, counted.iterations), "cached": False}
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(made), encoding="utf-8")
        part.replace(kept)
    return {
        **made,
        "limit": slice_.generation.usable_hbm_bytes,
        "flops": counted.flops,
        "narrow_flops": counted.narrow,
        "model_flops": model,
        "notes": counted.notes,
        "tokens": tokens,
        "arguments": describe(arguments),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "places": [
            [*device.coords, getattr(device, "core_on_chip", 0)] for device in mesh.devices.flat
        ],
        "trace_s": time.perf_counter() - began - (0 if made["cached"] else made["compile_s"]),
        "libtpu": version,
        "jax": jax.__version__,
    }


def main() -> int:
    """Answer one request."""
    asked, answer = map(pathlib.Path, sys.argv[1:3])
    try:
        result = plan(json.loads(asked.read_text(encoding="utf-8")))
    except ValueError as error:
        # JAX adds a page about its traceback to errors that it passes on.
        said = str(error).split("\n--------------------")[0].splitlines()
        result = {"refused": said[0] if said else repr(error)}
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    answer.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
