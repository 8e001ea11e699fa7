"""Where must the matrix that mixes tokens come from: from nowhere, from training, from the input?

A ladder of causal language models on the same bytes. In each block every head mixes tokens by a
matrix, reads them by Wv and hands on by Wo; an MLP follows, or not. The rungs differ in the matrix
alone: each token by itself; uniform over the past; random and fixed; learned, the same for every
input; made of the token that asks (dense synthesizer, arXiv:2005.00743); scores of queries and keys
by random frozen Wq, Wk (arXiv:2506.01115); attention. After training attention's maps are replaced
by their mean over training text (arXiv:2211.03495). All blocks train as many numbers, to within
1 %: with an MLP by its hidden width, without by heads and their width. Frozen numbers come on top.

Every model adds learned positions to its embedding; queries and keys are also turned by RoPE
(--rope=false leaves that out). A learned matrix moves at sqrt(D) times the learning rate, without
decay: its logits are drawn sqrt(D) times as wide as weights are, and at the common rate would
hardly leave their init. One rate serves all else, and how far models are apart depends on it.

Beside the curves: byte counts of order 0 to 5 on the same split and the same positions
(experiments/_counts.py), which say how many bytes of context a loss is worth.

Command: python -m experiments.static_vs_dynamic
Minutes: about 150 on one busy CPU core; --preset=quick about 1; --preset=tpu has not
  been run yet
Expected: without mixing the loss of order-1 counts, within 0.02 nats; attention below the learned
  matrix, the learned matrix below uniform; mean maps cost something (arXiv:2211.03495: 8 % of the
  score on average, of large models); frozen Wq, Wk are competitive (arXiv:2506.01115)
Writes: runs/static_vs_dynamic/summary.json, metrics.jsonl, loss.png, ladder.png
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _counts, _findings, _static_figures
from experiments._character import chunks, drawn, untrained
from experiments._learn import Learned, check_rows, learn
from experiments._report import save
from experiments._static_ladder import (
    DYNAMIC,
    LADDER,
    STATIC,
    Rung,
    columns,
    models,
    watched,
    with_maps,
)
from jax_attn import (
    attention,
    causal,
    data,
    language_model,
    mlp,
    read_mesh,
    specs,
    static_mixer,
    train,
)
from jax_attn.command_line import check_positive
from jax_attn.mlp import activate
from jax_attn.report import training_progress

FLOOR, MARGIN = 0.02, 0.01  # nats: as near as that to the counts; what one must win by


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters, N and F those of attention with an MLP; which models; what is seen.

    rungs: names such as none,static,attention; all if empty.
    """

    D: int = 128
    N: int = 4
    F: int = 512
    L: int = 4
    T: int = 64
    B: int = 12
    # On a CPU the backward pass of an exact GELU takes as long as the rest of a small model.
    activation: str = "relu"
    rope: bool = True
    steps: int = 2000
    every: int = 200
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    eval_windows: int = 256
    map_windows: int = 256
    rungs: str = ""
    without_mlp: bool = True
    data: str = ""
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/static_vs_dynamic"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"D": 32, "N": 2, "F": 128, "L": 2, "T": 32, "B": 8, "steps": 600, "every": 60},
        **{"learning_rate": 4e-3, "warmup": 60, "eval_windows": 64, "map_windows": 64},
        "without_mlp": False,
        "out": "runs/static_vs_dynamic/quick",
    },
    "tpu": {
        **{"D": 512, "N": 8, "F": 2048, "L": 6, "T": 256, "B": 64, "steps": 20_000},
        **{"every": 500, "warmup": 500, "activation": "gelu", "eval_windows": 1024},
        "out": "runs/static_vs_dynamic/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing or do not fit the mesh, before anything is compiled."""
    check_positive(cfg)
    activate(cfg.activation, jnp.zeros(1))
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if cfg.D % cfg.N or (cfg.D // cfg.N) % 2:
        raise ValueError(f"--N={cfg.N} heads must divide --D={cfg.D} into even widths, for RoPE")
    if cfg.eval_windows < 2:
        raise ValueError(f"--eval_windows must be at least 2, got {cfg.eval_windows}: a variance")
    mesh = read_mesh(cfg.mesh)
    check_rows(mesh, {"B": cfg.B})
    if mesh.shape["context"] > 1:
        raise ValueError("static mixers cannot be split by tokens: leave context out of --mesh")
    for model in models(cfg).values():
        specs(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    data.load_text(cfg.data or None, T=cfg.T)
    return mesh


def optimizer(cfg: Config, rung: Rung) -> optax.GradientTransformation:
    """Clip, AdamW, warm-up (at most half the steps) and cosine; what is frozen stays."""
    warmup = min(cfg.warmup, cfg.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, warmup, max(cfg.steps, warmup + 1), cfg.learning_rate / 10
    )

    def decayed(params: Any) -> Any:
        logits = jax.tree_util.DictKey("logits_NTS")
        return jax.tree_util.tree_map_with_path(lambda path, _: logits not in path, params)

    adamw = optax.adamw(rate, b2=0.99, weight_decay=cfg.weight_decay, mask=decayed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return train.scale_rates(train.freeze(tx, rung.frozen), rung.rates)


def predict(cfg: Config, part: str, run: Callable[..., Any], params: Any, windows: Any) -> Any:
    """Predict every byte of windows [B,T+1] but the first; return the loss, and what parts say."""
    attend = run if part == "attention" else attention
    mix = run if part == "mixer" else static_mixer
    feed = partial(mlp, activation=cfg.activation)
    logits_BTV, aux = language_model(params, windows[:, :-1], attend=attend, mix=mix, feed=feed)
    return train.next_token_loss(logits_BTV, windows[:, 1:]), aux


def measure(cfg: Config, rung: Rung, heldout: np.ndarray, params: Any) -> dict[str, jax.Array]:
    """Measure the held-out loss, and by layer how the matrix varies."""

    def look(windows: jax.Array) -> dict[str, jax.Array]:
        loss, aux = predict(cfg, rung.part, watched(rung), params, windows)
        return {"heldout": loss, "variance_L": aux[rung.part]["variance_N"].mean(-1)}

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(look, jnp.asarray(heldout)))


def mean_maps(cfg: Config, rung: Rung, params: Any, windows: np.ndarray) -> jax.Array:
    """Average attention's maps over inputs, [L,N,T,S]."""

    def maps(windows: jax.Array) -> jax.Array:
        _, aux = predict(cfg, rung.part, watched(rung), params, windows)
        return aux[rung.part]["mean_NTS"]

    return jax.lax.map(maps, jnp.asarray(windows)).mean(0)


def replaced_loss(
    cfg: Config, rung: Rung, train_windows: np.ndarray, heldout: np.ndarray, params: Any
) -> jax.Array:
    """Measure the held-out loss once every map is its mean over training windows."""
    fixed = with_maps(params, mean_maps(cfg, rung, params, train_windows))
    past = partial(static_mixer, mask=causal())

    def loss(windows: jax.Array) -> jax.Array:
        return predict(cfg, "mixer", past, fixed, windows)[0]

    return jax.lax.map(loss, jnp.asarray(heldout)).mean()


def verdicts(
    counts: Any, losses: Mapping[str, Any], variances: Mapping[str, Any]
) -> list[_findings.Verdict]:
    """Judge final losses, and how matrices varied.

    Args:
      counts: nats a byte of the counts by order, on the positions of the losses.
      losses: nats a byte by model, one for each seed; "mean" is attention with mean maps.
      variances: by model, [measurements, seeds, L].
    Returns: the verdicts, first with MLP, then without.
    """
    made = []
    for suffix, column in columns(losses).items():
        loss = {name: np.asarray(losses.get(name + suffix, ())) for name in (*LADDER, "mean")}
        if loss["none"].size:
            made.append(
                _findings.gate(
                    f"{column}: without mixing the loss is that of order-1 counts, in nats",
                    loss["none"] - counts[1],
                    least=-FLOOR,
                    most=FLOOR,
                    source="nothing but the last byte is known",
                )
            )
        for better, worse, statement, source in (
            ("attention", "static", "attention beats the learned matrix", "arXiv:2005.00743"),
            ("static", "uniform", "the learned matrix beats a uniform one", ""),
            ("frozen", "static", "random Wq, Wk beat the learned matrix", "either way of interest"),
            ("attention", "mean", "mean maps in place of attention's cost", "arXiv:2211.03495"),
        ):
            if loss[better].size and loss[worse].size:
                statement = f"{column}: {statement}, by nats"
                won = loss[worse] - loss[better]
                made.append(_findings.gate(statement, won, least=MARGIN, source=source))
    still, moving = (
        [np.asarray(x) for name, x in variances.items() if name.removesuffix("+mlp") in kind]
        for kind in (STATIC, DYNAMIC)
    )
    if still:
        made.append(
            _findings.gate(
                "largest variance across inputs of a static matrix, at any step and layer",
                np.max([x.max((0, 2)) for x in still], axis=0),
                most=0.0,
                source="the same matrix for every input, to the bit",
                exact=True,
            )
        )
    if moving:
        made.append(
            _findings.gate(
                "least variance across inputs of a matrix made from them, at any step and layer",
                np.min([x.min((0, 2)) for x in moving], axis=0),
                least=1e-6,
                exact=True,
            )
        )
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Train, judge, draw."""
    text = data.load_text(cfg.data or None, T=cfg.T)
    heldout = chunks(text.heldout, cfg.T, cfg.eval_windows)
    seen = chunks(text.train, cfg.T, cfg.map_windows)
    counts = _counts.losses(text.train, heldout.reshape(-1, cfg.T + 1))
    learned: dict[str, Learned] = {}
    losses: dict[str, np.ndarray] = {}
    variances: dict[str, np.ndarray] = {}
    with training_progress() as progress:
        for name, model in models(cfg).items():
            rung = model.rung

            def loss_fn(params: Any, windows: jax.Array, key: jax.Array, rung: Rung = rung) -> Any:
                return predict(cfg, rung.part, rung.run, params, windows)[0], {}

            learned[name] = learn(
                model.init,
                loss_fn,
                optimizer(cfg, rung),
                drawn(text.train, cfg.B, cfg.T),
                seeds=cfg.seeds,
                steps=cfg.steps,
                every=cfg.every,
                measure=partial(measure, cfg, rung, heldout),
                mesh=mesh,
                progress=progress,
                title=name,
                log=out / "metrics.jsonl",
            )
            losses[name] = learned[name].rows[-1]["heldout"]
            variances[name] = np.stack([row["variance_L"] for row in learned[name].rows])
        for suffix in columns(learned):
            if (name := "attention" + suffix) not in learned:
                continue
            found, rung = learned[name], models(cfg)[name].rung
            replaced = jax.jit(jax.vmap(partial(replaced_loss, cfg, rung, seen, heldout)))
            with jax.set_mesh(mesh):
                losses["mean" + suffix] = np.asarray(replaced(found.params))

    steps = [int(row["step"]) for row in next(iter(learned.values())).rows]
    curves = {
        name: np.stack([row["heldout"] for row in found.rows]) for name, found in learned.items()
    }
    save(_static_figures.loss_figure(steps, curves, counts), out / "loss.png")
    save(_static_figures.ladder_figure(steps, losses, variances, counts), out / "ladder.png")
    reference = [x for name, x in losses.items() if name.removesuffix("+mlp") == "attention"]
    if not reference:  # --rungs without it: the best that mixes has to have learned something
        mixed = [losses[name] for name in learned if name.removesuffix("+mlp") != "none"]
        reference = [np.min(mixed, axis=0)] if mixed else []
    captions = {
        "loss.png": "Held-out loss during training, equal numbers of trained parameters; mean of "
        "seeds, band from least to largest. Dashed: byte counts on the same positions. Text: "
        f"{text.name}, {text.sha256}.",
        "ladder.png": "Left: held-out loss after training, a dot for each seed. Right: how a row "
        "of the mixing matrix varies from input to input, mean of layers, heads, rows and seeds.",
    }
    return _findings.Answer(
        table=rows_of(cfg, counts, losses, variances),
        verdicts=verdicts(counts, losses, variances),
        figures=[_findings.Figure(file, caption) for file, caption in captions.items()],
        text=text,
        untrained=untrained(text, heldout, reference),
    )


def rows_of(
    cfg: Config, counts: Any, losses: Mapping[str, Any], variances: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make the table: models with MLP, without, then counts."""
    made = []
    for suffix, column in columns(losses).items():
        for name in (*LADDER, "mean"):
            if name + suffix not in losses:
                continue
            model = models(cfg).get(name + suffix)
            made.append(
                {
                    "mixing": _static_figures.TITLES[name],
                    "MLP": column.split()[0],
                    "heads": model and model.N,
                    "hidden": model and (model.F or None),
                    "trained": model and model.trained,
                    "frozen": model and model.frozen,
                    "loss, nats": losses[name + suffix],
                    "variance": model and variances[name + suffix][-1].mean(-1),
                }
            )
    nothing = dict.fromkeys(made[0])
    orders = [
        {**nothing, "mixing": f"counts of order {order}", "loss, nats": loss}
        for order, loss in enumerate(counts)
    ]
    return made + orders


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
