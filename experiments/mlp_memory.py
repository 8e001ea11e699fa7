"""What are the hidden units of an MLP keys of, and do their values name the byte that comes next?

Each hidden unit of an MLP is read as a memory (arXiv:2012.14913): its column of W_in is a key, the
activation says how well an input fits it, its row of W_out is the value that is added. On windows
of training text the units of every layer of a small character model are asked for their triggers:
the places where a unit is largest, one a window, those of the `top` windows.

Keys: the share of a unit's triggers that agree in their last 1, 2 or 3 bytes. Values: the byte that
the value alone would predict, through the final norm and the tied embedding, of the bytes that the
windows have; it agrees if it is the byte that follows the largest trigger. Rank: how many bytes the
value puts before that one. By chance: agreement once values and triggers of a layer are paired
anew, the mean of all pairings, so that bytes keep their frequencies. Two controls: random places in
place of triggers, and the same model at its random init, whose units have triggers that are alike
too. Beside them: the share of units that are active, and how often the model predicts what the
value of its largest unit names.

Command: python -m experiments.mlp_memory
Minutes: 12 on one CPU core; --preset=quick below 1; --preset=tpu has not been run yet
Expected: in arXiv:2012.14913, 16 layers on words, 65 to 80 % of a key's 25 triggers show a pattern
  that people found, shallow ones in lower layers; values agree with the next word almost never in
  layers 1 to 10, then up to 3.5 %, against 0.0004 % of random words; 10 to 50 % of units are
  active. It has no control at random init
Writes: runs/mlp_memory/summary.json, metrics.jsonl, mlp_memory.png, units.png
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _character
from experiments._character import Character
from experiments._findings import Answer, Figure, Verdict, gate, run, script
from experiments._memory_figures import layers_figure, units_figure
from experiments._report import save
from jax_attn import data, language_model, norm, read_mesh
from jax_attn.command_line import check_positive
from jax_attn.report import training_progress

BEFORE = 8  # nearer to the start of a window a unit sees little but that one begins
LAST = (1, 2, 3)  # how many last bytes triggers are compared by
SHOWN = 3  # units of a layer in the picture, and triggers of each
PAPER = "arXiv:2012.14913"
MODEL = Character()


@dataclasses.dataclass(frozen=True)
class Config:
    """The model and its training; `windows` searched for the `top` triggers of each unit."""

    model: Character = MODEL
    every: int = 250
    eval_windows: int = 256
    windows: int = 4096
    top: int = 25
    seeds: int = 3
    mesh: str = ""
    out: str = "runs/mlp_memory"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"model.D": 32, "model.N": 2, "model.L": 2, "model.T": 32, "model.B": 8},
        **{"model.steps": 1000, "model.learning_rate": 4e-3, "windows": 1024},
        **{"eval_windows": 64, "out": "runs/mlp_memory/quick"},
    },
    "tpu": {
        **{"model.D": 512, "model.N": 8, "model.L": 12, "model.T": 256, "model.B": 64},
        **{"model.steps": 20_000, "model.warmup": 500, "every": 1000, "windows": 16_384},
        "out": "runs/mlp_memory/tpu",
    },
}


class Seen(NamedTuple):
    """What units do on all windows; all arrays have seeds first, F units in each of L layers."""

    value: Any
    """[seeds,L,F,top] of the triggers, in falling order."""
    window: Any
    """[seeds,L,F,top], the window of each."""
    position: Any
    """[seeds,L,F,top], where its last byte stands."""
    says: Any
    """[seeds,L,F,V], logits of each value alone; -inf of bytes that the windows do not have."""
    active: Any
    """[seeds,L], share of units above zero."""
    largest: Any
    """[seeds,L], how often the value of the largest unit says what the model predicts."""
    largest_chance: Any
    """[seeds,L], the same once what is said and what is predicted are paired anew."""


def check(cfg: Config) -> jax.sharding.Mesh:
    """Refuse what cannot be run, before anything is compiled."""
    check_positive(cfg)
    mesh = read_mesh(cfg.mesh)
    _character.check(cfg.model, mesh)
    if cfg.model.T <= BEFORE:
        raise ValueError(f"--model.T must be above {BEFORE}, got {cfg.model.T}: triggers end later")
    _, searched = windows_of(cfg, data.load_text(cfg.model.data or None))
    total = searched.shape[0] * searched.shape[1]
    if cfg.top > total:
        raise ValueError(
            f"--top={cfg.top} triggers, one a window, but --windows={cfg.windows} are {total}"
        )
    return mesh


def windows_of(cfg: Config, text: data.Text) -> tuple[np.ndarray, np.ndarray]:
    """Cut held-out windows, for the loss, and those of training text that are searched."""
    T = cfg.model.T
    return (
        _character.chunks(text.heldout, T, cfg.eval_windows),
        _character.chunks(text.train, T, cfg.windows),
    )


def watched(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run an MLP, and say of its units where in each window they are largest."""
    hidden_BTF = jax.nn.relu(jnp.einsum("BTD,DF->BTF", x_BTD, params["w_in_DF"]))
    late_BTF = hidden_BTF[:, BEFORE:]
    return _character.feed(params, x_BTD), {
        "value_BF": late_BTF.max(1),
        "position_BF": BEFORE + late_BTF.argmax(1),
        "largest_BT": late_BTF.argmax(2),
        "active": (hidden_BTF > 0).mean(),
    }


def look(cfg: Config, params: Any, windows: jax.Array) -> Seen:
    """Search windows [chunks,B,T+1] for the triggers of every unit of one seed."""
    value_LFD = norm(params["norm"], params["layers"]["mlp"]["w_out_FD"])
    says_LFV = jnp.einsum("LFD,VD->LFV", value_LFD, params["embed_VD"])
    known_V = jnp.zeros(says_LFV.shape[-1], bool).at[windows.ravel()].set(True)
    says_LFV = jnp.where(known_V[None, None], says_LFV, -jnp.inf)
    top_LF = says_LFV.argmax(-1)
    L, F = top_LF.shape
    chunks, B, _ = windows.shape
    attend = _character.attend(cfg.model)

    def more(best: Any, chunk: Any) -> Any:
        number, tokens = chunk
        logits_BTV, aux = language_model(params, tokens[:, :-1], attend=attend, feed=watched)
        said = aux["mlp"]
        here = (
            said["value_BF"].swapaxes(1, 2),
            jnp.broadcast_to(number * B + jnp.arange(B), (L, F, B)),
            said["position_BF"].swapaxes(1, 2),
        )
        value, window, position = (
            jnp.concatenate(both, axis=-1) for both in zip(best, here, strict=True)
        )
        value, kept = jax.lax.top_k(value, cfg.top)
        window, position = (jnp.take_along_axis(x, kept, axis=-1) for x in (window, position))
        named_LBT = jax.vmap(lambda top_F, unit_BT: top_F[unit_BT])(top_LF, said["largest_BT"])
        predicted_BT = logits_BTV[:, BEFORE:].argmax(-1)
        equal_L = (named_LBT == predicted_BT[None]).mean((1, 2))
        often_LV = jax.nn.one_hot(named_LBT, data.VOCABULARY).mean((1, 2))
        often_V = jax.nn.one_hot(predicted_BT, data.VOCABULARY).mean((0, 1))
        return (value, window, position), (said["active"], equal_L, often_LV, often_V)

    none = jnp.zeros((L, F, cfg.top), jnp.int32)
    start = (jnp.full((L, F, cfg.top), -jnp.inf), none, none)
    (value, window, position), shares = jax.lax.scan(more, start, (jnp.arange(chunks), windows))
    active_L, largest_L, often_LV, often_V = (share.mean(0) for share in shares)
    chance_L = jnp.einsum("LV,V->L", often_LV, often_V)
    return Seen(value, window, position, says_LFV, active_L, largest_L, chance_L)


def alike(windows: np.ndarray, window: np.ndarray, position: np.ndarray, last: int) -> np.ndarray:
    """Measure the share of triggers that end in their commonest `last` bytes.

    Args:
      windows: [windows,T+1].
      window, position: [...,top], where each trigger ends.
      last: how many bytes are compared.
    Returns: [...], from 1 / top to 1.
    """
    codes = sum(windows[window, position - i].astype(np.int64) << 8 * i for i in range(last))
    same = np.asarray(codes)[..., :, None] == np.asarray(codes)[..., None, :]
    return same.sum(-1).max(-1) / window.shape[-1]


def agreement(top: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare what values say with what follows.

    Args:
      top: [...,F], the byte that each value says.
      following: [...,F], the byte after the largest trigger of its key.
    Returns: the share of units that agree [...], and the mean of that share over all pairings.
    """
    chance = np.zeros(top.shape[:-1])
    for byte in range(data.VOCABULARY):
        chance += (top == byte).mean(-1) * (following == byte).mean(-1)
    return (top == following).mean(-1), chance


def measured(windows: np.ndarray, seen: Seen) -> dict[str, np.ndarray]:
    """Reduce what was seen to numbers a layer, each [seeds,L]."""
    following = windows[seen.window, seen.position + 1]
    agrees, chance = agreement(seen.says.argmax(-1), following[..., 0])
    right = np.take_along_axis(seen.says, following[..., :1], axis=-1)
    return {
        **{f"last {n}": alike(windows, seen.window, seen.position, n).mean(-1) for n in LAST},
        "agrees": agrees,
        "by chance": chance,
        "rank": (seen.says > right).sum(-1).mean(-1),
        "active": np.asarray(seen.active),
        "largest": np.asarray(seen.largest),
        "largest by chance": np.asarray(seen.largest_chance),
    }


def anywhere(windows: np.ndarray, units: int, top: int, seed: int) -> dict[str, float]:
    """Measure random places in place of triggers: how alike they are, one number each."""
    rng = np.random.default_rng(seed)
    window = rng.integers(len(windows), size=(units, top))
    position = rng.integers(BEFORE, windows.shape[1] - 1, size=(units, top))
    return {f"last {n}": float(alike(windows, window, position, n).mean()) for n in LAST}


def verdicts(
    trained: Mapping[str, Any], init: Mapping[str, Any], places: Mapping[str, Any]
) -> list[Verdict]:
    """Judge keys and values.

    Args:
      trained, init: the model after training and before, by name [seeds,L], from `measured`.
      places: the same shares of random places instead of triggers, [seeds].
    Returns: the verdicts, of keys, then of values.
    """
    after = {name: np.asarray(x) for name, x in trained.items()}
    before = {name: np.asarray(x) for name, x in init.items()}
    above = after["agrees"] - after["by chance"]
    return [
        gate(
            "a key's triggers are alike: share with the same last byte, mean of layers",
            after["last 1"].mean(1),
            least=0.65,
            source=f"{PAPER}: 65 to 80 % show a pattern",
        ),
        gate(
            "training makes them so: share with the same last 3 bytes, over the larger of that at "
            "init and of random places",
            after["last 3"].mean(1) - np.maximum(before["last 3"].mean(1), places["last 3"]),
            least=0.05,
            source="no control in the paper",
        ),
        gate(
            "the first layer is shallower: with the same last 3 bytes, the last layer over it",
            after["last 3"][:, -1] - np.maximum(after["last 3"][:, 0], before["last 3"][:, -1]),
            least=0.05,
            source=f"{PAPER}: shallow patterns in lower layers; over the last at init, if larger",
        ),
        gate(
            "values of the first layer do not name the next byte: agreement over chance",
            above[:, 0],
            most=0.02,
            source=f"{PAPER}: close to none in lower layers",
        ),
        gate(
            "values of the last layer do: agreement over chance",
            above[:, -1],
            least=0.035,
            source=f"{PAPER}: 3.5 % in upper layers, chance 0.0004 %",
        ),
        gate(
            "agreement rises from the first layer to the last, by",
            after["agrees"][:, -1] - after["agrees"][:, 0],
            least=0.035,
            source=f"{PAPER}: from about 0 to 3.5 %",
        ),
        gate(
            "at random init there is none: agreement over chance, mean of layers",
            (before["agrees"] - before["by chance"]).mean(1),
            least=-0.02,
            most=0.02,
            source="keys and values are drawn apart",
        ),
    ]


def striking(windows: np.ndarray, seen: Seen) -> list[list[tuple[str, ...]]]:
    """Write out of each layer the units whose value names what follows most of their triggers.

    Of the first seed; one unit for each byte that values name, so that not all are spaces.
    Returns: by layer, a row of cells for each unit: name, triggers, how many end alike, the bytes
      that the value names, how many triggers it is right of.
    """
    top = seen.window.shape[-1]
    layers = []
    for layer, says_FV in enumerate(seen.says[0]):
        window, position = seen.window[0, layer], seen.position[0, layer]
        ordered = np.argsort(-says_FV, axis=-1)[:, :SHOWN]
        right = (windows[window, position + 1] == ordered[:, :1]).sum(-1)
        same = np.round(alike(windows, window, position, 1) * top).astype(int)
        best: dict[int, int] = {}
        for unit in np.argsort(-right, kind="stable"):
            best.setdefault(int(ordered[unit, 0]), int(unit))
        rows = []
        for unit in list(best.values())[:SHOWN]:
            ends = zip(window[unit, :SHOWN], position[unit, :SHOWN], strict=True)
            near = [(shown(windows[w, p - BEFORE + 1 : p + 2])) for w, p in ends]
            rows.append(
                (
                    f"{layer + 1}.{unit}",
                    "   ".join(f"{text[:-1]} → {text[-1]}" for text in near),
                    f"{same[unit]} of {top}",
                    "  ".join(shown(ordered[unit])),
                    f"{right[unit]} of {top}",
                )
            )
        layers.append(rows)
    return layers


def shown(tokens: Any) -> str:
    """Write bytes so that each is one visible character."""
    signs = {10: "↵", 32: "␣"}
    return "".join(signs.get(int(x), chr(x) if 32 < x < 127 else "·") for x in tokens)


def find(cfg: Config, mesh: jax.sharding.Mesh, out: pathlib.Path) -> Answer:
    """Train, search the windows with the trained model and the one at init, judge, draw."""
    text = data.load_text(cfg.model.data or None)
    heldout, searched = windows_of(cfg, text)

    def loss(params: Any) -> dict[str, jax.Array]:
        each = jax.lax.map(partial(_character.loss, cfg.model, params), jnp.asarray(heldout))
        return {"heldout": each.mean()}

    with training_progress() as progress:
        found = _character.trained(
            cfg.model,
            text,
            seeds=cfg.seeds,
            every=cfg.every,
            measure=loss,
            mesh=mesh,
            progress=progress,
            title="character model",
            log=out / "metrics.jsonl",
        )
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(cfg.seeds))
    with jax.set_mesh(mesh):
        # Draws run once, but optimising them takes XLA longer than compiling the step.
        quickly = {"xla_backend_optimization_level": 0}
        init = jax.vmap(partial(_character.init, cfg.model))
        start = jax.jit(init, compiler_options=quickly)(keys)
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), found.params, start)
        search = jax.jit(jax.vmap(partial(look, cfg), in_axes=(0, None)))
        seen = jax.tree.map(np.asarray, search(both, searched))
    windows = searched.reshape(-1, cfg.model.T + 1)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + cfg.seeds], seen) for i in (0, cfg.seeds)]
    trained, fresh = (measured(windows, half) for half in halves)
    drawn = [anywhere(windows, 4 * cfg.model.D, cfg.top, seed) for seed in range(cfg.seeds)]
    places = {name: np.array([one[name] for one in drawn]) for name in drawn[0]}

    table: list[dict[str, Any]] = []
    for model, numbers in (("trained", trained), ("random init", fresh)):
        for layer in range(cfg.model.L):
            row = {name: values[:, layer] for name, values in numbers.items()}
            table.append({"model": model, "layer": layer + 1, **row})
    table.append(dict.fromkeys(table[0]) | {"model": "random places", **places})
    save(layers_figure(trained, fresh, places), out / "mlp_memory.png")
    save(units_figure(striking(windows, halves[0])), out / "units.png")
    nats = found.rows[-1]["heldout"].mean()
    captions = {
        "mlp_memory.png": f"Hidden units as memories, {cfg.seeds} seeds, model at {nats:.2f} nats "
        f"a held-out byte. Left: triggers of a unit, of {cfg.top}, that end alike. Middle: values "
        "that name the byte after their key's largest trigger. Right: places where the largest "
        f"unit's value names the model's prediction. Text: {text.name}, {text.sha256}.",
        "units.png": f"In each layer the {SHOWN} units whose value names what follows most of "
        "their triggers, of seed 0, no two that name the same byte: a choice, not the average "
        "unit. Unit: layer and number.",
    }
    return Answer(
        table,
        verdicts(trained, fresh, places),
        [Figure(file, says) for file, says in captions.items()],
        text,
        _character.untrained(text, heldout, found.rows[-1]["heldout"]),
    )


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 0 whatever the verdicts are."""
    return run(__doc__ or "", Config, PRESETS, argv, check, find)


if __name__ == "__main__":
    script(main)
