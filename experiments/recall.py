"""Does recall need scores that depend on the input, and does it need learned Wq and Wk?

Multi-query associative recall (MQAR, arXiv:2312.04927). A row opens with a few pairs of a key and a
value, new ones in every row; then keys are asked again, each once, and after each the model is to
say its value. Nothing about the pairs can be stored in parameters, so recall has to be done from
the context. Same model, other mixing, each with and without MLP: attention, attention whose Wq and
Wk stay at their random init, a learned static mixer; and an MLP without mixing. A static matrix
moves at sqrt(D) times the rate, without decay, as in `static_vs_dynamic`: its logits are wide.

Data as in the paper's code: keys are distinct tokens of the lower half of the vocabulary, values of
the upper half; after the pairs every second place may ask, and the places are drawn without
replacement, place i with weight i^(power - 1), so near ones are likelier; all else is token 0. Loss
and accuracy count the places that ask, and no others. One thing differs: which pair is asked at
which place is shuffled. In the paper's order of draws the pair that stands first tends to be asked
first, and a mixer that sees positions alone can guess better than one in as many as there are
pairs. Positions are learned, as in the paper. With --fixed=true one more model sees 8,192 fixed
rows again and again: the trap is that it learns those by heart.

Command: python -m experiments.recall
Minutes: 60 on one busy CPU core; --preset=quick about 1; --preset=tpu has not been run yet: the
  paper's cell of 8 pairs at length 128, one of its widths (64 to 512) and of its learning rates, 64
  passes over 100,000 rows made fresh ones; a seed holds 2 GB of logits and the same of gradient
Expected: attention at least 0.99 with and without MLP (arXiv:2312.04927, figure 2); static at most
  0.05 above a guess among the pairs of the row, which is 0.25; none a guess among all 128 values.
  Frozen Wq and Wk: no gate (a small run had them solve it)
Writes: runs/recall/summary.json, metrics.jsonl, recall.png
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._findings import Answer, Figure, Verdict, gate, moot, run, script
from experiments._learn import check_rows, learn
from experiments._recall_figure import ALONE, figure
from experiments._report import save
from jax_attn import (
    count,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    init_static_mixer,
    language_model,
    read_mesh,
    specs,
    train,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

FROZEN = ("wq_DNH", "wk_DKH")
FRESH, FIXED = 3, 4  # keys of the rows that are asked in every measurement, and of the fixed set


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters; `asked` fresh rows in every measurement."""

    V: int = 256
    T: int = 64
    pairs: int = 4
    power: float = 0.01
    D: int = 64
    N: int = 1
    F: int = 256
    L: int = 2
    B: int = 256
    steps: int = 500
    every: int = 20
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    asked: int = 1024
    fixed: bool = False
    rows: int = 8192
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/recall"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"V": 32, "T": 16, "pairs": 2, "F": 128, "B": 64, "steps": 300},
        "out": "runs/recall/quick",
    },
    "tpu": {
        **{"V": 8192, "T": 128, "pairs": 8, "D": 128, "F": 512, "B": 512, "fixed": True},
        **{"steps": 12_500, "every": 250, "learning_rate": 4.6e-4, "asked": 512},
        "out": "runs/recall/tpu",
    },
}


class Rows(NamedTuple):
    """A batch: S pairs a row, where each is asked, and the value that it asks for."""

    tokens_BT: jax.Array
    asked_BS: jax.Array
    values_BS: jax.Array


class Model(NamedTuple):
    """How to draw it, where its rows are from, which leaves stay at their init."""

    title: str
    init: Callable[[jax.Array], Any]
    batch: Callable[[jax.Array], Rows]
    frozen: tuple[str, ...] = ()
    static: bool = False


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if not 0 < cfg.power <= 1:
        raise ValueError(f"--power must be above 0 and at most 1, got {cfg.power}")
    if cfg.V % 2 or cfg.pairs >= cfg.V // 2:
        raise ValueError(
            f"--V={cfg.V} must be even, and half of it above --pairs={cfg.pairs}: one half is keys "
            f"and the token between, the other values"
        )
    if cfg.T % 2 or 4 * cfg.pairs > cfg.T:
        raise ValueError(
            f"--T={cfg.T} must be even and at least 4 * --pairs={cfg.pairs}: 2 places a pair, and "
            f"as many to ask"
        )
    mesh = read_mesh(cfg.mesh)
    check_rows(mesh, {"B": cfg.B, "asked": cfg.asked})
    for model in models(cfg).values():
        specs(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    return mesh


def models(cfg: Config) -> dict[str, Model]:
    """Declare the models; with cfg.fixed one more, of fixed rows."""
    attends = partial(init_attention, D=cfg.D, N=cfg.N)
    mixes = partial(init_static_mixer, D=cfg.D, N=cfg.N, T=cfg.T)
    feeds = partial(init_mlp, D=cfg.D, F=cfg.F)

    lm = partial(init_language_model, V=cfg.V, D=cfg.D, L=cfg.L, T=cfg.T)
    both = partial(lm, layer=partial(init_block, D=cfg.D, attention=attends, mlp=feeds))
    alone = partial(lm, layer=partial(init_block, D=cfg.D, attention=attends))
    static = partial(lm, layer=partial(init_block, D=cfg.D, mixer=mixes, mlp=feeds))
    static_alone = partial(lm, layer=partial(init_block, D=cfg.D, mixer=mixes))
    none = partial(lm, layer=partial(init_block, D=cfg.D, mlp=feeds))
    fresh = partial(fresh_rows, cfg, cfg.B)
    made = {
        "attention": Model("attention, MLP", both, fresh),
        "attention alone": Model("attention alone", alone, fresh),
        "frozen": Model("Wq, Wk frozen, MLP", both, fresh, FROZEN),
        "frozen alone": Model("Wq, Wk frozen alone", alone, fresh, FROZEN),
        "static": Model("static mixer, MLP", static, fresh, static=True),
        "static alone": Model("static mixer alone", static_alone, fresh, static=True),
        "none": Model("MLP alone", none, fresh),
    }
    if cfg.fixed:
        again = partial(fixed_rows, cfg, cfg.B)
        made["fixed"] = Model(f"{cfg.rows:,} fixed rows", both, again)
    return made


def optimizer(cfg: Config, model: Model) -> optax.GradientTransformation:
    """Make AdamW; frozen leaves do not decay either, and logits of a static mixer move faster."""

    def decayed(params: Any) -> Any:
        logits = jax.tree_util.DictKey("logits_NTS")
        return jax.tree_util.tree_map_with_path(lambda path, _: logits not in path, params)

    tx = optax.adamw(cfg.learning_rate, weight_decay=cfg.weight_decay, mask=decayed)
    if model.static:
        return train.scale_rates(tx, {"logits_NTS": cfg.D**0.5})
    return train.freeze(tx, model.frozen) if model.frozen else tx


def row_of(cfg: Config, u: jax.Array) -> Rows:
    """Make a row, its arrays without the axis B, of as many uniform numbers as `chances` says."""
    S, half = cfg.pairs, cfg.V // 2
    of_keys, of_values, of_places, of_order = jnp.split(u, np.cumsum(chances(cfg))[:-1])

    def largest(x: jax.Array) -> jax.Array:
        return jax.lax.top_k(x, S)[1]

    keys_S, values_S = 1 + largest(of_keys), half + largest(of_values)
    # The largest of log weight + Gumbel noise: draws without replacement, one after the other.
    weight = (cfg.power - 1) * jnp.log(jnp.arange(1, len(of_places) + 1))
    place_S = largest(weight - jnp.log(-jnp.log(of_places)))[largest(of_order)]
    asked_S = 2 * S + 2 * place_S
    tokens_T = jnp.zeros(cfg.T, jnp.int32)
    tokens_T = tokens_T.at[0 : 2 * S : 2].set(keys_S).at[1 : 2 * S : 2].set(values_S)
    return Rows(tokens_T.at[asked_S].set(keys_S), asked_S, values_S)


def chances(cfg: Config) -> tuple[int, ...]:
    """Count what a row draws from: keys, values, places to ask, orders of the pairs."""
    return cfg.V // 2 - 1, cfg.V // 2, cfg.T // 2 - cfg.pairs, cfg.pairs


def fresh_rows(cfg: Config, B: int, key: jax.Array) -> Rows:
    """Draw rows that no other key gives."""
    return jax.vmap(partial(row_of, cfg))(uniform(key, (B, sum(chances(cfg)))))


def fixed_rows(cfg: Config, B: int, key: jax.Array) -> Rows:
    """Draw from a set of cfg.rows rows, made anew from their numbers: none has to be kept."""

    def numbered(number: jax.Array) -> Rows:
        key = jax.random.fold_in(jax.random.key(FIXED), number)
        return row_of(cfg, uniform(key, (sum(chances(cfg)),)))

    return jax.vmap(numbered)(jax.random.randint(key, (B,), 0, cfg.rows))


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw from (0, 1), both ends left out."""
    return jax.random.uniform(key, shape, minval=jnp.finfo(jnp.float32).tiny)


def answer(params: Any, rows: Rows) -> jax.Array:
    """Predict what follows each place that asks, [B,S,V]: causal, with learned positions."""
    logits_BTV, _ = language_model(params, rows.tokens_BT)
    return jnp.take_along_axis(logits_BTV, rows.asked_BS[:, :, None], axis=1)


def loss_fn(params: Any, rows: Rows, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Measure the cross entropy of the values that are asked for, in nats."""
    logits_BSV = answer(params, rows)
    return train.next_token_loss(logits_BSV, rows.values_BS), {}


def measure(cfg: Config, params: Any) -> dict[str, jax.Array]:
    """Ask fresh rows, the same for every model, and with cfg.fixed the fixed ones."""

    def asked(rows: Rows) -> tuple[jax.Array, jax.Array]:
        said_BS = jnp.argmax(answer(params, rows), axis=-1)
        named_BS = (said_BS[:, :, None] == rows.values_BS[:, None]).any(axis=-1)
        return (said_BS == rows.values_BS).mean(), named_BS.mean()

    key = jax.random.key(FRESH)
    accuracy, named = asked(fresh_rows(cfg, cfg.asked, key))
    made = {"accuracy": accuracy, "named": named}
    return made | ({"own": asked(fixed_rows(cfg, cfg.asked, key))[0]} if cfg.fixed else {})


def verdicts(
    accuracy: Mapping[str, Any],
    named: Mapping[str, Any],
    *,
    V: int,
    pairs: int,
    questions: int,
    own: Any = None,
) -> list[Verdict]:
    """Judge final accuracies.

    Args:
      accuracy: by model, on fresh rows, one for each seed.
      named: how often a model names one of the row's values.
      V: vocabulary; half of it are values.
      pairs: in a row.
      questions: how many were asked to measure an accuracy.
      own: of the model of fixed rows, on those; None if there is no such model.
    Returns: a verdict for each gate.
    """
    guess = 2 / V
    best = max(float(np.mean(accuracy[f"attention{end}"])) for end in ("", ALONE))
    unlearned = "not judged: no model with attention recalls"
    idle = "not judged: it names no values of the row yet"
    # Values of a row are distinct, so hits scatter no more than independent ones.
    band = 4 * math.sqrt(guess * (1 - guess) / questions)
    paper = "arXiv:2312.04927, figure 2"
    made = [
        gate("attention, MLP recalls", accuracy["attention"], least=0.99, source=paper),
        gate("attention alone recalls", accuracy["attention alone"], least=0.99, source=paper),
    ]
    for name, title in (("static", "a static mixer, MLP,"), ("static alone", "and alone")):
        verdict = gate(
            f"{title} does no better than to name one of the row's values",
            accuracy[name],
            most=1 / pairs + 0.05,
            source=f"a guess among {pairs}, and 0.05",
        )
        made.append(moot(verdict, idle) if np.min(named[name]) < 0.9 else verdict)
    made.append(
        gate(
            "without mixing the answer is a guess among all values",
            accuracy["none"],
            least=max(0.0, guess - band),
            most=guess + band,
            source=f"1/{V // 2}, 4 standard deviations of {questions:,} guesses",
        )
    )
    if best < 0.9:
        made = made[:2] + [moot(verdict, unlearned) for verdict in made[2:]]
    if own is not None:
        made += [
            gate("of fixed rows attention knows those it saw", own, least=0.99),
            gate(
                "and learned them by heart, not to recall: fresh ones it answers at most half",
                accuracy["fixed"],
                most=0.5,
            ),
        ]
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, judge, draw."""
    made, learned = models(cfg), {}
    with training_progress() as progress:
        for name, model in made.items():
            learned[name] = learn(
                model.init,
                loss_fn,
                optimizer(cfg, model),
                model.batch,
                seeds=cfg.seeds,
                steps=cfg.steps,
                every=cfg.every,
                measure=partial(measure, cfg),
                mesh=mesh,
                progress=progress,
                title=model.title,
                log=out / "metrics.jsonl",
            )
    last = {name: found.rows[-1] for name, found in learned.items()}
    table = [
        {
            "model": model.title,
            "parameters": count(learned[name].params) // cfg.seeds,
            "accuracy": last[name]["accuracy"],
            "names a value of the row": last[name]["named"],
            **({"accuracy, fixed rows": last[name]["own"]} if cfg.fixed else {}),
        }
        for name, model in made.items()
    ]
    titles = {name: model.title for name, model in made.items()}
    rows = {name: found.rows for name, found in learned.items()}
    save(figure(titles, rows, V=cfg.V, pairs=cfg.pairs), out / "recall.png")
    caption = (
        f"Recall of {cfg.pairs} pairs at length {cfg.T} over training: the share of answers that "
        f"are right, a line for each of {cfg.seeds} seeds, names where their best ends. Dashed: "
        "what a guess gets right."
    )
    return Answer(
        table=table,
        verdicts=verdicts(
            {name: row["accuracy"] for name, row in last.items()},
            {name: row["named"] for name, row in last.items()},
            V=cfg.V,
            pairs=cfg.pairs,
            questions=cfg.asked * cfg.pairs,
            own=last["fixed"]["own"] if cfg.fixed else None,
        ),
        figures=[Figure("recall.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
