"""What does a device need, do and wait for when a sequence is split over more of them?

Forward and backward of causal attention over one sequence of T tokens, split over 1, 2, 4, ... P
devices in each way. Memory is what XLA says that the compiled program takes on each device beside
inputs and outputs; work is counted in blocks of queries x keys that a device visits, and the
busiest device matters, since all wait for it. Then a language model of 2, 8 and 32 layers: how
long its training step on a mesh takes to compile.

On a CPU the devices are threads that share its cores, so time says what splitting adds to the whole
work, not what it saves: with P real devices the same work takes about 1 / P of it.

Command: python -m experiments.bench_sharding
Minutes: 2 on 2 CPU cores
Expected: temporaries fall as 1 / P from 2 devices on, to 0.19 of one device's on 8 (a ring of one
  holds no copy that travels); zigzag's busiest device does 1.0 times the mean work, the plain
  ring's 1.86 times; compile time does not depend on depth.
Writes: runs/bench_sharding/results.json, sharding.png
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
from jax.sharding import PartitionSpec

from experiments import _bench_measure as measure
from experiments._report import environment, save
from jax_attn import (
    attention,
    causal,
    context_attention,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    make_mesh,
    rope,
    shard_step,
    train,
)
from jax_attn.command_line import check_positive, parse
from jax_attn.kernels import blockwise, ring
from jax_attn.kernels.call import checked
from jax_attn.report import training_progress

WAYS = ("ring", "zigzag", "all_to_all")
SPLIT = PartitionSpec(None, "context")
DEPTHS = (2, 8, 32)


@dataclasses.dataclass(frozen=True)
class Config:
    """A sequence of T tokens, N heads of width H; a CPU is made P devices; `rounds` are timed."""

    T: int = 8192
    N: int = 8
    H: int = 64
    P: int = 8
    rounds: int = 2
    out: str = "runs/bench_sharding"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"T": 2048, "rounds": 1, "out": "runs/bench_sharding/quick"},
}


def main(argv: list[str] | None = None) -> int:
    """Compile, time, print tables, write JSON and a picture."""
    cfg = parse(Config, PRESETS, __doc__ or "", argv)
    console = rich.console.Console()
    try:
        check(cfg)
        counts = [2**i for i in range(cfg.P.bit_length())]
        with training_progress() as progress:
            rows = of_sequences(cfg, counts, progress)
            depths = of_depths(cfg, progress)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = pathlib.Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {"config": dataclasses.asdict(cfg), **environment(), "rows": rows, "depths": depths}
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    show(console, cfg, rows, depths)
    save(figure(cfg, rows, counts), out / "sharding.png")
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    console.print(f"wrote {out / 'results.json'} and sharding.png")
    return 0


def check(cfg: Config) -> None:
    """Refuse sizes that cannot be split, and make the devices if they are a CPU's threads."""
    check_positive(cfg)
    if cfg.P & (cfg.P - 1):
        raise ValueError(f"--P must be a power of two, got {cfg.P}")
    if cfg.T % (2 * cfg.P) or cfg.N % cfg.P:
        raise ValueError(f"--P={cfg.P} must divide --N={cfg.N}, and 2 P must divide --T={cfg.T}")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cfg.P)
    if jax.device_count() < cfg.P:
        raise ValueError(f"--P={cfg.P} but there are {jax.device_count()} devices; lower --P")


def of_sequences(cfg: Config, counts: list[int], progress: Any) -> list[dict[str, Any]]:
    """Compile and time every way of splitting a sequence over every number of devices."""
    rows, ready = [], {}
    task = progress.add_task("compiling", total=len(WAYS) * len(counts), status="")
    for way in WAYS:
        for count in counts:
            began = time.perf_counter()
            program, inputs = gradient(cfg, way, count)
            compile_s = time.perf_counter() - began
            run = partial(lambda f, x: jax.block_until_ready(f(*x)), program, inputs)
            ready[way, count] = run, 1
            spent = program.memory_analysis()
            rows.append(
                {
                    "way": way,
                    "devices": count,
                    "temporary_bytes": None if spent is None else spent.temp_size_in_bytes,
                    "busiest": busiest(cfg, way, count),
                    "compile_s": round(compile_s, 2),
                }
            )
            progress.update(task, advance=1)
    task = progress.add_task("timing", total=cfg.rounds, status="")
    seconds: dict[Any, list[float]] = {name: [] for name in ready}
    for _ in range(cfg.rounds):
        for name, taken in measure.interleave(ready, 1).items():
            seconds[name] += taken
        progress.update(task, advance=1)
    for row, each in zip(rows, seconds.values(), strict=True):
        row |= measure.summarise(each)
    return rows


def gradient(cfg: Config, way: str, count: int) -> tuple[Any, Any]:
    """Compile forward and backward over `count` devices; return it and its inputs in place."""
    mesh = make_mesh(context=count, devices=jax.devices()[:count])
    attend = partial(context_attention, context=way, mask=causal())
    split = jax.shard_map(attend, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    place = jax.NamedSharding(mesh, SPLIT)
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, cfg.T, cfg.N, cfg.H)
    *x, cotangent = (jax.device_put(jax.random.normal(key, shape), place) for key in keys)

    def derive(q, k, v, cotangent):
        return jax.vjp(split, q, k, v)[1](cotangent)

    inputs = (*x, cotangent)
    return jax.jit(derive).lower(*inputs).compile(), inputs


def busiest(cfg: Config, way: str, count: int) -> float:
    """Return how many times the mean work the busiest device does, in blocks that it visits."""
    if way == "all_to_all":  # each device attends to the whole sequence for as many heads
        return 1.0
    mesh = make_mesh(context=count, devices=jax.devices()[:count])

    def part(x_BTNH: jax.Array) -> jax.Array:
        options = (causal(), None, None, None, None, None, 0, 0.0, None, None)
        call = checked(x_BTNH, x_BTNH, x_BTNH, *options)
        T = x_BTNH.shape[1]
        place = ring.part_of(ring.Ring("context", count), way == "zigzag", T, T, (0, 0))
        return jnp.sum(blockwise.prepare(call, place)[1].by_query.some)[None]

    run = jax.shard_map(part, mesh=mesh, in_specs=SPLIT, out_specs=PartitionSpec("context"))
    block = max(1, cfg.T // (8 * cfg.P))
    with blockwise.block_limits((block, block)):
        visits = np.asarray(jax.jit(run)(jnp.zeros((1, cfg.T, 1, 1))))
    return float(visits.max() / visits.mean())


def of_depths(cfg: Config, progress: Any) -> list[dict[str, Any]]:
    """Compile a training step of models that differ in depth alone, on a mesh of two axes."""
    half = max(1, cfg.P // 2)
    mesh = make_mesh(context=half, model=cfg.P // half, devices=jax.devices()[: cfg.P])
    attend = partial(attention, mask=causal(), rope=rope.plain(8), context="ring")
    tx = optax.adamw(1e-3)

    def loss_fn(params, batch, key):
        logits_BTV, _ = language_model(params, batch["tokens_BT"], attend=attend)
        return train.next_token_loss(logits_BTV, batch["tokens_BT"]), {}

    def state_of(L: int) -> Any:
        layer = partial(
            init_block,
            D=64,
            attention=partial(init_attention, D=64, N=8),
            mlp=partial(init_mlp, D=64, F=256),
        )
        key = jax.random.key(0)
        return train.init_state(init_language_model(key, V=256, D=64, L=L, layer=layer), tx)

    step_fn = shard_step(train.make_train_step(loss_fn, tx), mesh)
    batch = {"tokens_BT": jax.ShapeDtypeStruct((2, 64 * cfg.P), "int32")}
    rows = []
    task = progress.add_task("depth", total=len(DEPTHS), status="")
    for L in DEPTHS:
        state = jax.eval_shape(partial(state_of, L))
        began = time.perf_counter()
        program = step_fn.lower(state, batch, jax.random.key(0)).compile()
        compile_s = round(time.perf_counter() - began, 2)
        lines = len((program.as_text() or "").splitlines())
        rows.append({"L": L, "compile_s": compile_s, "hlo_lines": lines})
        progress.update(task, advance=1)
    return rows


def show(console: rich.console.Console, cfg: Config, rows: list[Any], depths: list[Any]) -> None:
    """Print both tables: temporaries, also as a share of one device's, and the busiest's work."""
    table = rich.table.Table(
        title=f"causal attention, forward + backward, T = {cfg.T:,}, {cfg.N} x {cfg.H}",
        box=rich.box.SIMPLE_HEAD,
    )
    columns = ("way", "devices", "MB", "of one", "busiest", "seconds", "compile s")
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right")
    alone = {row["way"]: row for row in rows if row["devices"] == 1}
    for row in rows:
        size, whole = row["temporary_bytes"], alone[row["way"]]["temporary_bytes"]
        shown = ("-", "-") if size is None else (f"{size / 1e6:.1f}", f"{size / whole:.3f}")
        table.add_row(
            row["way"],
            str(row["devices"]),
            *shown,
            f"{row['busiest']:.2f}",
            f"{row['ms'] / 1e3:.2f} ({row['q1_ms'] / 1e3:.2f}-{row['q3_ms'] / 1e3:.2f})",
            f"{row['compile_s']:.1f}",
            end_section=row["devices"] == cfg.P,
        )
    console.print(table)
    table = rich.table.Table(title="a model's training step", box=rich.box.SIMPLE_HEAD)
    for column in ("layers", "compile s", "lines of HLO"):
        table.add_column(column, justify="right")
    for row in depths:
        table.add_row(str(row["L"]), f"{row['compile_s']:.1f}", f"{row['hlo_lines']:,}")
    console.print(table)


def figure(cfg: Config, rows: list[Any], counts: list[int]) -> matplotlib.figure.Figure:
    """Draw memory, the busiest device's work and time against the number of devices."""
    made = matplotlib.figure.Figure(figsize=(6.75, 2.5), layout="constrained")
    memory, work, wall = made.subplots(1, 3)
    styles = {"ring": ("#D55E00", "o"), "zigzag": ("#0072B2", "s"), "all_to_all": ("#009E73", "^")}
    for way, (color, marker) in styles.items():
        mine = [row for row in rows if row["way"] == way]
        style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}
        # Ring and zigzag need the same memory: the larger marker stays in sight.
        if way == "ring":
            style |= {"markersize": 7, "markerfacecolor": "none"}
        if all(row["temporary_bytes"] for row in mine):
            memory.plot(counts, [row["temporary_bytes"] / 1e6 for row in mine], **style)
        work.plot(counts, [row["busiest"] for row in mine], label=way, **style)
        ms, low, high = (np.array([row[k] for row in mine]) for k in ("ms", "q1_ms", "q3_ms"))
        wall.errorbar(counts, ms / 1e3, [(ms - low) / 1e3, (high - ms) / 1e3], **style)
    first = next((row["temporary_bytes"] for row in rows if row["devices"] == 1), None)
    if first:
        ideal = first / 1e6 / np.array(counts)
        memory.plot(counts, ideal, color="#57606a", linewidth=0.8, linestyle=(0, (4, 3)))
        memory.annotate("1 / P", (counts[-1], ideal[-1]), fontsize=7, va="top", ha="right")
        memory.set_yscale("log", base=2)
    memory.set_title("temporaries of a device, MB", fontsize=8)
    work.set_title("busiest device / mean work", fontsize=8)
    kind = "sharing this CPU" if jax.default_backend() == "cpu" else "of this machine"
    wall.set_title(f"seconds, devices {kind}", fontsize=8)
    work.set_ylim(0, 2.1)
    wall.set_ylim(bottom=0)
    for ax in (memory, work, wall):
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("devices", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.grid(color="#d9dee3", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    work.legend(fontsize=7, frameon=False, loc="lower left")
    made.suptitle(f"causal attention, forward + backward, T = {cfg.T:,}", fontsize=9)
    return made


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
