"""Sum what a scheduled program takes on one device: cycles, memory traffic, transfers.

The text of an optimised module is its schedule: instructions of a computation run in the order they
stand in. Most fusions carry the compiler's estimate of their cycles. A Pallas kernel has none: it
counts with the cost that it declares, at the chip's peak rates, the least that it can take. Where
the compiler does not know how often a loop runs, as where bounds come from a mask, the caller says
it. Of the branches of a conditional the least and the most are kept apart. Estimates rank programs;
none was compared with a TPU.
"""

import dataclasses
import re
from typing import Any

from tpu.hlo import Instruction, Module, size, trips
from tpu.topology import Generation
from tpu.traffic import Collective, collectives, source


@dataclasses.dataclass
class Cost:
    """Of one step on one device: least and most differ where a conditional decides."""

    cycles: float = 0.0
    most_cycles: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0
    priced_kernels: int = 0
    """Pallas kernels in the program that declare a cost."""
    unpriced_kernels: int = 0
    """Those that declare none: their time is in no sum."""


def cost(module: Module, generation: Generation, unknown_trips: float = 1.0) -> Cost:
    """Sum what one step takes on one device.

    Args:
      module: from `parse`.
      generation: whose rates the declared costs of kernels are divided by.
      unknown_trips: how often a loop runs whose count the compiler does not know.
    Returns: the sums. Bytes are of what instructions read and write in the main memory; of an array
      that a fusion only cuts a slice from, the slice.
    """
    made = Cost()
    made.cycles, made.most_cycles = _walk(
        module, module.entry, 1.0, unknown_trips, generation, made
    )
    return made


def _walk(
    module: Module, name: str, times: float, unknown: float, chip: Generation, made: Cost
) -> tuple[float, float]:
    """Walk a computation; return its cycles, at least and at most, of one execution."""
    lines = module.computations[name]
    shapes = {line.name: line.shape for line in lines}
    least = most = 0.0
    ends: list[float] = []  # cycles up to the end of each line
    for line in lines:
        if line.opcode == "while":
            count = trips(module, line)
            if count is None:
                made.unknown_loops += 1
            rounds = unknown if count is None else count
            low, high = _walk(module, line.calls("body")[0], times * rounds, unknown, chip, made)
            least, most = least + rounds * low, most + rounds * high
        elif line.opcode == "conditional":
            each = [Cost() for _ in line.calls("branch_computations")]
            spans = [
                _walk(module, branch, times, unknown, chip, mine)
                for branch, mine in zip(line.calls("branch_computations"), each, strict=True)
            ]
            least, most = least + min(s[0] for s in spans), most + max(s[1] for s in spans)
            first = min(range(len(spans)), key=lambda i: spans[i][0])
            made.hbm_bytes += each[first].hbm_bytes
            made.collectives += each[first].collectives
            for mine in each:
                made.unknown_loops += mine.unknown_loops
                made.priced_kernels += mine.priced_kernels
                made.unpriced_kernels += mine.unpriced_kernels
        elif line.opcode == "call":
            low, high = _walk(module, line.calls("to_apply")[0], times, unknown, chip, made)
            least, most = least + low, most + high
        else:
            cycles = line.cycles + _kernels(module, line, chip, made)
            least, most = least + cycles, most + cycles
            made.hbm_bytes += times * _traffic(module, line, shapes)
        ends.append(least)
    made.collectives += collectives(module, lines, ends, times)
    return least, most


def _kernels(module: Module, line: Instruction, chip: Generation, made: Cost) -> float:
    """Count the Pallas kernels that a line runs; return the cycles that they take at least."""
    called = line.calls("calls") + line.calls("to_apply")
    inside = [x for name in called for x in module.computations.get(name, ())]
    total = 0.0
    for one in (line, *inside):
        if one.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in one.rest:
            continue
        flops, moved = declared(one)
        if flops or moved:
            made.priced_kernels += 1
            seconds = max(flops / chip.device_bf16_flops, moved / chip.device_hbm_bytes_per_s)
            total += seconds * chip.clock_hz
        else:
            made.unpriced_kernels += 1
    return total


def declared(line: Instruction) -> tuple[float, float]:
    """Read the operations and bytes that a kernel's `cost_estimate` declares, of a whole call.

    Args:
      line: a custom call.
    Returns: both; 0 for what it does not declare.
    """
    written = re.search(r'"cost_estimate":\{([^}]*)\}', line.rest)
    said = dict(re.findall(r'"(\w+)":"?(\d+)', written[1])) if written else {}
    return float(said.get("flops", 0)), float(said.get("bytes_accessed", 0))


_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "copy-done", "slice-done", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "async-done", "async-update", "opt-barrier", "iota",
}  # fmt: skip


def _traffic(module: Module, line: Instruction, shapes: dict[str, str]) -> float:
    """Bytes that an instruction moves from and to the main memory."""
    if line.opcode in _FREE:
        return 0.0
    if line.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        return 2 * size(line.shape, hbm_only=True)
    if line.opcode == "dynamic-update-slice":
        return 2 * size(shapes.get(line.operands[1], ""), hbm_only=True)
    body = module.computations.get((line.calls("calls") or [""])[0], [])
    cut = _cut_parameters(body)
    total = 0.0
    for i, operand in enumerate(line.operands):
        whole = size(shapes.get(operand, ""), hbm_only=True)
        total += min(whole, cut[i]) if i in cut else whole
    root = body[-1] if body else line
    written = size(line.shape, hbm_only=True)
    if root.opcode == "dynamic-update-slice":  # in place
        inside = {inner.name: inner.shape for inner in body}
        written = min(written, size(inside.get(root.operands[1], "")))
    return total + written


def _cut_parameters(body: list[Instruction]) -> dict[int, float]:
    """Parameters of a fusion that only slices are read of or written to, and their bytes."""
    places = {
        line.name: int(line.rest.split(",")[0].rstrip(") ") or 0)
        for line in body
        if line.opcode == "parameter"
    }
    used: dict[int, float] = {}
    whole: set[int] = set()
    shapes = {line.name: line.shape for line in body}
    for line in body:
        for k, operand in enumerate(line.operands):
            if operand not in places:
                continue
            if line.opcode in ("dynamic-slice", "slice", "gather") and k == 0:
                used[places[operand]] = used.get(places[operand], 0.0) + size(line.shape)
            elif line.opcode == "dynamic-update-slice" and k == 0:
                update = size(shapes.get(line.operands[1], ""))
                used[places[operand]] = used.get(places[operand], 0.0) + update
            else:
                whole.add(places[operand])
    return {place: n for place, n in used.items() if place not in whole}


def read_error(text: str) -> dict[str, float] | None:
    """Read how much memory a program wanted, and how much there is, from the compiler's error.

    Args:
      text: of the exception.
    Returns: {"used": bytes, "limit": bytes}; None if it is another error.
    Example:
      >>> read_error("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.")["limit"]
      16911433728.0
      >>> read_error("HLO temporaries (577.29G) exceeds available HBM (15.75G).")["used"] > 6e11
      True
    """
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text) or re.search(
        r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text
    )
    if not found:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return {
        "used": float(found[1]) * unit[found[2]],
        "limit": float(found[3]) * unit[found[4]],
    }


def largest(module: Module, count: int = 5) -> list[dict[str, Any]]:
    """List the largest arrays that instructions make in the main memory.

    Args:
      module: from `parse`.
      count: how many.
    Returns: dicts of bytes, shape and source; one for each shape.
    """
    found: dict[str, dict[str, Any]] = {}
    for lines in module.computations.values():
        for line in lines:
            if line.opcode in _FREE or line.shape.startswith("("):
                continue
            n = size(line.shape, hbm_only=True)
            key = re.sub(r"\{.*", "", line.shape)
            if n and key not in found:
                found[key] = {"bytes": n, "shape": key, "source": source(line)}
    return sorted(found.values(), key=lambda x: -x["bytes"])[:count]
