"""How much does a context hold: how many keys can be told apart when it is read?

S keys, each with a value of its own (one-hot), are written, and each is asked for. Queries and keys
are learned, so what is left is what the way of attending can hold. Linear attention keeps a matrix
of d features against values: S answers come from a matrix of rank d, so the mean squared error
|y - v|^2 / 2 cannot be below (1 - d / S) / 2 (Eckart and Young), however it is trained. elu + 1
makes d = H features, DPFP-1 d = 2 H. softmax's features have no end, and no such bound.

Command: python -m experiments.fast_weights
Minutes: 2 on 2 busy CPU cores; --preset=tpu has not been run yet
Expected: beyond d keys exactly the bound, within 0.01; softmax 0 (arXiv:2102.11174, section 6.1).
  At d keys and fewer the bound is 0, which training from random keys does not always reach.
Writes: runs/fast_weights/summary.json, metrics.jsonl, fast_weights.png
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

from experiments import _findings
from experiments._learn import learn
from experiments._report import save
from jax_attn import dot_product_attention, dpfp, linear_attention, read_mesh
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

# Name: title, features for each dimension of a key (None: no bound), colour.
WAYS: dict[str, tuple[str, int | None, str]] = {
    "linear": ("linear, elu + 1", 1, "#D55E00"),
    "dpfp": ("linear, DPFP-1", 2, "#E69F00"),
    "softmax": ("softmax", None, "#0072B2"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Width of keys, how many there are."""

    H: int = 16
    keys: str = "8,16,24,32,48,64,96,128"
    steps: int = 2000
    learning_rate: float = 0.05
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/fast_weights"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"keys": "16,32,64,128", "steps": 1000, "out": "runs/fast_weights/quick"},
    "tpu": {
        "H": 64,
        "keys": "32,64,128,256,384,512,1024",
        "seeds": 8,
        "out": "runs/fast_weights/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what means nothing."""
    check_positive(cfg)
    sizes(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if cfg.mesh not in ("", "data=1"):
        raise ValueError(f"--mesh: one context is not split over devices, got {cfg.mesh!r}")
    return read_mesh("data=1", jax.devices()[:1])


def sizes(cfg: Config) -> list[int]:
    """Read the numbers of keys."""
    words = cfg.keys.split(",")
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise ValueError(f"--keys looks like 8,16,32, each at least 2; got {cfg.keys!r}")
    return sorted({int(word) for word in words})


def bound(way: str, H: int, S: int) -> float:
    """Compute what no matrix of that rank can be better than."""
    each = WAYS[way][1]
    return 0.0 if each is None else max(0.0, (1 - each * H / S) / 2)


def init(key: jax.Array, S: int, H: int) -> Any:
    """Draw queries and keys."""
    a, b = jax.random.split(key)
    return {"q_SH": jax.random.normal(a, (S, H)), "k_SH": jax.random.normal(b, (S, H))}


def answers(way: str, params: Any) -> jax.Array:
    """Write all keys with their values, and ask for each: [S,S], one answer a row."""
    q_BTNH, k_BSKH = params["q_SH"][None, :, None], params["k_SH"][None, :, None]
    v_BSKE = jnp.eye(params["k_SH"].shape[0])[None, :, None]
    if way == "softmax":
        return dot_product_attention(q_BTNH, k_BSKH, v_BSKE)[0, :, 0]
    made = partial(linear_attention, q_BTNH, k_BSKH, v_BSKE)
    return (made(feature=dpfp) if way == "dpfp" else made())[0, :, 0]


def error(way: str, params: Any) -> jax.Array:
    """Measure the mean of |y - v|^2 / 2."""
    y_SS = answers(way, params)
    return jnp.square(y_SS - jnp.eye(y_SS.shape[0])).sum(-1).mean() / 2


def verdicts(H: int, found: Mapping[tuple[str, int], Any]) -> list[_findings.Verdict]:
    """Judge errors.

    Args:
      H: width of keys.
      found: errors of all seeds by way and number of keys.
    Returns: for each way each seed's distance from the bound at its worst number of keys: the most
      above, or the most below if any is, which cannot be.
    """
    made = []
    for way, (title, each, _) in WAYS.items():
        beyond = [S for name, S in found if name == way and (each or 1) * H < S]
        over = {S: np.asarray(found[way, S]) - bound(way, H, S) for S in beyond}
        if not over:
            continue
        all_over = np.stack(list(over.values()))  # [numbers of keys, seeds]
        above, below = all_over.max(0), all_over.min(0)
        worst = np.where(below < -1e-4, below, above)
        limit = "(1 - d/S) / 2" if each else "0"
        made.append(
            _findings.gate(
                f"{title}: from S = {min(beyond)} keys on the error is {limit}",
                worst,
                least=-1e-4,
                most=0.01,
                source="each seed's error above the bound, at its worst S",
            )
        )
    return made


def figure(H: int, found: Mapping[tuple[str, int], Any]) -> matplotlib.figure.Figure:
    """Draw errors against the number of keys, beside their bounds."""
    made = matplotlib.figure.Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = made.subplots()
    every = sorted({S for _, S in found})
    dense = range(every[0], every[-1] + 1)
    for way, (title, each, color) in WAYS.items():
        if each is not None:
            axes.plot(dense, [bound(way, H, S) for S in dense], color=color, lw=1, ls=(0, (4, 3)))
        for S in every:
            y = np.asarray(found[way, S])
            axes.plot([S] * y.size, y, "o", ms=4, color=color, alpha=0.7)
        last = float(np.mean(found[way, every[-1]]))
        axes.text(every[-1] * 1.03, last, title, color=color, va="center")
    axes.set(xlabel="keys in the context, S", ylabel="error of the answer, |y − v|² / 2")
    axes.text(every[-1] * 0.62, 0.06, "dashed: (1 − d/S) / 2", color="#57606a")
    axes.set_xticks([x for x in axes.get_xticks() if 0 <= x <= every[-1]])
    axes.set_xlim(0, every[-1] * 1.36)
    axes.spines[["top", "right"]].set_visible(False)
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Train, judge, draw."""
    every = sizes(cfg)
    found: dict[tuple[str, int], Any] = {}
    with training_progress() as progress:
        for way, (title, _, _) in WAYS.items():
            for S in every:
                learned = learn(
                    partial(init, S=S, H=cfg.H),
                    lambda params, rows, key, way=way: (error(way, params), {}),
                    optax.adam(optax.cosine_decay_schedule(cfg.learning_rate, cfg.steps)),
                    lambda key: None,
                    seeds=cfg.seeds,
                    steps=cfg.steps,
                    every=max(cfg.steps // 5, 1),
                    measure=lambda params, way=way: {"error": error(way, params)},
                    mesh=mesh,
                    progress=progress,
                    title=f"{title}, {S} keys",
                    log=out / "metrics.jsonl",
                )
                found[way, S] = learned.rows[-1]["error"]
    table = [
        {"keys": S}
        | {
            f"{title}": f"{_findings.spread(found[way, S])}, bound {bound(way, cfg.H, S):.4f}"
            for way, (title, _, _) in WAYS.items()
        }
        for S in every
    ]
    save(figure(cfg.H, found), out / "fast_weights.png")
    caption = (
        f"Error of answers against the number of keys (H = {cfg.H}, {cfg.seeds} seeds). A matrix "
        "of d features holds d keys; softmax has no such limit."
    )
    return _findings.Answer(
        table=table,
        verdicts=verdicts(cfg.H, found),
        figures=[_findings.Figure("fast_weights.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
