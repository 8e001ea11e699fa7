"""A small training job for tests to break: python -m tests.fault_job OUT --name=value ...

It prints the SHA-256 of its last state. Rank, count and port make it one of several processes.
"""

import dataclasses
import os
import pathlib
import resource
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_attn import bootstrap, global_batch, make_mesh, shard_init, shard_step, train
from jax_attn.command_line import parse

B, D, F = 12, 5, 7


@dataclasses.dataclass(frozen=True)
class Config:
    """What the job does and what befalls it; steps of -1 never come."""

    out: str = ""
    steps: int = 60
    save_every: int = 7
    eval_every: int = 0
    sleep_s: float = 0.0
    width: int = D
    nan_from: int = -1
    nan_to: int = -1
    nan_batch: int = -1
    full_from: int = -1
    full_to: int = -1
    gone_from: int = -1
    gone_to: int = -1
    eval_s: float = 0.0
    compile_s: float = 0.0
    stuck_at: int = -1
    stuck_rank: int = 0
    stall_s: float = 1800.0
    rate: float = 0.02
    allow_config_change: bool = False
    rank: int = 0
    count: int = 1
    port: int = 0


def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
    noisy_BD = batch["x_BD"] * jax.random.bernoulli(key, 0.9, batch["x_BD"].shape)
    out_BD = jnp.tanh(noisy_BD @ params["w_DF"]) @ params["v_FD"]
    return jnp.mean(jnp.square(out_BD - jnp.sin(3 * batch["x_BD"]))), {}


def befall(cfg: Config, step: int) -> None:
    """Let happen what is to happen before this step."""
    time.sleep(cfg.sleep_s)
    folder = pathlib.Path(cfg.out) / "checkpoints"
    if step == cfg.stuck_at and cfg.rank == cfg.stuck_rank:
        time.sleep(600)
    if step == cfg.full_from:  # a file larger than this cannot be written: a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    if step == cfg.full_to:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if cfg.rank:  # the disk is shared: one process breaks it
        return
    if step == cfg.gone_from:  # a disk that is gone, or read-only: nothing can be made in it
        folder.rename(folder.parent / "away")
        folder.write_text("not a folder")
    if step == cfg.gone_to:
        folder.unlink()
        (folder.parent / "away").rename(folder)


def main() -> None:
    # What is started in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cfg = parse(Config, {"default": {}}, __doc__ or "")
    if cfg.count > 1:
        bootstrap(f"127.0.0.1:{cfg.port}", cfg.count, cfg.rank, timeout_s=60)
    mesh = make_mesh(data=jax.device_count())
    tx = optax.adamw(cfg.rate)

    def start(key: jax.Array) -> train.TrainState:
        keys = jax.random.split(key, 2)
        params = {
            "w_DF": jax.random.normal(keys[0], (cfg.width, F)),
            "v_FD": jax.random.normal(keys[1], (F, cfg.width)),
        }
        return train.init_state(params, tx)

    def batch_fn(step: int) -> Any:
        befall(cfg, step)

        def rows_of(rows: range) -> dict[str, np.ndarray]:
            x_BD = np.random.default_rng([7, step]).standard_normal((B, cfg.width), np.float32)
            bad = cfg.nan_from <= step < cfg.nan_to or step == cfg.nan_batch
            return {"x_BD": (x_BD * np.nan if bad else x_BD)[rows.start : rows.stop]}

        return global_batch(rows_of, mesh, B=B)

    step_fn = shard_step(train.make_train_step(loss_fn, tx), mesh)
    slow = [cfg.compile_s]

    def slow_first(state: Any, batch: Any, key: Any) -> Any:
        if slow:
            print("compiling", flush=True)
            time.sleep(slow.pop())
        return step_fn(state, batch, key)

    def evaluate(params: Any) -> dict[str, Any]:
        print("evaluating", flush=True)
        time.sleep(cfg.eval_s)
        return {"norm": optax.tree.norm(params)}

    print("ready", flush=True)
    state, _ = train.fit(
        slow_first if cfg.compile_s else step_fn,
        shard_init(start, jax.random.key(1), mesh),
        batch_fn,
        steps=cfg.steps,
        key=jax.random.key(2),
        evaluate=evaluate if cfg.eval_every else None,
        eval_every=cfg.eval_every,
        run=train.Run(
            cfg.out,
            save_every=cfg.save_every,
            config={"width": cfg.width, "rate": cfg.rate},
            allow_config_change=cfg.allow_config_change,
        ),
        stall_s=cfg.stall_s,
    )
    shown = train.digest(state)
    if cfg.rank == 0:
        print(f"digest {shown}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
