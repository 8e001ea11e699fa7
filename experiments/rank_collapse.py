"""Why is there a skip beside attention: what is left of the tokens' differences after 12 layers?

At random init, without training. Attention mixes, and mixing makes tokens alike: what is left of
their differences, r = |x - mean of tokens| / |x| in the Frobenius norm, falls doubly exponentially
through layers of attention alone, to a power of three at each (arXiv:2103.03404). That is of
attention to all tokens; under a causal mask r falls too, by a like factor at each layer
(arXiv:2405.18781). An MLP without a skip beside attention does not stop that; the skip does. How
well depends on the init: at variance 1 / fan-in each layer adds as much as there is, and r falls
slowly; at GPT-2's (deviation 0.02, what leads out of a part divided by sqrt(2 L)) it hardly falls.
Each part reads its normed input.

Command: python -m experiments.rank_collapse
Minutes: 2 on 2 busy CPU cores; --preset=tpu has not been run yet
Expected: log r of a layer is 3 times (2.4 to 3.6) that of the layer before, up to a constant, until
  rounding ends it (arXiv:2103.03404), under a causal mask once (0.8 to 1.2; arXiv:2405.18781); with
  a skip r stays above 0.95 at layer 12 (small runs)
Writes: runs/rank_collapse/summary.json, rank_collapse.png
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments import _findings
from experiments._report import save
from jax_attn import attention, causal, init_attention, init_block, init_mlp, mlp, norm, read_mesh
from jax_attn.command_line import check_positive

# Which parts there are, and whether what they make is added to what they read.
KINDS = {
    "attention": "attention",
    "mlp": "attention, MLP",
    "skip": "attention + skip",
    "both": "attention + skip, MLP + skip",
    "half": "attention, MLP + skip",
    "causal": "causal attention",
    "causal_mlp": "causal attention, MLP",
    "causal_both": "causal attention + skip, MLP + skip",
}
SKIPPED = ("skip", "both", "causal_both")  # kinds with a skip beside attention
INITS = {"fan_in": "1 / fan-in", "gpt2": "GPT-2"}
COLORS = {
    **{"attention": "#D55E00", "mlp": "#E69F00", "half": "#CC79A7"},
    **{"skip": "#0072B2", "both": "#009E73"},
    **{"causal": "#D55E00", "causal_mlp": "#E69F00", "causal_both": "#009E73"},
}
# Below, differences of tokens are rounding: so many units in the last place.
ROUNDING = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Layers, rows of tokens, tokens; widths belong to the precisions, see `SIZES`."""

    L: int = 12
    B: int = 8
    T: int = 64
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/rank_collapse"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"seeds": 2, "out": "runs/rank_collapse/quick"},
    "tpu": {"B": 64, "T": 512, "seeds": 8, "out": "runs/rank_collapse/tpu"},
}
SIZES = {"float32": {"D": 768, "N": 12}, "float64": {"D": 64, "N": 4}}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if cfg.T < 2:
        raise ValueError(f"--T must be at least 2 for tokens to differ, got {cfg.T}")
    if cfg.L < 4:
        raise ValueError(f"--L must be at least 4 to see how fast differences fall, got {cfg.L}")
    mesh = read_mesh(cfg.mesh)
    if cfg.B % mesh.size:
        raise ValueError(f"--B={cfg.B} rows cannot be split over {mesh.size} devices")
    return mesh


def draw(key: jax.Array, init: str, L: int, D: int, N: int, dtype: Any) -> Any:
    """Draw one layer."""
    params = init_block(
        key,
        D=D,
        attention=partial(init_attention, D=D, N=N, dtype=dtype),
        mlp=partial(init_mlp, D=D, F=4 * D, dtype=dtype),
    )
    if init == "fan_in":
        return params

    def small(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if not name.startswith("w"):
            return leaf
        fan_in = math.prod(leaf.shape[:-1]) if name in ("wo_NED", "w_out_FD") else D
        out = math.sqrt(2 * L) if name in ("wo_NED", "w_out_FD") else 1.0
        return leaf * (0.02 * math.sqrt(fan_in) / out)

    return jax.tree_util.tree_map_with_path(small, params)


def layer(kind: str, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Run one layer without or with skips."""
    mask = causal() if kind.startswith("causal") else None
    y_BTD = attention(params["attention"], norm(params["attention_norm"], x_BTD), mask=mask)
    x_BTD = x_BTD + y_BTD if kind in SKIPPED else y_BTD
    if kind in ("attention", "skip", "causal"):
        return x_BTD
    y_BTD = mlp(params["mlp"], norm(params["mlp_norm"], x_BTD))
    return y_BTD if kind in ("mlp", "causal_mlp") else x_BTD + y_BTD


def left_over(x_BTD: jax.Array) -> jax.Array:
    """Measure what is left of the tokens' differences, [B]."""
    apart_BTD = x_BTD - x_BTD.mean(axis=1, keepdims=True)
    return jnp.linalg.norm(apart_BTD, axis=(1, 2)) / jnp.linalg.norm(x_BTD, axis=(1, 2))


def through_layers(
    cfg: Config, mesh: jax.sharding.Mesh, kind: str, init: str, precision: str
) -> np.ndarray:
    """Measure r before the first and after each layer, [seeds, L+1]: the mean of log r over rows.

    Args:
      cfg: sizes.
      mesh: rows are split over data and fsdp.
      kind, init, precision: of `KINDS`, `INITS`, `SIZES`.
    Returns: r.
    """
    D, N, dtype = SIZES[precision]["D"], SIZES[precision]["N"], jnp.dtype(precision)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def one(seed: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), seed), cfg.L + 1)
        x_BTD = jax.random.normal(keys[-1], (cfg.B, cfg.T, D), dtype)
        x_BTD = jax.lax.with_sharding_constraint(x_BTD, place)

        def body(x_BTD: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_BTD = layer(kind, draw(key, init, cfg.L, D, N, dtype), x_BTD)
            return x_BTD, left_over(x_BTD)

        _, r_LB = jax.lax.scan(body, x_BTD, keys[:-1])
        r_LB = jnp.concatenate([left_over(x_BTD)[None], r_LB])
        return jnp.exp(jnp.log(jnp.maximum(r_LB, jnp.finfo(dtype).tiny)).mean(1))

    # One seed after the other: a layer of this width fills a CPU by itself.
    run = jax.jit(one)
    return np.stack([np.asarray(run(jnp.asarray(seed)), np.float64) for seed in range(cfg.seeds)])


def slopes(r_SL: np.ndarray, precision: str) -> np.ndarray:
    """Find the slope of log r of a layer against log r of the one before, [seeds].

    Of the layers where r is below a half, as the law is one of small r, and above rounding.

    Args:
      r_SL: from `through_layers`.
      precision: decides where rounding begins.
    Returns: slopes by least squares; not a number where fewer than two layers are left.
    """
    least = ROUNDING * float(np.finfo(precision).eps)
    found = []
    for r_L in r_SL:
        fits = (r_L[:-1] < 0.5) & (r_L[1:] > least)
        before, after = np.log(r_L[:-1][fits]), np.log(r_L[1:][fits])
        found.append(np.polyfit(before, after, 1)[0] if fits.sum() > 1 else np.nan)
    return np.array(found)


def verdicts(found: Mapping[tuple[str, str, str], np.ndarray]) -> list[_findings.Verdict]:
    """Judge what is left.

    Args:
      found: r [seeds, L+1] by kind, init and precision.
    Returns: verdicts.
    """
    made = []
    for kind, text, power, paper in (
        ("attention", "attention alone", 3, "arXiv:2103.03404"),
        ("mlp", "an MLP without skips", 3, "arXiv:2103.03404"),
        ("half", "an MLP with a skip, attention without", 3, "arXiv:2103.03404"),
        ("causal", "causal attention alone", 1, "arXiv:2405.18781"),
        ("causal_mlp", "causal attention and an MLP without skips", 1, "arXiv:2405.18781"),
    ):
        falls = "triples with each layer" if power == 3 else "falls by as much at each layer"
        made += [
            _findings.gate(
                f"{text}: log r {falls} (float64, D = 64)",
                slopes(found[kind, "fan_in", "float64"], "float64"),
                least=0.8 * power, most=1.2 * power, source=f"{power}, {paper}",
            ),
            _findings.gate(
                f"{text}: tokens are alike after the last layer (float32, D = 768)",
                found[kind, "fan_in", "float32"][:, -1], most=1e-5, source="rounding",
            ),
        ]  # fmt: skip
    for init, title in INITS.items():
        for kind in SKIPPED:
            made.append(
                _findings.gate(
                    f"{KINDS[kind]}, init {title}: r stays above 0.95 (float32, D = 768)",
                    found[kind, init, "float32"][:, -1], least=0.95, source="small runs",
                )
            )  # fmt: skip
    return made


def dashes(kind: str, init: str) -> Any:
    """Choose how a line is drawn: dashed if causal, dotted at GPT-2's init."""
    if init == "gpt2":
        return (0, (1, 1.5))
    return (0, (5, 2)) if kind.startswith("causal") else "-"


def figure(found: Mapping[tuple[str, str, str], np.ndarray]) -> matplotlib.figure.Figure:
    """Draw r against depth for both precisions, and what skips leave once more without logs."""
    made = matplotlib.figure.Figure(figsize=(11, 3.6), layout="constrained")
    *logs, last = made.subplots(1, 3)
    for axes, precision in zip(logs, SIZES, strict=True):
        floor = float(np.finfo(precision).eps)
        for (kind, init, at), r_SL in found.items():
            if at != precision:
                continue
            shown = np.maximum(r_SL, floor / 10)
            depth = np.arange(r_SL.shape[1])
            mean = np.exp(np.log(shown).mean(0))
            axes.plot(depth, mean, color=COLORS[kind], ls=dashes(kind, init), lw=1.6)
        axes.axhline(floor, color="#57606a", lw=0.8, ls=(0, (4, 3)))
        axes.text(depth[-1], floor / 2, "rounding", color="#57606a", ha="right", va="top")
        axes.set(yscale="log", xlabel="layer", ylim=(1e-17, 4))
        axes.set_title(f"{precision}, D = {SIZES[precision]['D']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    logs[0].set_ylabel("r: what is left of differences")
    for (kind, init, at), r_SL in found.items():
        if at == "float32" and kind in SKIPPED:
            style = dashes(kind, init)
            last.plot(range(r_SL.shape[1]), r_SL.T, color=COLORS[kind], ls=style, lw=1.4)
    last.axhline(0.95, color="#57606a", lw=0.8, ls=(0, (4, 3)))
    last.text(depth[-1], 0.94, "0.95", color="#57606a", ha="right", va="top")
    last.set(xlabel="layer", ylim=(0, 1.03))
    last.set_title("with a skip beside attention, float32", fontsize=10)
    last.spines[["top", "right"]].set_visible(False)
    labels = [(title, COLORS[kind]) for kind, title in KINDS.items() if "causal" not in kind]
    labels += [(how, "#57606a") for how in ("dashed: causal", "dotted: GPT-2's init")]
    for i, (title, color) in enumerate(labels):
        y = 0.70 - 0.068 * i
        logs[1].text(0.42, y, title, color=color, transform=logs[1].transAxes, fontsize=9)
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Measure, judge, draw."""
    found = {}
    for precision in SIZES:
        wide = jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext()
        for init in INITS:
            for kind in KINDS if init == "fan_in" else SKIPPED:
                print(f"{precision}, {INITS[init]}: {KINDS[kind]}", file=sys.stderr)
                with wide:
                    found[kind, init, precision] = through_layers(cfg, mesh, kind, init, precision)
    table = [
        {
            "layer": KINDS[kind],
            "init": INITS[init],
            "precision": precision,
            **{f"r, layer {i}": r_SL[:, i] for i in sorted({1, 2, 4, cfg.L})},
        }
        for (kind, init, precision), r_SL in found.items()
    ]
    save(figure(found), out / "rank_collapse.png")
    caption = (
        "What is left of the tokens' differences through layers at random init. Without a skip "
        "beside attention to all tokens it is gone after five layers, with an MLP or without; "
        "under a causal mask it falls by a factor at each. Means of seeds on the left, a line a "
        "seed on the right."
    )
    return _findings.Answer(
        table=table,
        verdicts=verdicts(found),
        figures=[_findings.Figure("rank_collapse.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
