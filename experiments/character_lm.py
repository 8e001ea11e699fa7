"""Train a character-level language model that can be stopped, killed and started again.

A small causal model (RoPE, GELU, tied embedding) on the bytes of Python's standard library or of
--data. It is the shortest script here that uses the whole training loop: started again with the
same --out it goes on where it had saved, to the bit; SIGTERM and Ctrl-C save and exit with 75.

Command: python -m experiments.character_lm --out=runs/character_lm
Minutes: 3 on 2 CPU cores; --preset=wide more than 12; --preset=tpu has not been run yet
Expected: held-out loss about 1.41 nats a byte after 2,000 steps
Writes: OUT/metrics.jsonl, run.json, checkpoints/; curves: python -m jax_attn.train.report OUT
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_attn import (
    ACTIVATIONS,
    attention,
    bootstrap,
    causal,
    count,
    data,
    global_batch,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    read_mesh,
    rope,
    shard_init,
    shard_step,
    specs,
    train,
)
from jax_attn.command_line import check_positive, parse_both


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes by their letters, the optimizer, and what of the text is evaluated."""

    D: int = 128
    N: int = 4
    L: int = 4
    T: int = 64
    B: int = 12
    steps: int = 2000
    seed: int = 0
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    average: float = 0.0
    accumulate: int = 1
    skip_spikes: float = 0.0
    dtype: str = "float32"
    remat: str = ""
    eval_every: int = 250
    eval_windows: int = 256
    data: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """What may differ when a run goes on: where it lies, what it lies on, what it tells."""

    out: str = "runs/character_lm"
    mesh: str = ""
    save_every: int = 500
    save_minutes: float = 10.0
    keep_last: int = 3
    log_every: int = 10
    allow_config_change: bool = False
    strict: bool = False
    profile: str = ""
    tensorboard: bool = False
    peak_tflops: float = 0.0
    stall_s: float = 1800.0


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"D": 32, "L": 2, "T": 32, "steps": 60, "warmup": 10, "eval_every": 20},
    "wide": {"D": 384, "N": 6, "L": 6, "T": 256, "steps": 300, "eval_every": 100},
    "tpu": {
        **{"D": 2048, "N": 16, "L": 24, "T": 2048, "B": 64, "steps": 20_000, "warmup": 1000},
        **{"learning_rate": 3e-4, "dtype": "bfloat16", "remat": "full", "eval_every": 1000},
    },
}


def check(cfg: Config, options: Options) -> None:
    """Refuse what means nothing, before anything is compiled."""
    for name, value in (("learning_rate", cfg.learning_rate), ("clip", cfg.clip)):
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite, got {value}")
    may_be_0 = {"seed": cfg.seed, "warmup": cfg.warmup, "eval_every": cfg.eval_every}
    check_positive(dataclasses.replace(cfg, **dict.fromkeys(may_be_0, 1)))
    for name, value in may_be_0.items():
        if value < 0:
            raise ValueError(f"--{name} must be at least 0, got {value}")
    if cfg.D % cfg.N or (cfg.D // cfg.N) % 2:
        raise ValueError(f"--N={cfg.N} heads must divide --D={cfg.D} into even widths, for RoPE")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {cfg.dtype!r}")
    if not 0 <= cfg.average < 1:
        raise ValueError(f"--average must be from 0 to below 1, got {cfg.average}")
    if not options.out:
        raise ValueError("--out must name a folder")


def init(cfg: Config, key: jax.Array) -> Any:
    """Draw the parameters."""
    layer = partial(
        init_block,
        D=cfg.D,
        attention=partial(init_attention, D=cfg.D, N=cfg.N),
        mlp=partial(init_mlp, D=cfg.D, F=4 * cfg.D),
    )
    return init_language_model(key, V=data.VOCABULARY, D=cfg.D, L=cfg.L, layer=layer)


def schedule(cfg: Config) -> optax.Schedule:
    """Warm up in a line, then fall along a cosine to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup, max(cfg.steps, cfg.warmup + 1), cfg.learning_rate / 10
    )


def optimizer(cfg: Config) -> optax.GradientTransformation:
    """AdamW, clipped; with --average, a running mean of the parameters beside it."""
    chain = [
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule(cfg), b2=0.99, weight_decay=cfg.weight_decay),
    ]
    return optax.chain(*chain, *([train.average_params(cfg.average)] if cfg.average else []))


def loss(cfg: Config, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Measure the mean cross entropy of the next byte."""
    logits_BTV, _ = language_model(
        params,
        batch["tokens_BT"],
        attend=partial(attention, mask=causal(), rope=rope.plain(cfg.D // cfg.N)),
        remat=cfg.remat or None,
    )
    return train.next_token_loss(logits_BTV, batch["targets_BT"]), {}


def start(cfg: Config, key: jax.Array) -> train.TrainState:
    """Draw a model and start its optimizer."""
    return train.init_state(init(cfg, key), optimizer(cfg))


def make_step(cfg: Config) -> train.StepFn:
    """Build the step of one device."""
    narrow = partial(train.compute_in, dtype=jnp.bfloat16) if cfg.dtype == "bfloat16" else None
    loss_fn: train.LossFn = partial(loss, cfg)
    return train.make_train_step(
        narrow(loss_fn) if narrow else loss_fn,
        optimizer(cfg),
        accumulate=cfg.accumulate,
        skip_spikes=cfg.skip_spikes or None,
        schedule=schedule(cfg),
    )


def plan_step(
    mesh: jax.sharding.Mesh, preset: str = "tpu", batch: int = 0, remat: str | None = None
) -> tuple[Any, tuple[Any, Any, Any], int]:
    """Build the step and its abstract arguments for a mesh that need not be here: for tpu.plan.

    Returns: the step, (state, batch, key) as shapes with their places, tokens a step.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    cfg = Config(**PRESETS[preset])
    cfg = dataclasses.replace(cfg, B=batch or cfg.B, remat=cfg.remat if remat is None else remat)
    check(cfg, Options())

    def placed(tree: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
        )

    state = jax.eval_shape(partial(start, cfg), jax.random.key(0))
    state = placed(state, specs(state, mesh))
    tokens = jax.ShapeDtypeStruct((cfg.B, cfg.T), "int32")
    rows = {"tokens_BT": tokens, "targets_BT": tokens}
    rows = placed(rows, specs(rows, mesh, ACTIVATIONS))
    key = jax.eval_shape(jax.random.key, 0)
    key = placed(key, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return shard_step(make_step(cfg), mesh), (state, rows, key), cfg.B * cfg.T


def cut(windows_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Split windows into inputs and targets."""
    return {"tokens_BT": windows_BT[:, :-1], "targets_BT": windows_BT[:, 1:]}


def held_out(cfg: Config, text: data.Text, mesh: Any) -> Callable[[Any], dict[str, Any]]:
    """Build the held-out loss: of the running mean of the parameters too if there is one."""
    batches = max(cfg.eval_windows // cfg.B, 1)
    windows = data.windows(text.heldout, B=cfg.B, T=cfg.T, count=batches)
    placed = [global_batch(lambda rows, w=w: cut(w[list(rows)]), mesh, B=cfg.B) for w in windows]
    one = jax.jit(lambda params, batch: loss(cfg, params, batch, jax.random.key(0))[0])

    def evaluate(params: Any) -> dict[str, Any]:
        with jax.set_mesh(mesh):
            value = float(np.mean([jax.device_get(one(params, batch)) for batch in placed]))
        return {"loss": value, "bits_per_byte": value / math.log(2)}

    return evaluate


def flops(cfg: Config, parameters: int) -> float:
    """Count the operations of a step: 6 a weight, 6 T D a layer for causal attention."""
    return cfg.B * cfg.T * (6 * parameters + 6 * cfg.L * cfg.T * cfg.D)


def read_profile(text: str) -> tuple[int, int] | None:
    """Read "START:STOP", the first and the last step to trace."""
    first, colon, last = text.partition(":")
    if text and not (colon and first.isdigit() and last.isdigit()):
        raise ValueError(f"--profile looks like START:STOP, got {text!r}")
    return (int(first), int(last)) if text else None


def learn(
    cfg: Config, options: Options, profile: tuple[int, int] | None
) -> tuple[train.TrainState, train.History]:
    """Train, from the start or from where the run had saved."""
    mesh = read_mesh(options.mesh)
    text = data.load_text(cfg.data or None, T=cfg.T)
    key = jax.random.key(cfg.seed)
    state = shard_init(partial(start, cfg), key, mesh)
    run = train.Run(
        options.out,
        save_every=options.save_every,
        save_minutes=options.save_minutes,
        keep_last=options.keep_last,
        best="eval/loss",
        config={**dataclasses.asdict(cfg), "text": text.sha256},
        allow_config_change=options.allow_config_change,
    )
    parameters = count(state.params)

    def batch(step: int) -> Any:
        def rows_of(rows: range) -> dict[str, np.ndarray]:
            return cut(data.batch(text.train, cfg.seed, step, B=cfg.B, T=cfg.T, rows=rows))

        return global_batch(rows_of, mesh, B=cfg.B)

    return train.fit(
        shard_step(make_step(cfg), mesh),
        state,
        batch,
        steps=cfg.steps,
        key=jax.random.fold_in(key, 1),
        evaluate=held_out(cfg, text, mesh),
        eval_every=cfg.eval_every,
        log_every=options.log_every,
        run=run,
        sinks=[train.tensorboard(run.folder / "tensorboard")] if options.tensorboard else [],
        title=f"{parameters:,} parameters",
        tokens_per_step=cfg.B * cfg.T,
        flops_per_step=flops(cfg, parameters),
        peak_flops=1e12 * options.peak_tflops,
        strict=options.strict,
        stall_s=options.stall_s,
        profile=profile,
    )


def main(argv: list[str] | None = None) -> int:
    cfg, options = parse_both(Config, Options, PRESETS, __doc__ or "", argv)
    try:
        check(cfg, options)
        profile = read_profile(options.profile)
        bootstrap()
        with train.stop_requests():
            state, history = learn(cfg, options, profile)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        if isinstance(error, FloatingPointError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if jax.process_index() == 0:
        last = (
            f"held-out loss {history.eval[-1]['eval/loss']:.4f} nats a byte" if history.eval else ""
        )
        print(f"{int(state.step)} steps made  {last}  {options.out}")
        spent = sum(history.seconds.values())
        parts = sorted(history.seconds.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {s / spent:.1%}" for name, s in parts if s / spent >= 5e-4)
        print(f"{spent:.1f} s: {shown}" if spent else "nothing was left to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
