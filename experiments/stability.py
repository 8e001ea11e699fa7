"""Which hold on attention's logits keeps training stable at learning rates that are too high?

Logits that grow make attention peaked, its entropy collapses, and training goes wrong; at scale at
usual rates, in small models at high ones (arXiv:2309.14322). The small character model is trained
at learning rates 1 to 100 times the usual one: plain; with RMS-norm of queries and keys (QK-norm);
with Wq and Wk rescaled after each update where a head's largest logit exceeded tau (QK-clip,
arXiv:2507.20534); with a penalty on rows whose entropy is below a floor. A rate multiplies the
whole update of AdamW, weight decay too; gradients are clipped.

Sensitivity is that of arXiv:2309.14322: the mean over rates of min(loss, loss at init) above the
loss at the best rate. Entropy, min-entropy (lse - max_logit), the largest logit and the mass on the
first token are measured for each head on held-out text.

Two things are exact. A row of T logits at most sigma from their mean in the Euclidean norm has an
entropy of at least log(1 + (T-1) b) + sigma sqrt(T (T-1)) b / (1 + (T-1) b), where
b = exp(-sigma sqrt(T / (T-1))); the row with one logit above T - 1 equal ones has just that
(arXiv:2303.06296, theorem 3.1). And a clipped head's largest logit on the same input is tau.

Command: python -m experiments.stability
Minutes: 22 on one busy CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: QK-norm less sensitive, logits that grow with the rate (arXiv:2309.14322); equality with
  the bound within 1e-5 (arXiv:2303.06296); after a clip at most tau (1 + 1e-3). Whether tau = 100
  is ever reached at this size: open, the table says for each rate how many heads were above it
Writes: runs/stability/summary.json, metrics.jsonl, stability.png, heads.png
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _character, _stability_figures
from experiments._character import Character
from experiments._entropy_bound import compare_with_bound
from experiments._findings import Answer, Figure, Verdict, gate, run, script
from experiments._learn import Case, learn_cases
from experiments._report import save
from experiments._sensitivity import sensitivity, too_high
from jax_attn import control, data, head_summary, language_model, read_mesh, train
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

WAYS = {"plain": "plain", "norm": "QK-norm", "clip": "QK-clip", "floor": "entropy floor"}
SEEN = ("entropy", "min_entropy", "max_logit", "first_mass")
MARGIN = 0.01  # nats: less sensitive by that much
SMALL = Character(D=64, L=3, steps=400, warmup=40)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model; rates, as multiples of its own; bounds on largest logits and on entropies.

    tau: of QK-clip. floor, weight: nats of entropy, and how much the penalty below it counts.
    """

    model: Character = SMALL
    rates: str = "1,3,10,30,100"
    tau: float = 100.0
    floor: float = 0.5
    weight: float = 1.0
    every: int = 40
    eval_windows: int = 64
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/stability"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.D": 32, "model.N": 2, "model.L": 2, "model.T": 32, "model.steps": 200},
        **{"rates": "3,10,100", "every": 20, "eval_windows": 32},
        "out": "runs/stability/quick",
    },
    "tpu": {
        **{"model.D": 256, "model.N": 8, "model.L": 6, "model.T": 256, "model.B": 64},
        **{"model.steps": 10_000, "model.warmup": 500, "rates": "1,3,10,30,100,300"},
        **{"every": 500, "eval_windows": 256},
        "out": "runs/stability/tpu",
    },
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what means nothing, before anything is compiled."""
    check_positive(cfg)
    multiples(cfg)
    for name, value in (("tau", cfg.tau), ("weight", cfg.weight)):
        if not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    if not 0 < cfg.floor < math.log(cfg.model.T):
        raise ValueError(
            f"--floor must lie between 0 and log(T) = {math.log(cfg.model.T):.3f} nats, which the "
            f"last row can reach, got {cfg.floor}"
        )
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    return mesh


def multiples(cfg: Config) -> list[float]:
    """Read the rates, rising."""
    try:
        made = sorted({float(word) for word in cfg.rates.split(",")})
    except ValueError:
        made = []
    apart = {f"{cfg.model.learning_rate * x:.3g}" for x in made}
    if len(apart) < max(len(made), 2) or not made[0] > 0 or not math.isfinite(made[-1]):
        raise ValueError(f"--rates looks like 1,10,100, two apart at least; got {cfg.rates!r}")
    return made


def init(cfg: Config, way: str, key: jax.Array) -> Any:
    """Draw the character model; QK-norm adds its scales."""
    params = _character.init(cfg.model, key)
    if way == "norm":
        scale_LH = jnp.ones((cfg.model.L, cfg.model.D // cfg.model.N))
        params["layers"]["attention"] |= {"q_scale_H": scale_LH, "k_scale_H": scale_LH}
    return params


def seen_by(cfg: Config, observe: tuple[str, ...], params: Any, windows: jax.Array) -> Any:
    """Predict windows [B,T+1]: the loss in nats, and statistics [L,B,T,N]."""
    watched = partial(_character.attend(cfg.model), observe=observe)
    logits_BTV, aux = language_model(params, windows[:, :-1], attend=watched)
    return train.next_token_loss(logits_BTV, windows[:, 1:]), aux["attention"]["seen"]


def cases(cfg: Config) -> dict[str, dict[str, Case]]:
    """List what is trained: by way, then by name, the rate, the bound and the penalty's weight."""
    return {
        way: {
            f"{title}, rate {cfg.model.learning_rate * times:.3g}": {
                "times": times,
                "tau": cfg.tau if way == "clip" else math.inf,
                "weight": cfg.weight,
            }
            for times in multiples(cfg)
        }
        for way, title in WAYS.items()
    }


def optimizer(cfg: Config, case: Case) -> optax.GradientTransformation:
    """Multiply every update of the character model's optimizer."""
    return optax.chain(_character.optimizer(cfg.model), optax.scale(case["times"]))


def loss_of(
    cfg: Config, floored: bool, case: Case, params: Any, windows: jax.Array, key: jax.Array
) -> Any:
    """Measure the loss, if floored with the penalty, and the largest logit of each head."""
    observe = ("max_logit", "entropy") if floored else ("max_logit",)
    loss, seen = seen_by(cfg, observe, params, windows)
    if floored:
        reaches_BTN = (jnp.log(jnp.arange(cfg.model.T) + 1.0) > cfg.floor)[None, :, None]
        missing = control.entropy_floor(seen["entropy"], floor=cfg.floor, where=reaches_BTN)
        loss += case["weight"] * missing
    largest_LN = head_summary({"max_logit": seen["max_logit"]})["max_logit"]["max"]
    return loss, {"largest_LN": largest_LN, "above": jnp.mean(largest_LN > cfg.tau)}


def clip(case: Case, params: Any, metrics: Mapping[str, jax.Array]) -> Any:
    """Rescale the heads whose largest logit in this step was above tau, if they may be."""
    layers = params["layers"]
    if "q_scale_H" in layers["attention"]:
        return params
    attention = control.qk_clip(layers["attention"], metrics["largest_LN"], tau=case["tau"])
    return params | {"layers": layers | {"attention": attention}}


def measure(cfg: Config, heldout: np.ndarray, case: Case, params: Any) -> dict[str, jax.Array]:
    """Measure the held-out loss, and of each head means over rows and the largest logit."""

    def look(windows: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, seen = seen_by(cfg, SEEN, params, windows)
        heads = head_summary(seen)
        return loss, {k: heads[k]["max" if k == "max_logit" else "mean"] for k in SEEN}

    loss, heads = jax.lax.map(look, jnp.asarray(heldout))
    made = {f"{k}_LN": x.max(0) if k == "max_logit" else x.mean(0) for k, x in heads.items()}
    return {"heldout": loss.mean(), **made}


def after_a_clip(cfg: Config, windows: np.ndarray, params: Any) -> jax.Array:
    """Clip every layer on its own input; return the largest logit then, over tau, of all heads.

    tau is the config's, or half the largest logit where that is less, so that a head is clipped.
    """
    tokens_BT = jnp.asarray(windows)[:, :-1]
    watched = partial(_character.attend(cfg.model), observe=("max_logit",), reduce=head_summary)

    def largest(aux: Any) -> jax.Array:
        return aux["seen"]["max_logit"]["max"]

    _, aux = language_model(params, tokens_BT, attend=watched)
    tau: Any = jnp.minimum(cfg.tau, largest(aux["attention"]).max() / 2)

    def twice(params: Any, x_BTD: jax.Array) -> Any:
        y_BTD, before = watched(params, x_BTD)
        _, again = watched(control.qk_clip(params, largest(before), tau=tau), x_BTD)
        return y_BTD, {"ratio_N": largest(again) / tau}

    _, aux = language_model(params, tokens_BT, attend=twice)
    return aux["attention"]["ratio_N"].max()


def verdicts(
    start: Any,
    losses: Mapping[str, Any],
    largest: Any,
    lowest: Any,
    above: Any,
    clipped: Any,
    bound: Mapping[str, Mapping[tuple[int, float], Any]],
) -> list[Verdict]:
    """Judge the sweep, and what is exact.

    Args:
      start: losses at init, [seeds].
      losses: final ones by way, [rates,seeds].
      largest, lowest: the largest logit and the lowest entropy of any head of the plain model in
        the end, [rates,seeds].
      above: share of heads and steps that QK-clip clipped, [rates,seeds].
      clipped: largest logit over tau after a clip, [seeds].
      bound: from `compare_with_bound`.
    Returns: verdicts.
    """
    plain = np.asarray(losses["plain"], float)
    best = np.nanargmin(plain, axis=0)
    lowest = np.asarray(lowest, float)
    at_best = np.take_along_axis(lowest, best[None], axis=0)[0]
    sources = {"norm": "arXiv:2309.14322", "clip": "arXiv:2507.20534", "floor": "open"}
    lengths = sorted({T for T, _ in bound["extremal"]})

    def by_length(name: str, worst: Callable[[np.ndarray], Any]) -> list[Any]:
        return [
            worst(np.stack([x for (T, _), x in bound[name].items() if t == T])) for t in lengths
        ]

    return [
        *(
            gate(
                f"{WAYS[way]} is less sensitive to the learning rate than plain, by nats",
                sensitivity(plain, start) - sensitivity(losses[way], start),
                least=MARGIN,
                source=source,
            )
            for way, source in sources.items()
        ),
        *(
            gate(
                f"at rates above plain's best {WAYS[way]} loses less than plain, by nats",
                too_high(plain, start, best) - too_high(losses[way], start, best),
                least=MARGIN,
                source=source,
            )
            for way, source in sources.items()
        ),
        gate(
            "plain logits grow with the rate: the largest at the highest rate over at the lowest",
            np.asarray(largest)[-1] / np.asarray(largest)[0],
            least=2.0,
            source="arXiv:2309.14322, section 3.1.1",
        ),
        gate(
            "plain entropy collapses: lowest of a head at the highest rate over at the best rate",
            lowest[-1] / at_best,
            most=0.5,
            source="arXiv:2303.06296",
        ),
        gate(
            "QK-clip has something to clip at the highest rate: share of heads and steps",
            np.asarray(above)[-1],
            least=0.001,
        ),
        gate(
            f"entropy of the extremal row is the bound, off by at most, T = {lengths}",
            by_length("extremal", lambda x: np.abs(x).max()),
            most=1e-5,
            source="arXiv:2303.06296, theorem 3.1",
            exact=True,
        ),
        gate(
            f"no random row is below the bound: least above it, T = {lengths}",
            by_length("random", np.min),
            least=-1e-5,
            source="arXiv:2303.06296, theorem 3.1",
            exact=True,
        ),
        gate(
            "after a clip the largest logit on the same input is tau: their ratio",
            clipped,
            least=1 - 1e-3,
            most=1 + 1e-3,
            source="arXiv:2507.20534",
            exact=True,
        ),
    ]


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train all ways at all rates, judge, draw."""
    text = data.load_text(cfg.model.data or None, T=cfg.model.T)
    heldout = _character.chunks(text.heldout, cfg.model.T, cfg.eval_windows)
    bound = compare_with_bound()
    learned = {}
    with training_progress() as progress:
        for ways in (("plain", "clip"), ("floor",), ("norm",)):  # each one program
            learned |= learn_cases(
                partial(init, cfg, ways[0]),
                partial(loss_of, cfg, ways[0] == "floor"),
                partial(optimizer, cfg),
                _character.drawn(text.train, cfg.model.B, cfg.model.T),
                cases={name: case for way in ways for name, case in cases(cfg)[way].items()},
                seeds=cfg.seeds,
                steps=cfg.model.steps,
                every=cfg.every,
                measure=partial(measure, cfg, heldout),
                mesh=mesh,
                progress=progress,
                title=" and ".join(WAYS[way] for way in ways),
                log=out / "metrics.jsonl",
                after=clip,
            )
    names = {way: list(made) for way, made in cases(cfg).items()}
    with jax.set_mesh(mesh):
        ratio = jax.jit(jax.vmap(partial(after_a_clip, cfg, heldout[0])))
        clipped = np.stack([ratio(learned[name].params) for name in names["plain"]]).max(axis=0)

    def of(way: str, statistic: str, at: int = -1) -> np.ndarray:
        """Take a statistic of all rates at one measurement, [rates,seeds,...]."""
        return np.stack([learned[name].rows[at][statistic] for name in names[way]])

    losses = {way: of(way, "heldout") for way in WAYS}
    start = of("plain", "heldout", 0)[0]
    above = {
        way: np.stack(
            [np.mean([row["above"] for row in learned[name].rows[1:]], axis=0) for name in made]
        )
        for way, made in names.items()
    }
    table = [
        {
            "model": name,
            "loss, nats": losses[way][i],
            "least entropy": of(way, "entropy_LN")[i].min(axis=(1, 2)),
            "least min-entropy": of(way, "min_entropy_LN")[i].min(axis=(1, 2)),
            "largest logit": of(way, "max_logit_LN")[i].max(axis=(1, 2)),
            "largest first mass": of(way, "first_mass_LN")[i].max(axis=(1, 2)),
            f"above {cfg.tau:g}": above[way][i],
            "left out": of(way, "skipped")[i],
        }
        for way, made in names.items()
        for i, name in enumerate(made)
    ]
    rates = [cfg.model.learning_rate * times for times in multiples(cfg)]
    scores = {way: sensitivity(losses[way], start) for way in WAYS}
    drawn = _stability_figures.losses(WAYS, rates, losses, start, scores, bound)
    save(drawn, out / "stability.png")
    rows = {way: [learned[name].rows for name in made] for way, made in names.items()}
    save(_stability_figures.heads(WAYS, rates, rows), out / "heads.png")
    captions = {
        "stability.png": f"Final held-out loss against the learning rate, {cfg.seeds} seeds, dots "
        "of one rate side by side, and "
        "sensitivity to it (arXiv:2309.14322). Right: entropy of rows of 64 logits within sigma of "
        f"their mean, and the least there can be. Text: {text.name}, {text.sha256}.",
        "heads.png": "Statistics of every head during training, seed 0, by learning rate.",
    }
    return Answer(
        table=table,
        verdicts=verdicts(
            start,
            losses,
            of("plain", "max_logit_LN").max(axis=(2, 3)),
            of("plain", "entropy_LN").min(axis=(2, 3)),
            above["clip"],
            clipped,
            bound,
        ),
        figures=[Figure(file, caption) for file, caption in captions.items()],
        text=text,
        untrained=_character.untrained(text, heldout, np.nanmin(losses["plain"], axis=0)),
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
