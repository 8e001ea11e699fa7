"""Can a model recall a token placed far back, in a context that no device could hold densely?

A sequence is noise but for one needle, a token of one of 8 classes, somewhere in it; the last token
asks for the class. One layer of attention without positions learns it on short sequences, and is
then asked in ever longer ones, split over P devices by ring attention. Its scores, written out,
would not fit: T x T numbers a head. Recall is what it answers; "found" is how often the largest
score of some head lies on the needle. What a device needs is what XLA says that the compiled
program takes, arguments and temporaries together.

Command: python -m experiments.long_context
Minutes: 6 on 2 busy CPU cores
Expected: recall of 1.00 at the length it was trained on and at four times that; then it falls to a
  guess, though the largest score stays on the needle: ever more noise outweighs it. Memory of a
  device falls nearly as 1 / P.
Writes: runs/long_context/metrics.jsonl, results.json, recall.png
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.box
import rich.console
import rich.table

from experiments import _bench_measure as measure
from experiments._report import environment, save
from jax_attn import (
    attention,
    causal,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    make_mesh,
    shard_init,
    shard_step,
    train,
    zigzag_order,
)
from jax_attn.command_line import check_positive, parse
from jax_attn.report import training_progress

CLASSES, NOISE = 8, 48
ASK = CLASSES + NOISE
CONTEXTS = ("ring", "zigzag", "all_to_all")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train at length T, ask up to length `longest` in steps of 4; a CPU is made P devices."""

    T: int = 256
    longest: int = 65536
    D: int = 32
    N: int = 2
    H: int = 16
    B: int = 16
    P: int = 8
    steps: int = 300
    learning_rate: float = 5e-3
    asked: int = 8
    context: str = "zigzag"
    out: str = "runs/long_context"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"longest": 1024, "steps": 200, "out": "runs/long_context/quick"},
}


def main(argv: list[str] | None = None) -> int:
    """Train, ask, print tables, write JSON and a picture."""
    cfg = parse(Config, PRESETS, __doc__ or "", argv)
    console = rich.console.Console()
    try:
        check(cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = pathlib.Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    with training_progress() as progress:
        params = learn(cfg, out / "metrics.jsonl", progress)
        asked = ask(cfg, params, progress)
        weighed = weigh(cfg, progress)
    result = {"config": dataclasses.asdict(cfg), **environment()}
    result |= {"asked": asked, "weighed": weighed}
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    show(console, cfg, asked, weighed)
    save(figure(cfg, asked, weighed), out / "recall.png")
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    console.print(f"wrote {out / 'results.json'} and recall.png")
    return 0


def check(cfg: Config) -> None:
    """Refuse sizes that cannot be split, and make the devices if they are a CPU's threads."""
    check_positive(cfg)
    if cfg.context not in CONTEXTS:
        raise ValueError(f"--context must be one of {', '.join(CONTEXTS)}, got {cfg.context!r}")
    if cfg.P & (cfg.P - 1):
        raise ValueError(f"--P must be a power of two, got {cfg.P}")
    if cfg.T % (2 * cfg.P) or cfg.T < 16:
        raise ValueError(f"--T={cfg.T} must be at least 16 and a multiple of 2 * --P={cfg.P}")
    if cfg.longest < cfg.T:
        raise ValueError(f"--longest={cfg.longest} is shorter than --T={cfg.T}")
    if cfg.longest % (2 * cfg.P):
        raise ValueError(f"--longest={cfg.longest} must be a multiple of 2 * --P={cfg.P}")
    if cfg.context == "all_to_all" and cfg.N % cfg.P:
        raise ValueError(f"--context=all_to_all needs --P={cfg.P} to divide --N={cfg.N}")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cfg.P)
    if jax.device_count() < cfg.P:
        raise ValueError(f"--P={cfg.P} but there are {jax.device_count()} devices; lower --P")


def sequences(seed: int, step: int, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [B,T] and where the needle is, [B]; a pure function of its arguments."""
    rng = np.random.default_rng((seed, step))
    tokens_BT = rng.integers(CLASSES, ASK, (B, T), dtype=np.int32)
    needle_B = rng.integers(0, T - 1, B)
    tokens_BT[np.arange(B), needle_B] = rng.integers(0, CLASSES, B)
    tokens_BT[:, -1] = ASK
    return tokens_BT, needle_B


def model(cfg: Config, params: Any, tokens_BT: Any, observe: Any = None) -> Any:
    """Return logits [B,V] of the last token, and what its attention was seen to do."""
    attend = partial(attention, mask=causal(), context=cfg.context, observe=observe)
    logits_BTV, aux = language_model(params, tokens_BT, attend=attend)
    last = int(np.argmax(order(cfg, tokens_BT.shape[1])))
    seen = {} if observe is None else aux["attention"]["seen"]
    return logits_BTV[:, last], {name: x[:, :, last] for name, x in seen.items()}


def order(cfg: Config, T: int) -> np.ndarray:
    """Say in which order a split sequence is stored."""
    return zigzag_order(T, cfg.P) if cfg.context == "zigzag" else np.arange(T)


def init(cfg: Config, key: jax.Array) -> Any:
    """Draw the model: one block, no positions."""
    layer = partial(
        init_block,
        D=cfg.D,
        attention=partial(init_attention, D=cfg.D, N=cfg.N, H=cfg.H),
        mlp=partial(init_mlp, D=cfg.D, F=4 * cfg.D),
    )
    return init_language_model(key, V=ASK + 1, D=cfg.D, L=1, layer=layer)


def optimizer(cfg: Config) -> Any:
    """Adam on a cosine: at a constant rate some classes stay unlearned."""
    rate = optax.cosine_decay_schedule(cfg.learning_rate, cfg.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def start(cfg: Config, key: jax.Array) -> Any:
    """Draw a model and what its optimizer keeps."""
    return train.init_state(init(cfg, key), optimizer(cfg))


def step_of(cfg: Config, mesh: Any) -> Any:
    """Make the training step on a mesh: cross-entropy of the last token alone."""

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        logits_BV, _ = model(cfg, params, batch["tokens_BT"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BV, batch["class_B"])
        hits_B = jnp.argmax(logits_BV, axis=-1) == batch["class_B"]
        return losses.mean(), {"recall": hits_B.mean()}

    return shard_step(train.make_train_step(loss_fn, optimizer(cfg)), mesh)


def batch_of(cfg: Config, seed: int, step: int, T: int) -> dict[str, np.ndarray]:
    """Make a batch, its tokens in the order of storage."""
    tokens_BT, needle_B = sequences(seed, step, cfg.B, T)
    class_B = tokens_BT[np.arange(cfg.B), needle_B]
    return {"tokens_BT": tokens_BT[:, order(cfg, T)], "class_B": class_B}


def learn(cfg: Config, metrics_path: pathlib.Path, progress: Any) -> Any:
    """Train at length T; return the parameters."""
    mesh = make_mesh(context=cfg.P, devices=jax.devices()[: cfg.P])
    state = shard_init(partial(start, cfg), jax.random.key(0), mesh)
    metrics_path.unlink(missing_ok=True)
    state, _ = train.fit(
        step_of(cfg, mesh),
        state,
        lambda step: batch_of(cfg, 0, step, cfg.T),
        steps=cfg.steps,
        key=jax.random.key(1),
        metrics_path=metrics_path,
        title=f"length {cfg.T:,}",
        tokens_per_step=cfg.B * cfg.T,
        progress=progress,
    )
    return state.params


def ask(cfg: Config, params: Any, progress: Any) -> list[dict[str, Any]]:
    """Ask the model in ever longer contexts; one sequence at a time."""
    mesh = make_mesh(context=cfg.P, devices=jax.devices()[: cfg.P])
    run = jax.jit(partial(model, cfg, observe=("argmax_key", "max_prob")))
    lengths = [cfg.T]
    while 4 * lengths[-1] <= cfg.longest:
        lengths.append(4 * lengths[-1])
    task = progress.add_task("asking", total=len(lengths) * cfg.asked, status="")
    rows = []
    for T in lengths:
        hits, found, weight, seconds = [], [], [], []
        for i in range(cfg.asked):
            tokens_BT, needle_B = sequences(1, i, 1, T)
            began = time.perf_counter()
            with jax.set_mesh(mesh):
                logits_BV, seen = jax.device_get(run(params, tokens_BT[:, order(cfg, T)]))
            seconds.append(time.perf_counter() - began)
            hits.append(int(np.argmax(logits_BV[0])) == tokens_BT[0, needle_B[0]])
            on_needle_N = seen["argmax_key"][0, 0] == needle_B[0]
            found.append(bool(on_needle_N.any()))
            weight.append(float(np.max(seen["max_prob"][0, 0] * on_needle_N)))
            progress.update(task, advance=1, status=f"{T:,} tokens")
        rows.append(
            {
                "T": T,
                "dense_bytes": 4 * cfg.N * T * T,
                "recall": float(np.mean(hits)),
                "found": float(np.mean(found)),
                "weight": float(np.mean(weight)),
                "seconds": float(np.median(seconds)),
            }
        )
    return rows


def weigh(cfg: Config, progress: Any) -> list[dict[str, Any]]:
    """Compile the training step at the longest length for 1, 2, 4 ... devices; what each needs."""
    counts = [2**i for i in range(cfg.P.bit_length())]
    task = progress.add_task("weighing", total=len(counts), status="")
    rows = []
    for P in counts:
        here = dataclasses.replace(cfg, P=P, B=1)
        mesh = make_mesh(context=P, devices=jax.devices()[:P])
        state = jax.eval_shape(partial(start, here), jax.random.key(0))
        batch = {
            "tokens_BT": jax.ShapeDtypeStruct((1, cfg.longest), "int32"),
            "class_B": jax.ShapeDtypeStruct((1,), "int32"),
        }
        spent = step_of(here, mesh).lower(state, batch, jax.random.key(0)).compile()
        spent = spent.memory_analysis()
        needed = None
        if spent is not None:
            needed = spent.argument_size_in_bytes + spent.temp_size_in_bytes
        rows.append({"devices": P, "bytes": needed})
        progress.update(task, advance=1, status=f"{P} devices")
    return rows


def show(console: rich.console.Console, cfg: Config, asked: list[Any], weighed: list[Any]) -> None:
    """Print both tables."""
    memory = measure.machine_memory()
    of = f"of {memory / 1e9:.0f} GB" if memory else "GB"
    title = f"trained at {cfg.T:,}, {cfg.context} over {cfg.P} devices"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for column in ("tokens", f"dense scores, {of}", "recall", "found", "weight on it", "seconds"):
        table.add_column(column, justify="right")
    for row in asked:
        table.add_row(
            f"{row['T']:,}",
            f"{row['dense_bytes'] / 1e9:,.2f}",
            f"{row['recall']:.2f}",
            f"{row['found']:.2f}",
            f"{row['weight']:.3f}",
            f"{row['seconds']:.1f}",
        )
    console.print(table)
    table = rich.table.Table(
        title=f"a training step of one sequence of {cfg.longest:,}", box=rich.box.SIMPLE_HEAD
    )
    for column in ("devices", "MB on each", "of one"):
        table.add_column(column, justify="right")
    for row in weighed:
        size, whole = row["bytes"], weighed[0]["bytes"]
        shown = ("-", "-") if size is None else (f"{size / 1e6:.1f}", f"{size / whole:.3f}")
        table.add_row(str(row["devices"]), *shown)
    console.print(table)
    console.print(
        f"One of {CLASSES} classes: a guess recalls {1 / CLASSES:.2f}. {cfg.asked} questions each."
    )


def figure(cfg: Config, asked: list[Any], weighed: list[Any]) -> matplotlib.figure.Figure:
    """Draw recall against length, and a device's memory against their number."""
    made = matplotlib.figure.Figure(figsize=(6.75, 2.5), layout="constrained")
    left, right = made.subplots(1, 2)
    lengths = [row["T"] for row in asked]
    for key, label, color, marker in (
        ("recall", "answered right", "#0072B2", "o"),
        ("found", "largest score on it", "#009E73", "^"),
        ("weight", "weight on it", "#D55E00", "s"),
    ):
        values = [row[key] for row in asked]
        left.plot(lengths, values, color=color, marker=marker, markersize=4, label=label)
    left.axhline(1 / CLASSES, color="#57606a", linewidth=0.8, linestyle=(0, (4, 3)))
    left.annotate("guess", (lengths[0], 1 / CLASSES), fontsize=7, va="bottom")
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [f"{T:,}" for T in lengths])
    left.set_ylim(0, 1.05)
    left.set_xlabel(f"tokens (trained at {cfg.T:,})", fontsize=8)
    left.set_title("a needle far back", fontsize=8)
    left.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(0, 0.45))
    counts = [row["devices"] for row in weighed]
    if all(row["bytes"] for row in weighed):
        sizes = np.array([row["bytes"] for row in weighed]) / 1e6
        right.plot(counts, sizes, color="#0072B2", marker="o", markersize=4)
        ideal = sizes[0] / np.array(counts)
        right.plot(counts, ideal, color="#57606a", linewidth=0.8, linestyle=(0, (4, 3)))
        right.annotate("1 / P", (counts[-1], ideal[-1]), fontsize=7, va="top", ha="right")
        right.set_yscale("log", base=2)
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [str(count) for count in counts])
    right.yaxis.set_major_formatter("{x:g}")
    right.set_xlabel("devices", fontsize=8)
    right.set_title(f"MB on each, a training step of {cfg.longest:,} tokens", fontsize=8)
    for ax in (left, right):
        ax.minorticks_off()
        ax.tick_params(labelsize=7)
        ax.grid(color="#d9dee3", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return made


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; metrics so far are kept", file=sys.stderr)
        raise SystemExit(130) from None
