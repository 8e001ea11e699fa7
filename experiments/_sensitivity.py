"""What a learning rate that is not the best costs: of all rates, and of those too high."""

from typing import Any

import numpy as np


def above_best(losses: Any, start: Any) -> np.ndarray:
    """Measure how far min(loss, loss at init) is above that of the best rate.

    Args:
      losses: [rates,seeds], rates rising; one that is not a number counts as the loss at init.
      start: losses at init, [seeds].
    Returns: [rates,seeds], nats.
    """
    bounded = np.fmin(np.asarray(losses, float), np.asarray(start, float)[None])
    return bounded - bounded.min(axis=0)


def sensitivity(losses: Any, start: Any) -> np.ndarray:
    """Average `above_best` over all rates, those too low among them (arXiv:2309.14322).

    Args:
      losses, start: as for `above_best`.
    Returns: [seeds], nats.
    Example:
      >>> sensitivity([[4.0], [1.0], [1.5], [np.nan]], [6.0]).tolist()
      [2.125]
    """
    return above_best(losses, start).mean(axis=0)


def too_high(losses: Any, start: Any, best: Any) -> np.ndarray:
    """Average `above_best` over the rates above one.

    Args:
      losses, start: as for `above_best`.
      best: index of that rate, [seeds].
    Returns: [seeds], nats; not a number where no rate is above.
    Example:
      >>> too_high([[4.0], [1.0], [1.5], [np.nan]], [6.0], [1]).tolist()
      [2.75]
    """
    above = np.arange(len(losses))[:, None] > np.asarray(best)
    counted = np.where(above.any(axis=0), above.sum(axis=0), np.nan)
    return np.where(above, above_best(losses, start), 0.0).sum(axis=0) / counted
