"""Find the traffic between devices in a scheduled program, and the work that hides it."""

import dataclasses
import math
import re

from tpu.hlo import ARRAY, Instruction, Module, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Traffic between devices, as often as it happens in a step.

    Attributes:
      kind: one of `KINDS`.
      shapes: each array in it, as `bf16[8,128]`: what a device has in the end (all-gather) or puts
        in.
      times: executions in a step.
      group: the devices of one group, as positions in the mesh; pairs for a permute.
      covered_cycles: of other work that the schedule puts between its start and its end, each time.
      source: what in the program it came from; empty where the compiler made it up.
    """

    kind: str
    shapes: tuple[str, ...]
    times: float
    group: tuple[int, ...] | tuple[tuple[int, int], ...]
    covered_cycles: float
    source: str

    @property
    def bytes(self) -> float:
        """Of all its arrays."""
        return math.fsum(map(size, self.shapes))


def collectives(
    module: Module, lines: list[Instruction], ends: list[float], times: float
) -> list[Collective]:
    """Find the collectives that a computation starts, and the work its schedule puts beside each.

    Args:
      module: from `parse`.
      lines: of the computation, in order.
      ends: cycles up to the end of each line.
      times: how often the computation runs in a step.
    Returns: them. A transfer that several fusions carry, or that has a start and a done, is one;
      its cover runs from the first to the last. One that is a single instruction has none.
    """
    carried: dict[str, str] = {}  # by a call to another core, from its start to its done
    seen: dict[str, tuple[int, int, Instruction, dict[str, str]]] = {}
    for i, line in enumerate(lines):
        inner = [(line, {x.name: x.shape for x in lines})]
        if line.opcode.endswith("-done") and line.operands and line.operands[0] in carried:
            key = carried[line.operands[0]]
            seen[key] = (seen[key][0], i, *seen[key][2:])
        called = line.calls("to_apply") if line.opcode.endswith("-start") else []
        for name in line.calls("calls") + called:
            body = module.computations.get(name, [])
            inner += [(x, {y.name: y.shape for y in body}) for x in body]
        for one, shapes in inner:
            kind = one.opcode.removesuffix("-start").removesuffix("-done")
            if kind not in KINDS:
                continue
            key = one.operands[0] if one.opcode.endswith("-done") else _channel(one)
            if key in seen:
                first, _, start, known = seen[key]
                seen[key] = (first, i, start, known)
            else:
                seen[key] = (i, i, one, shapes)
                if one is not line and line.opcode.endswith("-start"):
                    carried[line.name] = key
                if one.opcode.endswith("-start"):
                    seen[one.name] = seen.pop(key)
    found = []
    for first, last, one, shapes in seen.values():
        # A fusion that carries a part of a transfer computes meanwhile; a bare one waits.
        before = ends[first] - (lines[first].cycles if lines[first].calls("calls") else 0.0)
        covered = max(ends[last] - before, 0.0) if last > first else 0.0
        origin = source(one) or source(lines[first])
        found.append(
            Collective(
                one.opcode.removesuffix("-start"),
                _moved(one, shapes),
                times,
                _group(one.rest),
                covered,
                origin,
            )
        )
    return found


def source(line: Instruction) -> str:
    """Read what in the program an instruction came from; empty where it does not say."""
    found = re.search(r'op_name="([^"]*)"', line.rest)
    return found[1].replace("\\'", "'") if found else ""


def _channel(line: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", line.rest)
    return f"channel {found[1]}" if found else line.name


def _moved(line: Instruction, shapes: dict[str, str]) -> tuple[str, ...]:
    kind = line.opcode.removesuffix("-start")
    arrays = _arrays(line.shape)
    if kind == "all-gather":
        halves = len(arrays) // 2 if line.opcode.endswith("-start") and len(arrays) > 1 else 0
        return arrays[halves:]
    return tuple(x for operand in line.operands for x in _arrays(shapes.get(operand, ""))) or arrays


def _arrays(shape: str) -> tuple[str, ...]:
    return tuple(f"{kind}[{dims}]" for kind, dims, _ in ARRAY.findall(shape))


def _group(rest: str) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    """Read the devices of the first group, in any of the ways they are written."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']+)'", mesh[2])
        ids, stride = [0], 1
        for axis in reversed(list(sizes)):
            if axis in named:
                ids = [j + stride * i for i in range(sizes[axis]) for j in ids]
            stride *= sizes[axis]
        return tuple(sorted(ids))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        ids = [0]
        for axis in order:
            ids = [j + i * strides[axis] for j in ids for i in range(dims[axis])]
        return tuple(ids[: int(iota[2])])
    if plain := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in plain[1].split(","))
    return ()
