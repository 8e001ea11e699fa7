"""When does a head learn to look for what followed last time, and which models have one?

An induction head: after A B ... A it looks at B (Elhage 2021; Olsson 2022, arXiv:2209.11895).
Attention-only language models read rows in which random tokens come back: 12 to 24 distinct ones,
a random number in each row, over and over. With one number for all rows a head could count
positions instead. Positions enter queries and keys alone, by RoPE.

A head's prefix-matching score is the weight that a token of the repeat lays on the tokens after its
earlier occurrences, on average; it is read as a mean over pairs, in blocks, no T x S array is made.
An ideal head has 1; a head that looks at all tokens alike has what the dashed line shows. Four
models: two layers; one layer, which cannot compose two heads; one layer with smeared keys, each
mixed with that of the token before by a learned share a head, which puts into one layer what takes
two; two layers whose Wq and Wk stay at their random init, for longer.

A jump: the best head rises by more than half of its whole rise between two measurements, of which
there are 20 in the default training. Without a head (score below 0.5) there is no jump.

Command: python -m experiments.induction
Minutes: 29 on one busy CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: two layers at least 0.5, and a jump; one layer at most 0.1; smeared keys above 0.3
  (Olsson 2022, arguments 1 and 2; bounds set from a small run). Frozen Wq and Wk: open, no gate. A
  small run had no head in 3,000 steps; arXiv:2506.01115 says that they form
Writes: runs/induction/summary.json, metrics.jsonl, induction.png
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax

from experiments._findings import Answer, Figure, Verdict, gate, moot, run, script
from experiments._learn import Learned, check_rows, learn
from experiments._report import save
from jax_attn import (
    Mask,
    Rope,
    attention,
    causal,
    count,
    dot_product_attention,
    init_attention,
    init_block,
    init_language_model,
    language_model,
    mean_of,
    project_qkv,
    read_mesh,
    rope,
    rotate,
    specs,
    strict,
    train,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

FROZEN = ("wq_DNH", "wk_DKH")
HEAD = 0.5  # the score from which on a head counts as an induction head
COLORS = ("#E69F00", "#0072B2")
LOOKED = 3  # key of the rows that every measurement looks at


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters; periods from `shortest` to `longest`; `looked` rows measured."""

    V: int = 32
    T: int = 48
    shortest: int = 12
    longest: int = 24
    D: int = 64
    N: int = 4
    L: int = 2
    B: int = 64
    steps: int = 2000
    frozen_steps: int = 12_000
    every: int = 100
    learning_rate: float = 2e-3
    looked: int = 256
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/induction"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"B": 16, "steps": 1000, "frozen_steps": 1000, "every": 50, "looked": 64},
        "out": "runs/induction/quick",
    },
    "tpu": {
        **{"V": 512, "T": 512, "shortest": 128, "longest": 256, "D": 256, "N": 8, "B": 256},
        **{"steps": 10_000, "frozen_steps": 100_000, "every": 500, "learning_rate": 1e-3},
        "out": "runs/induction/tpu",
    },
}


class Rows(NamedTuple):
    """A batch of T + 1 tokens a row, and after how many of them they come back."""

    tokens_BT: jax.Array
    period_B: jax.Array


class Model(NamedTuple):
    """How to draw it, how its layers attend, which leaves stay at their init, for how long."""

    title: str
    init: Callable[[jax.Array], Any]
    attend: Callable[..., Any]
    steps: int
    frozen: tuple[str, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Follows:
    """1 for the pairs whose key comes right after an earlier occurrence of the query's token."""

    period_B: jax.Array

    def __call__(self, b: Any, n: Any, t: Any, s: Any) -> Any:
        """Decide from indices of batch entry, head, query and key, as a score function does."""
        return (s > 0) & (s <= t) & ((t + 1 - s) % self.period_B[b] == 0)


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse sizes that mean nothing, before anything is compiled."""
    check_positive(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    if cfg.shortest > cfg.longest:
        raise ValueError(f"--shortest={cfg.shortest} is above --longest={cfg.longest}")
    if cfg.longest > cfg.V:
        raise ValueError(f"--longest={cfg.longest} distinct tokens, but there are --V={cfg.V}")
    if cfg.longest >= cfg.T:
        raise ValueError(f"--longest={cfg.longest} must be below --T={cfg.T}, to come back")
    if cfg.L < 2:
        raise ValueError(f"--L must be at least 2, got {cfg.L}: one layer is a model of its own")
    if cfg.D % cfg.N or cfg.D // cfg.N % 2:
        raise ValueError(f"--N={cfg.N} heads must divide --D={cfg.D} into even widths, for RoPE")
    mesh = read_mesh(cfg.mesh)
    check_rows(mesh, {"B": cfg.B, "looked": cfg.looked})
    for model in models(cfg).values():
        specs(jax.eval_shape(model.init, jax.random.key(0)), mesh)
    return mesh


def models(cfg: Config) -> dict[str, Model]:
    """Declare the models: attention alone, tied embedding, no positions beside RoPE's."""
    turns = rope.plain(cfg.D // cfg.N)
    usual = partial(attention, mask=causal(), rope=turns)
    smears = partial(smeared_attention, mask=causal(), turns=turns)

    def lm(L: int, heads: Callable[..., Any]) -> Callable[[jax.Array], Any]:
        layer = partial(init_block, D=cfg.D, attention=partial(heads, D=cfg.D, N=cfg.N))
        return partial(init_language_model, V=cfg.V, D=cfg.D, L=L, layer=layer)

    deep, shallow = lm(cfg.L, init_attention), lm(1, init_attention)
    return {
        "deep": Model(f"{cfg.L} layers", deep, usual, cfg.steps),
        "one": Model("1 layer", shallow, usual, cfg.steps),
        "smeared": Model("1 layer, smeared keys", lm(1, init_smeared), smears, cfg.steps),
        "frozen": Model(f"{cfg.L} layers, Wq, Wk frozen", deep, usual, cfg.frozen_steps, FROZEN),
    }


def init_smeared(key: jax.Array, D: int, N: int) -> Any:
    """Draw attention whose keys are half of the token's own, half of the one before."""
    return init_attention(key, D, N) | {"smear_K": jnp.zeros(N)}


def smeared_attention(
    params: Any, x_BTD: jax.Array, *, mask: Mask, turns: Rope, observe: tuple[Any, ...] = ()
) -> tuple[jax.Array, dict[str, Any]]:
    """Attend with keys a k_s + (1 - a) k_(s-1), a = sigmoid(smear) a head (Olsson 2022)."""
    usual = {name: leaf for name, leaf in params.items() if name != "smear_K"}
    q_BTNH, k_BSKH, v_BSKE = project_qkv(usual, x_BTD)
    before_BSKH = jnp.pad(k_BSKH, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    own = jax.nn.sigmoid(params["smear_K"])[None, None, :, None]
    k_BSKH = own * k_BSKH + (1 - own) * before_BSKH
    at = jnp.arange(x_BTD.shape[1])[None]
    q_BTNH, k_BSKH = rotate(q_BTNH, turns, at), rotate(k_BSKH, turns, at)
    o_BTNE, seen = dot_product_attention(q_BTNH, k_BSKH, v_BSKE, mask=mask, observe=observe)
    y_BTD = jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])
    return y_BTD, {"seen": seen}


def optimizer(cfg: Config, model: Model) -> optax.GradientTransformation:
    """Make Adam at a constant rate."""
    tx = optax.adam(cfg.learning_rate)
    return train.freeze(tx, model.frozen) if model.frozen else tx


def draw(cfg: Config, B: int, key: jax.Array) -> Rows:
    """Draw rows of distinct tokens that come back after a random number of them."""
    of_tokens, of_period = jax.random.split(key)
    chances_BV = jax.random.uniform(of_tokens, (B, cfg.V))
    order_BV = jax.lax.top_k(chances_BV, cfg.longest)[1]
    period_B = jax.random.randint(of_period, (B,), cfg.shortest, cfg.longest + 1)
    at_BT = jnp.arange(cfg.T + 1)[None] % period_B[:, None]
    return Rows(jnp.take_along_axis(order_BV, at_BT, axis=1), period_B)


def loss_of(attend: Callable[..., Any], params: Any, rows: Rows, key: jax.Array) -> Any:
    """Measure the cross entropy of every next token, the unknown first ones too, in nats."""
    logits_BTV, _ = language_model(params, rows.tokens_BT[:, :-1], attend=attend)
    return train.next_token_loss(logits_BTV, rows.tokens_BT[:, 1:]), {}


def measure(cfg: Config, attend: Callable[..., Any], params: Any) -> dict[str, jax.Array]:
    """Look at the same rows in every model: the score of each head, the loss on the repeat."""
    rows = draw(cfg, cfg.looked, jax.random.key(LOOKED))
    watched = partial(attend, observe=(mean_of(Follows(rows.period_B), name="follows"),))
    with strict():
        logits_BTV, aux = language_model(params, rows.tokens_BT[:, :-1], attend=watched)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.tokens_BT[:, 1:])
    repeat_BT = jnp.arange(cfg.T)[None] >= rows.period_B[:, None]
    follows_LBTN = aux["attention"]["seen"]["follows"]
    score_LN = jnp.sum(follows_LBTN * repeat_BT[None, :, :, None], axis=(1, 2)) / repeat_BT.sum()
    return {"score_LN": score_LN, "repeat": jnp.sum(nats_BT * repeat_BT) / repeat_BT.sum()}


def even_score(cfg: Config) -> float:
    """Count the score of a head that looks at all tokens alike, over all periods, exactly."""
    hits, tokens = 0.0, 0
    for period in range(cfg.shortest, cfg.longest + 1):
        for t in range(period, cfg.T):
            hits += (t // period) / (t + 1)
            tokens += 1
    return hits / tokens


def best(score_LN: np.ndarray) -> np.ndarray:
    """Take the score of the best head of each seed: scores [seeds,L,N]."""
    return score_LN.max(axis=(1, 2))


def steepest(curve: np.ndarray) -> float:
    """Say which share of its whole change a curve makes between two measurements."""
    return float((np.diff(curve) / (curve[-1] - curve[0])).max()) if curve[-1] != curve[0] else 0.0


def jump(score_LN: np.ndarray) -> np.ndarray:
    """Say how steeply the head rises that ends best.

    Args:
      score_LN: [measurements,seeds,L,N].
    Returns: one number for each seed; not a number where no head ends as an induction head.
    """
    curves = score_LN.reshape(*score_LN.shape[:2], -1)
    ends = [curves[:, i, curves[-1, i].argmax()] for i in range(curves.shape[1])]
    return np.array([steepest(curve) if curve[-1] >= HEAD else np.nan for curve in ends])


def verdicts(scores: Mapping[str, np.ndarray]) -> list[Verdict]:
    """Judge the scores of all heads.

    Args:
      scores: by model, [measurements,seeds,L,N].
    Returns: a verdict for each gate; frozen Wq and Wk have none.
    """
    olsson, formed = "Olsson 2022", best(scores["deep"][-1])
    one = gate("one layer forms none", best(scores["one"][-1]), most=0.1, source=olsson)
    return [
        gate(
            "two layers form an induction head",
            formed,
            least=HEAD,
            source=olsson,
        ),
        gate(
            "it comes in a jump: more than half of its rise between two measurements",
            jump(scores["deep"]),
            least=0.5,
            source=f"{olsson}: a phase change",
        ),
        moot(one, "not judged: two layers form none either") if np.max(formed) < HEAD else one,
        gate(
            "one layer with smeared keys forms one",
            best(scores["smeared"][-1]),
            least=0.3,
            source=olsson,
        ),
    ]


def figure(cfg: Config, learned: Mapping[str, Learned]) -> matplotlib.figure.Figure:
    """Draw the score of every head of every seed over steps, the loss on the repeat beneath."""
    made = matplotlib.figure.Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = made.subplots(2, len(learned), sharex="col", sharey="row", height_ratios=(1.3, 1))
    levels = (even_score(cfg), math.log(cfg.V))
    for (name, model), column in zip(models(cfg).items(), panels.T, strict=True):
        rows = learned[name].rows
        steps = [row["step"] for row in rows]
        score_LN = np.array([row["score_LN"] for row in rows])
        for layer in range(score_LN.shape[2]):
            curves = score_LN[:, :, layer].reshape(len(steps), -1)
            column[0].plot(steps, curves, color=COLORS[min(layer, 1)], lw=0.9, alpha=0.8)
        column[1].plot(steps, [row["repeat"] for row in rows], color="#1b1f24", lw=0.9, alpha=0.8)
        for axes, level in zip(column, levels, strict=True):
            axes.axhline(level, color="#57606a", lw=0.8, ls=(0, (4, 3)))
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(model.title, fontsize=10)
        column[1].set(xlabel="step", xlim=(0, steps[-1]))
        column[1].locator_params(axis="x", nbins=4)
    panels[0, 0].set(ylabel="prefix-matching score", ylim=(0, 1.02))
    panels[1, 0].set(ylabel="loss on the\nrepeat, nats", ylim=(0, None))
    panels[0, 1].text(0.07 * cfg.steps, 0.95, "a head of layer 1", color=COLORS[0], va="top")
    panels[0, 1].text(0.07 * cfg.steps, 0.83, "of a later layer", color=COLORS[1], va="top")
    panels[0, 1].text(0.07 * cfg.steps, 0.71, "dashed: looks at all alike", va="top", fontsize=8)
    panels[1, 1].text(0.07 * cfg.steps, 0.3, "dashed: knows nothing", fontsize=8)
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, judge, draw."""
    made, learned = models(cfg), {}
    with training_progress() as progress:
        for name, model in made.items():
            learned[name] = learn(
                model.init,
                partial(loss_of, model.attend),
                optimizer(cfg, model),
                partial(draw, cfg, cfg.B),
                seeds=cfg.seeds,
                steps=model.steps,
                every=cfg.every,
                measure=partial(measure, cfg, model.attend),
                mesh=mesh,
                progress=progress,
                title=model.title,
                log=out / "metrics.jsonl",
            )
    scores, losses = (
        {name: np.array([row[key] for row in found.rows]) for name, found in learned.items()}
        for key in ("score_LN", "repeat")
    )
    table: list[dict[str, Any]] = [
        {
            "model": model.title,
            "parameters": count(learned[name].params) // cfg.seeds,
            "steps": model.steps,
            "best head's score": best(scores[name][-1]),
            "of its rise in one interval": jump(scores[name]),
            "loss on the repeat, nats": losses[name][-1],
            "of its fall in one interval": [steepest(curve) for curve in losses[name].T],
        }
        for name, model in made.items()
    ]
    blank = dict.fromkeys(table[0])
    table.append(blank | {"model": "even attention", "best head's score": even_score(cfg)})
    save(figure(cfg, learned), out / "induction.png")
    caption = (
        f"Weight of every head on what followed the token before, {cfg.seeds} seeds, and the loss "
        "on the part of the row that repeats. Dashed: a head that looks at all tokens alike, a "
        "model that knows nothing."
    )
    return Answer(
        table=table,
        verdicts=verdicts(scores),
        figures=[Figure("induction.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
