"""The tables and the JSON of tpu.cycles."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tpu import topology

if TYPE_CHECKING:
    from tpu.cycles import Config, Point

# What a narrow terminal goes without, the first first.
SPARE = ("bundles", "store", "bound by", "inner", "VPU", "spill", "kernel", "MXU")
HEAD = ("cycles", "us", "bound by", "bundles", "inner", "MXU", "VPU", "store", "spill")


def label(point: "Point") -> str:
    """Name a point: `v5e block_q=512`."""
    return " ".join([point.target, *(f"{name}={value}" for name, value in point.options.items())])


def rows(points: Sequence["Point"]) -> list[list[str]]:
    """Return the table of one generation's points, as text, its head first."""
    options = list(points[0].options)
    several = any(len(point.kernels) > 1 for point in points)
    made = [["rank", *options, *(["kernel"] if several else []), *HEAD]]
    rank = 0
    for point in points:
        rank += point.seconds is not None
        first = ["-" if point.seconds is None else str(rank), *map(str, point.options.values())]
        for i, kernel in enumerate(point.kernels):
            lead = first if i == 0 else [""] * len(first)
            name = [f"{kernel.name}{f' x{kernel.calls}' if kernel.calls > 1 else ''}"]
            share = [
                f"{100 * x:.0f}%" for x in (kernel.mxu, kernel.vpu, kernel.store, kernel.spill)
            ]
            made.append(
                [*lead, *(name if several else [])]
                + [
                    "unavailable" if kernel.cycles is None else f"{kernel.cycles:,.0f}",
                    "" if kernel.seconds is None else f"{1e6 * kernel.seconds:,.1f}",
                    kernel.bound,
                    f"{kernel.bundles:,}",
                    f"{kernel.inner.end - kernel.inner.start:,}",
                    *share,
                ]
            )
        if len(point.kernels) > 1 and point.seconds is not None:
            total = [*[""] * len(first), "all of them", "", f"{1e6 * point.seconds:,.1f}"]
            made.append(total + [""] * (len(HEAD) - 2))
        if not point.kernels:
            made.append(
                [*first, *([""] if several else []), "unavailable", *[""] * (len(HEAD) - 1)]
            )
    return made


def narrowed(table: list[list[str]], width: int) -> tuple[list[list[str]], list[str]]:
    """Leave out columns of a table until it fits.

    Args:
      table: rows of text, the head first.
      width: columns of the terminal; a column of the table takes 3 beside its text.
    Returns: the table, and the names of what was left out.
    Example:
      >>> narrowed([["rank", "us", "store"], ["1", "2", "3"]], 16)
      ([['rank', 'us'], ['1', '2']], ['store'])
    """
    gone: list[str] = []
    for name in SPARE:
        if 1 + sum(3 + max(map(len, column)) for column in zip(*table, strict=True)) <= width:
            break
        if name in table[0]:
            at = table[0].index(name)
            table = [row[:at] + row[at + 1 :] for row in table]
            gone.append(name)
    return table, gone


def notes(points: Sequence["Point"]) -> list[str]:
    """Return what the table needs said below it: why something is unavailable, and bounds."""
    made = []
    for point in points:
        if point.why:
            made.append(f"{label(point)}: unavailable: {point.why}")
        for kernel in point.kernels:
            if kernel.source.startswith("unavailable"):
                made.append(f"{label(point)}: cycles {kernel.source}")
    if any(k.source == "bundles" for p in points for k in p.kernels):
        made.append("cycles are the inner block's bundles times its runs: all else is left out")
    if any(not k.bytes_exact for p in points for k in p.kernels):
        made.append("bytes of HBM, and so the time it takes, are a lower bound")
    return list(dict.fromkeys(made))


def show(kernel: str, points: Sequence["Point"]) -> None:
    """Print a table for each generation: a rich one on a terminal, aligned text elsewhere."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    ambient = os.environ.get("LIBTPU_INIT_ARGS")
    for target in dict.fromkeys(point.target for point in points):
        here = [point for point in points if point.target == target]
        table, gone = rows(here), []
        if sys.stdout.isatty():
            table, gone = narrowed(table, console.width)
        head, *body = table
        generation = next(g for g in topology.GENERATIONS if g.name == target)
        title = (
            f"{kernel} on {target}: {generation.clock_hz / 1e9:g} GHz, "
            f"{generation.device_hbm_bytes_per_s / 1e9:,.0f} GB/s; estimates, not timings"
        )
        if sys.stdout.isatty():
            drawn = Table(title=title, title_justify="left")
            words = (*here[0].options, "kernel", "bound by")
            for name in head:
                drawn.add_column(
                    name, justify="left" if name in words else "right", overflow="fold"
                )
            for row in body:
                drawn.add_row(*row)
            console.print(drawn)
        else:
            print(title)
            widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
            for row in (head, *body):
                cells = (text.rjust(width) for text, width in zip(row, widths, strict=True))
                print("  ".join(cells).rstrip())
        if gone:
            console.print(f"Too narrow for {', '.join(gone)}: --json has everything.", markup=False)
        for note in notes(here):
            console.print(note, markup=False, highlight=False)
    if ambient:
        console.print(
            "LIBTPU_INIT_ARGS of the environment was not used; --flags= takes what should be",
            markup=False,
        )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a nightly build has another name
        return "unknown"


def record(cfg: "Config", points: Sequence["Point"], seconds: float, interrupted: bool) -> Any:
    """Return everything as data."""
    versions = {name: _version(name) for name in ("jax", "libtpu")}
    made = []
    for point in points:
        kernels = [
            dataclasses.asdict(kernel) | {"seconds": kernel.seconds, "bound": kernel.bound}
            for kernel in point.kernels
        ]
        made.append(
            {"target": point.target, "options": point.options, "seconds": point.seconds}
            | {"unavailable": point.why or None, "kernels": kernels}
        )
    return {
        "what": "estimates of the TPU's compiler; not run on a TPU",
        "arguments": dataclasses.asdict(cfg),
        "versions": versions,
        "wall_seconds": seconds,
        "interrupted": interrupted,
        "points": made,
    }
