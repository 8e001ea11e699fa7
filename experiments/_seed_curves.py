"""Curves of several seeds along a training, out of what `learn` measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def steps_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps of measurements."""
    return [int(row["step"]) for row in rows]


def collected(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Collect one number of all measurements, [measurements, seeds, ...]."""
    return np.array([row[name] for row in rows])


def norms_of(rows: Sequence[Mapping[str, Any]], kind: str, parts: Sequence[str]) -> np.ndarray:
    """Collect norms of a step, means between measurements, [measurements - 1, seeds, parts]."""
    return np.stack([collected(rows[1:], f"{kind}_norm/{part}") for part in parts], axis=2)


def path(steps: Sequence[int], norm_RSL: np.ndarray) -> np.ndarray:
    """Add up the lengths of updates, mean of layers, [measurements, seeds]."""
    moved_RS = norm_RSL.mean(axis=2) * np.diff(steps)[:, None]
    return np.concatenate([np.zeros_like(moved_RS[:1]), np.cumsum(moved_RS, axis=0)])


def half_way(steps: Sequence[int], curve_RS: np.ndarray) -> np.ndarray:
    """Find the step at which each seed's curve first is at half of its end, between measurements.

    Args:
      steps: of the measurements.
      curve_RS: [measurements, seeds].
    Returns: [seeds]; not a number where a curve does not end above 0.
    """

    def one(curve: np.ndarray) -> float:
        half = curve[-1] / 2
        at = int(np.argmax(curve >= half))
        if not half > 0 or at == 0:
            return float(steps[0]) if half > 0 else float("nan")
        return float(np.interp(half, curve[at - 1 : at + 1], steps[at - 1 : at + 1]))

    return np.array([one(curve) for curve in curve_RS.T])


def early(steps: Sequence[int], cost_RS: np.ndarray) -> np.ndarray:
    """Average a cost over the first tenth of the training, as a share of what it ends at, [seeds].

    Not a number where it does not end above 0.
    """
    at = np.asarray(steps)
    first = (at > 0) & (at <= max(at[-1] / 10, at[1]))
    ends = np.where(cost_RS[-1] > 0, cost_RS[-1], np.nan)
    return cost_RS[first].mean(axis=0) / ends
