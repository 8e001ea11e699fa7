"""Read an optimised HLO module: its computations, instructions, shapes and trip counts.

A loop's trip count is the constant that its condition compares with; a loop whose bounds come from
data or from a mask has none.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "bf16": 16, "tuple": 0, "opaque": 0}
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def cycles(self) -> float:
        """What the compiler estimates; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.rest)
        return max(float(found[1]), 0.0) if found else 0.0

    def calls(self, role: str) -> list[str]:
        """Names of computations in a role such as `body`."""
        return [
            name.strip().lstrip("%")
            for found, names in _CALLED.findall(self.rest)
            if found == role
            for name in names.strip("{}").split(",")
        ]


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each a list of instructions in the order of the schedule."""

    entry: str
    computations: dict[str, list[Instruction]]


def parse(text: str) -> Module:
    """Read a module's text, from `compiled.as_text()`.

    Args:
      text: of an optimised, scheduled module.
    Returns: its computations.
    Raises: ValueError: no entry computation.
    Example:
      >>> text = "ENTRY %main (p: f32[8]) -> f32[8] {\\n  ROOT %p = f32[8]{0} parameter(0)\\n}"
      >>> parse(text).computations["main"][0].opcode
      'parameter'
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (made := _instruction(line)):
            current.append(made)
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no optimised HLO module")
    return Module(entry, computations)


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if not named:
        return None
    at = named.end()
    end = _balanced(line, at) if line[at] == "(" else line.find(" ", at)
    shape, opened = line[at:end], line.find("(", end)
    if opened < 0:
        return None
    closed = _balanced(line, opened)
    operands = tuple(re.findall(r"%([\w.-]+)", line[opened:closed]))
    rest = line[opened + 1 : closed - 1] + line[closed:]
    return Instruction(named[1], shape, line[end:opened].strip(), operands, rest)


def _balanced(line: str, at: int) -> int:
    """Find the end of the parenthesis that opens at a place."""
    depth = 0
    for i in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i + 1
    return len(line)


def size(shape: str, *, hbm_only: bool = False) -> float:
    """Sum the bytes of a shape's arrays.

    Args:
      shape: as written, a tuple too: `(f32[2,3]{1,0}, bf16[8]{0:S(1)})`.
      hbm_only: leaves out what lies in a memory space of its own (S(1) is the vector memory).
    Returns: bytes, without the padding of tiles.
    Example:
      >>> size("(f32[2,3]{1,0}, bf16[8]{0:S(1)})"), size("bf16[8]{0:S(1)}", hbm_only=True)
      (40.0, 0)
    """
    total = 0.0
    for kind, dims, layout in ARRAY.findall(shape):
        if hbm_only and re.search(r"S\([1-9]", layout):
            continue
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits[0]) if digits else 0
        total += bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total or 0


def trips(module: Module, loop: Instruction) -> int | None:
    """Find how often a loop runs; None if its condition compares with no constant.

    Args:
      module: where the loop is from.
      loop: a `while` instruction that counts up from 0 by 1, as those of scans do.
    Returns: the count.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    (condition,) = loop.calls("condition")
    found = {
        int(value[0])
        for line in _with_called(module, condition)
        if line.opcode == "constant" and (value := re.match(r"-?\d+", line.rest))
    }
    return found.pop() if len(found) == 1 else None


def _with_called(module: Module, name: str) -> Iterator[Instruction]:
    for line in module.computations.get(name, ()):
        yield line
        for inner in line.calls("calls") + line.calls("to_apply"):
            yield from _with_called(module, inner)
