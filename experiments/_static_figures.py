"""The pictures of `static_vs_dynamic`: loss over steps beside byte counts, and the ladder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._curves import band, name_ends
from experiments._static_ladder import DYNAMIC, LADDER, STATIC, columns

TITLES = {
    **{"none": "each token alone", "uniform": "uniform over the past", "random": "random, fixed"},
    **{"static": "learned, static", "synthesizer": "dense synthesizer"},
    **{"frozen": "random Wq, Wk", "attention": "attention", "mean": "attention, mean maps"},
}
# Okabe and Ito's palette: told apart without red-green vision.
COLORS = {
    **{"none": "#57606a", "uniform": "#CC79A7", "random": "#E69F00", "static": "#009E73"},
    **{"synthesizer": "#56B4E9", "frozen": "#D55E00", "attention": "#0072B2", "mean": "#000000"},
}
GREY, GRID = "#57606a", "#d9dee3"


def loss_figure(steps: Sequence[int], curves: Mapping[str, Any], counts: Any) -> Figure:
    """Draw held-out loss over steps, with MLP and without, above the lines of the counts.

    Args:
      steps: of the measurements.
      curves: by model, [measurements, seeds], nats a byte.
      counts: by order, nats a byte.
    Returns: the figure.
    """
    shown = columns(curves)
    figure = Figure(figsize=(5.5 * len(shown), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    finals = [curve[-1].mean() for curve in curves.values()]
    low, high = min(*finals, *counts), max(*finals, counts[0])
    margin = 0.06 * (high - low)
    for ax, (suffix, column) in zip(panels, shown.items(), strict=True):
        ax.set(ylim=(low - margin, high + margin), xlim=(0, steps[-1]), xlabel="step")
        for loss, label in _named(counts, 0.5 * margin):
            above = loss > max(finals)  # there the curves fall on the left
            ax.text(
                0.99 if above else 0.01,
                loss + 0.08 * margin,
                f"counts of bytes, {label}" if above else label,
                transform=ax.get_yaxis_transform(),
                ha="right" if above else "left",
                va="bottom",
                color=GREY,
                fontsize=7.5,
            )
        for loss in counts:
            ax.axhline(loss, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
        names = [name for name in LADDER if name + suffix in curves]
        for name in names:
            band(ax, steps, curves[name + suffix], COLORS[name])
        ends = [curves[name + suffix][-1].mean() for name in names]
        name_ends(
            ax,
            [
                (end, f"{TITLES[name]}  {end:.2f}", COLORS[name])
                for name, end in zip(names, ends, strict=True)
            ],
        )
        ax.set_title(column, fontsize=11, loc="left")
        _plain(ax)
    panels[0].set_ylabel("held-out loss, nats a byte")
    return figure


def ladder_figure(
    steps: Sequence[int], losses: Mapping[str, Any], variances: Mapping[str, Any], counts: Any
) -> Figure:
    """Draw final losses as a ladder, beside how each mixing matrix varies over training.

    Args:
      steps: of the measurements.
      losses: by model, one for each seed; "mean" is attention with mean maps.
      variances: by model, [measurements, seeds, L].
      counts: by order, nats a byte.
    Returns: the figure.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    shifts = {"+mlp": 0.14, "": -0.14}
    names = [name for name in TITLES if any(name + suffix in losses for suffix in shifts)]
    for suffix, column in columns(losses).items():
        for i, name in enumerate(names):
            color = COLORS[name]
            fill = color if suffix else "white"
            values = np.atleast_1d(losses[name + suffix])
            y = np.full(len(values), i + shifts[suffix])
            left.plot(values, y, "o", ms=5.5, color=color, mfc=fill, zorder=3)
        last = float(np.max(losses[names[0] + suffix]))
        left.annotate(
            column,
            (last, shifts[suffix]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=GREY,
            fontsize=8,
        )
    spread = [float(np.mean(value)) for value in losses.values()]
    low, high = min(*spread, counts[-1]), max(*spread, counts[1])
    margin = 0.05 * (high - low)
    left.set_xlim(low - margin, high + 3 * margin)
    for loss, label in _named(counts, margin):
        if loss <= high:
            orders, top = label.split()[-1], len(names) - 0.45
            left.text(loss, top, orders, color=GREY, fontsize=8, ha="center")
    for loss in counts:
        left.axvline(loss, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
    left.set_ylim(-0.6, len(names) - 0.5)
    left.set_yticks(range(len(names)), [TITLES[name] for name in names])
    left.set_xlabel("held-out loss, nats a byte; dashed: counts of order …")
    left.grid(axis="y", color=GRID, lw=0.6)

    _variances(right, steps, variances)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _variances(ax: Any, steps: Sequence[int], variances: Mapping[str, Any]) -> None:
    """Draw the mean variance of each matrix; those that stay the same are one line."""
    lines = []
    for name in DYNAMIC:
        drawn = []
        for suffix in columns(variances):
            if name + suffix in variances:
                drawn.append(variances[name + suffix].mean((1, 2)))
                style = "-" if suffix else (0, (4, 2))
                ax.plot(steps, drawn[-1], color=COLORS[name], ls=style, lw=1.8)
        if drawn:
            lines.append((drawn[0][-1], TITLES[name], COLORS[name]))
    still = [x.max() for name, x in variances.items() if name.removesuffix("+mlp") in STATIC]
    if still:
        ax.plot(steps, [max(still)] * len(steps), color=COLORS["none"], lw=1.8)
        value = "exactly 0" if max(still) == 0 else f"{max(still):.1g}"
        lines.append((max(still), f"static ones: {value}", COLORS["none"]))
    top = max(ax.get_ylim()[1], 1e-6)
    ax.set(xlim=(0, steps[-1]), ylim=(-0.02 * top, top), xlabel="step")
    name_ends(ax, lines)
    ax.set_ylabel("variance of a row of the matrix across inputs")
    if len(columns(variances)) == 2:
        ax.set_title("solid with MLP, dashed without", fontsize=9, loc="left", color=GREY)


def _named(counts: Sequence[float], gap: float) -> list[tuple[float, str]]:
    """Name the lines of the counts; lines nearer than a gap share a name, at the upper one."""
    named: list[tuple[float, str]] = []
    for order, loss in enumerate(counts):
        if named and named[-1][0] - loss < gap:
            first = named[-1][1].removeprefix("order ").partition("–")[0]
            named[-1] = (named[-1][0], f"order {first}–{order}")
        else:
            named.append((float(loss), f"order {order}"))
    return named


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color=GRID, lw=0.5, alpha=0.6)
