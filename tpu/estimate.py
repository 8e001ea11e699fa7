"""From what the compiler made to memory, times and rates of a training step on a slice.

A step's time lies between two bounds. The least: the longest of computing (estimated cycles over
the clock), memory (bytes over bandwidth) and the busiest links, as if all overlapped. The most:
their sum, as if nothing did. Between them the estimate: the longer of computing and memory, and on
top the transfers that the schedule does not cover. A collective moves over the links of the
dimensions of the torus that its group spans: two a dimension where it is a closed ring, else one,
shared with the other groups that lie interleaved on them. None of this was compared with a TPU.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from tpu.hlo import size
from tpu.topology import Slice
from tpu.traffic import Collective


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one collective takes in a step, seconds."""

    kind: str
    axes: str
    shapes: tuple[str, ...]
    times: float
    seconds: float
    exposed: float
    source: str

    @property
    def bytes(self) -> float:
        """Of all its arrays."""
        return math.fsum(map(size, self.shapes))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Times of one step, in seconds, and what follows from them."""

    compute: float
    memory: float
    transfers: dict[str, float]
    exposed: float
    least: float
    step: float | None
    most: float | None
    mfu: float | None
    tokens_per_s: float | None
    dollars_per_billion_tokens: float | None


def links(group: Sequence[int], places: Sequence[Sequence[int]], slice_: Slice) -> float:
    """Count the links that a group of devices has for itself, one way.

    Args:
      group: positions in the mesh.
      places: of each position, its coordinates in the torus and its core.
      slice_: for its size and its rings.
    Returns: links; 6 for a group within one chip, as the pages on TPU7x say of its two halves.
    Example:
      >>> from tpu.topology import find
      >>> links(range(4), [(0, y, 0, 0) for y in range(4)], find("v5e-16"))
      1.0
    """
    total = 0.0
    for axis, extent in enumerate(slice_.shape):
        seen = sorted({places[i][axis] for i in group})
        if len(seen) < 2:
            continue
        stride = min(b - a for a, b in itertools.pairwise(seen))
        closed = slice_.wrap[axis] and len(seen) * stride == extent
        total += (2.0 if closed else 1.0) / stride
    return total or 6.0


def transfer(found: Collective, places: Any, axes: dict[str, int], slice_: Slice) -> Transfer:
    """Work out what a collective takes.

    Args:
      found: from the schedule.
      places: of each position in the mesh, its coordinates and its core.
      axes: sizes of the mesh by name, in order.
      slice_: the target.
    Returns: times; exposed is what the schedule's work beside it does not cover.
    """
    link = slice_.generation.ici_bytes_per_s
    if found.kind == "collective-permute":
        pairs = [(a, b) for a, b in found.group if a != b]  # type: ignore[misc]
        hops = max((_distance(places[a], places[b], slice_) for a, b in pairs), default=0)
        members = sorted({i for pair in pairs for i in pair})
        seconds = found.bytes * hops / link
    else:
        members = list(found.group) or list(range(len(places)))  # type: ignore[arg-type]
        n, ways = len(members), links(members, places, slice_)  # type: ignore[arg-type]
        share = (n - 1) / n
        if found.kind == "all-reduce":
            share *= 2
        elif found.kind == "all-to-all":  # the middle of a line or ring carries the most
            share = n / (8 if ways >= 2 else 4)
        seconds = found.bytes * share / (ways * link)
    hidden = found.covered_cycles / slice_.generation.clock_hz
    return Transfer(
        found.kind,
        _axes_of(members, axes),  # type: ignore[arg-type]
        found.shapes,
        found.times,
        seconds * found.times,
        max(seconds - hidden, 0.0) * found.times,
        found.source,
    )


def _distance(a: Sequence[int], b: Sequence[int], slice_: Slice) -> int:
    hops = 0
    for axis, extent in enumerate(slice_.shape):
        straight = abs(a[axis] - b[axis])
        hops += min(straight, extent - straight) if slice_.wrap[axis] else straight
    return max(hops, 1)


def _axes_of(members: Sequence[int], axes: dict[str, int]) -> str:
    """Name the axes of the mesh that a group's members differ in."""
    names, strides = list(axes), {}
    stride = 1
    for name in reversed(names):
        strides[name], stride = stride, stride * axes[name]
    varied = [name for name in names if len({i // strides[name] % axes[name] for i in members}) > 1]
    return "·".join(varied) or "none"


def estimate(
    facts: dict[str, Any],
    transfers: Sequence[Transfer],
    slice_: Slice,
    dollars_per_chip_hour: float | None = None,
) -> Estimate:
    """Put a step's times together.

    Args:
      facts: of the compiled program: cycles, most_cycles, hbm_bytes, model_flops, tokens, and how
        many Pallas kernels declare no cost.
      transfers: all of them.
      slice_: the target.
      dollars_per_chip_hour: None leaves the cost out.
    Returns: the times. Utilisation counts the model's operations, without what is computed twice;
      above 1, which cannot be, it is None. With a kernel of unknown cost, or with nothing that
      takes time, only the least is known.
    """
    made = slice_.generation
    compute = facts["cycles"] / made.clock_hz
    memory = facts["hbm_bytes"] / made.device_hbm_bytes_per_s
    by_axis: dict[str, float] = {}
    for one in transfers:
        by_axis[one.axes] = by_axis.get(one.axes, 0.0) + one.seconds
    exposed = math.fsum(one.exposed for one in transfers)
    step = max(compute, memory) + exposed
    least = min(max([compute, memory, *by_axis.values()]), step)
    if facts["unpriced_kernels"] or not step:
        return Estimate(compute, memory, by_axis, exposed, least, None, None, None, None, None)
    most = facts["most_cycles"] / made.clock_hz + memory + math.fsum(by_axis.values())
    peak = slice_.devices * made.device_bf16_flops
    mfu = facts["model_flops"] / (peak * step)
    tokens = facts["tokens"] / step
    cost = None
    if dollars_per_chip_hour is not None:
        cost = dollars_per_chip_hour * slice_.chips / 3600 / tokens * 1e9
    return Estimate(
        compute,
        memory,
        by_axis,
        exposed,
        least,
        step,
        max(most, step),
        mfu if mfu <= 1 else None,
        tokens,
        cost,
    )
