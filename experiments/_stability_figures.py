"""The pictures of `stability`: loss against the learning rate, and heads during training."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments._entropy_bound import SIGMAS, least_entropy

# Okabe and Ito's palette: told apart without red-green vision.
COLORS = {"plain": "#D55E00", "norm": "#0072B2", "clip": "#009E73", "floor": "#CC79A7"}
GREY = "#57606a"
SHOWN = 64  # length of the rows whose entropies are drawn
STATISTICS = {
    "entropy": ("entropy, nats", "linear"),
    "min_entropy": ("min-entropy, nats", "linear"),
    "max_logit": ("largest logit", "log"),
    "first_mass": ("mass on the\nfirst token", "linear"),
}


def losses(
    titles: Mapping[str, str],
    rates: Sequence[float],
    found: Mapping[str, Any],
    start: Any,
    scores: Mapping[str, Any],
    bound: Mapping[str, Mapping[tuple[int, float], Any]],
) -> Figure:
    """Draw final losses against rates, sensitivities, and entropies above their bound.

    Args:
      titles: by way.
      rates: learning rates.
      found: final losses by way, [rates,seeds].
      start: losses at init, [seeds].
      scores: sensitivities by way, [seeds].
      bound: from `compare_with_bound`.
    Returns: the figure.
    """
    figure = Figure(figsize=(11.0, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1.2))
    for place, way in enumerate(titles):
        y = np.asarray(found[way], float)
        beside = np.asarray(rates) * 1.05 ** (place - (len(titles) - 1) / 2)
        left.plot(beside, y, "o", ms=3, color=COLORS[way], alpha=0.6)
        left.plot(beside, y.mean(axis=1), color=COLORS[way], lw=1.4)
    text = f"at init {np.mean(start):.2f}"
    left.text(0.5, 0.95, text, color=GREY, ha="center", transform=left.transAxes, fontsize=8)
    left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats a byte")
    for place, (way, title) in enumerate(titles.items()):
        score = np.asarray(scores[way], float)
        middle.plot(score, [place] * score.size, "o", ms=4, color=COLORS[way], alpha=0.7)
        middle.text(0, place, f" {title}", color=COLORS[way], va="center", fontsize=9)
    middle.set(xlabel="sensitivity, nats", yticks=[], ylim=(len(titles) - 0.5, -0.5))
    middle.set_xlim(0, None)
    middle.locator_params(axis="x", nbins=4)
    dense = np.geomspace(SIGMAS[0], SIGMAS[-1], 200)
    right.plot(dense, least_entropy(dense, SHOWN), color="#0072B2", lw=1.6)
    for name, color in (("random", "#c4cad1"), ("extremal", "#D55E00")):
        for sigma in SIGMAS:
            y = np.asarray(bound[name][SHOWN, sigma])[::64] + least_entropy(sigma, SHOWN)
            right.plot([sigma] * y.size, y, "o", ms=3, color=color, zorder=1 if y.size > 1 else 3)
    right.set(xscale="log", xlabel="sigma: norm of a row's logits", ylabel="entropy, nats")
    right.set_ylim(0, None)
    for place, (text, color) in enumerate(
        (("least there can be", "#0072B2"), ("its extremal row", "#D55E00"), ("random rows", GREY))
    ):
        right.text(0.04, 0.3 - 0.09 * place, text, color=color, transform=right.transAxes)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    middle.spines["left"].set_visible(False)
    return figure


def heads(
    titles: Mapping[str, str],
    rates: Sequence[float],
    rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> Figure:
    """Draw statistics of every head of seed 0 over steps, a column for each way.

    Args:
      titles: by way.
      rates: learning rates.
      rows: by way, then rate, the measurements; statistics are [seeds,L,N].
    Returns: the figure.
    """
    figure = Figure(figsize=(11.0, 7.6), layout="constrained")
    panels = figure.subplots(len(STATISTICS), len(titles), sharex=True, sharey="row")
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, len(rates)))
    for column, (way, title) in zip(panels.T, titles.items(), strict=True):
        steps = [int(row["step"]) for row in rows[way][0]]
        for axes, (name, (_, scale)) in zip(column, STATISTICS.items(), strict=True):
            for made, shade in zip(rows[way], shades, strict=True):
                curves = np.stack([np.ravel(row[f"{name}_LN"][0]) for row in made])
                axes.plot(steps, curves, color=shade, lw=0.8, alpha=0.7)
            axes.set(yscale=scale, xlim=(0, steps[-1]))
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(title, fontsize=10)
        column[-1].set_xlabel("step")
        column[-1].locator_params(axis="x", nbins=4)
    for axes, (label, scale) in zip(panels[:, 0], STATISTICS.values(), strict=True):
        axes.set_ylabel(label)
        if scale == "linear":
            axes.set_ylim(0, None)
    named = figure.legend(
        handles=[Line2D([], [], color=shade, lw=2) for shade in shades],
        labels=[f"{rate:.2g}" for rate in rates],
        title="learning rate",
        loc="outside upper center",
        ncols=len(rates),
        frameon=False,
    )
    named.get_title().set_color(GREY)
    return figure
