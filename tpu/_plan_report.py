"""Plans as a table, as JSON and as a picture."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tpu.plan import Plan

GIB = 2**30
COLUMNS = ("target", "mesh", "HBM of GiB", "step", "MFU", "tokens/s", "bounds", "compute", "HBM",
           "network", "bare", "$/10⁹")  # fmt: skip
NARROW = (0, 1, 2, 3, 4, 5)
ENDLESS = 10_000  # columns: where nobody looks, nothing is cut


def mesh_text(mesh: dict[str, int]) -> str:
    """Write a mesh as `data=4 model=4`, axes of one device left out."""
    return " ".join(f"{name}={n}" for name, n in mesh.items() if n > 1) or "1 device"


def seconds(value: float) -> str:
    """Write a time with three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    for unit, scale in (("ms", 1e3), ("us", 1e6), ("ns", 1e9)):
        if value * scale >= 1:
            return f"{value * scale:.{2 - math.floor(math.log10(min(value * scale, 999)))}f} {unit}"
    return "<1 ns" if value else "0 s"


def gib(value: float) -> str:
    """Write bytes in GiB, with two digits at least of what is small."""
    return f"{value / GIB:.2f}" if value >= 0.1 * GIB or not value else f"{value / GIB:.2g}"


def ordered(plans: Sequence["Plan"]) -> list["Plan"]:
    """Sort the plans of each target: those that fit first, the fastest first."""
    targets = list(dict.fromkeys(one.slice.name for one in plans))
    return sorted(
        plans,
        key=lambda one: (
            targets.index(one.slice.name),
            (one.estimate.step or one.estimate.least) if one.estimate else math.inf,
            bool(one.why_not),
        ),
    )


def show(plans: Sequence["Plan"], spent: float) -> None:
    """Print a row for each plan, then what else there is to say."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=ENDLESS)
    if plans:
        _tabulate(console, plans)
    for one in ordered(plans):
        _tell(console, one)
    kept = sum(bool(one.facts.get("cached")) for one in plans)
    console.print(
        f"{len(plans)} plans in {spent:.0f} s, {kept} of them from the cache. Estimates of the "
        f"TPU's compiler, none compared with a TPU: use them to rank."
    )


def _tabulate(console: Console, plans: Sequence["Plan"]) -> None:
    """Print all columns if they have room, or some, or a block for each plan."""
    rows = [_cells(one) for one in ordered(plans)]
    widths = []
    for shown in (range(len(COLUMNS)), NARROW):
        table = Table(box=rich.box.SIMPLE, header_style="bold")
        for i in shown:
            table.add_column(COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*[cells[i] for i in shown if i < len(cells)])
        widths.append(Console(width=ENDLESS).measure(table).maximum)
        if widths[-1] <= console.width:
            console.print(table)
            if len(widths) > 1:
                hidden = ", ".join(name for i, name in enumerate(COLUMNS) if i not in shown)
                also = f"A terminal of {widths[0]} columns also shows {hidden}; so does --json."
                console.print(also)
            return
    for cells in rows:
        console.print(f"[bold]{cells[0]} {cells[1]}[/]")
        for name, cell in zip(COLUMNS[2:], cells[2:], strict=False):
            console.print(f"  {name} {cell}", highlight=False)


def _cells(one: "Plan") -> list[str]:
    facts, found = one.facts, one.estimate
    head = [one.slice.name, mesh_text(one.mesh)]
    if one.why_not:
        return [*head, "[yellow]no plan[/]"]
    memory = f"{gib(facts['used'])}/{gib(facts['limit'])}"
    if found is None:
        return [*head, f"[red]{memory} too much[/]"]
    return [
        *head,
        memory,
        seconds(found.step) if found.step is not None else "",
        f"{found.mfu:.1%}" if found.mfu is not None else "",
        f"{found.tokens_per_s:,.0f}" if found.tokens_per_s is not None else "",
        f"{seconds(found.least)}–{seconds(found.most) if found.most is not None else '?'}",
        seconds(found.compute),
        seconds(found.memory),
        seconds(sum(found.transfers.values())),
        seconds(found.exposed),
        _dollars(found.dollars_per_billion_tokens),
    ]


def _dollars(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tell(console: Console, one: "Plan") -> None:
    lines = []
    if one.why_not:
        lines.append(f"no plan: {one.why_not}")
    if one.facts.get("fits") is False:
        used, limit = gib(one.facts["used"]), gib(one.facts["limit"])
        lines.append(f"does not fit: {used} GiB wanted on a device of {limit}")
        lines += [f"large: {gib(x['bytes'])} GiB {x['shape']} {x['source']}"
                  for x in one.facts["largest"][:3]]  # fmt: skip
        lines.append(one.advice or "take more devices, a smaller batch or remat='full'")
    lines += [f"lint: {text}" for text in one.findings]
    for text in one.facts.get("notes", ()):
        lines.append(f"operations: {text}")
    if one.facts.get("unknown_loops"):
        lines.append(
            f"{one.facts['unknown_loops']} loops of the schedule have no constant count: taken as "
            f"{one.facts['unknown_trips']:.3g}, the mean of the traced program"
        )
    if n := one.facts.get("priced_kernels"):
        lines.append(f"Pallas kernels that count with their declared cost, at peak rates: {n}")
    if n := one.facts.get("unpriced_kernels"):
        lines.append(
            f"Pallas kernels that are not in compute time: {n}; they declare no cost "
            f"(cost_estimate of pallas_call), so the step and MFU are not known"
        )
    elif one.estimate and one.estimate.step and one.estimate.mfu is None:
        lines.append(
            "MFU is left out: it would be above 100 %, so the time, or what a kernel declares, is "
            "wrong"
        )
    for axes, (moved, spent, bare) in network(one).items():
        amount = f"{moved / 1e6:,.0f}" if moved >= 1e7 else f"{moved / 1e6:.3g}"
        lines.append(
            f"network over {axes}: {amount} MB a step, {seconds(spent)}, of which {seconds(bare)} "
            f"bare"
        )
    if one.facts.get("not_kept"):
        lines.append(f"not kept for another time: {one.facts['not_kept']}; see --cache")
    if lines:
        console.print(f"[bold]{one.slice.name} {mesh_text(one.mesh)}[/]")
        for line in lines:
            console.print("  " + escape(line), soft_wrap=False, highlight=False)


def network(one: "Plan") -> dict[str, tuple[float, float, float]]:
    """Sum bytes, seconds and bare seconds of a step's transfers, by the axes of the mesh."""
    made: dict[str, tuple[float, float, float]] = {}
    for x in one.transfers:
        moved, spent, bare = made.get(x.axes, (0.0, 0.0, 0.0))
        made[x.axes] = (moved + x.bytes * x.times, spent + x.seconds, bare + x.exposed)
    return {axes: sums for axes, sums in made.items() if sums[1]}


def record(one: "Plan") -> dict[str, Any]:
    """Make what JSON holds of a plan."""
    facts = {k: v for k, v in one.facts.items() if k not in ("arguments", "places", "collectives")}
    return {
        "target": one.slice.name,
        "topology": one.slice.topology,
        "devices": one.slice.devices,
        "mesh": one.mesh,
        **facts,
        "estimate": dataclasses.asdict(one.estimate) if one.estimate else None,
        "transfers": [
            {**dataclasses.asdict(x), "bytes": x.bytes} for x in one.transfers if x.seconds
        ],
        "network": {
            axes: dict(zip(("bytes", "seconds", "bare"), sums, strict=True))
            for axes, sums in network(one).items()
        },
        "lint": list(one.findings),
        "advice": one.advice,
    }


def check_paths(json_file: str, picture: str) -> None:
    """Refuse paths that could not be written, before anything is compiled.

    Raises: ValueError: a folder, a place that cannot be written to, or no kind of picture.
    """
    kinds = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if picture and pathlib.Path(picture).suffix.lstrip(".").lower() not in kinds:
        raise ValueError(f"--picture={picture} must end in one of .{', .'.join(sorted(kinds))}")
    for name, given in (("json", json_file), ("picture", picture)):
        path = pathlib.Path(given)
        if given and path.is_dir():
            raise ValueError(f"--{name}={given} is a folder: name a file in it")
        folder = next(p for p in path.absolute().parents if p.exists())
        if given and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"--{name}={given} cannot be written: {folder} takes no files")


def write_json(path: pathlib.Path, plans: Sequence["Plan"]) -> None:
    """Write all plans, best first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([record(one) for one in ordered(plans)], indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def draw(path: pathlib.Path, plans: Sequence["Plan"]) -> None:
    """Draw memory and time by target and mesh."""
    rows = [one for one in ordered(plans) if not one.why_not][::-1]
    figure = matplotlib.figure.Figure(figsize=(9, 1.4 + 0.38 * max(len(rows), 2)))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{one.slice.name}  {mesh_text(one.mesh)}" for one in rows]
    for y, one in enumerate(rows):
        limit = one.facts["limit"]
        fits = one.facts["fits"]
        left.barh(y, one.facts["used"] / GIB, color="#4269d0" if fits else "#b3261e", height=0.6)
        left.plot([limit / GIB] * 2, [y - 0.38, y + 0.38], color="#1b1f24", linewidth=1.5)
        if one.estimate:
            e = one.estimate
            busy = max(e.compute, e.memory)
            right.barh(y, busy, color="#4269d0", height=0.6)
            right.barh(y, e.exposed, left=busy, color="#efb118", height=0.6)
            if e.most is not None:
                right.plot([e.least, e.most], [y, y], color="#1b1f24", linewidth=1)
    left.set_yticks(range(len(rows)), names)
    left.set_xlabel("memory of a device, GiB (line: the limit)")
    right.set_xlabel("step, s (blue: busy, yellow: bare network, line: bounds)")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#d9dee3", linewidth=0.5)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight")
