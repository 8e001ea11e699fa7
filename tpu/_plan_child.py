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
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

import jax_attn
from tpu import flops, schedule
from tpu.hlo import parse
from tpu.topology import Slice, find

# Where an error was raised says more of the user's step than of these.
_NOT_THE_USERS = (
    pathlib.Path(__file__).parent,
    pathlib.Path(jax_attn.__file__).parent,
    pathlib.Path(jax.__file__).parent.parent,  # where packages are installed
    pathlib.Path(os.__file__).parent,
)
_HOST = re.compile(r' (infeed|outfeed|send|recv)\(|custom_call_target="([^"]*callback[^"]*)"')


class Wrong(ValueError):
    """An argument of the command that means nothing for this step."""


def load(step: str) -> Callable[..., Any]:
    """Find the function of "module:function".

    Args:
      step: as given.
    Returns: it.
    Raises: Wrong: there is no such module or function.
    """
    module, _, name = step.partition(":")
    sys.path.insert(0, "")  # a researcher's own file lies where the command is given
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Wrong(f"--step={step}: {error}") from error
    if not hasattr(found, name):
        beside = pathlib.Path(found.__file__ or "").parent.glob("*.py")
        there = sorted(p.stem for p in beside if f"\ndef {name}(" in p.read_text("utf-8"))
        named = name == "plan_step" and there  # what --experiment looks for
        hint = f"; beside it these have one: {', '.join(there)}" if named else ""
        raise Wrong(f"--step={step}: {module} has no function {name}{hint}")
    return getattr(found, name)


def describe_slice(slice_: Slice) -> Any:
    """Ask libtpu for the devices of a slice that nobody has rented."""
    extra: dict[str, Any] = (
        {"chip_config_name": "megacore"} if slice_.generation.name == "v4" else {}
    )
    if slice_.chips_per_host == 8:
        extra["chips_per_host_bounds"] = [2, 4, 1]
    return topologies.get_topology_desc(platform="tpu", topology_name=slice_.compiler_name, **extra)


class Built(NamedTuple):
    """What the step's function returned for a mesh."""

    mesh: Any
    step: Any
    arguments: tuple[Any, ...]
    plain: tuple[Any, ...] | None
    """The step and its arguments without rematerialisation, if the function can be asked."""
    tokens: int
    batch: int | None
    """Its rows, so far as they can be known."""
    takes: list[str]
    """The parameters of the function."""


def build(request: dict[str, Any], slice_: Slice) -> Built:
    """Call the step's function for the mesh of a slice that nobody has rented."""
    described = describe_slice(slice_)
    function = load(request["step"])
    mesh = jax_attn.make_mesh(**request["mesh"], devices=described.devices)
    takes = inspect.signature(function).parameters
    options = {name: value for name, value in request["options"].items() if value is not None}
    if unknown := [name for name in options if name not in takes]:
        raise Wrong(f"{request['step']} takes no {', '.join(unknown)}: it has {', '.join(takes)}")
    made = function(mesh, **options)
    if not isinstance(made, tuple) or len(made) != 3 or not hasattr(made[0], "trace"):
        raise ValueError(
            f"{request['step']} must return (step, arguments, tokens): a jitted step, a tuple of "
            f"its abstract arguments, tokens a step"
        )
    step, arguments, tokens = made
    if isinstance(tokens, bool) or not hasattr(tokens, "__index__") or tokens < 1:
        raise ValueError(
            f"{request['step']} must return tokens a step as a whole number of at least 1, "
            f"got {tokens!r}"
        )
    plain = None
    if "remat" in takes and options.get("remat") != "":
        plain = function(mesh, **{**options, "remat": ""})
    batch = options.get("batch") or _rows(arguments)
    return Built(mesh, step, arguments, plain, int(tokens), batch, list(takes))


def _rows(arguments: Any) -> int | None:
    """Find the rows of the second argument, the batch: the first size of all its arrays."""
    leaves = jax.tree.leaves(arguments[1:2])
    sizes = {leaf.shape[0] if getattr(leaf, "shape", ()) else 0 for leaf in leaves}
    return sizes.pop() or None if len(sizes) == 1 else None


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


def compiled_facts(lowered: Any, iterations: list[float], slice_: Slice) -> dict[str, Any]:
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
    cost = schedule.cost(module, slice_.generation, mean)
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
        "priced_kernels": cost.priced_kernels,
        "unpriced_kernels": cost.unpriced_kernels,
        "collectives": [dataclasses.asdict(one) for one in cost.collectives],
        "host_transfers": sorted({a or b for a, b in _HOST.findall(text)}),
    }


def read_kept(kept: pathlib.Path) -> dict[str, Any] | None:
    """Read what was kept of an earlier compile; None if it cannot be used, and so is made again."""
    try:
        facts = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or not {"fits", "used", "largest", "compile_s"} <= facts.keys():
        return None
    return {**facts, "cached": True}


def keep(kept: pathlib.Path, facts: dict[str, Any]) -> str:
    """Keep what a compile said; return why it could not be kept, or nothing."""
    part = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(facts), encoding="utf-8")
        part.replace(kept)
    except OSError as error:
        return str(error)
    return ""


def _unit(text: str) -> float:
    return float(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[text[-1]]


def plan(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks: trace, count, compile or take from the cache."""
    import libtpu  # pyright: ignore[reportMissingImports]

    slice_ = find(request["target"])
    began = time.perf_counter()
    made = build(request, slice_)
    mesh, arguments, plain = made.mesh, made.arguments, made.plain
    traced = made.step.trace(*arguments)
    counted = flops.count(traced.jaxpr)
    model = flops.count(plain[0].trace(*plain[1]).jaxpr).flops if plain else counted.flops
    lowered = traced.lower()
    version = getattr(libtpu, "__version__", "")
    text = lowered.as_text()
    name = [text, version, jax.__version__, slice_.compiler_name, os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", "")]  # fmt: skip
    # What reads the program is part of the result too.
    for source in ("_plan_child", "flops", "hlo", "schedule", "topology", "traffic"):
        source += ".py"
        name.append(pathlib.Path(__file__).with_name(source).read_text(encoding="utf-8"))
    digest = hashlib.sha256("\n".join(name).encode()).hexdigest()[:32]
    kept = pathlib.Path(request["cache"]) / f"{digest}.json"
    facts = read_kept(kept)
    if facts is None:
        facts = compiled_facts(lowered, counted.iterations, slice_)
        facts |= {"cached": False, "not_kept": keep(kept, facts)}
    return {
        **facts,
        "limit": slice_.generation.usable_hbm_bytes,
        "flops": counted.flops,
        "narrow_flops": counted.narrow,
        "model_flops": model,
        "notes": counted.notes,
        "tokens": made.tokens,
        "batch": made.batch,
        "takes": made.takes,
        "arguments": describe(arguments),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "places": [
            [*device.coords, getattr(device, "core_on_chip", 0)] for device in mesh.devices.flat
        ],
        "trace_s": time.perf_counter() - began - (0 if facts["cached"] else facts["compile_s"]),
        "libtpu": version,
        "jax": jax.__version__,
    }


def explained(error: Exception) -> str:
    """Write the first line of an error, and the line of the user's file that it came from."""
    # JAX adds a page about its traceback to errors that it passes on.
    said = str(error).split("\n--------------------")[0].strip().splitlines()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(folder in pathlib.Path(frame.filename).parents for folder in _NOT_THE_USERS)
        and not frame.filename.startswith("<")
    ]
    text = said[0][:300] if said else (frames[-1].line or "" if frames else "no message")
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return text + where


def main() -> int:
    """Answer one request."""
    asked, answer = map(pathlib.Path, sys.argv[1:3])
    try:
        result = plan(json.loads(asked.read_text(encoding="utf-8")))
    except Wrong as error:
        result = {"refused": explained(error), "wrong": True}
    except ValueError as error:
        result = {"refused": explained(error)}
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {explained(error)}"}
    answer.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
