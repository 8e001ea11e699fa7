"""Figures of `heads`: what edits cost, what tells it, two kinds of maps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

GREY = "#57606a"
BLUES = LinearSegmentedColormap.from_list("blues", ["#f4f6f8", "#56B4E9", "#0072B2", "#08306b"])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#E69F00", "#009E73", "#0072B2"])
TITLES = {
    **{"entropy": "entropy, nats", "max_prob": "largest weight", "first_mass": "weight on token 1"},
    **{"norm": "norm of what it writes", "gate": "E |∂L / ∂gate|"},
}
SHOWN = 3  # seeds
TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)  # of costs, nats


def damage_figure(damage: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray]) -> Figure:
    """Draw what edits of single heads [seeds,L,N], and of single MLPs [seeds,L], cost."""
    seeds, L, N = next(iter(damage.values())).shape
    seeds = min(seeds, SHOWN)
    widths = [N] * len(damage) + [len(feeds)]
    made = Figure(figsize=(0.25 * sum(widths) + 3.5, 0.25 * L * seeds + 1.4), layout="constrained")
    panels = made.subplots(seeds, len(widths), squeeze=False, width_ratios=widths)
    feeds_SLK = np.stack(list(feeds.values()), axis=2)
    heads = PowerNorm(0.5, vmin=0, vmax=max(*(x.max() for x in damage.values()), 1e-6), clip=True)
    whole = PowerNorm(0.5, vmin=0, vmax=max(feeds_SLK.max(), 1e-6), clip=True)
    how: dict[str, Any] = {"cmap": BLUES, "origin": "lower", "aspect": "auto"}
    for seed, row in enumerate(panels):
        for axes, (kind, x_SLN) in zip(row, damage.items(), strict=False):
            image = axes.imshow(x_SLN[seed], norm=heads, **how)
            axes.set_title(kind if not seed else "", fontsize=10)
        of_mlps = row[-1].imshow(feeds_SLK[seed], norm=whole, **how)
        row[-1].set_title("MLP" if not seed else "", fontsize=10)
        last = seed == seeds - 1
        for axes, names in zip(row, [*([range(1, N + 1)] * len(damage)), list(feeds)], strict=True):
            axes.set(xticks=range(len(names)), yticks=[])
            axes.set_xticklabels(names if last else [""] * len(names), fontsize=6.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        row[-1].tick_params(axis="x", rotation=90)
        row[0].set_yticks(range(L), range(1, L + 1), fontsize=6.5)
        row[0].set_ylabel(f"layer\nseed {seed}" if seeds > 1 else "layer", fontsize=9)
    panels[-1, len(damage) // 2].set_xlabel("head", fontsize=9)
    for drawn, axes, pad, label in (
        (image, panels[:, :-1], 0.01, "cost of a head, nats"),
        (of_mlps, panels[:, -1], 0.05, "cost of an MLP, nats"),
    ):
        ticks = [tick for tick in TICKS if tick <= drawn.norm.vmax]
        made.colorbar(drawn, ax=axes, shrink=0.8, pad=pad, label=label, ticks=ticks)
    return made


def predictors_figure(
    predictors: Mapping[str, np.ndarray], damage_SLN: np.ndarray, found: Mapping[str, np.ndarray]
) -> Figure:
    """Draw each predictor against the damage, heads of all seeds; `found`: from `correlations`."""
    L = damage_SLN.shape[1]
    made = Figure(figsize=(13, 3.3), layout="constrained")
    panels = made.subplots(1, len(predictors), sharey=True)
    chance = found["chance"].mean()
    for axes, (name, x_SLN) in zip(panels, predictors.items(), strict=True):
        for layer in range(L):
            color = DEPTH(layer / max(L - 1, 1))
            x, y = x_SLN[:, layer].ravel(), damage_SLN[:, layer].ravel()
            axes.scatter(x, y, s=16, color=color, alpha=0.8, lw=0)
        rho = found[name]
        near = f" [{rho.min():.2f}, {rho.max():.2f}]" if rho.size > 1 else ""
        color = "#1b1f24" if abs(rho.mean()) > chance else GREY
        axes.set_title(f"ρ = {rho.mean():.2f}{near}", fontsize=10, color=color)
        axes.set(xlabel=TITLES[name])
        if damage_SLN.max() > 0.02:
            axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
        axes.axhline(0, color=GREY, lw=0.7, ls=(0, (4, 3)), zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("cost of a head's mean edit, nats")
    named = [(f"layer {layer + 1}", DEPTH(layer / max(L - 1, 1))) for layer in range(L)]
    named.append((f"by chance\n|ρ| ≤ {chance:.2f}", GREY))
    for i, (text, color) in enumerate(named):
        place = (1.09, 0.98 - 0.08 * i)
        panels[-1].annotate(text, place, xycoords="axes fraction", color=color, va="top")
    return made


def maps_figure(raw: np.ndarray, share: np.ndarray, text: str) -> Figure:
    """Draw weights beside weights times norms, [L,N,T,S]: the head that changes most, a usual one.

    Args:
      raw, share: rows sum to 1.
      text: what the tokens are.
    Returns: the figure.
    """
    change = np.abs(raw - share).sum(axis=-1).mean(axis=-1) / 2
    order = np.argsort(change.ravel())
    made = Figure(figsize=(10.5, 10.5), layout="constrained")
    panels = made.subplots(2, 2)
    for row, at in zip(panels, (order[-1], order[len(order) // 2]), strict=True):
        layer, head = np.unravel_index(at, change.shape)
        for axes, kind, p in zip(row, ("weights", "weights × norms"), (raw, share), strict=True):
            image = _map(axes, p[layer, head], text)
            axes.set_title(
                f"layer {layer + 1}, head {head + 1}: {kind}", fontsize=10, loc="left", pad=8
            )
    made.colorbar(image, ax=panels, shrink=0.4, label="√ share of a row")
    return made


def _map(axes: Any, p_TS: np.ndarray, text: str) -> Any:
    image = axes.imshow(np.sqrt(p_TS), cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
    ticks = [character.replace(" ", "␣") for character in text]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(ticks)), ticks, fontsize=6.5, family="monospace")
        axis.set_tick_params(length=0)
    axes.set(ylabel="query", xlabel="key")
    axes.spines[:].set_visible(False)
    return image
