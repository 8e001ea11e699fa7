"""How statistics of heads move during training, for a paper."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_attn.view import paper
from jax_attn.view.colors import OKABE_ITO, ramp
from jax_attn.view.summary import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL_HEIGHT = 1.9  # inches


def plot_statistic_over_training(
    history: Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    statistics: Sequence[str] | None = None,
    width: float | None = None,
) -> "Figure":
    """Draw statistics of heads over training: a panel for each, a line a head, a colour a layer.

    In each panel the heads that end highest and lowest are named.

    Args:
      history: "steps" -> [steps], rising; and name -> [steps, L, N] for each statistic. NaN leaves
        a gap.
      path: where to save it; the ending says the format. None only returns it.
      statistics: which to draw, in this order; None draws all of history.
      width: of the whole figure in inches; default 3.3 for one panel, a paper's column, else 6.75.
    Returns: a Matplotlib Figure, made without pyplot.
    Raises: ValueError naming what is missing, or the axis letter and both sizes.
    Example:
      >>> history = {"steps": [0, 100], "entropy": np.ones((2, 3, 4))}
      >>> figure = plot_statistic_over_training(history)
      >>> figure.axes[0].get_ylabel(), len(figure.axes[0].get_lines())
      ('entropy (nats)', 12)
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap, to_hex
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    steps, values = _checked(history, statistics)
    L, N = next(iter(values.values())).shape[1:]
    columns = min(2, len(values))
    rows = -(-len(values) // columns)
    if width is None:
        width = paper.COLUMN if columns == 1 else paper.TEXT
    size = (paper.positive("width", width), rows * _PANEL_HEIGHT + 0.25)
    figure = Figure(figsize=size, layout="constrained")
    few = len(OKABE_ITO) >= L
    # The palest fifth of the scale would not be seen as a line.
    shades = ramp()[np.linspace(50, 255, L).astype(int)] / 255
    colors = OKABE_ITO[:L] if few else [to_hex(tuple(shade)) for shade in shades]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in panels[len(values) :]:
        ax.set_visible(False)
    for ax, (name, values_RLN) in zip(panels, values.items(), strict=False):
        for layer in range(L):
            for head in range(N):
                ax.plot(
                    steps,
                    values_RLN[:, layer, head],
                    color=colors[layer],
                    linewidth=1.0 if L * N <= 24 else 0.6,
                    alpha=0.9 if L * N <= 24 else 0.7,
                    marker="o" if len(steps) == 1 else None,
                    markersize=3,
                )
        _name_ends(ax, steps, values_RLN, colors if few else [paper.FAINT] * L)
        title, unit, _ = label(name)
        ax.set_ylabel(f"{title} ({unit})" if unit else title, fontsize=paper.LABEL_SIZE)
        ax.set_xlabel("step", fontsize=paper.LABEL_SIZE)
        ax.yaxis.label.set_parse_math(False)
        ax.tick_params(labelsize=paper.SMALL_SIZE, length=2.5, width=0.6)
        if len(steps) > 1:
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        else:
            ax.set_xticks(steps)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_linewidth(0.6)
        ax.grid(axis="y", color=paper.GRID, linewidth=0.5)
    if few and L > 1:
        handles = [Line2D([], [], color=colors[layer], linewidth=1.8) for layer in range(L)]
        figure.legend(
            handles,
            [f"layer {layer}" for layer in range(L)],
            loc="outside upper center",
            ncols=L if columns > 1 else min(L, 3),
            frameon=False,
            fontsize=paper.SMALL_SIZE,
            handlelength=1.4,
            columnspacing=1.2,
        )
    elif not few:
        scale = ScalarMappable(BoundaryNorm(np.arange(L + 1) - 0.5, L), ListedColormap(colors))
        bar = figure.colorbar(scale, ax=panels[: len(values)], pad=0.02, aspect=40, fraction=0.05)
        bar.set_ticks(range(0, L, -(-L // 12)))
        bar.ax.minorticks_off()
        bar.set_label("layer", fontsize=paper.LABEL_SIZE)
        bar.ax.tick_params(labelsize=paper.SMALL_SIZE, length=0)
        bar.outline.set_visible(False)  # type: ignore[operator]
    paper.save(figure, path)
    return figure


def _name_ends(ax: Any, steps: np.ndarray, values_RLN: np.ndarray, colors: Sequence[Any]) -> None:
    """Write "L2 H5" where the highest and the lowest line end."""
    last_LN = values_RLN[-1]
    if not np.isfinite(last_LN).any() or last_LN.size == 1:
        return
    ends = {int(np.nanargmax(last_LN)), int(np.nanargmin(last_LN))}
    for end in ends:
        layer, head = divmod(end, last_LN.shape[1])
        ax.annotate(
            f"L{layer} H{head}",
            (steps[-1], last_LN[layer, head]),
            xytext=(3, 0),
            textcoords="offset points",
            color=colors[layer],
            fontsize=6.5,
            va="center",
            annotation_clip=False,
        )


def _checked(
    history: Mapping[str, Any], statistics: Sequence[str] | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if "steps" not in history:
        raise ValueError(
            f"history needs 'steps', it has {', '.join(map(repr, history)) or 'nothing'}"
        )
    steps = np.asarray(history["steps"], np.float64)
    if steps.ndim != 1 or not len(steps) or not (np.diff(steps, prepend=-np.inf) > 0).all():
        raise ValueError(
            f"history: 'steps' must be rising numbers [steps], got shape {steps.shape}"
        )
    names = [name for name in history if name != "steps"] if statistics is None else statistics
    if isinstance(names, str) or not names:
        raise ValueError(f"statistics must be names of history beside 'steps', got {names!r}")
    values: dict[str, np.ndarray] = {}
    for name in names:
        if name not in history:
            raise ValueError(
                f"statistics: {name!r} is not in history, which has {', '.join(map(repr, history))}"
            )
        if isinstance(history[name], Mapping):
            raise ValueError(
                f"history: {name!r} holds {', '.join(map(repr, history[name]))}; take one of them, "
                f"an array [steps, L, N]"
            )
        array = np.asarray(history[name], np.float64)
        if array.ndim != 3 or len(array) != len(steps):
            raise ValueError(
                f"history: {name!r} must be [steps, L, N] with {len(steps)} steps, got "
                f"{array.shape}"
            )
        first = next(iter(values.items()), (name, array))
        for letter, size, other in zip("LN", array.shape[1:], first[1].shape[1:], strict=True):
            if size != other or not size:
                raise ValueError(
                    f"history: {name!r} has {letter}={size} but {first[0]!r} has {letter}={other}"
                )
        values[name] = array
    return steps, values
