"""Which heads matter, and what tells: their entropy, their norm, or the gradient of a gate?

The small character model is trained; then every head, the heads of every layer, all heads, and
every MLP are edited, and the held-out loss says what that costs. One program runs all edits, by
vmap over masks. Heads hand on instead of their output

- zero; mean: the mean of their output over training text; patched: their output in another window;
- uniform: the mean of the past's values; permuted: their values with the weights of each row
  permuted within the past (Jain & Wallace 2019).

What might tell which heads matter: entropy, largest weight, weight on the first token, the norm of
what the head writes, and the mean |dL / dgate| of a gate on its output (Michel 2019). Spearman's
rank correlation with the cost of a head's mean edit, over the heads of one seed: heads of a model
are no independent draws, so n is the number of seeds, and each has its own verdict. Chance is
the correlation that the best of the five has in 5 % of random orders.

Weights times the norm of what their values write (Kobayashi 2020) are drawn beside the weights.

Command: python -m experiments.heads
Minutes: 15 on one CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: mean edits cost less than uniform weights, those less than zeros; most heads can be taken
  out alone at little cost (arXiv:1905.10650); permuted weights hardly change a prediction
  (arXiv:1902.10186, of one attention layer on an LSTM); weight goes where values are small
  (arXiv:2004.10102, of BERT)
Writes: runs/heads/summary.json, metrics.jsonl, damage.png, predictors.png, maps.png
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _character, _heads_figures
from experiments._character import Character
from experiments._findings import Answer, Figure, Verdict, gate, positive, run, script
from experiments._heads_sweep import (
    HEADS,
    MLPS,
    clean,
    maps,
    masks,
    means,
    sorted_out,
    statistics,
    sweep,
)
from experiments._learn import first
from experiments._report import save
from jax_attn import data, read_mesh
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

PREDICTORS = ("entropy", "max_prob", "first_mass", "norm", "gate")
LINE = "total = width * height; print(total, width)"
CHEAP = 0.01  # nats: what a head may cost that can be taken out
STILL = 0.05  # total variation that hardly changes a prediction
MODEL = Character(N=8)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model; steps between measurements of its loss; windows that edits are measured on."""

    model: Character = MODEL
    every: int = 500
    eval_windows: int = 96
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/heads"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.D": 64, "model.N": 4, "model.L": 2, "model.steps": 400, "model.warmup": 40},
        **{"every": 200, "eval_windows": 32, "out": "runs/heads/quick"},
    },
    "tpu": {
        **{"model.D": 512, "model.N": 8, "model.L": 8, "model.T": 256, "model.B": 64},
        **{"model.steps": 10_000, "model.warmup": 500, "every": 1000, "eval_windows": 256},
        "out": "runs/heads/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if cfg.eval_windows < 2:
        raise ValueError("--eval_windows must be at least 2, to patch from another, got 1")
    if cfg.model.L * cfg.model.N < 4:
        raise ValueError(
            f"--model.L={cfg.model.L} layers of --model.N={cfg.model.N} heads are too few to rank"
        )
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    return mesh


def ranks(x: np.ndarray) -> np.ndarray:
    """Rank numbers [n] from 1; equal ones share the mean of their ranks."""
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]


def spearman(x_LN: np.ndarray, y_LN: np.ndarray) -> float:
    """Correlate ranks within rows, all rows together; not a number if one of them is constant."""
    a, b = (np.concatenate([ranks(x) - (x.size + 1) / 2 for x in z]) for z in (x_LN, y_LN))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


def by_chance(predictors: Mapping[str, np.ndarray], damage: np.ndarray, draws: int = 2000) -> float:
    """Say how well the best predictor does in 5 % of random orders of the damage: |Spearman|.

    Args:
      predictors: by name, one number for each head.
      damage: of each head.
      draws: random orders.
    Returns: the 95 % quantile.
    """
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(ranks(damage.ravel()), (draws, 1)), axis=1)
    order -= order.mean(axis=1, keepdims=True)
    given = np.array([ranks(x.ravel()) for x in predictors.values()])
    given = given - given.mean(axis=1, keepdims=True)
    sizes = np.linalg.norm(order, axis=1)[:, None] * np.linalg.norm(given, axis=1)[None]
    best = np.abs(order @ given.T / np.maximum(sizes, 1e-12)).max(axis=1)
    return float(np.quantile(best, 0.95))


def correlations(
    predictors: Mapping[str, np.ndarray], damage_SLN: np.ndarray
) -> dict[str, np.ndarray]:
    """Correlate each predictor [seeds,L,N] with the damage, for each seed; and "chance".

    Also "NAME within layers", where no layer is ranked against another.
    """
    made = {}
    for name, x_SLN in predictors.items():
        pairs = list(zip(x_SLN, damage_SLN, strict=True))
        made[name] = np.array([spearman(x.reshape(1, -1), y.reshape(1, -1)) for x, y in pairs])
        made[f"{name} within layers"] = np.array([spearman(x, y) for x, y in pairs])
    seeds = range(len(damage_SLN))
    of_seed = [{name: x[seed] for name, x in predictors.items()} for seed in seeds]
    made["chance"] = np.array([by_chance(x, y) for x, y in zip(of_seed, damage_SLN, strict=True)])
    return made


def verdicts(
    damage: Mapping[str, np.ndarray],
    moved_SLN: np.ndarray,
    predictors: Mapping[str, np.ndarray],
    small_values_SLN: np.ndarray,
) -> list[Verdict]:
    """Judge the numbers.

    Args:
      damage: by edit, what it costs of one head, [seeds,L,N].
      moved_SLN: how far a prediction moves when one head's weights are permuted.
      predictors: [seeds,L,N], those of `PREDICTORS`.
      small_values_SLN: norm of the values that are looked at, over the mean norm.
    Returns: verdicts.
    """
    cost = {kind: x_SLN.mean(axis=(1, 2)) for kind, x_SLN in damage.items()}
    found = correlations(predictors, damage["mean"])
    strength = {name: np.nan_to_num(np.abs(found[name])) for name in predictors}
    others = np.max([x for name, x in strength.items() if name != "gate"], axis=0)
    expected = "expected order: mean, uniform, zero"
    return [
        positive(
            "a head's mean output costs less than uniform weights",
            cost["uniform"] - cost["mean"],
            source=expected,
        ),
        positive(
            "a head's uniform weights cost less than zeros",
            cost["zero"] - cost["uniform"],
            source=expected,
        ),
        positive(
            "a head's permuted weights cost more than uniform ones",
            cost["permuted"] - cost["uniform"],
            source="which key has which weight matters",
        ),
        gate(
            "permuting a head's weights hardly moves a prediction (median head, total variation)",
            np.median(moved_SLN, axis=(1, 2)),
            most=STILL,
            source="Jain & Wallace 2019; bound set here",
        ),
        gate(
            f"at least half of the heads cost below {CHEAP} nats when zeroed alone",
            (damage["zero"] < CHEAP).mean(axis=(1, 2)),
            least=0.5,
            source="Michel 2019; bound set here",
        ),
        positive(
            "the best of five statistics tells which heads matter, beyond chance",
            np.max(list(strength.values()), axis=0) - found["chance"],
            source="95 % of random orders",
        ),
        positive(
            "the gate's gradient tells it better than the other four",
            strength["gate"] - others,
            source="Michel 2019 prunes by it",
        ),
        gate(
            "heads look at small values: their norm there over the mean (median head)",
            np.median(small_values_SLN, axis=(1, 2)),
            most=1.0,
            source="Kobayashi 2020",
        ),
    ]


def measured(cfg: Config, text: data.Text, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Edit and look into the models of all seeds.

    Returns: (edits, statistics): `sorted_out` of "loss" and "moved"; [seeds,L,N] by name.
    """
    model = cfg.model
    chunks = jnp.asarray(_character.chunks(text.heldout, model.T, cfg.eval_windows))
    train = jnp.asarray(_character.chunks(text.train, model.T, cfg.eval_windows))
    average = jax.jit(partial(means, model))
    edit, look = jax.jit(partial(sweep, model)), jax.jit(partial(statistics, model))
    runs, seen = masks(model.L, model.N), []
    for seed in range(cfg.seeds):
        own = first(params, seed)
        mean, found = average(own, train), []
        for i, windows in enumerate(chunks):
            made = {"edits": edit(own, mean, runs, windows, jax.random.key(i))}
            found.append(jax.device_get(made | {"looks": look(own, windows)}))
        seen.append(jax.tree.map(lambda *x: np.mean(x, axis=0), *found))
        print(f"edited seed {seed + 1} of {cfg.seeds}", file=sys.stderr)
    all_seeds = jax.tree.map(lambda *x: np.stack(x), *seen)
    edits = {name: sorted_out(x, model.L, model.N) for name, x in all_seeds["edits"].items()}
    return edits, all_seeds["looks"]


def line_maps(cfg: Config, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Write out both kinds of maps of one line of text, [L,N,T,S] each; rows sum to 1."""
    tokens_BT = jnp.asarray(data.encode(LINE[: cfg.model.T]))[None]
    found = jax.jit(partial(clean, cfg.model))(params, tokens_BT)
    wo_LNED = params["layers"]["attention"]["wo_NED"]
    raw, weighted = maps(found, wo_LNED, range(tokens_BT.shape[1]))
    share = weighted / weighted.sum(axis=-1, keepdims=True)
    return np.asarray(raw[:, 0]), np.asarray(share[:, 0])


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, edit, judge, draw."""
    model = cfg.model
    text = data.load_text(model.data or None, T=model.T)
    chunks = jnp.asarray(_character.chunks(text.heldout, model.T, cfg.eval_windows))

    def heldout(params: Any) -> dict[str, jax.Array]:
        return {"heldout": jax.lax.map(partial(_character.loss, model, params), chunks).mean()}

    with training_progress() as progress:
        learned = _character.trained(
            model,
            text,
            seeds=cfg.seeds,
            every=cfg.every,
            measure=heldout,
            mesh=mesh,
            progress=progress,
            title="character model",
            log=out / "metrics.jsonl",
        )
    edits, looks = measured(cfg, text, learned.params)
    damage = {kind: found["head"] for kind, found in edits["loss"]["heads"].items()}
    moved = {kind: found["head"] for kind, found in edits["moved"]["heads"].items()}
    predictors = {name: looks[name] for name in PREDICTORS}
    found = {kind: correlations(predictors, damage[kind]) for kind in ("mean", "zero")}

    def row(what: str, head: Any = None, layer: Any = None, whole: Any = None) -> dict[str, Any]:
        return {"what": what, "one head": head, "one layer": layer, "all layers": whole}

    table = [row("held-out loss, nats a byte", whole=learned.rows[-1]["heldout"])]
    for name, unit in (("loss", "cost of"), ("moved", "prediction moved by")):
        for kind in HEADS:
            x = edits[name]["heads"][kind]
            head = x["head"].mean(axis=(1, 2))
            table.append(row(f"{unit} {kind}, attention", head, x["layer"].mean(axis=1), x["all"]))
        for kind in MLPS:
            x = edits[name]["mlps"][kind]
            table.append(row(f"{unit} {kind}, MLP", None, x["layer"].mean(axis=1), x["all"]))
    for kind, rho in found.items():
        table += [row(f"Spearman, {name} and cost of {kind}", x) for name, x in rho.items()]
    for name, what in (("small_values", "norm of values looked at"), ("apart", "maps apart by")):
        table.append(row(what, looks[name].mean(axis=(1, 2))))

    raw, share = line_maps(cfg, first(learned.params))
    feeds = {kind: x["layer"] for kind, x in edits["loss"]["mlps"].items()}
    save(_heads_figures.damage_figure(damage, feeds), out / "damage.png")
    made = _heads_figures.predictors_figure(predictors, damage["mean"], found["mean"])
    save(made, out / "predictors.png")
    save(_heads_figures.maps_figure(raw, share, LINE[: model.T]), out / "maps.png")
    n = model.L * model.N
    return Answer(
        table,
        verdicts(damage, moved["permuted"], predictors, looks["small_values"]),
        [
            Figure(
                "damage.png",
                "What it costs, in nats a byte, to edit one head, or the MLP of one layer; a row "
                "of pictures is a seed.",
            ),
            Figure(
                "predictors.png",
                f"What might tell which heads matter, against what their mean edit costs: {n} "
                f"heads of each of {cfg.seeds} seeds, rank correlation by seed. Grey: what the "
                "best of the five reaches by chance in 5 % of random orders.",
            ),
            Figure(
                "maps.png",
                "The head of seed 0 whose map changes most when weights are multiplied by the norm "
                "of what their values write, and the median head; square roots are drawn.",
            ),
        ],
        text,
        _character.untrained(text, chunks, learned.rows[-1]["heldout"]),
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
