"""Maps of heads side by side, for a paper."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_attn.view import paper
from jax_attn.view.colors import ramp
from jax_attn.view.glyphs import check_strings, visible
from jax_attn.view.maps import Maps, check_statistic, largest_in_blocks, open_maps
from jax_attn.view.summary import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches.
_GAP, _EDGE = 0.06, 0.03
_BAR, _BAR_TEXT, _LEAST_BAR = 0.07, 0.38, 0.6
_NARROWEST_TITLED = 0.75
# In points: smaller ones cannot be read in print.
_SMALLEST_TOKEN, _LARGEST_TOKEN = 4.0, 7.0
_LONGEST_TOKEN = 14


class _Grid(NamedTuple):
    """Where panels stand, in inches from the top left."""

    rows: int
    columns: int
    width: float
    height: float
    left: float
    top: float
    gap_x: float
    gap_y: float

    def total(self) -> tuple[float, float]:
        right = self.left + self.columns * (self.width + self.gap_x) - self.gap_x
        bottom = self.top + self.rows * (self.height + self.gap_y) - self.gap_y
        return right, bottom


def plot_heads(
    weights_LNTS: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    statistics: Mapping[str, Any] | None = None,
    limit: float = 1.0,
    width: float = paper.TEXT,
    columns: int | None = None,
    L: int | None = None,
    N: int | None = None,
) -> "Figure":
    """Draw maps of heads: a row is a query, a column the key it looks at, colour the √ weight.

    Weights of exactly 0 are white. A map with more cells than dots is shrunk; each block then shows
    its largest weight, so that thin lines stay.

    Args:
      weights_LNTS: probabilities, or a function `(layer, head) -> [T,S]` with L and N, as in
        `attention_html`.
      path: where to save it; the ending says the format. None only returns it.
      heads: (layer, head) pairs in the order to show them; None shows all, a row for each layer.
      tokens: the text of each query, beside the first column, where there is room, in Matplotlib's
        own fonts, which lack Chinese, Japanese and Korean; set `font.family` for those.
      key_tokens: the text of each key, above the first row; left out, `tokens` if T = S.
      statistics: name -> [L,N], a line each above its panel.
      limit: the weight that gets the last colour; larger ones get it too.
      width: of the whole figure in inches; 6.75 spans the text of most papers, 3.3 a column.
      columns: panels side by side; default N, or up to 4 of chosen heads.
      L, N: layers and heads, where weights_LNTS is a function.
    Returns: a Matplotlib Figure, made without pyplot.
    Raises: ValueError naming the argument, the axis letter and both sizes, or what has no room.
    Example:
      >>> weights_LNTS = np.tril(np.ones((1, 2, 3, 3))) / np.arange(1, 4)[:, None]
      >>> figure = plot_heads(weights_LNTS, tokens=["the", " cat", " sat"], width=3.3)
      >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
      ['the', '␣cat', '␣sat']
    """
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.figure import Figure

    maps = open_maps(weights_LNTS, L=L, N=N)
    shown = _chosen(heads, maps)
    if columns is None:
        columns = maps.N if heads is None else min(4, len(shown))
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        raise ValueError(f"columns must be an int >= 1, got {columns!r}")
    width, limit = paper.positive("width", width), paper.positive("limit", limit)
    titled = heads is not None or columns != maps.N
    values = _values(statistics, maps)
    weights = [maps.read(layer, head) for layer, head in shown[:1]]
    T, S = weights[0].shape
    query_labels, key_labels = _token_labels(tokens, key_tokens, T, S)
    lines = len(values) + titled
    grid = _grid(len(shown), columns, width, T / S, query_labels, key_labels, lines, titled)
    if lines and grid.width < _NARROWEST_TITLED:
        raise ValueError(
            f"columns: {columns} panels on {width:g} inches leave {grid.width:.2f} inches each, "
            f"and what stands above them needs {_NARROWEST_TITLED}; show fewer heads side by side"
        )
    right, bottom = grid.total()
    bar_height = min(max(bottom - grid.top, _LEAST_BAR), 1.5) - 0.15
    height = max(bottom, grid.top + bar_height + 0.15) + _EDGE
    figure = Figure(figsize=(width, height))
    colormap = ListedColormap(ramp() / 255).with_extremes(bad="white")
    norm = PowerNorm(0.5, vmin=0, vmax=limit, clip=True)
    dots = [max(1, round(paper.DOTS_PER_INCH * side / 2)) for side in (grid.height, grid.width)]
    image = None
    for i, (layer, head) in enumerate(shown):
        weights_TS = weights[0] if i == 0 else maps.read(layer, head)
        if weights_TS.shape != (T, S):
            raise ValueError(
                f"weights_LNTS({layer}, {head}) has (T, S) = {weights_TS.shape} but the first map "
                f"has {(T, S)}"
            )
        row, column = divmod(i, columns)
        x = grid.left + column * (grid.width + grid.gap_x)
        y = grid.top + row * (grid.height + grid.gap_y)
        place = (x, height - y - grid.height, grid.width, grid.height)
        ax = figure.add_axes(tuple(np.array(place) / [width, height, width, height]))
        small = largest_in_blocks(weights_TS, *dots)
        image = ax.imshow(
            np.ma.masked_equal(small, 0),
            cmap=colormap,
            norm=norm,
            interpolation="nearest",
            aspect="auto",
            extent=(-0.5, S - 0.5, T - 0.5, -0.5),
        )
        ax.spines[:].set(color="#b8c0c8", linewidth=0.5)
        ax.set(xticks=[], yticks=[])
        above = [f"layer {layer}, head {head}"] if titled else []
        for name, unit, array in values:
            number = f"{array[layer, head]:.3g}".replace("-", "−")
            above.append(f"{name} {number} {unit}".strip())
        if above:
            ax.set_title("\n".join(above), fontsize=paper.SMALL_SIZE, pad=3, linespacing=1.15)
            ax.title.set_parse_math(False)
        if column == 0:
            _label_axis(ax.yaxis, query_labels, grid.height / T)
        if row == 0:
            _label_axis(ax.xaxis, key_labels, grid.width / S)
        if heads is None and not titled:
            _label_grid(figure, grid, layer, head, (width, height))
    assert image is not None
    place = (right + 0.08, height - grid.top - bar_height, _BAR, bar_height)
    bar_ax = figure.add_axes(tuple(np.array(place) / [width, height, width, height]))
    bar = figure.colorbar(image, cax=bar_ax, extend="max" if limit < 1 else "neither")
    shares = [0, 0.1, 0.5, 1] if bar_height < 0.9 else [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([share * limit for share in shares], labels=[f"{s * limit:.2g}" for s in shares])
    bar.ax.tick_params(labelsize=6, length=1.5, width=0.5, pad=1.5)
    bar.outline.set(linewidth=0.4, edgecolor="#b8c0c8")  # type: ignore[operator]
    bar.ax.set_xlabel("weight", fontsize=6, labelpad=3, loc="left")
    paper.save(figure, path)
    return figure


def _chosen(heads: Sequence[tuple[int, int]] | None, maps: Maps) -> list[tuple[int, int]]:
    if heads is None:
        return [(layer, head) for layer in range(maps.L) for head in range(maps.N)]
    if not len(heads):
        raise ValueError("heads is empty; name one (layer, head) pair at least")
    for pair in heads:
        ints = np.shape(pair) == (2,) and np.asarray(pair).dtype.kind in "iu"
        if not ints or not (0 <= pair[0] < maps.L and 0 <= pair[1] < maps.N):
            raise ValueError(f"heads: {pair!r} is no (layer, head) of L={maps.L}, N={maps.N}")
    return [(int(layer), int(head)) for layer, head in heads]


def _values(statistics: Mapping[str, Any] | None, maps: Maps) -> list[tuple[str, str, np.ndarray]]:
    made = []
    for name, values_LN in (statistics or {}).items():
        array = check_statistic(name, values_LN, maps)
        made.append((label(name).title, label(name).unit, array))
    return made


def _token_labels(
    tokens: Sequence[str] | None, key_tokens: Sequence[str] | None, T: int, S: int
) -> tuple[list[str], list[str]]:
    if key_tokens is None and tokens is not None and T == S:
        key_tokens = tokens
    made = []
    for name, given, letter, size in (
        ("tokens", tokens, "T", T),
        ("key_tokens", key_tokens, "S", S),
    ):
        if given is not None and len(given) != size:
            raise ValueError(
                f"{name} has {letter}={len(given)} but weights_LNTS has {letter}={size}"
            )
        texts = [visible(token) for token in check_strings(name, given or ())]
        made.append(
            [t if len(t) <= _LONGEST_TOKEN else f"{t[: _LONGEST_TOKEN - 1]}…" for t in texts]
        )
    return made[0], made[1]


def _inches(texts: list[str], points: float) -> float:
    """How long the longest text is in a monospaced font, where wide characters take two cells."""
    cells = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) for text in texts]
    return max(cells, default=0) * 0.61 * points / 72


def _grid(
    count: int,
    columns: int,
    width: float,
    ratio: float,
    query_labels: list[str],
    key_labels: list[str],
    lines: int,
    titled: bool,
) -> _Grid:
    """Share the width out among panels, and check that tokens can be read beside them."""
    rows = -(-count // columns)
    gap_x = _GAP if columns > 1 else 0.0
    gap_y = _GAP + lines * 0.118 + (0.03 if lines else 0)
    named = 0.0 if titled else 0.17
    right = _BAR + 0.08 + _BAR_TEXT
    T, S = len(query_labels), len(key_labels)
    points, panel = _LARGEST_TOKEN, 0.0
    # Smaller letters leave larger panels, which take larger letters.
    for _ in range(20):
        left = _EDGE + named + (_inches(query_labels, points) + 0.06 if query_labels else 0)
        panel = (width - left - right - (columns - 1) * gap_x) / columns
        cells = [panel / S] if S else []
        cells += [panel * min(max(ratio, 0.25), 2.0) / T] if T else []
        points = min([_LARGEST_TOKEN, *(72 * cell / 1.15 for cell in cells)])
    if panel <= 0 or points < _SMALLEST_TOKEN:
        raise ValueError(
            f"tokens: {columns} panels on {width:g} inches leave {max(points, 0):.1f} points for a "
            f"token, and print needs {_SMALLEST_TOKEN:g}; show fewer heads side by side (columns), "
            "make the figure wider, or leave tokens out"
            if T or S
            else f"width: {columns} panels do not fit on {width:g} inches"
        )
    height = panel * min(max(ratio, 0.25), 2.0)
    above = _inches(key_labels, points) + 0.05 if key_labels else 0.0
    top = _EDGE + named + lines * 0.118 + (0.05 if lines else 0.0) + above
    return _Grid(rows, columns, panel, height, left, top, gap_x, gap_y)


def _label_axis(axis: Any, labels: list[str], cell: float) -> None:
    if not labels:
        return
    size = min(_LARGEST_TOKEN, 72 * cell / 1.15)
    is_top = axis.axis_name == "x"
    axis.set_ticks(
        range(len(labels)),
        labels,
        fontsize=size,
        family=paper.MONOSPACE,
        rotation=90 if is_top else 0,
    )
    axis.set_tick_params(length=0, pad=2)
    if is_top:
        axis.tick_top()
        axis.set_tick_params(length=0, pad=2)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)


def _label_grid(figure: Any, grid: _Grid, layer: int, head: int, size: tuple[float, float]) -> None:
    """Name columns and rows once, along the first row and the first column."""
    width, height = size
    style = {"fontsize": paper.SMALL_SIZE, "color": paper.FAINT}
    if layer == 0:
        x = grid.left + head * (grid.width + grid.gap_x) + grid.width / 2
        word = "head " if head == 0 else ""
        figure.text(x / width, 1 - 0.02 / height, f"{word}{head}", ha="center", va="top", **style)
    if head == 0:
        y = grid.top + layer * (grid.height + grid.gap_y) + grid.height / 2
        word = "layer " if layer == 0 else ""
        figure.text(
            0.02 / width,
            1 - y / height,
            f"{word}{layer}",
            ha="left",
            va="center",
            rotation=90,
            **style,
        )
