"""Curves of several seeds, named where they end."""

from collections.abc import Sequence
from typing import Any

import matplotlib.axes
import numpy as np


def band(axes: matplotlib.axes.Axes, steps: Any, curve_RS: np.ndarray, color: Any) -> None:
    """Draw the mean of seeds [measurements, seeds], and a band from the least to the largest."""
    axes.plot(steps, curve_RS.mean(1), color=color, lw=1.7)
    axes.fill_between(steps, curve_RS.min(1), curve_RS.max(1), color=color, alpha=0.2, lw=0)


def name_ends(
    axes: matplotlib.axes.Axes, ends: Sequence[tuple[float, str, Any]], *, gap: float = 0.065
) -> None:
    """Name curves right of their ends, apart from each other; what comes after keeps the limits.

    A name that had to move is joined to the end it is of.

    Args:
      axes: with all curves drawn, which end at its right edge.
      ends: of each curve its last value, its name and its colour.
      gap: least distance of two names, as a share of the height.
    """
    axes.set_ylim(axes.get_ylim())  # before places are asked for: limits are found lazily
    place = axes.transData + axes.transAxes.inverted()
    own = [float(place.transform((0, value))[1]) for value, *_ in ends]
    for (_, title, color), at, y in zip(ends, own, apart(own, gap), strict=True):
        if abs(y - at) > gap / 4:
            joined: Any = {"transform": axes.transAxes, "clip_on": False, "color": color}
            axes.plot((1.002, 1.015), (at, y), lw=0.7, **joined)
        axes.annotate(
            title,
            (1.02, y),
            xycoords="axes fraction",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def apart(values: Sequence[float], gap: float) -> np.ndarray:
    """Move numbers no further than it takes for no two to be nearer than a gap.

    Args:
      values: any order.
      gap: at least 0.
    Returns: the moved ones, in the order of `values`.
    Example:
      >>> apart([2.0, 0.0, 0.0], 1.0).tolist()
      [2.0, -0.5, 0.5]
    """
    order = np.argsort(values, kind="stable")
    room = gap * np.arange(len(values))
    free = np.asarray(values)[order] - room
    # The nearest rising sequence in least squares (isotonic regression, as max of min of means).
    ends = range(len(free))
    rising = [
        max(min(free[j : k + 1].mean() for k in ends[i:]) for j in ends[: i + 1]) for i in ends
    ]
    moved = np.empty(len(values))
    moved[order] = rising + room
    return moved
