"""How does the loss fall with parameters and with data, and how much of a model should attend?

Six sizes of one model (RoPE, relu, tied embedding; F = 4 D, heads of width H) are trained once from
each seed and measured after four numbers of bytes, each twice the one before: 24 points. The rate
stays as it is after a warm-up, and what is measured is the mean of the weights over about the last
tenth of the steps made, which comes near to a schedule of its own for each length
(arXiv:2405.18392). L = E + A / P^a + B / D^b is fitted to the points: P all parameters (the
embedding is the head too), D bytes trained on, least squares of relative errors. Confidence: the
middle 95 % of fits to points drawn with replacement, of each size the mean of seeds drawn likewise.

The rate is learning_rate (64 / D)^(1/2) at width D, not searched for each size: exponents are those
of this recipe. Nothing is said beyond the sizes and bytes trained. The table has how many epochs of
the text each point makes; above 4 is refused, where bytes that come again are no longer worth new
ones (arXiv:2305.16264).

Then one size with other shares of its operations in attention: N heads of width H, and as wide an
MLP as makes the same number of operations a token, of matrices and of the pairs that the causal
mask allows. Is the best share better than the usual one by more than seeds differ?

Command: python -m experiments.scaling
Minutes: 29 on one busy CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: exponents 0.34 and 0.28 (arXiv:2203.15556), 0.35 and 0.37 fitted anew to the same models
  (arXiv:2404.10102), for large models and tokens of several bytes; the usual share near the best,
  since the loss depends little on a model's shape (arXiv:2001.08361, figure 5)
Writes: runs/scaling/summary.json, metrics.jsonl, scaling.png
TPU: python -m tpu.plan --experiment=experiments.scaling --preset=tpu --target=v5e-16
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _findings, _power_law, _scaling_figure
from experiments._character import chunks, drawn, untrained
from experiments._learn import check_rows, learn
from experiments._report import save
from experiments._scaling_sizes import (
    Shape,
    init,
    operations,
    parameters,
    shape,
    shapes,
    splits,
    with_mean,
)
from jax_attn import (
    ACTIVATIONS,
    attention,
    causal,
    data,
    language_model,
    mlp,
    read_mesh,
    rope,
    shard_step,
    specs,
    train,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

EPOCHS = 4  # so often a text may be read
MARGIN = 0.01  # nats: what a share of attention must win by at least
PUBLISHED = {"a": (0.34, 0.348), "b": (0.28, 0.366)}  # arXiv:2203.15556, arXiv:2404.10102
BASE = 64  # the width that --learning_rate is for


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes as width x layers; the size that is split, and its numbers of heads.

    halvings: losses are measured after steps, steps / 2, steps / 4, so often halved.
    eval_windows: windows of the held-out text that losses are measured on.
    draws: fits for the confidence.
    """

    sizes: str = "16x1,32x1,32x2,48x2,64x3,80x4"
    steps: int = 2000
    halvings: int = 3
    split: str = "64x3"
    heads: str = "1,2,6,8,10"
    H: int = 16
    T: int = 64
    B: int = 8
    learning_rate: float = 6e-3
    warmup: int = 50
    weight_decay: float = 0.1
    eval_windows: int = 256
    draws: int = 400
    data: str = ""
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/scaling"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"sizes": "16x1,32x1,32x2,48x2", "steps": 800, "split": "32x2", "heads": "1,5"},
        **{"T": 32, "eval_windows": 128, "out": "runs/scaling/quick"},
    },
    "tpu": {
        **{"sizes": "64x3,128x4,192x5,256x6,384x7,512x8", "steps": 1600, "split": "256x6"},
        **{"heads": "1,2,6,8,10", "H": 64, "T": 256, "B": 64, "warmup": 100},
        **{"eval_windows": 1024, "out": "runs/scaling/tpu"},
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing or do not fit the mesh, and more epochs than are of use."""
    mesh = read_mesh(cfg.mesh)
    check_sizes(cfg, mesh)
    text = data.load_text(cfg.data or None, T=cfg.T)
    if (read := epochs(cfg, text, cfg.steps)) > EPOCHS:
        raise ValueError(
            f"--steps={cfg.steps} read {text.train.size:,} bytes {read:.1f} times, more than "
            f"{EPOCHS}; give a longer --data"
        )
    chunks(text.heldout, cfg.T, cfg.eval_windows)
    return mesh


def check_sizes(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse sizes that mean nothing or do not fit a mesh, which need not be of this machine."""
    check_positive(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if cfg.H % 2:
        raise ValueError(f"--H={cfg.H} must be even, for RoPE")
    few = _power_law.DIFFERENT
    if cfg.halvings < few - 1 or cfg.steps % 2**cfg.halvings:
        raise ValueError(
            f"--halvings={cfg.halvings} must be at least {few - 1}, and halve --steps={cfg.steps} "
            "so often without a rest"
        )
    if len(shapes(cfg.sizes, cfg.H)) <= few:
        raise ValueError(f"--sizes={cfg.sizes}: the law, tried on one more, needs {few + 1}")
    check_rows(mesh, {"B": cfg.B})
    for made in models(cfg):
        specs(jax.eval_shape(partial(init, made), jax.random.key(0)), mesh)


def models(cfg: Config) -> list[Shape]:
    """List all models: the sizes, and the splits of one, once each."""
    shared = splits(cfg.split, cfg.heads, cfg.H, cfg.T)
    return list(dict.fromkeys([*shapes(cfg.sizes, cfg.H), *shared.values()]))


def lengths(cfg: Config) -> list[int]:
    """List the steps after which losses are measured."""
    return [cfg.steps >> i for i in range(cfg.halvings, -1, -1)]


def epochs(cfg: Config, text: data.Text, steps: int) -> float:
    """Say how often a training reads the text, on average."""
    return steps * cfg.B * cfg.T / text.train.size


def loss(made: Shape, model: Any, windows: jax.Array) -> jax.Array:
    """Measure the mean cross entropy of every byte of windows [B,T+1] but the first, in nats."""
    attend = partial(attention, mask=causal(), rope=rope.plain(made.H))
    feed = partial(mlp, activation="relu")
    logits_BTV, _ = language_model(model, windows[:, :-1], attend=attend, feed=feed)
    return train.next_token_loss(logits_BTV, windows[:, 1:])


def optimizer(cfg: Config, made: Shape) -> optax.GradientTransformation:
    """Clip, AdamW, warm-up to a rate that stays, lower for a wider model; and the mean."""
    rate = cfg.learning_rate * (BASE / made.D) ** 0.5
    warmed = optax.warmup_constant_schedule(0.0, rate, cfg.warmup)
    adamw = optax.adamw(warmed, b2=0.99, weight_decay=cfg.weight_decay)
    return with_mean(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def plan_step(
    mesh: jax.sharding.Mesh, preset: str = "tpu", batch: int = 0
) -> tuple[Any, tuple[Any, Any, Any], int]:
    """Build one seed's step of the largest size for a mesh that need not be here: for tpu.plan.

    Returns: the step, (state, batch, key) as shapes with their places, tokens a step.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    cfg = Config(**PRESETS[preset])
    cfg = dataclasses.replace(cfg, B=batch or cfg.B)
    check_sizes(cfg, mesh)
    made = shapes(cfg.sizes, cfg.H)[-1]
    tx = optimizer(cfg, made)

    def placed(tree: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    def start(key: jax.Array) -> train.TrainState:
        return train.init_state(init(made, key), tx)

    def measured(params: Any, rows: Any, key: jax.Array) -> Any:
        return loss(made, params["model"], rows["tokens_BT"]), {}

    state = jax.eval_shape(start, jax.random.key(0))
    rows = {"tokens_BT": jax.ShapeDtypeStruct((cfg.B, cfg.T + 1), "int32")}
    key = jax.eval_shape(jax.random.key, 0)
    arguments = (
        placed(state, specs(state, mesh)),
        placed(rows, specs(rows, mesh, ACTIVATIONS)),
        placed(key, jax.NamedSharding(mesh, jax.sharding.PartitionSpec())),
    )
    return shard_step(train.make_train_step(measured, tx), mesh), arguments, cfg.B * cfg.T


def foretold(sizes: Any, seen: Any, losses: Any) -> np.ndarray:
    """Fit each seed's law without the largest size; return its largest relative error there."""
    sizes, seen, losses = (np.asarray(x, dtype=float) for x in (sizes, seen, losses))
    laws = [_power_law.fit(sizes[:-1], seen, losses[:-1, :, i]) for i in range(losses.shape[2])]
    return np.array(
        [np.abs(law(sizes[-1], seen) / losses[-1, :, i] - 1).max() for i, law in enumerate(laws)]
    )


def verdicts(
    sizes: Any, seen: Any, losses: Any, fits: _power_law.Law, shares: Mapping[int, Any], usual: int
) -> list[_findings.Verdict]:
    """Judge the law and the split.

    Args:
      sizes: parameters, rising.
      seen: bytes trained on, rising.
      losses: [sizes, bytes, seeds], nats a byte.
      fits: laws fitted to resampled points.
      shares: losses of the split by number of heads, one for each seed.
      usual: the number of heads of the usual model.
    Returns: the verdicts.
    """
    own = "a bound of this file"
    made = [
        _findings.positive(
            "each larger size is better after the most bytes, by nats",
            -np.diff(np.asarray(losses)[:, -1], axis=0).max(0),
        ),
        _findings.gate(
            "a law fitted without the largest size foretells its losses: relative error",
            foretold(sizes, seen, losses),
            most=0.02,
            source=own,
        ),
    ]
    for name, of in (("a", "parameters"), ("b", "data")):
        low, high = _power_law.interval(getattr(fits, name))
        least, most = PUBLISHED[name]
        pinned = _findings.gate(
            f"the exponent of {of} is pinned down: width of its 95 % interval "
            f"[{low:.3f}, {high:.3f}]",
            high - low,
            most=0.1,
            source=own,
            whole=True,
        )
        like = _findings.gate(
            f"a published exponent of {of}, {least:g} to {most:g}, lies in that interval: distance",
            max(low - most, least - high, 0.0),
            most=0.0,
            source="arXiv:2203.15556 and 2404.10102, large models, tokens of several bytes",
            whole=True,
        )
        # A wide interval holds any exponent, which says nothing.
        made += [pinned, like if pinned.holds or not like.holds else like._replace(holds=None)]
    share = {N: np.atleast_1d(np.asarray(x, dtype=float)) for N, x in shares.items()}
    best = min(share, key=lambda N: share[N].mean())
    margin = max(MARGIN, *(np.ptp(x) for x in share.values()))
    for N, what in ((usual, "the usual"), (min(share), "the least"), (max(share), "the largest")):
        made.append(
            _findings.gate(
                f"at equal operations another share of attention beats {what}, N = {N}: nats won "
                f"by the best, N = {best}",
                share[N] - share[best],
                least=float(margin),
                source=f"{MARGIN:g}, or what seeds differ by",
            )
        )
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Train every model, fit, judge, draw."""
    text = data.load_text(cfg.data or None, T=cfg.T)
    heldout = jnp.asarray(chunks(text.heldout, cfg.T, cfg.eval_windows))
    losses: dict[Shape, np.ndarray] = {}
    with training_progress() as progress:
        for made in models(cfg):

            def measured(
                params: Any, windows: jax.Array, key: jax.Array, made: Shape = made
            ) -> Any:
                return loss(made, params["model"], windows), {}

            def look(params: Any, made: Shape = made) -> dict[str, jax.Array]:
                each = jax.lax.map(partial(loss, made, params["mean"]), heldout)
                return {"heldout": each.mean()}

            found = learn(
                partial(init, made),
                measured,
                optimizer(cfg, made),
                drawn(text.train, cfg.B, cfg.T),
                seeds=cfg.seeds,
                steps=cfg.steps,
                every=lengths(cfg)[0],
                measure=look,
                mesh=mesh,
                progress=progress,
                title=f"{made.D} x {made.L}, {made.N} heads",
                log=out / "metrics.jsonl",
            )
            rows = {int(row["step"]): row["heldout"] for row in found.rows}
            losses[made] = np.array([rows[steps] for steps in lengths(cfg)], dtype=float)

    grown = shapes(cfg.sizes, cfg.H)
    sizes = np.array([parameters(made) for made in grown], dtype=float)
    seen = np.array(lengths(cfg), dtype=float) * cfg.B * cfg.T
    points = np.array([losses[made] for made in grown])
    law = _power_law.fit(sizes, seen, points.mean(-1))
    fits = _power_law.resampled(sizes, seen, points, draws=cfg.draws)
    shared = splits(cfg.split, cfg.heads, cfg.H, cfg.T)
    shares = {N: losses[made][-1] for N, made in shared.items()}
    usual = shape("split", cfg.split, cfg.H).N
    attended = {N: attends(made, cfg.T) for N, made in shared.items()}
    save(
        _scaling_figure.figure(sizes, seen, points, law, fits, attended, shares, usual, PUBLISHED),
        out / "scaling.png",
    )
    fitted, said = describe(law, fits)
    caption = (
        "Left: held-out loss, a dot for each seed, and the law L = E + A / P^a + B / D^b: "
        f"E = {said['E']}, a = {said['a']}, b = {said['b']}, 95 % of resampled fits in brackets; "
        f"the best size then grows with operations to the power {said['optimum']}. Middle: "
        f"exponents of resampled fits. Right: {cfg.split} with other shares of its operations in "
        f"attention, after {seen[-1]:,.0f} bytes. Text: {text.name}, {text.sha256}, read "
        f"{epochs(cfg, text, cfg.steps):.2g} times at most."
    )
    table = [
        {
            "width x layers": f"{made.D} x {made.L}",
            "heads": made.N,
            "hidden": made.F,
            "parameters": parameters(made),
            "in attention": attends(made, cfg.T),
            "bytes seen": steps * cfg.B * cfg.T,
            "epochs": epochs(cfg, text, steps),
            "loss, nats": losses[made][i],
            "law, nats": law(float(parameters(made)), seen[i]) if made in grown else None,
        }
        for made in models(cfg)
        for i, steps in enumerate(lengths(cfg))
        if made in grown or steps == cfg.steps
    ]
    return _findings.Answer(
        table=table,
        verdicts=verdicts(sizes, seen, points, fits, shares, usual),
        figures=[_findings.Figure("scaling.png", caption)],
        text=text,
        untrained=untrained(text, heldout, points[-1, -1]),
        fitted=fitted,
    )


def attends(made: Shape, T: int) -> float:
    """Say which share of a model's operations attention has."""
    return operations(made, T)[0] / sum(operations(made, T))


def describe(
    law: _power_law.Law, fits: _power_law.Law
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return each number of the law with its interval, and the same in words."""
    of_fits = {**fits._asdict(), "optimum": fits.optimum()}
    fitted = {
        name: {"fit": value, "interval": _power_law.interval(of_fits[name])}
        for name, value in {**law._asdict(), "optimum": law.optimum()}.items()
    }
    words = "{fit:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"
    return fitted, {name: words.format(**one) for name, one in fitted.items()}


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
