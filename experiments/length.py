"""Which positions let a model read windows longer than those it was trained on?

Four small character models differ in how they know positions: RoPE, ALiBi, not at all, a learned
table. All are trained on windows of T bytes and evaluated on windows of T, 2T and 4T. Every length
predicts the same bytes, the last T of each window, so that lengths differ in context alone. RoPE is
also evaluated with its frequencies rescaled to the length, without fine-tuning: linear, NTK-aware
(theta times factor^(H/(H-2))), Llama 3's and YaRN. A learned table of T rows has none for position
T: the model cannot be run there, and nothing is put in its place.

Longer windows also help without longer reach: fewer bytes stand near the start of a window, with
little before them. So all bytes are predicted once more from windows of T, slid by T/4: each byte
then has at least 3T/4 before it, and no model sees more than it was trained on. By position, the
loss in a window of 4T is shown over that of windows that are slid, byte for byte.

Command: python -m experiments.length
Minutes: 26 on one busy CPU core; --preset=quick about 1; --preset=tpu has not been run yet
Expected: ALiBi at 2T and 4T no worse than at T, plain RoPE worse at 2T already (arXiv:2108.12409,
  figure 1); what ALiBi gains is that fewer bytes stand near a start, not longer reach (its appendix
  B). Without positions a model goes further than RoPE, but not without limit (arXiv:2404.12224).
  YaRN without fine-tuning is better than plain RoPE and than linear (arXiv:2309.00071)
Writes: runs/length/summary.json, metrics.jsonl, length.png, positions.png
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure as Picture

from experiments import _character
from experiments._character import Character
from experiments._findings import Answer, Figure, Verdict, gate, run, script
from experiments._learn import learn
from experiments._report import save
from jax_attn import (
    Rope,
    alibi,
    alibi_slopes,
    attention,
    causal,
    count,
    data,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    read_mesh,
    rope,
)
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

FACTORS = (1, 2, 4)  # lengths of windows, over the trained one
SLIDES = 4  # steps in which a window is slid by its length
MARGIN = 0.01  # nats that count
THETA = 10_000.0  # the base of RoPE's frequencies
# On a CPU the backward pass of an exact GELU takes as long as the rest of this model.
MODEL = Character(D=64)
SHORT, COLORS = "#57606a", ("#1b1f24", "#E69F00", "#0072B2")


@dataclasses.dataclass(frozen=True)
class Config:
    """The models and their training, on windows of model.T; `eval_windows` of four times that."""

    model: Character = MODEL
    every: int = 250
    eval_windows: int = 512
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/length"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.D": 32, "model.N": 2, "model.L": 2, "model.T": 32, "model.B": 8},
        **{"model.steps": 600, "model.learning_rate": 4e-3, "every": 200, "eval_windows": 128},
        "out": "runs/length/quick",
    },
    "tpu": {
        **{"model.D": 512, "model.N": 8, "model.L": 6, "model.T": 256, "model.B": 64},
        **{"model.steps": 20_000, "model.warmup": 500, "every": 1000},
        "out": "runs/length/tpu",
    },
}


class Positions(NamedTuple):
    """What attention knows of positions: nothing, where both frequencies and slopes are 0."""

    rope: Rope
    slopes_N: jax.Array


class Way(NamedTuple):
    """One way to know positions: which model is trained, what it knows at a multiple of T."""

    title: str
    model: str
    at: Callable[[float], Positions]
    factors: tuple[int, ...] = FACTORS


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what cannot be run, before anything is compiled."""
    check_positive(cfg)
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    if cfg.model.T % SLIDES:
        raise ValueError(f"--model.T must be a multiple of {SLIDES}, got {cfg.model.T}")
    if cfg.model.D // cfg.model.N < 4:
        raise ValueError(
            f"--model.D={cfg.model.D} over --model.N={cfg.model.N} heads must be at least 4 wide, "
            "for NTK-aware RoPE"
        )
    windows_of(cfg, data.load_text(cfg.model.data or None))
    return mesh


def windows_of(cfg: Config, text: data.Text) -> np.ndarray:
    """Cut held-out windows of the largest length, [chunks,B,4T+1]."""
    return _character.chunks(text.heldout, FACTORS[-1] * cfg.model.T, cfg.eval_windows)


def ways(model: Character) -> dict[str, Way]:
    """Declare the ways; those whose model has their own name are trained."""
    H, T = model.D // model.N, model.T
    flat, still = jnp.zeros(model.N), Rope(np.zeros(H, np.float32))

    def turned(rescaled: Callable[[float], Rope]) -> Callable[[float], Positions]:
        # A factor of 1 is plain RoPE to the bit, so that all are the same model at T.
        return lambda factor: Positions(rope.plain(H) if factor == 1 else rescaled(factor), flat)

    def ntk(factor: float) -> Rope:
        return rope.plain(H, theta=THETA * factor ** (H / (H - 2)))

    def llama3(factor: float) -> Rope:
        return rope.llama3(H, factor=factor, original=T, theta=THETA)

    nothing = Positions(still, flat)
    sloped = Positions(still, alibi_slopes(model.N))
    return {
        "rope": Way("RoPE", "rope", turned(lambda factor: rope.plain(H))),
        "linear": Way("RoPE, linear", "rope", turned(lambda f: rope.linear(H, factor=f))),
        "ntk": Way("RoPE, NTK-aware", "rope", turned(ntk)),
        "llama3": Way("RoPE, Llama 3", "rope", turned(llama3)),
        "yarn": Way("RoPE, YaRN", "rope", turned(lambda f: rope.yarn(H, factor=f, original=T))),
        "alibi": Way("ALiBi", "alibi", lambda factor: sloped),
        "none": Way("no positions", "none", lambda factor: nothing),
        "learned": Way("learned table", "learned", lambda factor: nothing, FACTORS[:1]),
    }


def init(model: Character, learned: bool, key: jax.Array) -> Any:
    """Draw the parameters; the learned table has a row for each of T positions."""
    layer = partial(
        init_block,
        D=model.D,
        attention=partial(init_attention, D=model.D, N=model.N),
        mlp=partial(init_mlp, D=model.D, F=4 * model.D),
    )
    T = model.T if learned else None
    return init_language_model(key, V=data.VOCABULARY, D=model.D, L=model.L, layer=layer, T=T)


def nats(knows: Positions, params: Any, windows: jax.Array) -> jax.Array:
    """Measure the cross entropy of every byte of windows [B,T+1] but the first, [B,T]."""
    attend = partial(attention, mask=causal(), rope=knows.rope, score=alibi(knows.slopes_N))
    logits_BTV, _ = language_model(params, windows[:, :-1], attend=attend, feed=_character.feed)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, windows[:, 1:])


def by_position(length: int, knows: Positions, params: Any, windows: jax.Array) -> jax.Array:
    """Read the last `length` bytes of windows [chunks,B,4T+1]: mean nats by position, [length]."""

    def one(tokens: jax.Array) -> jax.Array:
        return nats(knows, params, tokens[:, -(length + 1) :]).mean(0)

    return jax.lax.map(one, windows).mean(0)


def slid(T: int, knows: Positions, params: Any, windows: jax.Array) -> jax.Array:
    """Read windows [chunks,B,4T+1] by windows of T, slid by T/4: mean nats by position, [4T].

    The first window gives its T bytes, each later one its last T/4.
    """
    step = T // SLIDES
    starts = jnp.arange(0, windows.shape[2] - T, step)

    def one(tokens: jax.Array) -> jax.Array:
        def at(start: jax.Array) -> jax.Array:
            near = jax.lax.dynamic_slice_in_dim(tokens, start, T + 1, axis=1)
            return nats(knows, params, near).mean(0)

        first, *_ = each = jax.lax.map(at, starts)
        return jnp.concatenate([first, each[1:, -step:].ravel()])

    return jax.lax.map(one, windows).mean(0)


def verdicts(loss: Mapping[str, Mapping[int, Any]], slid: Mapping[str, Any]) -> list[Verdict]:
    """Judge what longer windows cost.

    Args:
      loss: by way and multiple of T, nats a byte of the same bytes, one for each seed.
      slid: of windows of T that are slid, by trained way, one for each seed.
    Returns: the verdicts.
    """

    def cost(way: str, factor: int) -> np.ndarray:
        return np.asarray(loss[way][factor]) - np.asarray(loss[way][1])

    def over(worse: str, better: str, factor: int) -> np.ndarray:
        return np.asarray(loss[worse][factor]) - np.asarray(loss[better][factor])

    press, peng = "arXiv:2108.12409", "arXiv:2309.00071"
    reach = np.asarray(slid["alibi"]) - np.asarray(loss["alibi"][4])
    spared = cost("rope", 2) - cost("none", 2)
    at_most: tuple[Any, ...] = (
        ("ALiBi at 2T costs no more than at T", cost("alibi", 2), press),
        ("ALiBi at 4T costs no more than at T", cost("alibi", 4), press),
        ("ALiBi at 4T gains nothing over windows of T, slid", reach, f"{press}, appendix B"),
    )
    at_least: tuple[Any, ...] = (
        ("plain RoPE at 2T costs more than at T", cost("rope", 2), press),
        ("without positions 2T costs less than it does RoPE", spared, "arXiv:2404.12224"),
        ("at 4T YaRN is below plain RoPE", over("rope", "yarn", 4), peng),
        ("at 4T YaRN is below linear RoPE", over("linear", "yarn", 4), peng),
    )
    return [
        *(gate(f"{says}, nats", x, most=MARGIN, source=source) for says, x, source in at_most),
        *(gate(f"{says}, nats", x, least=MARGIN, source=source) for says, x, source in at_least),
    ]


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train four models, evaluate all ways, judge, draw."""
    model, made = cfg.model, ways(cfg.model)
    text = data.load_text(model.data or None)
    heldout = windows_of(cfg, text)
    params: dict[str, Any] = {}
    curves: dict[str, dict[int, np.ndarray]] = {}
    near: dict[str, np.ndarray] = {}

    def over_seeds(read: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return jax.jit(jax.vmap(read, in_axes=(None, 0, None)))

    readers = {factor: over_seeds(partial(by_position, factor * model.T)) for factor in FACTORS}
    slider = over_seeds(partial(slid, model.T))
    with training_progress() as progress:
        for name in [name for name, way in made.items() if way.model == name]:
            knows = made[name].at(1)
            params[name] = learn(
                partial(init, model, name == "learned"),
                lambda params, windows, key, knows=knows: (nats(knows, params, windows).mean(), {}),
                _character.optimizer(model),
                _character.drawn(text.train, model.B, model.T),
                seeds=cfg.seeds,
                steps=model.steps,
                every=cfg.every,
                measure=lambda params: {},
                mesh=mesh,
                progress=progress,
                title=made[name].title,
                log=out / "metrics.jsonl",
            ).params
        task = progress.add_task("longer windows", total=len(made), status="")
        with jax.set_mesh(mesh):
            for name, way in made.items():
                trained = params[way.model]
                curves[name] = {
                    factor: np.asarray(readers[factor](way.at(factor), trained, heldout))
                    for factor in way.factors
                }
                if way.model == name:
                    near[name] = np.asarray(slider(way.at(1), trained, heldout))
                progress.advance(task)
    last = slice(-model.T, None)  # the bytes that every length predicts
    loss = {
        name: {factor: curve[:, last].mean(1) for factor, curve in each.items()}
        for name, each in curves.items()
    }
    near_loss = {name: curve[:, last].mean(1) for name, curve in near.items()}
    table = [
        {
            "positions": way.title,
            "parameters": count(params[way.model]) // cfg.seeds,
            "T, nats": loss[name][1],
            "T, slid": near_loss.get(name),
            **{f"{factor}T": loss[name].get(factor) for factor in FACTORS[1:]},
        }
        for name, way in made.items()
    ]
    save(length_figure(made, loss, near_loss), out / "length.png")
    save(positions_figure(made, curves, near, model.T), out / "positions.png")
    same = f"Trained on windows of T = {model.T} bytes, {cfg.seeds} seeds."
    captions = {
        "length.png": f"{same} Loss on the same bytes, the last T of each window, by the length of "
        "the window; slid: windows of T, each byte with at least 3T/4 before it. A learned table "
        f"has no row beyond T. Text: {text.name}, {text.sha256}.",
        "positions.png": f"{same} Loss by position in windows of 4T, over that of the same bytes "
        "in windows of T that are slid; means of T/4 positions, band from the least to the largest "
        "seed. Below 0 reading on is better than starting anew.",
    }
    return Answer(
        table,
        verdicts(loss, near_loss),
        [Figure(*each) for each in captions.items()],
        text,
        _character.untrained(text, heldout, loss["rope"][1]),
    )


def length_figure(
    made: Mapping[str, Way], loss: Mapping[str, Mapping[int, Any]], near: Mapping[str, Any]
) -> Picture:
    """Draw the losses of each way on a line of its own, a dot for each seed."""
    figure = Picture(figsize=(8.5, 3.9), layout="constrained")
    ax = figure.subplots()
    for row, name in enumerate(made):
        for factor, values in loss[name].items():
            color = COLORS[FACTORS.index(factor)]
            ax.plot(values, np.full(len(values), row), "o", color=color, ms=6, alpha=0.8)
        values = near.get(name, [])
        ax.plot(values, np.full(len(values), row), "o", color=SHORT, ms=6, mfc="none")
        if max(loss[name]) == 1:
            at = float(np.max([*loss[name][1], *values]))
            ax.text(at + 0.05, row, "no rows beyond T: cannot be run", color=SHORT, va="center")
    ax.set_yticks(range(len(made)), [way.title for way in made.values()])
    ax.set_ylim(len(made) - 0.4, -1.2)
    names = [("T", COLORS[0]), ("T, slid (open)", SHORT), ("2T", COLORS[1]), ("4T", COLORS[2])]
    for i, (label, color) in enumerate(names):
        at = (0.02 + 0.19 * i, 0.95)
        ax.text(*at, label, transform=ax.transAxes, color=color, fontsize=9, va="center")
    ax.set_xlabel("held-out loss on the same bytes, nats a byte")
    ax.grid(axis="y", color="#d9dee3", lw=0.6, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def positions_figure(
    made: Mapping[str, Way],
    curves: Mapping[str, Mapping[int, np.ndarray]],
    near: Mapping[str, np.ndarray],
    T: int,
) -> Picture:
    """Draw, by position in the longest window, what reading on costs over windows of T, slid."""
    figure = Picture(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for ax, (name, way) in zip(panels.flat, made.items(), strict=True):
        longest = max(way.factors)
        # Of a table of T rows there is nothing to show: windows of T are its only ones.
        if longest > 1:
            costs = curves[name][longest] - near[way.model]
            costs = costs.reshape(len(costs), -1, T // SLIDES).mean(-1)
            at = (np.arange(costs.shape[1]) + 0.5) / SLIDES
            ax.fill_between(at, costs.min(0), costs.max(0), color=COLORS[2], alpha=0.25, lw=0)
            ax.plot(at, costs.mean(0), color=COLORS[2], lw=1.6)
            end = f"{costs.mean(0)[-1]:+.3f} at 4T"
            ax.set_title(end, fontsize=9, loc="right", color=COLORS[2])
        else:
            ax.text(1.2, 0, "no rows beyond T", color=SHORT, va="bottom")
        ax.axhline(0, color=SHORT, lw=0.8)
        ax.axvline(1, color=SHORT, lw=0.8, ls=(0, (4, 3)))
        ax.set_title(way.title, fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[1]:
        ax.set(xlabel="position / T", xlim=(0, FACTORS[-1]), xticks=(0, *FACTORS))
    for ax in panels[:, 0]:
        ax.set_ylabel("loss over windows of T, slid\n(nats a byte)")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
