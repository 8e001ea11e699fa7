"""The picture of `sinks`: weight on the first token by layer, and loss beyond the window."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart without red-green vision.
WAYS = {
    "all": ("all keys", "#CC79A7"),
    "last": ("last T", "#D55E00"),
    "kept": ("first {kept}, last T − {kept}", "#0072B2"),
}
GREY = "#57606a"
BINS = 24  # of positions, over which losses are averaged


def draw(
    titles: Mapping[str, str],
    first: Mapping[str, Any],
    reads: Mapping[str, Mapping[str, Any]],
    T: int,
    kept: int,
    sink: float,
) -> Figure:
    """Draw weights of all models, and losses by position of the two without sinks of their own.

    Args:
      titles: by model.
      first: every head's mean weight on the first token by model, [seeds,L,N].
      reads: losses by model, then by way of reading on, [seeds,positions].
      T: the window that the models were trained on.
      kept: how many first tokens one way keeps.
      sink: from which weight on a head is a sink.
    Returns: the figure.
    """
    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    for place, x_SLN in enumerate(first.values()):
        L = x_SLN.shape[1]
        shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1.0, L))
        for layer, shade in enumerate(shades):
            y = np.ravel(x_SLN[:, layer])
            x = place + 0.7 * ((layer + 0.5) / L - 0.5)
            left.plot([x] * y.size, y, "o", ms=3.5, color=shade, alpha=0.8, mew=0)
            if not place:
                left.text(0.02 + 0.1 * layer, 0.93, layer + 1, color=shade, **_within(left))
    left.text(0.02, 0.86, "layer", color=GREY, fontsize=8, **_within(left))
    even = float(np.mean(1 / np.arange(1, T + 1)))
    for level, text in ((sink, "a sink\nfrom here on"), (even, "even\nattention")):
        left.axhline(level, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
        left.text(len(first) - 0.4, level, text, color=GREY, fontsize=8, va="bottom")
    names = [textwrap.fill(title.removeprefix("rows begin "), 10) for title in titles.values()]
    left.set_xticks(range(len(first)), names, fontsize=8)
    left.set(ylabel="mean weight on the first token", xlim=(-0.5, len(first) + 0.4))
    left.set(xlabel="how rows begin, and what sink heads have of their own")
    left.set_ylim(0, max(0.42, 1.15 * max(float(np.max(x)) for x in first.values())))
    for axes, name in zip(others, ("open", "fixed"), strict=True):
        afresh = np.asarray(reads[name]["afresh"])
        width = max(afresh.shape[1] // BINS, 1)
        bins = afresh.shape[1] // width
        x = T + width * (np.arange(bins) + 0.5)
        for way, (_, color) in WAYS.items():
            above = (np.asarray(reads[name][way])[:, T:] - afresh)[:, : bins * width]
            y = above.reshape(-1, bins, width).mean(axis=2)
            axes.plot(x, y.mean(axis=0), color=color, lw=1.5)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)
        axes.axhline(0, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.set_title(titles[name], fontsize=10)
        axes.set(xlabel="position", xlim=(T, T + afresh.shape[1]))
    others[1].sharey(others[0])
    others[0].set_ylabel("loss above that of reading\nafresh, nats a byte")
    for place, (label, color) in enumerate(WAYS.values()):
        others[1].text(
            1.02, 0.9 - 0.08 * place, label.format(kept=kept), color=color, **_within(others[1])
        )
    for axes in (left, *others):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _within(axes: Any) -> dict[str, Any]:
    return {"transform": axes.transAxes}
