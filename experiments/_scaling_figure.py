"""The picture of `scaling`: loss against size and data, the exponents' confidence, the split."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments._power_law import Law, interval

GREY, GRID = "#57606a", "#d9dee3"
BLUES = ("#9ccbea", "#56B4E9", "#0072B2", "#003d66")  # short to long
ORANGE, GREEN = "#D55E00", "#009E73"


def figure(
    sizes: np.ndarray,
    seen: np.ndarray,
    losses: np.ndarray,
    law: Law,
    drawn: Law,
    attended: Mapping[int, float],
    shares: Mapping[int, Any],
    usual: int,
    published: Mapping[str, Sequence[float]],
) -> Figure:
    """Draw points and law, resampled exponents, and losses by attention's share.

    Args:
      sizes, seen, losses: parameters, bytes and [sizes, lengths, seeds].
      law, drawn: fitted to all points; to resampled ones.
      attended: attention's share of operations by number of heads.
      shares, usual: losses by number of heads; the usual number.
      published: exponents "a" and "b" of other work, in the same order.
    Returns: the figure.
    """
    made = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = made.subplots(
        1, 3, width_ratios=(1.35, 1, 1), gridspec_kw={"wspace": 0.1}
    )
    _losses(left, sizes, seen, losses, law)
    _exponents(middle, law, drawn, published)
    _split(right, attended, shares, usual)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def _losses(axes: Any, sizes: Any, seen: Any, losses: Any, law: Law) -> None:
    """Draw a curve of the law for each length, only where there are points."""
    line = np.geomspace(sizes[0], sizes[-1], 100)
    for j, length in enumerate(seen):
        color = BLUES[round(j * (len(BLUES) - 1) / max(len(seen) - 1, 1))]
        axes.plot(line, law(line, length), color=color, lw=1.4)
        for seed in range(losses.shape[-1]):
            axes.plot(sizes, losses[:, j, seed], "o", color=color, ms=3.5, alpha=0.8, mew=0)
        axes.annotate(
            _short(length),
            (sizes[-1], law(sizes[-1], length)),
            (6, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="held-out loss, nats a byte")
    ticks = [x for x in np.arange(0.5, 6.0, 0.25) if losses.min() <= x <= losses.max()]
    axes.set_yticks(ticks, [f"{x:.2f}" for x in ticks])
    axes.set_xticks(sizes, [f"{size / 1e3:,.0f} k" for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, lw=0.5, alpha=0.6)
    axes.set_title("dots: after so many bytes; lines: the law", fontsize=9, loc="left", color=GREY)


def _exponents(axes: Any, law: Law, drawn: Law, published: Mapping[str, Sequence[float]]) -> None:
    """Draw a dot for each resampled fit, the intervals as bars, and what others found."""
    axes.plot(drawn.a, drawn.b, ".", color=BLUES[1], ms=4, alpha=0.5, mew=0)
    (a_low, a_high), (b_low, b_high) = interval(drawn.a), interval(drawn.b)
    axes.plot([a_low, a_high], [law.b] * 2, color=BLUES[3], lw=1.6)
    axes.plot([law.a] * 2, [b_low, b_high], color=BLUES[3], lw=1.6)
    axes.plot(law.a, law.b, "o", color=BLUES[3], ms=5)
    marks = zip(published["a"], published["b"], ("Hoffmann", "Besiroglu"), "D^", strict=True)
    for a, b, name, mark in marks:
        axes.plot(a, b, mark, color=ORANGE, ms=5, zorder=4)
        axes.annotate(name, (a, b), (4, 6), textcoords="offset points", color=ORANGE, va="center")
    a_all, b_all = ([low, high, *published[name]] for name, low, high in (
        ("a", *interval(drawn.a, 0.99)), ("b", *interval(drawn.b, 0.99))))  # fmt: skip
    for values, limit in ((a_all, axes.set_xlim), (b_all, axes.set_ylim)):
        room = 0.08 * (max(values) - min(values))
        limit(max(min(values) - room, 0.0), max(values) + room)
    axes.set(xlabel="exponent of parameters, a", ylabel="exponent of data, b")
    axes.set_title("dots: resampled fits; bars: 95 %", fontsize=9, loc="left", color=GREY)


def _split(axes: Any, attended: Mapping[int, float], shares: Mapping[int, Any], usual: int) -> None:
    """Draw losses against attention's share, a dot for each seed."""
    at = [100 * attended[N] for N in shares]
    axes.plot(at, [np.mean(x) for x in shares.values()], color=GREEN, lw=1.4)
    for x, values in zip(at, shares.values(), strict=True):
        axes.plot([x] * np.size(values), np.ravel(values), "o", color=GREEN, ms=4, alpha=0.8, mew=0)
    top = max(np.max(x) for x in shares.values())
    room = top - min(np.min(x) for x in shares.values())
    for N, x in zip(shares, at, strict=True):
        word = f"{N}\nusual" if usual == N else f"{N}"
        high = np.max(shares[N]) + 0.05 * room
        text = axes.text(x, high, word, color=GREY, fontsize=8, ha="center", va="bottom")
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_ylim(top=top + 0.22 * room)
    axes.margins(x=0.08)
    axes.set(xlabel="attention's share of operations, %", ylabel="held-out loss, nats a byte")
    axes.set_title("numbers: heads, each of the same width", fontsize=9, loc="left", color=GREY)
    axes.grid(axis="y", color=GRID, lw=0.5, alpha=0.6)


def _short(number: float) -> str:
    """Write 512000 as 512 kB."""
    return f"{number / 1e6:.3g} MB" if number >= 1e6 else f"{number / 1e3:.3g} kB"
