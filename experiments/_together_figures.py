"""The pictures of `learning_together`: costs and losses along the training, and two routes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.axes
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments._curves import band, name_ends

GREY = "#57606a"
COLORS = {"attention": "#0072B2", "mlp": "#D55E00"}
TITLES = {"attention": "attention", "mlp": "MLPs"}
FROZEN = ("#0072B2", "#D55E00", "#CC79A7")
AGAIN = (GREY, "#CC79A7", "#0072B2", "#D55E00")
DEPTH = LinearSegmentedColormap.from_list("depth", ["#E69F00", "#009E73", "#0072B2"])


class Curve(NamedTuple):
    """Held-out loss [measurements, seeds], and the steps of the measurements."""

    steps: Sequence[int]
    loss_RS: np.ndarray


def learning_figure(
    steps: Sequence[int],
    freezing: Mapping[str, np.ndarray],
    damage: Mapping[str, np.ndarray],
    half: Mapping[str, np.ndarray],
    again: Mapping[str, Curve],
) -> Figure:
    """Draw what freezing, resetting and swapping cost.

    Args:
      steps: of the measurements of the next two.
      freezing: what it costs, by title, [measurements, seeds].
      damage: of each part's reset, [measurements, seeds].
      half: the step where each seed has half of it.
      again: held-out loss by title.
    Returns: the figure.
    """
    made = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    titles = ("frozen at random init", "reset to a random draw", "made random, all trained on")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
    costs = [cost_RS[-1].mean() for cost_RS in freezing.values()]
    for cost_RS, color in zip(freezing.values(), FROZEN, strict=True):
        band(left, steps, cost_RS, color)
    finish(left, list(zip(costs, freezing, FROZEN, strict=True)))
    left.set_ylabel("cost, nats a byte")
    for part, cost_RS in damage.items():
        band(middle, steps, cost_RS, COLORS[part])
        for seed, at in enumerate(half[part]):
            if np.isfinite(at):
                level = cost_RS[-1, seed] / 2
                middle.plot([at], [level], "o", ms=4.5, color=COLORS[part], mec="white", zorder=4)
    middle.axhline(0, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
    ends = [(cost_RS[-1].mean(), TITLES[part], COLORS[part]) for part, cost_RS in damage.items()]
    finish(middle, ends)
    middle.set_ylabel("cost, nats a byte")
    for curve, color in zip(again.values(), AGAIN, strict=True):
        band(right, curve.steps, curve.loss_RS, color)
    # Of all but the first steps, in which a fresh start falls from 8 bits a byte.
    shown = [x.loss_RS[np.asarray(x.steps) >= x.steps[-1] / 15] for x in again.values()]
    low, high = min(x.min() for x in shown), max(x.max() for x in shown)
    right.set_ylim(low - 0.05 * (high - low), high)
    losses = [curve.loss_RS[-1].mean() for curve in again.values()]
    finish(right, list(zip(losses, again, AGAIN, strict=True)))
    right.set_ylabel("held-out loss, nats a byte")
    return made


def routes_figure(
    steps: Sequence[int],
    share_RSL: np.ndarray,
    cosine_RSL: np.ndarray,
    norms: Mapping[str, Mapping[str, np.ndarray]],
) -> Figure:
    """Draw the two routes of attention's gradient, and norms of gradients and updates.

    Args:
      steps: of the measurements.
      share_RSL, cosine_RSL: [measurements, seeds, L].
      norms: "grad" and "update": by part, [measurements - 1, seeds, L].
    Returns: the figure.
    """
    made = Figure(figsize=(13, 3.8), layout="constrained")
    made.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr]
    share, cosine, grad, update = made.subplots(1, 4)
    L = share_RSL.shape[2]
    shades = [DEPTH(layer / max(L - 1, 1)) for layer in range(L)]
    for axes, x_RSL in ((share, share_RSL), (cosine, cosine_RSL)):
        ends = []
        for layer, color in enumerate(shades):
            band(axes, steps, x_RSL[:, :, layer], color)
            ends.append((x_RSL[-1, :, layer].mean(), f"layer {layer + 1}", color))
        axes.axhline(0, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
        finish(axes, ends)
    share.set_title("share that came through the MLP", fontsize=10, loc="left")
    share.set_ylabel("⟨g_MLP, g⟩ / ⟨g, g⟩")
    cosine.set_title("do the routes agree?", fontsize=10, loc="left")
    cosine.set_ylabel("cosine of g_MLP and g_skip")
    middles = (np.asarray(steps[1:]) + np.asarray(steps[:-1])) / 2
    for axes, name, word in ((grad, "grad", "gradient"), (update, "update", "update")):
        ends = []
        for part, norm_RSL in norms[name].items():
            for layer in range(L):
                alpha = 0.35 + 0.65 * layer / max(L - 1, 1)
                axes.plot(middles, norm_RSL[:, :, layer].mean(1), color=COLORS[part], alpha=alpha)
            ends.append((norm_RSL[-1].mean(), TITLES[part], COLORS[part]))
        axes.set(yscale="log", ylabel=f"norm of a layer's {word}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{word}s; darker: later layers", fontsize=10, loc="left")
        finish(axes, ends)
    return made


def finish(axes: matplotlib.axes.Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Name curves over steps beside their ends."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(right=axes.dataLim.x1)  # names are joined to curves that end at the edge
    name_ends(axes, ends)
