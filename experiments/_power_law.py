"""The law L = E + A / P^a + B / D^b: fitted to losses, and how well they pin it down.

P parameters, D bytes trained on (arXiv:2203.15556, equation 2). For given exponents the law is
linear in E, A and B, so only the two exponents are searched: a grid, then ever finer grids around
its best point. What is least is the mean square of (law - loss) / loss, which is that of the
logarithms' difference up to third order; E, A and B are at least 0.
"""

from typing import Any, NamedTuple

import numpy as np

BOUNDS = (0.02, 3.0)  # of both exponents
GRID = 12  # points of an exponent
ZOOMS, SHRINK = 7, 0.25
DIFFERENT = 3  # sizes, and numbers of bytes, that five unknowns need at least
# Which of E, A and B are above 0, in order of falling number.
KEPT = np.array([[i, j, k] for i in (1, 0) for j in (1, 0) for k in (1, 0)][:-1], dtype=float)


class Law(NamedTuple):
    """Numbers of the law, each a float, or an array of one for each resampled fit."""

    E: Any
    A: Any
    a: Any
    B: Any
    b: Any

    def __call__(self, parameters: Any, seen: Any) -> Any:
        """Predict the loss of a size after so many bytes."""
        return self.E + self.A * parameters**-self.a + self.B * seen**-self.b

    def optimum(self) -> Any:
        """With which power of the operations the best number of parameters grows."""
        return self.b / (self.a + self.b)


def fit(sizes: Any, seen: Any, losses: Any) -> Law:
    """Fit the law to a grid of points.

    Args:
      sizes: numbers of parameters.
      seen: numbers of bytes.
      losses: [sizes, numbers of bytes].
    Returns: the law.
    Raises: ValueError: fewer than three sizes, or than three numbers of bytes.
    Example:
      >>> P, D = np.array([1e3, 1e4, 1e5]), np.array([1e5, 1e6, 1e7])
      >>> law = fit(P, D, 1.5 + 20 / P[:, None] ** 0.3 + 300 / D**0.4)
      >>> [round(float(x), 3) for x in (law.E, law.a, law.b)]
      [1.5, 0.3, 0.4]
    """
    losses = np.asarray(losses, dtype=float)
    if min(losses.shape) < DIFFERENT:
        raise ValueError(
            f"the law needs {DIFFERENT} sizes and numbers of bytes, got {losses.shape}"
        )
    made = _fits(*_points(sizes, seen), losses.reshape(1, -1), np.ones((1, losses.size)))
    return Law(*(float(x[0]) for x in made))


def resampled(sizes: Any, seen: Any, losses: Any, *, draws: int, seed: int = 0) -> Law:
    """Fit the law to points drawn with replacement, of each size the mean of seeds drawn likewise.

    A seed's losses along one training go together, since they fall together; points are drawn one
    by one all the same, as so few sizes drawn whole give intervals that miss the truth. So they
    hold for a law that misses each point on its own, and are too narrow for one that bends.

    Args:
      sizes, seen: as for `fit`.
      losses: [sizes, numbers of bytes, seeds].
      draws: fits; one with fewer than three sizes or numbers of bytes is drawn again.
      seed: of the draws.
    Returns: the laws, arrays [draws].
    """
    losses = np.asarray(losses, dtype=float)
    rng, grid = np.random.default_rng(seed), losses.shape[:2]
    counts, means = [], []
    while len(counts) < draws:
        chosen = rng.integers(losses[..., 0].size, size=losses[..., 0].size)
        if min(np.unique(index).size for index in np.unravel_index(chosen, grid)) < DIFFERENT:
            continue
        counts.append(np.bincount(chosen, minlength=losses[..., 0].size))
        of_seeds = rng.integers(losses.shape[2], size=(len(losses), 1, losses.shape[2]))
        means.append(np.take_along_axis(losses, of_seeds, axis=2).mean(2).ravel())
    points = _points(sizes, seen)
    return _fits(*points, np.array(means), np.array(counts, dtype=float))


def _points(sizes: Any, seen: Any) -> tuple[np.ndarray, np.ndarray]:
    """List the size, and the number of bytes, of each point of a grid."""
    pairs = (np.asarray(x, dtype=float) for x in (sizes, seen))
    P, D = np.meshgrid(*pairs, indexing="ij")
    return P.ravel(), D.ravel()


def interval(values: Any, share: float = 0.95) -> tuple[float, float]:
    """Take the interval that holds the middle share of resampled values.

    Args:
      values: one for each draw.
      share: how much it holds.
    Returns: its ends.
    Example:
      >>> interval(np.arange(101.0), 0.5)
      (25.0, 75.0)
    """
    low, high = np.quantile(np.asarray(values, dtype=float), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _fits(parameters: Any, seen: Any, losses: np.ndarray, weights: np.ndarray) -> Law:
    """Fit each row of losses [fits, points] with its weights."""
    # In units of the points' geometric means, the terms are alike in size.
    unit_P, unit_D = (np.exp(np.log(x).mean()) for x in (parameters, seen))
    log_P, log_D = np.log(parameters / unit_P), np.log(seen / unit_D)
    weights = weights / weights.sum(1, keepdims=True)
    low, high = np.log(BOUNDS)
    center = np.full((len(losses), 2), (low + high) / 2)
    half = (high - low) / 2
    made = np.zeros((len(losses), 3))
    for _ in range(1 + ZOOMS):
        line = half * np.linspace(-1, 1, GRID)
        corner = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
        tried = np.clip(center[:, None] + corner[None], low, high)
        found, missed = _linear(np.exp(tried), log_P, log_D, losses, weights)
        row, best = np.arange(len(losses)), missed.argmin(1)
        center, made = tried[row, best], found[row, best]
        half *= SHRINK
    a, b = np.exp(center).T
    E, A, B = made.T
    return Law(E, A * unit_P**a, a, B * unit_D**b, b)


def _linear(
    exponents: np.ndarray,
    log_P: np.ndarray,
    log_D: np.ndarray,
    losses: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Find E, A, B >= 0 for exponents [fits, tried, 2]; return them, and what they miss by."""
    terms = [np.exp(-exponents[..., i, None] * x) for i, x in enumerate((log_P, log_D))]
    terms = np.stack([np.ones_like(terms[0]), *terms], axis=-1) / losses[:, None, :, None]
    weighted = terms * weights[:, None, :, None]
    square = np.swapaxes(weighted, -1, -2) @ terms
    target = weighted.sum(-2)
    best, least = np.zeros(target.shape), np.full(target.shape[:-1], np.inf)
    for kept in KEPT:
        # Rows and columns of what is left out are those of the identity. The last term keeps two
        # columns apart that are alike, such as those of 1 and of P to a tiny power.
        system = square * np.outer(kept, kept) + np.diag(1 - kept) + 1e-12 * np.eye(3)
        solved = np.linalg.solve(system, (target * kept)[..., None])[..., 0]
        missed = 1 - (solved * target).sum(-1)
        better = (solved >= 0).all(-1) & (missed < least)
        best, least = np.where(better[..., None], solved, best), np.where(better, missed, least)
    return best, least
