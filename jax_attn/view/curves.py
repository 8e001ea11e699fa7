"""How runs went, for a paper: loss, gradient norm, learning rate, steps left out."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_attn.view import paper
from jax_attn.view.colors import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL_HEIGHT = 1.9  # inches
_SMOOTH = 50  # a smoothed line averages over about one part in so many of the run
_LABELS = {
    "loss": "loss (nats)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "skipped": "updates left out",
}


def plot_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str] | None = None,
    *,
    metrics: Sequence[str] = ("loss", "grad_norm", "learning_rate", "skipped"),
    width: float | None = None,
) -> "Figure":
    """Draw metrics over steps: a panel a metric, a colour a run.

    Faint lines are the rows themselves, strong ones their running mean; dots with a line are what
    an evaluation measured of the same name (`eval/loss`); dotted verticals are events: a rollback,
    a stop, a step compiled again. Where a step was logged twice the last row counts. Metrics with
    an axis of seeds are drawn as their mean. A metric that no run has, or that is 0 throughout, has
    no panel.

    Args:
      runs: a run's name to its rows, as `fit` returns and writes them; see `read_rows`.
      path: where to save it; the ending says the format. None only returns it.
      metrics: which to draw, in this order.
      width: of the whole figure in inches; default 3.3 for one panel, a paper's column, else 6.75.
    Returns: a Matplotlib Figure, made without pyplot.
    Raises: ValueError: no run, or no run has any of the metrics.
    Example:
      >>> rows = [{"step": i, "loss": 5.0 / (i + 1)} for i in range(10)]
      >>> figure = plot_curves({"first": rows})
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss (nats)']
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be a sequence of names, got {metrics!r}")
    if not runs:
        raise ValueError("runs is empty; give at least one run")
    found = {}
    for metric in metrics:
        lines = {name: (curve(rows, metric), curve(rows, f"eval/{metric}"))
                 for name, rows in runs.items()}  # fmt: skip
        if any(np.any(y != 0) for line in lines.values() for _, y in line):
            found[metric] = lines
    if not found:
        there = sorted({name for rows in runs.values() for row in rows for name in row})
        raise ValueError(f"no run has any of {', '.join(metrics)}; rows have {', '.join(there)}")
    columns = min(2, len(found))
    height = -(-len(found) // columns) * _PANEL_HEIGHT + 0.25
    if width is None:
        width = paper.COLUMN if columns == 1 else paper.TEXT
    figure = Figure(figsize=(paper.positive("width", width), height), layout="constrained")
    panels = figure.subplots(-(-len(found) // columns), columns, squeeze=False).ravel()
    for ax in panels[len(found) :]:
        ax.set_visible(False)
    colors = dict(zip(runs, (OKABE_ITO * (1 + len(runs) // len(OKABE_ITO))), strict=False))
    marks: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1.0}
    for ax, (metric, lines) in zip(panels, found.items(), strict=False):
        for name, ((steps, y), (at, measured)) in lines.items():
            _draw(ax, steps, y, colors[name], smooth=metric not in ("learning_rate", "skipped"))
            ax.plot(at, measured, color=colors[name], markerfacecolor="white", **marks)
            for row in runs[name]:
                if "event" in row:
                    ax.axvline(row["step"], color=colors[name], linewidth=0.7, linestyle=":")
        if any(len(measured) for _, (_, measured) in lines.values()):
            ax.plot([], [], color=paper.FAINT, markerfacecolor="white", label="held out", **marks)
            ax.legend(fontsize=paper.SMALL_SIZE, frameon=False, loc="upper right")
        values = np.concatenate([y for line in lines.values() for _, y in line])
        values = values[np.isfinite(values) & (values > 0)]
        if metric != "skipped" and len(values) and values.max() > 20 * np.median(values):
            ax.set_yscale("log")
        ax.set_ylabel(_LABELS.get(metric, metric), fontsize=paper.LABEL_SIZE)
        ax.set_xlabel("step", fontsize=paper.LABEL_SIZE)
        ax.yaxis.label.set_parse_math(False)
        ax.tick_params(labelsize=paper.SMALL_SIZE, length=2.5, width=0.6)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.get_offset_text().set_fontsize(paper.SMALL_SIZE)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_linewidth(0.6)
        ax.grid(axis="y", color=paper.GRID, linewidth=0.5)
    if len(runs) > 1:
        figure.legend(
            [Line2D([], [], color=color, linewidth=1.8) for color in colors.values()],
            [name.replace("$", r"\$") for name in colors],
            loc="outside upper center",
            ncols=min(len(runs), 3),
            frameon=False,
            fontsize=paper.SMALL_SIZE,
        )
    paper.save(figure, path)
    return figure


def curve(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a metric, the last row of each step, seeds averaged.

    Args:
      rows: as `fit` writes them.
      metric: its name.
    Returns: two float64 arrays of the same length, steps rising.
    Example:
      >>> curve([{"step": 0, "loss": 3.0}, {"step": 0, "loss": 2.0}], "loss")[1].tolist()
      [2.0]
    """
    last = {}
    for row in rows:
        if metric in row:
            last[row["step"]] = float(np.mean(np.asarray(row[metric], np.float64)))
    steps = sorted(last)
    return np.array(steps, np.float64), np.array([last[step] for step in steps], np.float64)


def _draw(ax: Any, steps: np.ndarray, y: np.ndarray, color: str, smooth: bool) -> None:
    if not len(y):
        return
    window = max(1, len(y) // _SMOOTH)
    smooth = smooth and window > 1
    ax.plot(steps, y, color=color, linewidth=0.6 if smooth else 1.0, alpha=0.3 if smooth else 0.9)
    if smooth:
        weight, mean, means = 1 - 1 / window, 0.0, []
        for i, value in enumerate(y):
            if np.isfinite(value):
                mean = weight * mean + (1 - weight) * value
            means.append(mean / (1 - weight ** (i + 1)))
        ax.plot(steps, means, color=color, linewidth=1.2)
