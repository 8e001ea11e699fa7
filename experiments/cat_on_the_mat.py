"""Does "mat" need attention, or only some view of "the cat sat on the"?

One sentence, six words, one layer, no positions. Each word is to predict the next. "the" stands
there twice, followed by "cat" and by "mat": a layer that sees one word at a time must give both the
same answer, and the best it can do is ln 2 for two of five predictions. Anything that mixes in the
words before tells the two apart, be it attention or a plain mean. So this sentence shows that
context is needed; it does not show that scores have to depend on the input.

Command: python -m experiments.cat_on_the_mat
Minutes: 0.5 on 2 busy CPU cores; --preset=tpu has not been run yet
Expected: without mixing exactly (2/5) ln 2 = 0.277259 nats, by counting; with a uniform mean and
  with attention below 0.001
Writes: runs/cat_on_the_mat/summary.json, metrics.jsonl, cat_on_the_mat.png
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

from experiments import _findings
from experiments._learn import Learned, learn
from experiments._report import save
from jax_attn import (
    attention,
    causal,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    init_static_mixer,
    language_model,
    read_mesh,
    static_mixer,
    train,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

SENTENCE = ("the", "cat", "sat", "on", "the", "mat")
WORDS = tuple(dict.fromkeys(SENTENCE))
FLOOR = 2 / 5 * math.log(2)
COLORS = {"none": "#009E73", "uniform": "#CC79A7", "attention": "#0072B2"}
TITLES = {"none": "each word alone", "uniform": "mean of the past", "attention": "attention"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters."""

    D: int = 32
    N: int = 2
    F: int = 64
    steps: int = 600
    every: int = 10
    learning_rate: float = 3e-3
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/cat_on_the_mat"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"steps": 400, "learning_rate": 5e-3, "out": "runs/cat_on_the_mat/quick"},
    "tpu": {"D": 128, "F": 512, "seeds": 64, "out": "runs/cat_on_the_mat/tpu"},
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if cfg.D % cfg.N:
        raise ValueError(f"--N={cfg.N} heads must divide --D={cfg.D}")
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if cfg.mesh not in ("", "data=1"):
        raise ValueError(f"--mesh: one sentence is not split over devices, got {cfg.mesh!r}")
    return read_mesh("data=1", jax.devices()[:1])


def models(cfg: Config) -> dict[str, Callable[[jax.Array], Any]]:
    """Declare what mixes words: nothing, their mean, attention; an MLP follows in each."""
    feed = partial(init_mlp, D=cfg.D, F=cfg.F)
    layers = {
        "none": partial(init_block, D=cfg.D, mlp=feed),
        "uniform": partial(
            init_block, D=cfg.D, mixer=partial(init_static_mixer, D=cfg.D, N=cfg.N), mlp=feed
        ),
        "attention": partial(
            init_block, D=cfg.D, attention=partial(init_attention, D=cfg.D, N=cfg.N), mlp=feed
        ),
    }
    return {
        name: partial(init_language_model, V=len(WORDS), D=cfg.D, L=1, layer=layer)
        for name, layer in layers.items()
    }


def predict(params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Predict the next word at every place, without positions."""
    attend, mix = partial(attention, mask=causal()), partial(static_mixer, mask=causal())
    return language_model(params, tokens_BT, attend=attend, mix=mix)[0]


def sentence() -> jax.Array:
    """Write the sentence as numbers, [1,T]."""
    return jnp.array([[WORDS.index(word) for word in SENTENCE]])


def loss_fn(params: Any, tokens_BT: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Measure the mean cross entropy of the five predictions, in nats."""
    logits_BTV = predict(params, tokens_BT[:, :-1])
    return train.next_token_loss(logits_BTV, tokens_BT[:, 1:]), {}


def measure(params: Any) -> dict[str, jax.Array]:
    """Measure the loss, and what is predicted after each "the"."""
    tokens_BT = sentence()
    logits_BTV = predict(params, tokens_BT[:, :-1])
    after_the = [t for t, word in enumerate(SENTENCE[:-1]) if word == "the"]
    return {
        "exact": train.next_token_loss(logits_BTV, tokens_BT[:, 1:]),
        "next": jax.nn.softmax(logits_BTV[0, jnp.array(after_the)], axis=-1),
    }


def verdicts(losses: Mapping[str, Any]) -> list[_findings.Verdict]:
    """Judge final losses.

    Args:
      losses: nats by model, one for each seed.
    Returns: a verdict for each model.
    """
    return [
        _findings.gate(
            "without mixing the loss is that of counting, (2/5) ln 2",
            losses["none"],
            least=FLOOR - 1e-6,
            most=FLOOR + 1e-3,
            source="two of five predictions are a coin's toss",
        ),
        _findings.gate(
            "a mean of the past is enough: this sentence asks for context, not for scores",
            losses["uniform"],
            most=1e-3,
        ),
        _findings.gate("attention is enough", losses["attention"], most=1e-3),
    ]


def figure(learned: Mapping[str, Learned]) -> matplotlib.figure.Figure:
    """Draw losses over training, and what each model expects after both of "the"."""
    made = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=(1.2, 1))
    for name, found in learned.items():
        steps = np.array([row["step"] for row in found.rows])
        loss_RS = np.array([row["exact"] for row in found.rows])
        left.plot(steps, loss_RS.mean(1), color=COLORS[name])
        least, most = loss_RS.min(1), loss_RS.max(1)
        left.fill_between(steps, least, most, color=COLORS[name], alpha=0.2, lw=0)
    left.axhline(FLOOR, color="#57606a", lw=0.8, ls=(0, (4, 3)))
    last = max(int(found.rows[-1]["step"]) for found in learned.values())
    left.text(last, FLOOR * 1.08, "(2/5) ln 2", ha="right", va="bottom", color="#57606a")
    for name, x, y in (("none", 0.12, 0.64), ("uniform", 0.12, 0.1), ("attention", 0.3, 0.3)):
        left.text(x, y, TITLES[name], color=COLORS[name], transform=left.transAxes)
    left.set(yscale="log", xlabel="step", ylabel="loss, nats a word")
    names = list(learned)
    for i, name in enumerate(names):
        p_SWV = np.asarray(learned[name].rows[-1]["next"])
        for j, color in enumerate(("#E69F00", "#56B4E9")):
            mat = p_SWV[:, j, WORDS.index("mat")]
            right.plot(mat, [i + (0.12, -0.12)[j]] * len(mat), "o", color=color, ms=5, alpha=0.8)
    right.set_yticks(range(len(names)), [TITLES[name] for name in names])
    right.set(xlim=(-0.05, 1.05), ylim=(-0.6, len(names) - 0.4), xlabel='probability of "mat"')
    right.text(0.0, len(names) - 0.62, "after the first “the”", color="#E69F00", va="top")
    right.text(1.0, len(names) - 0.62, "after the second", color="#56B4E9", va="top", ha="right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Train, judge, draw."""
    tokens_BT = sentence()
    learned = {}
    with training_progress() as progress:
        for name, init in models(cfg).items():
            learned[name] = learn(
                init,
                loss_fn,
                optax.adam(cfg.learning_rate),
                lambda key: tokens_BT,
                seeds=cfg.seeds,
                steps=cfg.steps,
                every=cfg.every,
                measure=measure,
                mesh=mesh,
                progress=progress,
                title=TITLES[name],
                log=out / "metrics.jsonl",
            )
    losses = {name: found.rows[-1]["exact"] for name, found in learned.items()}
    mat = WORDS.index("mat")
    table = [
        {
            "mixing": TITLES[name],
            "loss, nats": losses[name],
            "P(mat | first the)": found.rows[-1]["next"][:, 0, mat],
            "P(mat | second the)": found.rows[-1]["next"][:, 1, mat],
        }
        for name, found in learned.items()
    ]
    save(figure(learned), out / "cat_on_the_mat.png")
    caption = (
        "Loss of one layer on one sentence, and what it expects after each “the”: a mean of the "
        "words before does what attention does."
    )
    return _findings.Answer(
        table=table,
        verdicts=verdicts(losses),
        figures=[_findings.Figure("cat_on_the_mat.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
