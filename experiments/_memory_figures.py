"""The pictures of `mlp_memory`: keys, values and predictions by layer, and units written out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Of Okabe and Ito's palette: told apart without red-green vision.
TRAINED, INIT, INK, GREY = "#0072B2", "#D55E00", "#1b1f24", "#57606a"
STYLES: dict[str, Any] = {"last 1": "-", "last 2": (0, (5, 2)), "last 3": (0, (1, 1.5))}


def layers_figure(
    trained: Mapping[str, np.ndarray],
    init: Mapping[str, np.ndarray],
    places: Mapping[str, np.ndarray],
) -> Figure:
    """Draw three shares over layers, a dot for each seed.

    Args:
      trained, init: by name [seeds,L].
      places: of random places, by name [seeds].
    Returns: the figure.
    """
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    keys, values, whole = figure.subplots(1, 3)
    layers = np.arange(1, trained["agrees"].shape[1] + 1)

    def line(ax: Any, shares: np.ndarray, color: str, style: Any = "-") -> None:
        ax.plot(layers, shares.mean(0), color=color, lw=1.6, ls=style)
        ax.plot(layers, shares.T, "o", ms=3.5, color=color, alpha=0.7)

    for name, style in STYLES.items():
        line(keys, trained[name], TRAINED, style)
        line(keys, init[name], INIT, style)
        keys.axhline(np.mean(places[name]), color=GREY, lw=0.9, ls=style)
        at = (layers[-1], trained[name].mean(0)[-1])
        label = name.replace("last 1", "last byte")
        keys.annotate(label, at, (7, 0), textcoords="offset points", va="center", fontsize=8)
    line(values, trained["agrees"], TRAINED)
    line(values, trained["by chance"], GREY, STYLES["last 2"])
    line(values, init["agrees"], INIT)
    line(whole, trained["largest"], TRAINED)
    line(whole, trained["largest by chance"], GREY, STYLES["last 2"])
    line(whole, init["largest"], INIT)
    names = ("trained", TRAINED), ("random init", INIT)
    chance = (*names, ("by chance", GREY))
    for ax, title, label, lines in (
        (keys, "keys", "triggers that end alike, share", (*names, ("random places", GREY))),
        (values, "values", "units that name the next byte, share", chance),
        (whole, "the model", "places where the unit that is largest\nnames its prediction", chance),
    ):
        ax.set_title(title, fontsize=10, loc="left")
        ax.set(xlabel="layer", ylabel=label, xlim=(0.8, layers[-1] + 0.2))
        top = 1.0 if ax is keys else ax.get_ylim()[1]
        ax.set_ylim(0, 1.16 * top)  # room for the names of the lines
        ax.set_xticks(layers)
        ax.spines[["top", "right"]].set_visible(False)
        for i, (name, color) in enumerate(lines):
            at = (0.03 + 0.31 * i, 0.94)
            ax.text(*at, name, transform=ax.transAxes, color=color, fontsize=8.5)
    keys.set_yticks(np.linspace(0, 1, 6))
    return figure


def units_figure(layers: Sequence[Sequence[Sequence[str]]]) -> Figure:
    """Write out units, a row each, a line between layers.

    Args:
      layers: by layer, by unit: name, triggers, how many of them end in their commonest byte, what
        the value names, how many of the triggers that follows.
    Returns: the figure.
    """
    count = sum(len(rows) for rows in layers)
    figure = Figure(figsize=(10.5, 0.3 * (count + 2)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(count + 1, -1))
    starts = (0.02, 0.1, 0.56, 0.71, 0.83)
    heads = ("unit", "largest triggers → what follows", "end in the same", "value names")
    for x, head in zip(starts, (*heads, "follows"), strict=True):
        ax.text(x, 0, head, color=GREY, fontsize=9)
    y = 0
    for rows in layers:
        ax.axhline(y + 0.35, color="#d9dee3", lw=0.8)
        for cells in rows:
            y += 1
            for x, cell in zip(starts, cells, strict=True):
                ax.text(x, y, cell, color=INK, fontsize=9, family="monospace")
    return figure
