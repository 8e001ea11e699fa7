"""Is reading a context with linear attention a step of gradient descent on what it says?

A context of N pairs (x, y), y = w · x with a new w each time, and a question x_q. One layer of
linear attention, trained to answer, can do no better than one step of gradient descent from w = 0
on the pairs, with the best step size: an error of d (d + 1) / (N + d + 1). Its weights hold how to
learn, the context what.

Command: python -m experiments.gradient_step
Minutes: 3 on 2 busy CPU cores; --preset=tpu has not been run yet
Expected: error within 1 % of d (d + 1) / (N + d + 1) for N = 10, 20, 40 (w, x standard normal), and
  the answers of that step (von Oswald et al., arXiv:2212.07677)
Writes: runs/gradient_step/summary.json, metrics.jsonl, gradient_step.png
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
from experiments._learn import Learned, first, learn
from experiments._report import save
from jax_attn import draw, linear_attention, read_mesh
from jax_attn.command_line import check_positive
from jax_attn.params import normal
from jax_attn.report import training_progress

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclasses.dataclass(frozen=True)
class Config:
    """d inputs, pairs in a context, contexts in a batch and in an evaluation."""

    d: int = 10
    pairs: str = "10,20,40"
    B: int = 512
    asked: int = 16384
    steps: int = 1000
    learning_rate: float = 0.01
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/gradient_step"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"steps": 500, "out": "runs/gradient_step/quick"},
    "tpu": {
        "d": 64,
        "pairs": "64,128,256",
        "B": 16384,
        "asked": 2**17,
        "steps": 5000,
        "out": "runs/gradient_step/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what means nothing."""
    check_positive(cfg)
    sizes(cfg)
    if not cfg.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {cfg.learning_rate}")
    mesh = read_mesh(cfg.mesh)
    if cfg.B % mesh.size:
        raise ValueError(f"--B={cfg.B} contexts cannot be split over {mesh.size} devices")
    return mesh


def sizes(cfg: Config) -> list[int]:
    """Read the numbers of pairs."""
    words = cfg.pairs.split(",")
    if not all(word.isdecimal() and int(word) for word in words) or len(words) > len(COLORS):
        raise ValueError(f"--pairs looks like 10,20,40, at most {len(COLORS)}; got {cfg.pairs!r}")
    return sorted({int(word) for word in words})


def least(d: int, N: int) -> float:
    """Compute the error of one step of gradient descent, with step size 1 / (N + d + 1)."""
    return d * (d + 1) / (N + d + 1)


def contexts(key: jax.Array, B: int, N: int, d: int) -> dict[str, jax.Array]:
    """Draw contexts: `tokens_BTD`, N pairs and a question with y = 0; `answer_B`."""
    a, b = jax.random.split(key)
    x_BTD = jax.random.normal(a, (B, N + 1, d))
    y_BT = jnp.einsum("BTD,BD->BT", x_BTD, jax.random.normal(b, (B, d)))
    known_BT = y_BT.at[:, -1].set(0.0)
    return {
        "tokens_BTD": jnp.concatenate([x_BTD, known_BT[..., None]], axis=-1),
        "answer_B": y_BT[:, -1],
    }


def init(key: jax.Array, d: int) -> Any:
    """Draw one head that reads tokens of width d + 1; small, as nothing normalises."""
    leaves = {name: normal(0.1) for name in ("wq_DNH", "wk_DKH", "wv_DKE", "wo_NED")}
    return draw(key, leaves, {"D": d + 1, "N": 1, "K": 1, "H": d + 1, "E": d + 1})


def answer(params: Any, tokens_BTD: jax.Array) -> jax.Array:
    """Let the question read the pairs: the last entry of attention's output, [B]."""
    pairs_BSD = tokens_BTD[:, :-1]
    q_BTNH = jnp.einsum("BTD,DNH->BTNH", tokens_BTD[:, -1:], params["wq_DNH"])
    k_BSKH = jnp.einsum("BSD,DKH->BSKH", pairs_BSD, params["wk_DKH"])
    v_BSKE = jnp.einsum("BSD,DKE->BSKE", pairs_BSD, params["wv_DKE"])
    o_BTNE = linear_attention(q_BTNH, k_BSKH, v_BSKE, feature=None, normalize=False)
    y_BTD = jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])
    return y_BTD[:, 0, -1]


def descent(tokens_BTD: jax.Array) -> jax.Array:
    """Take one step of gradient descent from w = 0 on the pairs, and answer with it, [B]."""
    N, d = tokens_BTD.shape[1] - 1, tokens_BTD.shape[2] - 1
    x_BSD, y_BS = tokens_BTD[:, :-1, :-1], tokens_BTD[:, :-1, -1]
    w_BD = jnp.einsum("BS,BSD->BD", y_BS, x_BSD) / (N + d + 1)
    return jnp.einsum("BD,BD->B", w_BD, tokens_BTD[:, -1, :-1])


def loss_fn(params: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Measure the mean squared error."""
    wrong_B = answer(params, rows["tokens_BTD"]) - rows["answer_B"]
    return jnp.square(wrong_B).mean(), {}


def measure(cfg: Config, N: int, params: Any) -> dict[str, jax.Array]:
    """Measure on contexts that training does not see, the same for all.

    The mean over so many contexts still wanders by a percent. So `error` is the theory's error of
    the step plus the mean, over these contexts, of how much attention's squared error is above the
    step's: the same number on average, and exact where the two agree. `apart` is the mean square of
    the difference between their answers, over the mean square of the step's.
    """
    rows = contexts(jax.random.key(999), cfg.asked, N, cfg.d)
    ours_B, theirs_B = answer(params, rows["tokens_BTD"]), descent(rows["tokens_BTD"])
    above_B = jnp.square(ours_B - rows["answer_B"]) - jnp.square(theirs_B - rows["answer_B"])
    return {
        "error": least(cfg.d, N) + above_B.mean(),
        "apart": jnp.square(ours_B - theirs_B).mean() / jnp.square(theirs_B).mean(),
    }


def verdicts(d: int, found: Mapping[int, Mapping[str, Any]]) -> list[_findings.Verdict]:
    """Judge what was measured after training.

    Args:
      d: inputs.
      found: by number of pairs, `error` and `apart` of all seeds.
    Returns: two verdicts for each number of pairs.
    """
    made = []
    for N, last in found.items():
        made.append(
            _findings.gate(
                f"N = {N}: the error is d (d + 1) / (N + d + 1) = {least(d, N):.4f}",
                np.asarray(last["error"]) / least(d, N),
                least=0.99,
                most=1.01,
                source="measured over theory, arXiv:2212.07677",
            )
        )
        made.append(
            _findings.gate(
                f"N = {N}: its answers are those of one step of gradient descent",
                last["apart"],
                most=0.01,
                source="mean square of the difference, relative",
            )
        )
    return made


def figure(cfg: Config, learned: Mapping[int, Learned]) -> matplotlib.figure.Figure:
    """Draw errors over training with their theory, and answers against the step's."""
    made = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=(1.3, 1))
    for color, (N, found) in zip(COLORS, learned.items(), strict=False):
        steps = np.array([row["step"] for row in found.rows])
        error_RS = np.array([row["error"] for row in found.rows])
        left.plot(steps, error_RS.mean(1), color=color)
        left.fill_between(steps, error_RS.min(1), error_RS.max(1), color=color, alpha=0.2, lw=0)
        left.axhline(least(cfg.d, N), color=color, lw=0.9, ls=(0, (4, 3)))
        left.text(steps[-1], least(cfg.d, N) * 1.03, f"N = {N}", color=color, ha="right")
        rows = contexts(jax.random.key(998), 400, N, cfg.d)
        ours_B = answer(first(found.params), rows["tokens_BTD"])
        right.plot(descent(rows["tokens_BTD"]), ours_B, ".", color=color, ms=3, alpha=0.6)
    left.set(xlabel="step", ylabel="mean squared error", yscale="log")
    for formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        formatter("{x:g}")
    left.text(0.98, 0.95, "dashed: d (d + 1) / (N + d + 1)", color="#57606a", ha="right",
              transform=left.transAxes)  # fmt: skip
    ends = right.get_xlim()
    right.plot(ends, ends, color="#57606a", lw=0.8, zorder=0)
    right.set(xlabel="answer of one step of gradient descent", ylabel="answer of attention")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> _findings.Answer:
    """Train, judge, draw."""
    every = sizes(cfg)
    learned = {}
    with training_progress() as progress:
        for N in every:
            learned[N] = learn(
                partial(init, d=cfg.d),
                loss_fn,
                optax.chain(
                    optax.clip_by_global_norm(1.0),
                    optax.adam(optax.cosine_decay_schedule(cfg.learning_rate, cfg.steps)),
                ),
                partial(contexts, B=cfg.B, N=N, d=cfg.d),
                seeds=cfg.seeds,
                steps=cfg.steps,
                every=max(cfg.steps // 10, 1),
                measure=partial(measure, cfg, N),
                mesh=mesh,
                progress=progress,
                title=f"{N} pairs",
                log=out / "metrics.jsonl",
            )
    found = {N: made.rows[-1] for N, made in learned.items()}
    table = [
        {
            "pairs": N,
            "theory": least(cfg.d, N),
            "attention": last["error"],
            "difference of answers": last["apart"],
        }
        for N, last in found.items()
    ]
    save(figure(cfg, learned), out / "gradient_step.png")
    caption = (
        f"One layer of linear attention on regression in context, d = {cfg.d}: it ends at the "
        "error of one step of gradient descent, and gives its answers (right: 400 contexts each, "
        "seed 0)."
    )
    return _findings.Answer(
        table=table,
        verdicts=verdicts(cfg.d, found),
        figures=[_findings.Figure("gradient_step.png", caption)],
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return _findings.run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    _findings.script(main)
