"""Plans as a table, as JSON and as a picture."""

import dataclasses
import json
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
WIDE = 132


def mesh_text(mesh: dict[str, int]) -> str:
    """Write a mesh as `data=4 model=4`, axes of one device left out."""
    return " ".join(f"{name}={n}" for name, n in mesh.items() if n > 1) or "1 device"


def seconds(value: float) -> str:
    """Write a time with three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def ordered(plans: Sequence["Plan"]) -> list["Plan"]:
    """Sort the plans of each target: those that fit first, the fastest first."""
    targets = list(dict.fromkeys(one.slice.name for one in plans))
    return sorted(
        plans,
        key=lambda one: (
            targets.index(one.slice.name),
            one.estimate.step if one.estimate else 1e9,
            bool(one.why_not),
        ),
    )


def show(plans: Sequence["Plan"], spent: float) -> None:
    """Print a row for each plan, then what else there is to say."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    shown = [i for i in range(len(COLUMNS)) if console.width >= WIDE or i in NARROW]
    table = Table(box=rich.box.SIMPLE, header_style="bold")
    for i in shown:
        table.add_column(COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=True)
    for one in ordered(plans):
        cells = _cells(one)
        table.add_row(*[cells[i] for i in shown if i < len(cells)])
    if plans:
        console.print(table)
        if len(shown) < len(COLUMNS):
            hidden = ", ".join(name for i, name in enumerate(COLUMNS) if i not in shown)
            console.print(f"A terminal of {WIDE} columns also shows {hidden}; so does --json.")
    for one in ordered(plans):
        _tell(console, one)
    kept = sum(bool(one.facts.get("cached")) for one in plans)
    console.print(
        f"{len(plans)} plans in {spent:.0f} s, {kept} of them from the cache. Estimates of the "
        f"TPU's compiler, none compared with a TPU: use them to rank."
    )


def _cells(one: "Plan") -> list[str]:
    facts, found = one.facts, one.estimate
    head = [one.slice.name, mesh_text(one.mesh)]
    if one.why_not:
        return [*head, "[yellow]no plan[/]"]
    memory = f"{facts['used'] / GIB:.2f}/{facts['limit'] / GIB:.2f}"
    if found is None:
        return [*head, f"[red]{memory} too much[/]"]
    return [
        *head,
        memory,
        seconds(found.step),
        f"{found.mfu:.1%}" if found.mfu is not None else "",
        f"{found.tokens_per_s:,.0f}",
        f"{seconds(found.least)}–{seconds(found.most)}",
        seconds(found.compute),
        seconds(found.memory),
        seconds(sum(found.transfers.values())),
        seconds(found.exposed),
        f"{found.dollars_per_billion_tokens:,.0f}" if found.dollars_per_billion_tokens else "–",
    ]


def _tell(console: Console, one: "Plan") -> None:
    lines = []
    if one.why_not:
        lines.append(f"no plan: {one.why_not}")
    if one.facts.get("fits") is False:
        used, limit = one.facts["used"] / GIB, one.facts["limit"] / GIB
        lines.append(f"does not fit: {used:.2f} GiB wanted on a device of {limit:.2f}")
        lines += [f"large: {x['bytes'] / GIB:.2f} GiB {x['shape']} {x['source']}"
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
    if one.estimate and len(one.estimate.transfers) > 1:
        split = ", ".join(f"{axis} {seconds(s)}" for axis, s in one.estimate.transfers.items())
        lines.append(f"network by axis: {split}")
    if lines:
        console.print(f"[bold]{one.slice.name} {mesh_text(one.mesh)}[/]")
        for line in lines:
            console.print("  " + escape(line), soft_wrap=False, highlight=False)


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
        "lint": list(one.findings),
        "advice": one.advice,
    }


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
