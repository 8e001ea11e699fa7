"""How fast is the training loop, against a plain loop in PyTorch and against its own step alone?

The same model from the same initial values, the same batches, the same AdamW, clipping and
schedule, in one run on the same cores: chunks of steps of `fit` (with metrics of every step fetched
and written) and of the PyTorch loop take turns. Then the same step without a loop around it, to see
what the loop costs, a step of almost no work, to see what a step costs in Python, and the step's
products of weights without anything else: no step of either can be faster than those.

Command: pip install 'jax-attn[bench]' && python -m experiments.bench_train
Minutes: about 8 on 2 CPU cores (2.4 with --steps=600); --preset=wide about 10
Expected: the aim is 1.5 times the tokens a second of PyTorch in the small configuration, measured
    was 1.02, and XLA's products alone take longer than such a step; a held-out loss that is no
    worse, at most 2 % for the loop, 1 ms of Python a step
Writes: OUT/results.json, OUT/train.png
"""

import collections
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
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

from experiments import _report, _step_products
from jax_attn import (
    attention,
    causal,
    count,
    data,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    train,
)
from jax_attn.command_line import check_positive, parse
from jax_attn.report import training_progress
from jax_attn.train.watch import host_share


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters; `steps` in all, taken in turns of `chunk`."""

    D: int = 128
    N: int = 4
    L: int = 4
    T: int = 64
    B: int = 12
    steps: int = 2000
    chunk: int = 100
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    log_every: int = 10
    heldout: int = 512
    out: str = "runs/bench_train"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "wide": {
        **{"D": 384, "N": 6, "L": 6, "T": 256, "steps": 60, "chunk": 10, "warmup": 10},
        **{"heldout": 48, "out": "runs/bench_train/wide"},
    },
    "quick": {"steps": 200, "chunk": 20, "out": "runs/bench_train/quick"},
}


def schedule(cfg: Config) -> optax.Schedule:
    """Warm up in a line, then fall along a cosine to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup, cfg.steps, cfg.learning_rate / 10
    )


def init(cfg: Config, key: jax.Array) -> Any:
    """Draw the parameters that both start from."""
    layer = partial(
        init_block,
        D=cfg.D,
        attention=partial(init_attention, D=cfg.D, N=cfg.N),
        mlp=partial(init_mlp, D=cfg.D, F=4 * cfg.D),
    )
    return init_language_model(key, V=data.VOCABULARY, D=cfg.D, L=cfg.L, layer=layer, T=cfg.T)


def loss_fn(params: Any, windows_BT: jax.Array, key: jax.Array) -> Any:
    """Measure the mean cross entropy of the next byte."""
    attend = partial(attention, mask=causal())
    logits_BTV, _ = language_model(params, windows_BT[:, :-1], attend=attend)
    return train.next_token_loss(logits_BTV, windows_BT[:, 1:]), {}


class Ours:
    """The loop of this library, in turns."""

    def __init__(self, cfg: Config, params: Any, batch: Callable[[int], np.ndarray]) -> None:
        self.cfg, self.batch, self.key = cfg, batch, jax.random.key(1)
        tx = optax.chain(
            optax.clip_by_global_norm(cfg.clip),
            optax.adamw(schedule(cfg), b2=0.99, weight_decay=cfg.weight_decay),
        )
        step = train.make_train_step(loss_fn, tx, schedule=schedule(cfg))
        self.step_fn = jax.jit(step, donate_argnums=0)
        # A copy: the step deletes what it is given.
        self.state = train.init_state(jax.tree.map(jnp.array, params), tx)
        self.made, self.path = 0, pathlib.Path(cfg.out) / "metrics.jsonl"
        self.seconds: collections.Counter[str] = collections.Counter()

    def advance(self, steps: int) -> None:
        """Make some steps with `fit`."""
        self.made += steps
        self.state, history = train.fit(
            self.step_fn, self.state, self.batch, steps=self.made, key=self.key,
            log_every=self.cfg.log_every, metrics_path=self.path,
            progress=training_progress(rich.console.Console(quiet=True)),
        )  # fmt: skip
        self.seconds.update(history.seconds)

    def advance_alone(self, steps: int) -> None:
        """Make some steps with nothing around them, batches made before."""
        for batch in [self.batch(self.made + i) for i in range(steps)]:
            self.state, metrics = self.step_fn(self.state, batch, self.key)
        jax.block_until_ready((self.state, metrics))
        self.made += steps


def take_turns(
    turns: dict[str, Callable[[int], None]], steps: int, chunk: int, progress: Any
) -> dict[str, list[float]]:
    """Let each make `chunk` steps in turn; seconds of each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    task = progress.add_task("taking turns", total=steps, status="")
    for turn in range(steps // chunk):
        names = list(turns) if turn % 2 == 0 else list(turns)[::-1]
        for name in names:
            began = time.perf_counter()
            turns[name](chunk)
            seconds[name].append(time.perf_counter() - began)
        progress.update(task, advance=chunk, status="")
    return seconds


def python_overhead(steps: int = 2000) -> float:
    """Time a step of `fit` whose step does next to nothing, in milliseconds, metrics written."""
    tx = optax.adamw(1e-3)
    fn = jax.jit(
        train.make_train_step(lambda p, batch, key: (jnp.square(p["w_D"] - batch).sum(), {}), tx),
        donate_argnums=0,
    )
    batch, key = jnp.zeros(3), jax.random.key(0)
    folder = tempfile.mkdtemp()

    def run(made: int, state: Any, loop: bool) -> tuple[Any, float]:
        began = time.perf_counter()
        if loop:
            quiet = training_progress(rich.console.Console(quiet=True))
            state, _ = train.fit(
                fn, state, lambda step: batch, steps=made + steps, key=key, progress=quiet,
                metrics_path=f"{folder}/metrics.jsonl",
            )  # fmt: skip
        else:
            for _ in range(steps):
                state, metrics = fn(state, batch, key)
            jax.block_until_ready(metrics)
        return state, (time.perf_counter() - began) / steps

    state, each = train.init_state({"w_D": jnp.ones(3)}, tx), []
    for i in range(10):
        state, seconds = run(i * steps, state, loop=i % 2 == 1)
        each.append(seconds)
    shutil.rmtree(folder)
    # The first pair compiles.
    return 1e3 * float(np.median(np.array(each[3::2]) - np.array(each[2::2])))


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": float(np.median(values)), "least": float(values.min()),
            "largest": float(values.max())}  # fmt: skip


def figure(cfg: Config, rates: dict[str, np.ndarray], losses: dict[str, Any]) -> Any:
    """Draw losses over steps, and tokens a second of every turn."""
    made = matplotlib.figure.Figure(figsize=(6.75, 2.4), layout="constrained")
    left, right = made.subplots(1, 2)
    for (name, (steps, values)), color in zip(losses.items(), ("#0072B2", "#D55E00"), strict=True):
        left.plot(steps, values, color=color, linewidth=0.9, alpha=0.8, label=name)
    left.set(xlabel="step", ylabel="loss (nats a byte)")
    left.legend(fontsize=7, frameon=False)
    for (name, rate), color in zip(rates.items(), ("#0072B2", "#D55E00"), strict=True):
        turns = np.arange(1, len(rate) + 1)
        right.plot(turns, rate, "o-", color=color, markersize=2.5, linewidth=0.9, label=name)
    right.set(xlabel=f"turn of {cfg.chunk} steps", ylabel="tokens a second", ylim=(0, None))
    right.legend(fontsize=7, frameon=False)
    for ax in (left, right):
        ax.xaxis.label.set_size(8)
        ax.yaxis.label.set_size(8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    return made


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Config, PRESETS, __doc__ or "", argv)
    try:
        check_positive(cfg)
        if cfg.steps % cfg.chunk or cfg.steps < 3 * cfg.chunk:
            raise ValueError(f"--chunk={cfg.chunk} must divide --steps={cfg.steps}, thrice or more")
        from experiments import _train_peer as peer
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("error: PyTorch is not here: pip install 'jax-attn[bench]'", file=sys.stderr)
        return 2
    import torch  # pyright: ignore[reportMissingImports]

    out, console = pathlib.Path(cfg.out), rich.console.Console()
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    text = data.load_text(T=cfg.T)
    heldout = data.windows(text.heldout, B=cfg.B, T=cfg.T, count=max(cfg.heldout // cfg.B, 1))

    def batch(step: int) -> np.ndarray:
        return data.batch(text.train, 0, step, B=cfg.B, T=cfg.T)

    params = init(cfg, jax.random.key(0))
    ours = Ours(cfg, params, batch)
    model = peer.Model(data.VOCABULARY, cfg.D, cfg.N, cfg.L, cfg.T)
    model.take(params)
    theirs = peer.Trainer(
        model, batch, steps=cfg.steps, rate=cfg.learning_rate, warmup=cfg.warmup,
        weight_decay=cfg.weight_decay, clip=cfg.clip, log_every=cfg.log_every,
    )  # fmt: skip
    one = jax.jit(lambda params, windows: loss_fn(params, windows, jax.random.key(0))[0])

    def held() -> dict[str, float]:
        with torch.no_grad():
            theirs_ = float(np.mean([peer.loss_of(model, w).item() for w in heldout]))
        return {
            "jax_attn": float(np.mean([float(one(ours.state.params, w)) for w in heldout])),
            "PyTorch": theirs_,
        }

    with training_progress() as progress:
        at_first = held()
        turns = {"jax_attn": ours.advance, "PyTorch": theirs.advance}
        seconds = take_turns(turns, cfg.steps, cfg.chunk, progress)
        at_last = held()
        alone = take_turns(
            {"fit": ours.advance, "step": ours.advance_alone},
            min(cfg.steps, 20 * cfg.chunk), cfg.chunk, progress,
        )  # fmt: skip
        overhead = python_overhead()
        products = _step_products.milliseconds(cfg.D, cfg.L, data.VOCABULARY, cfg.B * cfg.T)
    # The first turn of each compiles or warms up.
    took = {name: np.array(each[1:]) for name, each in seconds.items()}
    rates = {name: cfg.chunk * cfg.B * cfg.T / each for name, each in took.items()}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row and row["step"] < cfg.steps]
    logged = [cfg.log_every * i for i in range(len(theirs.losses))]
    results = {
        **_report.environment(),
        "torch": torch.__version__,
        "config": dataclasses.asdict(cfg),
        "parameters": count(params),
        "tokens_per_s": {name: spread(rate) for name, rate in rates.items()},
        "ratio": spread(took["PyTorch"] / took["jax_attn"]),
        "heldout_before": at_first,
        "heldout_after": at_last,
        "loop_share": spread(1 - np.array(alone["step"][1:]) / np.array(alone["fit"][1:])),
        "step_ms": {name: spread(1e3 * each / cfg.chunk) for name, each in took.items()},
        "products_ms": {name: spread(np.array(each)) for name, each in products.items()},
        "python_ms": overhead,
        # Of the time of steps, at most: the device computes meanwhile.
        "host_share": host_share(ours.seconds),
    }
    results["verdict"] = {
        "1.5 times PyTorch": results["ratio"]["median"] >= 1.5,
        "held-out loss no worse": at_last["jax_attn"] <= at_last["PyTorch"] + 0.01,
        "the loop costs at most 2 %": results["loop_share"]["median"] <= 0.02,
        "at most 1 ms of Python": overhead <= 1.0,
        "the host holds up less than 2 % of a step": results["host_share"] < 0.02,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    curves = {
        "jax_attn": ([row["step"] for row in rows], [row["loss"] for row in rows]),
        "PyTorch": (logged, theirs.losses),
    }
    _report.save(figure(cfg, rates, curves), out / "train.png")
    show(console, cfg, results)
    return 0


def show(console: rich.console.Console, cfg: Config, results: dict[str, Any]) -> None:
    """Print what was measured."""
    size = (
        f"{results['parameters']:,} parameters, L={cfg.L} N={cfg.N} D={cfg.D} T={cfg.T} B={cfg.B}"
    )
    table = rich.table.Table(title=size, box=rich.box.SIMPLE_HEAD)
    for column in ("", "tokens/s", "least", "largest", "held out, before", "after"):
        table.add_column(column, justify="right")
    for name, rate in results["tokens_per_s"].items():
        table.add_row(
            name,
            *(f"{rate[which]:,.0f}" for which in ("median", "least", "largest")),
            f"{results['heldout_before'][name]:.4f}",
            f"{results['heldout_after'][name]:.4f}",
        )
    console.print(table)
    ratio, loop = results["ratio"], results["loop_share"]
    console.print(
        f"{ratio['median']:.2f} times PyTorch ({ratio['least']:.2f} to {ratio['largest']:.2f}); "
        f"the loop around the step: {loop['median']:.1%} ({loop['least']:.1%} to "
        f"{loop['largest']:.1%}); Python: {results['python_ms']:.3f} ms a step, and the "
        f"device waits for the host at most {results['host_share']:.1%} of it"
    )
    wanted = results["step_ms"]["PyTorch"]["median"] / 1.5
    console.print(
        f"The products of weights alone: {results['products_ms']['XLA']['median']:.1f} ms in XLA, "
        f"{results['products_ms']['PyTorch']['median']:.1f} ms in PyTorch; a step takes "
        f"{results['step_ms']['jax_attn']['median']:.1f} ms, and would take {wanted:.1f} ms at "
        f"1.5 times PyTorch"
    )
    for claim, holds in results["verdict"].items():
        console.print(f"{'holds' if holds else 'does NOT hold'}: {claim}", highlight=False)
    console.print(f"{results['device']}, {results['machine']}, jax {results['jax']}, "
                  f"torch {results['torch']}, {results['date']}; {cfg.out}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
