"""Sum what a scheduled program takes on one device: cycles, memory traffic, transfers.

The text of an optimised module is its schedule: instructions of a computation run in the order they
stand in. Most fusions carry the compiler's estimate of their cycles. Where the compiler does not
know how often a loop runs, as where bounds come from a mask, the caller says it. Of the branches of
a conditional the least and the most are kept apart. Estimates rank programs; none was compared with
a TPU.
"""

import dataclasses
import re
from typing import Any

from tpu.hlo import Instruction, Module, size, trips
from tpu.traffic import Collective, collectives


@dataclasses.dataclass
class Cost:
    """Of one step on one device: least and most differ where a conditional decides."""

    cycles: float = 0.0
    most_cycles: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)


def cost(module: Module, unknown_trips: float = 1.0) -> Cost:
    """Sum what one step takes on one device.

    Args:
      module: from `parse`.
      unknown_trips: how often a loop runs whose count the compiler does not know.
    Returns: the sums. Bytes are of what instructions read and write in the main memory; of an array
      that a fusion only cuts a slice from, the slice.
    """
    made = Cost()
    made.cycles, made.most_cycles = _walk(module, module.entry, 1.0, unknown_trips, made)
    return made


def _walk(
    module: Module, name: str, times: float, unknown: float, made: Cost
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
            low, high = _walk(module, line.calls("body")[0], times * rounds, unknown, made)
            least, most = least + rounds * low, most + rounds * high
        elif line.opcode == "conditional":
            each = [Cost() for _ in line.calls("branch_computations")]
            spans = [
                _walk(module, branch, times, unknown, mine)
                for branch, mine in zip(line.calls("branch_computations"), each, strict=True)
            ]
            least, most = least + min(s[0] for s in spans), most + max(s[1] for s in spans)
            first = min(range(len(spans)), key=lambda i: spans[i][0])
            made.hbm_bytes += each[first].hbm_bytes
            made.collectives += each[first].collectives
        elif line.opcode == "call":
            low, high = _walk(module, line.calls("to_apply")[0], times, unknown, made)
            least, most = least + low, most + high
        else:
            least, most = least + line.cycles, most + line.cycles
            made.hbm_bytes += times * _traffic(module, line, shapes)
            if line.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]*)"', line.rest)
                label = target[1] if target else "?"
                made.custom_calls[label] = made.custom_calls.get(label, 0) + 1
        ends.append(least)
    made.collectives += collectives(module, lines, ends, times)
    return least, most


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
            origin = re.search(r'op_name="([^"]*)"', line.rest)
            key = re.sub(r"\{.*", "", line.shape)
            if n and key not in found:
                found[key] = {"bytes": n, "shape": key, "source": origin[1] if origin else ""}
    return sorted(found.values(), key=lambda x: -x["bytes"])[:count]
