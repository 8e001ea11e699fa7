"""Do heads that have nothing to look at look at the first token, and is it needed ever after?

Attention's weights sum to 1, so a head must look somewhere. In large models many look at the first
token, whatever it is: an attention sink (arXiv:2309.17453). In a window a head is one if its mean
weight on the first token is above 0.3 (arXiv:2410.10781, in windows of 64, where even attention has
0.07); the share of sinks is over heads and held-out windows.

The small character model is trained six times: its windows begin anywhere in the text, or their
first byte is replaced by one that the text does not have; and a head has no sink of its own, one
with a learned logit, or one with logit 0 (softmax off by one). Such a sink takes weight and has no
value. Learned logits move at sqrt(D) times the learning rate, as scores are that much wider than
weights.

Then the models read on, four times as far as they were trained: with all keys; with the last T keys
alone; with the first 4 and the last T - 4, which keep the positions they have in such a cache
(arXiv:2309.17453). The same bytes are also read afresh, in windows of T of which the last half
counts. All is measured on bytes after the first T.

Command: python -m experiments.sinks
Minutes: 13 on one CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: in large models sinks, and a loss that explodes once the first tokens are dropped and does
  not if four are kept (arXiv:2309.17453: perplexity 5158 against 5.40); a learned sink in their
  place (arXiv:2309.17453, arXiv:2410.10781). A small run had no sinks: "does not hold" then means
  not at this scale
Writes: runs/sinks/summary.json, metrics.jsonl, sinks.png
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _character, _sinks_figure
from experiments._character import Character
from experiments._findings import Answer, Figure, Verdict, gate, run, script
from experiments._learn import Case, learn_cases
from experiments._report import save
from jax_attn import (
    Rope,
    causal,
    data,
    dot_product_attention,
    language_model,
    mean_of,
    prefix,
    project_qkv,
    read_mesh,
    rope,
    rotate,
    train,
    window,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

FIRST = 0  # the byte that stands first in rows that begin alike; no text has it
SINK = 0.3  # a head's mean weight on the first token from which on it is a sink
MARGIN = 0.01  # nats: a difference that counts
SMALL = Character(D=64, L=4, steps=1000, learning_rate=3e-3)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model; how many first tokens are kept; how many times as far it reads on."""

    model: Character = SMALL
    kept: int = 4
    times: int = 4
    every: int = 100
    eval_windows: int = 64
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/sinks"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.D": 32, "model.N": 2, "model.L": 2, "model.T": 32, "model.steps": 200},
        **{"every": 50, "eval_windows": 32, "out": "runs/sinks/quick"},
    },
    "tpu": {
        **{"model.D": 512, "model.N": 8, "model.L": 8, "model.T": 256, "model.B": 64},
        **{"model.steps": 20_000, "model.learning_rate": 1e-3, "model.warmup": 500},
        **{"every": 1000, "eval_windows": 512},
        "out": "runs/sinks/tpu",
    },
}


class Model(NamedTuple):
    """What rows begin with, and what sink each head has of its own: none, learned or zero."""

    title: str
    fixed: bool
    sink: str


MODELS = {
    "open": Model("rows begin anywhere", False, "none"),
    "fixed": Model("rows begin alike", True, "none"),
    "open, learned": Model("anywhere, learned sink", False, "learned"),
    "fixed, learned": Model("alike, learned sink", True, "learned"),
    "open, zero": Model("anywhere, sink of logit 0", False, "zero"),
    "fixed, zero": Model("alike, sink of logit 0", True, "zero"),
}


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what means nothing, before anything is compiled."""
    check_positive(cfg)
    T = cfg.model.T
    if T % 2 or cfg.kept >= T:
        raise ValueError(f"--model.T={T} must be even and above --kept={cfg.kept}")
    if cfg.times < 2:
        raise ValueError(f"--times must be at least 2 to read on, got {cfg.times}")
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    text = data.load_text(cfg.model.data or None, T=cfg.times * T)
    _character.chunks(text.heldout, cfg.times * T, cfg.eval_windows)
    return mesh


def init(cfg: Config, sink: bool, key: jax.Array) -> Any:
    """Draw the character model; a sink of its own has logit 0 at first."""
    params = _character.init(cfg.model, key)
    if sink:
        params["layers"]["attention"]["sinks_N"] = jnp.zeros((cfg.model.L, cfg.model.N))
    return params


def optimizer(cfg: Config, sink: bool, case: Case) -> optax.GradientTransformation:
    """Take the character model's; logits of sinks move as fast as scores do, not as weights."""
    tx = _character.optimizer(cfg.model)
    return train.scale_rates(tx, {"sinks_N": cfg.model.D**0.5}) if sink else tx


def begun(case: Case, windows: jax.Array) -> jax.Array:
    """Replace the first byte of windows [B,T+1], if rows begin alike."""
    return windows.at[:, 0].set(jnp.where(case["fixed"], FIRST, windows[:, 0]))


def loss_of(cfg: Config, case: Case, params: Any, windows: jax.Array, key: jax.Array) -> Any:
    """Measure the loss; a sink that is not learned gets no gradient."""
    layers = params["layers"]
    if "sinks_N" in layers["attention"]:
        sinks = {"sinks_N": layers["attention"]["sinks_N"] * case["learned"]}
        params = params | {"layers": layers | {"attention": layers["attention"] | sinks}}
    return _character.loss(cfg.model, params, begun(case, windows)), {}


def any_key(b: Any, n: Any, t: Any, s: Any) -> Any:
    """Count every key: the mean is the weight that is not a sink's own."""
    return jnp.ones_like(s, jnp.float32)


def measure(cfg: Config, heldout: np.ndarray, case: Case, params: Any) -> dict[str, jax.Array]:
    """Measure the held-out loss, weights on the first token and on own sinks, and who is a sink."""
    observe = ("first_mass", mean_of(any_key, name="keys"))
    attend = partial(_character.attend(cfg.model), observe=observe)

    def look(windows: jax.Array) -> dict[str, jax.Array]:
        windows = begun(case, windows)
        logits_BTV, aux = language_model(params, windows[:, :-1], attend=attend)
        seen = aux["attention"]["seen"]
        first_LBN = seen["first_mass"].mean(axis=2)
        return {
            "heldout": train.next_token_loss(logits_BTV, windows[:, 1:]),
            "first_LN": first_LBN.mean(axis=1),
            "sink_LN": jnp.mean(first_LBN > SINK, axis=1),
            "own_LN": 1 - seen["keys"].mean(axis=(1, 2)),
        }

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(look, jnp.asarray(heldout)))


def streaming_attention(
    params: Any, x_BTD: jax.Array, *, turns: Rope, room: int, kept: int
) -> jax.Array:
    """Attend to `kept` first keys and to the last `room - kept`, as if they lay in a cache.

    Positions are those in the cache (arXiv:2309.17453): the last keys are as far away as they are,
    the first ones never farther than the cache is long. Both distances in one product: queries and
    keys of twice the width, of which a first key has one half and another key the other.
    """
    q_BTNH, k_BSKH, v_BSKE = project_qkv(params, x_BTD)
    at = jnp.arange(x_BTD.shape[1])[None]
    near, far = rotate(q_BTNH, turns, at), rotate(q_BTNH, turns, jnp.minimum(at, room - 1))
    k_BSKH = rotate(k_BSKH, turns, at)
    first = (at < kept)[:, :, None, None]
    split = [jnp.where(first, 0, k_BSKH), jnp.where(first, k_BSKH, 0)]
    o_BTNE = dot_product_attention(
        jnp.concatenate([near, far], axis=-1),
        jnp.concatenate(split, axis=-1),
        v_BSKE,
        mask=causal() & (window(room - kept - 1, 0) | prefix(kept)),
        scale=q_BTNH.shape[-1] ** -0.5,
        sinks_N=params.get("sinks_N"),
    )
    return jnp.einsum("BTNE,NED->BTD", o_BTNE, params["wo_NED"])


def afresh(T: int, times: int) -> np.ndarray:
    """List the windows of T + 1 bytes whose last halves are the bytes after the first T."""
    starts = T // 2 * np.arange(1, 2 * times - 1)
    return starts[:, None] + np.arange(T + 1)[None]


def read_on(cfg: Config, windows: np.ndarray, case: Case, params: Any) -> dict[str, jax.Array]:
    """Measure the loss by position of windows [chunks,B,times * T + 1], by way of reading on."""
    T = cfg.model.T
    usual = _character.attend(cfg.model)
    streams = partial(streaming_attention, turns=rope.plain(cfg.model.D // cfg.model.N), room=T)
    attends = {
        "all": usual,
        "last": partial(streams, kept=0),
        "kept": partial(streams, kept=cfg.kept),
    }

    def nats(attend: Any, windows: jax.Array) -> jax.Array:
        windows = begun(case, windows)
        logits_BTV, _ = language_model(params, windows[:, :-1], attend=attend)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, windows[:, 1:])

    def look(windows: jax.Array) -> dict[str, jax.Array]:
        made = {name: nats(attend, windows).mean(0) for name, attend in attends.items()}
        short = windows[:, afresh(T, cfg.times)]
        halves = nats(usual, short.reshape(-1, T + 1))[:, T // 2 :]
        return made | {"afresh": halves.reshape(windows.shape[0], -1).mean(0)}

    return jax.tree.map(lambda x: x.mean(0), jax.lax.map(look, jnp.asarray(windows)))


def verdicts(
    shares: Mapping[str, Any], first: Mapping[str, Any], losses: Mapping[str, Mapping[str, Any]]
) -> list[Verdict]:
    """Judge heads, and losses after the first T bytes.

    Args:
      shares: by model, in how many windows each head is a sink, [seeds,L,N].
      first: by model, every head's mean weight on the first token, [seeds,L,N].
      losses: by model, then by way of reading on, [seeds], nats a byte.
    Returns: verdicts, those on rows that begin anywhere first.
    """
    made = []
    for name in ("open", "fixed"):
        title = MODELS[name].title
        own = f"{name}, learned"
        _, L, N = np.shape(shares[name])
        saved = {key: np.subtract(losses[key]["last"], losses[key]["kept"]) for key in (name, own)}
        most = {key: np.max(first[key], axis=(1, 2)) for key in (name, own)}
        made += [
            gate(
                f"{title}: heads are sinks at this scale, their share",
                np.mean(shares[name], axis=(1, 2)),
                least=1 / (L * N),
                source="arXiv:2410.10781; as many as one head",
            ),
            gate(
                f"{title}: beyond the window the first tokens are needed, they save nats",
                saved[name],
                least=MARGIN,
                source="arXiv:2309.17453",
            ),
            gate(
                f"{title}: a learned sink takes weight off the first token, of the head with most",
                most[name] - most[own],
                least=0.05,
                source="arXiv:2410.10781",
            ),
            gate(
                f"{title}: with a learned sink the first tokens are not needed, they save nats",
                saved[own],
                most=MARGIN,
                source="arXiv:2309.17453",
            ),
        ]
    return made


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, read on, judge, draw."""
    T = cfg.model.T
    text = data.load_text(cfg.model.data or None, T=T)
    heldout = _character.chunks(text.heldout, T, cfg.eval_windows)
    longer = _character.chunks(text.heldout, cfg.times * T, cfg.eval_windows)
    rows, reads = {}, {}
    with training_progress() as progress:
        for sink in (False, True):  # each one program
            cases = {
                name: {"fixed": model.fixed, "learned": model.sink == "learned"}
                for name, model in MODELS.items()
                if sink == (model.sink != "none")
            }
            learned = learn_cases(
                partial(init, cfg, sink),
                partial(loss_of, cfg),
                partial(optimizer, cfg, sink),
                _character.drawn(text.train, cfg.model.B, T),
                cases=cases,
                seeds=cfg.seeds,
                steps=cfg.model.steps,
                every=cfg.every,
                measure=partial(measure, cfg, heldout),
                mesh=mesh,
                progress=progress,
                title="a sink of its own" if sink else "no sink of its own",
                log=out / "metrics.jsonl",
            )
            with jax.set_mesh(mesh):
                reading = jax.jit(jax.vmap(partial(read_on, cfg, longer), in_axes=(None, 0)))
                for name, found in learned.items():
                    rows[name] = found.rows[-1]
                    read = reading(jax.tree.map(jnp.asarray, cases[name]), found.params)
                    reads[name] = jax.tree.map(np.asarray, read)
    first = {name: rows[name]["first_LN"] for name in MODELS}
    shares = {name: rows[name]["sink_LN"] for name in MODELS}
    losses = {
        name: {way: (x if way == "afresh" else x[:, T:]).mean(1) for way, x in reads[name].items()}
        for name in MODELS
    }
    table = [
        {
            "model": model.title,
            "loss afresh": losses[name]["afresh"],
            "last T": losses[name]["last"],
            f"first {cfg.kept}, last": losses[name]["kept"],
            "all": losses[name]["all"],
            "share of sinks": shares[name].mean(axis=(1, 2)),
            "most on the first": first[name].max(axis=(1, 2)),
            "by layer": " ".join(f"{x:.2f}" for x in first[name].mean(axis=(0, 2))),
            "on its own sink": rows[name]["own_LN"].mean(axis=(1, 2)),
        }
        for name, model in MODELS.items()
    ]
    titles = {name: model.title for name, model in MODELS.items()}
    save(_sinks_figure.draw(titles, first, reads, T, cfg.kept, SINK), out / "sinks.png")
    caption = (
        f"Left: mean weight of every head on the first token, {cfg.seeds} seeds; "
        f"above {SINK} it is a sink (arXiv:2410.10781). Right: models trained on {T} bytes "
        f"read on. Text: {text.name}, {text.sha256}."
    )
    return Answer(
        table,
        verdicts(shares, first, losses),
        [Figure("sinks.png", caption)],
        text,
        _character.untrained(text, heldout, losses["open"]["afresh"]),
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
