"""What `bench_attention` makes of its rows: tables, verdicts, fitted exponents, pictures."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments._report import save

Row = dict[str, Any]

# Okabe and Ito's palette, told apart without red-green vision; markers tell the lines apart too.
STYLES = {
    "native": ("#D55E00", "o"),
    "blockwise": ("#E69F00", "s"),
    "dense": ("#F0E442", "D"),
    "cudnn": ("#D55E00", "P"),
    "splash": ("#D55E00", "X"),
    "tokamax": ("#E69F00", "<"),
    "jax.nn": ("#0072B2", "^"),
    "jax.nn.cudnn": ("#0072B2", "p"),
    "flax.linen": ("#56B4E9", "v"),
    "flax.nnx": ("#CC79A7", ">"),
    "torch": ("#000000", "*"),
}
FIT_FROM = 1024
DOUBLINGS = (1024, 2048, 4096, 8192)
# What this library is to reach: (what, against, times as fast, at the sizes), for the causal mask.
TARGETS = (
    ("forward", "jax.nn", 4.0, (4096,)),
    ("forward", "torch", 1.0, DOUBLINGS),
    ("forward+backward", "jax.nn", 6.0, (4096,)),
    ("forward+backward", "torch", 1.0, DOUBLINGS),
)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Fit values ~ size^p by least squares of logarithms; None with fewer than 3 points."""
    points = [(s, v) for s, v in zip(sizes, values, strict=True) if s >= FIT_FROM and v > 0]
    if len(points) < 3:
        return None
    x, y = np.log(np.asarray(points)).T
    return float(np.polyfit(x, y, 1)[0])


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Split rows by the values of some keys, in the order in which they first come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def fits(rows: Sequence[Row]) -> list[Row]:
    """Fit the exponents of time and memory for every contestant of every group."""
    made = []
    for (mask, dtype, what, peer), line in grouped(rows, "mask", "dtype", "what", "peer").items():
        row = {"mask": mask, "dtype": dtype, "what": what, "peer": peer}
        for key in ("ms", "memory_bytes"):
            seen = [r for r in line if r.get(key) is not None]
            row[key] = exponent([r["S"] for r in seen], [r[key] for r in seen])
        made.append(row)
    return made


def verdicts(rows: Sequence[Row], picked: dict[str, str], dtypes: Sequence[str]) -> list[Row]:
    """Compare with the targets, each dtype by itself.

    Args:
      rows: the cases.
      picked: for each size, "dtype what S", the implementation that the library picks by itself.
      dtypes: those of the run.
    Returns: dicts with `verdict` ("met", "met where measured", "missed", "not measured"), `target`
      and `measured`.
    """
    by = {(r["mask"], r["dtype"], r["what"], r["S"], r["peer"]): r for r in rows}
    made = []
    for dtype in dtypes:
        for what, other, target, sizes in TARGETS:
            said, reached, missing = [], [], []
            for S in sizes:
                name = picked.get(f"{dtype} {what} {S}", "this library")
                row = by.get(("causal", dtype, what, S, name), {})
                over = row.get("over", {}).get(other)
                if over is None:
                    missing.append(S)
                    continue
                reached.append(over[0] >= target)
                said.append(
                    f"{name} is {over[0]:.2f} [{over[1]:.2f}, {over[2]:.2f}] times as fast as "
                    f"{other} at S={S}"
                )
            if missing:
                said.append(f"not measured at S={', '.join(map(str, missing))}")
            # A size that was not measured neither makes up for a miss nor counts as met.
            met = "met where measured" if missing else "met"
            met = "not measured" if not reached else met if all(reached) else "missed"
            where = f"S={sizes[0]}" if len(sizes) == 1 else f"S={sizes[0]} ... {sizes[-1]}"
            made.append(
                {
                    "verdict": met,
                    "target": f"causal {what}, {dtype}: >= {target:g} x {other} at {where}",
                    "measured": "; ".join(said),
                }
            )
    return made


def show(console: rich.console.Console, summary: dict[str, Any]) -> None:
    """Print one table a group, what was left out, the exponents and the verdicts."""
    rows = summary["rows"]
    for (mask, dtype, what), group in grouped(rows, "mask", "dtype", "what").items():
        console.print(_table(f"{mask}, {dtype}, {what}", group, summary["fits"]))
    rates = (
        f"{dtype} " + ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in made.items())
        for dtype, made in summary["matmul"].items()
    )
    lines = [f"matmul {summary['config']['matmul']}^3, GFLOP/s: {'; '.join(rates)}"]
    lines += ["x: how many times as fast as that one in the same round, median [min, max]"]
    for line in [*lines, *summary["notes"]]:
        console.print(line, markup=False, highlight=False)
    for row in summary["verdicts"]:
        style = {"met": "green", "missed": "red"}.get(row["verdict"], "yellow")
        console.print(f"[{style}]{row['verdict'].upper()}[/]  {row['target']}", highlight=False)
        console.print(f"    {row['measured']}", markup=False, highlight=False)


def _table(title: str, rows: Sequence[Row], fitted: Sequence[Row]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE, title=title, title_justify="left", padding=(0, 1))
    for name in (
        *("S", "contestant", "ms", "quartiles", "x jax.nn", "[min, max]", "x torch", "[min, max]"),
        *("GFLOP/s", "% of matmul", "peak MB", "compile s"),
    ):
        left = name in ("contestant", "quartiles", "[min, max]")
        table.add_column(rich.text.Text(name), justify="left" if left else "right", overflow="fold")
    if any("left_out" in row or "memory_failed" in row for row in rows):
        table.add_column("left out", overflow="fold")
    for number, row in enumerate(rows, 1):
        cells = [f"{row['S']:,}", row["peer"]]
        if "ms" in row:
            cells += [_short(row["ms"]), f"{_short(row['q1_ms'])} – {_short(row['q3_ms'])}"]
            for other in ("jax.nn", "torch"):
                over = row["over"].get(other)
                cells += [f"{over[0]:.2f}", f"{over[1]:.2f} – {over[2]:.2f}"] if over else ["–", ""]
            cells += [f"{row['gflops']:,.1f}", f"{100 * row['share']:.0f}"]
        else:
            cells += ["–", "", "–", "", "–", "", "–", "–"]
        memory, compile_s = row.get("memory_bytes"), row.get("compile_s")
        cells += ["–" if memory is None else f"{memory / 1e6:,.1f}"]
        cells += ["–" if compile_s is None else f"{compile_s:.2f}"]
        if len(table.columns) > len(cells):
            cells.append(row.get("left_out") or row.get("memory_failed") or "")
        last = number == len(rows) or rows[number]["S"] != row["S"]
        # As text: a reason may hold brackets, which markup would eat.
        table.add_row(*map(rich.text.Text, cells), end_section=last)
    keys = {(row["mask"], row["dtype"], row["what"]) for row in rows}
    powers = [
        f"{fit['peer']} {fit['ms']:.2f}"
        for fit in fitted
        if (fit["mask"], fit["dtype"], fit["what"]) in keys and fit["ms"] is not None
    ]
    none = f"no exponent: fewer than 3 sizes >= {FIT_FROM}"
    table.caption = f"time ~ S^p, p: {', '.join(powers)}" if powers else none
    table.caption_justify = "left"
    return table


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def draw(summary: dict[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
    """Draw one picture a mask: time and memory against S, a row for each dtype and direction."""
    paths = []
    for (mask,), rows in grouped(summary["rows"], "mask").items():
        if any("ms" in row for row in rows):
            paths.append(save(_figure(mask, rows, summary), out / f"{mask}.png"))
    return paths


def _figure(mask: str, rows: Sequence[Row], summary: dict[str, Any]) -> Figure:
    panels = [("ms", "time of a call, ms")]
    if any(row.get("memory_bytes") is not None for row in rows):
        panels.append(("memory_bytes", "peak memory beside the inputs, MB"))
    groups = grouped(rows, "dtype", "what")
    size = (5.6 * len(panels), 3.7 * len(groups) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    cfg, titles = summary["config"], {"window": f"causal, window of {summary['config']['window']}"}
    titles["segments"] = "causal, 4 packed documents"
    shape = f"B={cfg['B']}, {cfg['N']} heads x {cfg['H']}"
    figure.suptitle(f"{titles.get(mask, mask)} · {shape} · {summary['hardware']}", fontsize=11)
    axes = figure.subplots(len(groups), len(panels), squeeze=False, sharex=True)
    for line, ((dtype, what), group) in zip(axes, groups.items(), strict=True):
        fitted = {
            fit["peer"]: fit
            for fit in summary["fits"]
            if (fit["mask"], fit["dtype"], fit["what"]) == (mask, dtype, what)
        }
        for ax, (key, label) in zip(line, panels, strict=True):
            _panel(ax, key, group, fitted)
            ax.set_title(f"{what}, {dtype}", fontsize=10, loc="left")
            ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("sequence length S = T")
    return figure


def _panel(ax: Axes, key: str, rows: Sequence[Row], fitted: dict[str, Row]) -> None:
    scale = 1e-6 if key == "memory_bytes" else 1.0
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for (peer,), line in grouped(rows, "peer").items():
        seen = [row for row in line if row.get(key)]
        if not seen:
            continue
        color, marker = STYLES[peer]
        power = fitted[peer][key]
        label = peer if power is None else f"{peer}  $S^{{{power:.2f}}}$"
        x, y = [row["S"] for row in seen], [row[key] * scale for row in seen]
        front = 4 if peer == "native" else 3
        edge = {"markeredgecolor": "#444444", "markeredgewidth": 0.5}
        # Smaller from line to line: of lines on top of each other, all markers are seen.
        size = 8 if peer == "torch" else 9 - 0.5 * list(STYLES).index(peer)
        ax.plot(
            x, y, color=color, marker=marker, markersize=size, label=label, zorder=front, **edge
        )
        if key == "ms":
            low, high = [row["q1_ms"] for row in seen], [row["q3_ms"] for row in seen]
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    sizes = sorted({row["S"] for row in rows})
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set_xticks(sizes)
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        few = all(fit[key] is None for fit in fitted.values())
        title = f"no exponent: < 3 sizes ≥ {FIT_FROM:,}" if few else f"fit over S ≥ {FIT_FROM:,}"
        legend = ax.legend(
            loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, title=title
        )
        legend.get_title().set_fontsize(8)
