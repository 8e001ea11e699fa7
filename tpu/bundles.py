"""What the TPU's compiler writes down about a kernel, read: its cycles and its VLIW bundles.

libtpu writes these files when it is asked to (see tpu/_cycles_child.py):
  NAME_KIND_static_llo_profile.textproto    the estimated cycles of one call
  ...-NAME-NN-packed-bundles-post-ra.txt    the program, one bundle a line, with labels and loops
  ...-NAME-NN-pre-delay_...-per-bundle-utilization.txt   units that each of these bundles uses

The last two have one line for each cycle, empty ones that wait for a result included. Their format
is not documented: what does not look as expected is an error, never a guess.
"""

import dataclasses
import re
from collections.abc import Sequence

# Names that libtpu gives the columns of units.
MXU, VPU, STORE, SPILL, FILL = "MXU", "VALU", "VSTORE", "VSTORE:SPILL", "VLOAD:FILL"
_LABELS = "LH|LB|LE|PB|PF|CT"


@dataclasses.dataclass(frozen=True)
class Profile:
    """What libtpu's static profile says of one kernel."""

    kernel: str
    cycles: int
    calls: int
    """How many equal calls the program has, compiled once."""


@dataclasses.dataclass(frozen=True)
class Units:
    """What each bundle of a program uses of each unit."""

    capacity: dict[str, int]
    used: tuple[tuple[int, ...], ...]

    def share(self, unit: str, start: int, end: int) -> float:
        """Return the share of a unit's slots that bundles start to end use, from 0 to 1."""
        column = list(self.capacity).index(unit)
        capacity = self.capacity[unit]
        # Some stores are counted above the capacity that the same file gives: full is full.
        slots = sum(min(bundle[column], capacity) for bundle in self.used[start:end])
        return slots / max(capacity * (end - start), 1)

    def count(self, unit: str, start: int, end: int) -> int:
        """Return how many operations on a unit bundles start to end hold."""
        column = list(self.capacity).index(unit)
        return sum(bundle[column] for bundle in self.used[start:end])


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles from one label of the program to the next; `loops` is how many loops they are in."""

    label: str
    start: int
    end: int
    loops: int


def read_profile(text: str) -> Profile:
    """Read a static profile.

    Args:
      text: of the file.
    Returns: `Profile`.
    Raises: ValueError: the text is no such profile.
    Example:
      >>> read_profile('hlo_op_estimate { hlo_op_name: "mm.1" estimated_cycles: 42 }')
      Profile(kernel='mm.1', cycles=42, calls=1)
    """
    name = re.search(r'\bhlo_op_name: "([^"]+)"', text)
    cycles = re.search(r"\bestimated_cycles: (\d+)", text)
    calls = re.search(r"\bnum_equivalent_hlos: (\d+)", text)
    if name is None or cycles is None:
        raise ValueError(
            f"this is no static profile as libtpu 0.0.42 to 0.0.50 writes it: {text:.80}"
        )
    return Profile(name[1], int(cycles[1]), int(calls[1]) if calls else 1)


def read_units(text: str) -> Units:
    """Read a table of the units that bundles use.

    Args:
      text: of the file.
    Returns: `Units`.
    Raises: ValueError: the text is no such table.
    Example:
      >>> units = read_units("== CAPACTIY:\\nMXU, VALU\\n4 2\\n== UTILIZATION:\\n4 1\\n0 1")
      >>> units.share("MXU", 0, 2)
      0.5
    """
    lines = text.splitlines()
    try:
        # libtpu itself writes CAPACTIY.
        capacities = next(i for i, line in enumerate(lines) if line.startswith("== CAPA"))
        begin = lines.index("== UTILIZATION:")
        names = [name.strip() for name in lines[capacities + 1].split(",")]
        numbers = [int(n) for n in lines[capacities + 2].split()]
        used = tuple(tuple(map(int, line.split())) for line in lines[begin + 1 :] if line.strip())
    except (StopIteration, ValueError, IndexError) as error:
        raise ValueError(f"this is no table of bundles' units: {text:.80}") from error
    if len(names) != len(numbers) or any(len(bundle) != len(names) for bundle in used):
        raise ValueError(f"this table of bundles' units has rows of several lengths: {text:.80}")
    return Units(dict(zip(names, numbers, strict=True)), used)


def read_blocks(text: str) -> tuple[Block, ...]:
    """Read a listing of bundles as blocks, cut at its labels and where a loop ends.

    A part of a block that is run only under a condition counts as part of it.

    Args:
      text: of the file.
    Returns: the blocks, in order, without gaps.
    Raises: ValueError: the text is no such listing, or a bundle is missing from it.
    Example:
      >>> [(b.label, b.start, b.end, b.loops) for b in read_blocks(
      ...     "     0   :  { %1 = sld }\\n   0x1 LB: > { %2 = vadd }\\n   0x2   : > { %3 = vst }")]
      [('', 0, 1, 0), ('LB', 1, 3, 1)]
    """
    bundle = re.compile(rf"^ *(0x[0-9a-f]+|0) +((?:{_LABELS})?) *:((?: *>)*) +({{ *}}|{{)")
    starts: list[tuple[str, int, int]] = []
    count = 0
    for line in text.splitlines():
        found = bundle.match(line)
        if found is None:
            continue
        if int(found[1], 16) != count:
            raise ValueError(f"the listing goes from bundle {count - 1} to {found[1]}")
        empty, loops = found[4] != "{", found[3].count(">")  # an empty bundle shows no loops
        if found[2] or not count or (not empty and loops != starts[-1][2]):
            starts.append((found[2], count, loops))
        count += 1
    if not starts:
        raise ValueError(f"this is no listing of bundles: {text:.80}")
    ends = [start for _, start, _ in starts[1:]] + [count]
    return tuple(
        Block(label, start, end, loops)
        for (label, start, loops), end in zip(starts, ends, strict=True)
    )


def inner(units: Units, blocks: Sequence[Block]) -> Block:
    """Find the block that does a kernel's work.

    Of the blocks in the most nested loops that use a matrix unit at all, the one that uses it most;
    where no loop uses one, the same by the vector units. A kernel without a loop is one block.

    Args:
      units, blocks: of one program.
    Returns: the block.
    Raises: ValueError: the two are not of one program.
    """
    if not blocks or blocks[-1].end != len(units.used):
        raise ValueError(
            f"the listing has {blocks[-1].end if blocks else 0} bundles, the table of units "
            f"{len(units.used)}"
        )

    def work(unit: str, block: Block) -> int:
        return units.count(unit, block.start, block.end)

    for unit in (MXU, VPU):
        busy = [block for block in blocks if block.loops and work(unit, block)]
        if busy:
            deepest = max(block.loops for block in busy)
            return max((b for b in busy if b.loops == deepest), key=lambda b: work(unit, b))
    return max(blocks, key=lambda block: block.end - block.start)
