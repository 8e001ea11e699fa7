"""The pictures of `flow`: who predicts better, who learns when, where attention looks."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._curves import name_ends
from experiments._report import save
from jax_attn.view import plot_heads, plot_statistic_over_training

# Okabe and Ito's palette: told apart without red-green vision.
COLORS = {
    "both": "#0072B2",
    "attention": "#E69F00",
    "mlp": "#009E73",
    "static": "#CC79A7",
    "frozen_attention": "#56B4E9",
    "frozen_mlp": "#56B4E9",
}
DASHES = {"frozen_attention": (0, (4, 2)), "frozen_mlp": (0, (1, 1.5))}


def draw(
    cfg: Any, trained: dict[str, Any], seen: dict[str, Any], out: pathlib.Path
) -> list[tuple[pathlib.Path, str]]:
    """Draw all figures into a folder; return paths and captions in reading order."""
    seeds = f"{cfg.seeds} seeds: mean, band from least to largest"
    return [
        (
            save(loss_figure(trained), out / "loss.png"),
            f"Held-out bits per byte during training, equal parameter count ({seeds}).",
        ),
        (
            save(together_figure(trained["both"]), out / "together.png"),
            f"Gradient and update norms of both parts of the full model, every step ({seeds}).",
        ),
        (
            save(maps_figure(seen), out / "maps.png"),
            "Attention scores before and after training, on one line of text, for the head of "
            "each layer that changed most. A row is a query, a column the token it looks at.",
        ),
        (
            save(every_head_figure(seen), out / "heads.png"),
            "Every head of the trained model on one line of text, seed 0, with the mean entropy of "
            "its rows. heads.html shows the same to hover over.",
        ),
        (
            save(statistics_figure(trained["both"]), out / "statistics.png"),
            "What each head of the full model does on held-out text while it learns, seed 0: means "
            "over rows, and the largest logit. Layers and heads count from 0, as in heads.html.",
        ),
        (
            save(static_dynamic_figure(seen), out / "static_dynamic.png"),
            "One head on two sentences. The static mixer uses the same matrix for both, "
            "attention derives one from each.",
        ),
    ]


def loss_figure(trained: dict[str, Any]) -> Figure:
    """Bits per byte over steps, one line a model, labelled where it ends."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    ends = []
    for name, model in trained.items():
        steps = [row["step"] for row in model.history.eval]
        bits = np.stack([np.atleast_1d(row["eval/bits_per_byte"]) for row in model.history.eval])
        style = DASHES.get(name, "-")
        ax.plot(steps, bits.mean(1), color=COLORS[name], linestyle=style, linewidth=2)
        ax.fill_between(steps, bits.min(1), bits.max(1), color=COLORS[name], alpha=0.2, linewidth=0)
        ends.append((float(bits[-1].mean()), f"{model.title}  {bits[-1].mean():.2f}", COLORS[name]))
    finals = [end for end, *_ in ends]
    low, high = min(finals), max(finals)
    top = high + max(1.2 * (high - low), 0.5)
    ax.set_ylim(low - 0.08 * (top - low), top)
    ax.set_xlim(0, steps[-1])
    name_ends(ax, ends)
    ax.set_xlabel("step")
    ax.set_ylabel("held-out bits per byte")
    _plain(ax)
    return figure


def together_figure(model: Any) -> Figure:
    """Norms of the two parts, step by step, on a log scale."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = model.history.train
    steps = [row["step"] + 1 for row in rows]
    titles = {"grad_norm": "gradient norm", "update_norm": "update norm"}
    for ax, (norm, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for part, color in (("attention", COLORS["both"]), ("mlp", COLORS["mlp"])):
            values = np.stack([np.atleast_1d(row[f"{norm}/{part}"]) for row in rows])
            label = "MLP" if part == "mlp" else part
            ax.plot(steps, values.mean(1), color=color, linewidth=1, label=label)
            ax.fill_between(
                steps, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_title(title, fontsize=11)
        _plain(ax)
        ax.legend(frameon=False)
    return figure


def every_head_figure(seen: dict[str, Any]) -> Figure:
    """All maps of the trained model."""
    maps_LNTT = seen["line"]["after"][:, 0]
    logs = np.log(np.where(maps_LNTT > 0, maps_LNTT, 1.0))
    return plot_heads(
        maps_LNTT, statistics={"entropy": -(maps_LNTT * logs).sum(axis=-1).mean(axis=-1)}
    )


def statistics_figure(model: Any) -> Figure:
    """Statistics of every head over training, as they were observed."""
    rows = model.history.eval
    history: dict[str, Any] = {"steps": [row["step"] for row in rows]}
    for name in ("entropy", "expected_distance", "first_mass", "max_logit"):
        history[name] = np.stack([row[f"eval/{name}"][0] for row in rows])
    return plot_statistic_over_training(history)


def maps_figure(seen: dict[str, Any]) -> Figure:
    """Scores before and after training, for the most changed head of the first and last layer."""
    before, after = seen["line"]["before"][:, 0], seen["line"]["after"][:, 0]
    layers = sorted({0, len(after) - 1})
    figure = Figure(figsize=(10, 5.1 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 2, squeeze=False)
    for row, layer in zip(axes, layers, strict=True):
        head = int(np.abs(after[layer] - before[layer]).sum(axis=(1, 2)).argmax())
        for ax, maps, when in zip(row, (before, after), ("before", "after"), strict=True):
            image = _map(ax, maps[layer, head], seen["texts"][0])
            ax.set_title(f"layer {layer + 1}, head {head + 1}, {when} training", fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.5, label="√ score")
    return figure


def static_dynamic_figure(seen: dict[str, Any]) -> Figure:
    """One head of the static mixer and of attention on two sentences."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    rows = figure.subplots(2, 2)
    for row, key, title in zip(
        rows, ("pair_static", "pair"), ("static mixer", "attention"), strict=True
    ):
        maps = seen[key][-1]
        head = int(np.abs(maps[0] - maps[1]).sum(axis=(1, 2)).argmax())
        equal = "identical" if (maps[0] == maps[1]).all() else "different"
        for ax, matrix, sentence in zip(row, maps, seen["texts"][1:], strict=True):
            image = _map(ax, matrix[head], sentence)
            ax.set_title(f"{title}, last layer, head {head + 1}: {equal}", fontsize=11)
    figure.colorbar(image, ax=rows, shrink=0.5, label="√ weight")
    return figure


def _map(ax: Any, p_TS: np.ndarray, text: str) -> Any:
    # The square root shows small scores too; the bar says so.
    image = ax.imshow(np.sqrt(p_TS), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ticks = [character.replace(" ", "␣") for character in text]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(len(ticks)), ticks, fontsize=7, family="monospace")
        axis.set_tick_params(length=0)
    ax.xaxis.tick_top()
    for side in ax.spines.values():
        side.set_visible(False)
    return image


def _plain(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#d9dee3", linewidth=0.6)
