"""Where does blockwise attention's time go on a CPU, and why is there a kernel in C++?

Each part of a block's work runs by itself in a loop over as many blocks as causal attention visits:
the two matmuls, the exponential, the maximum and the sum of each row, and a loop that only cuts its
blocks out. Beside them the whole forward pass, and a large matmul as the machine's measure.

Command: python -m experiments.block_costs
Minutes: 0.2 on 2 CPU cores
Expected: the matmuls take half of the forward pass, near the rate of a large one; exponential,
  maximum and sum, each a pass of its own over the block, take a quarter.
"""

import dataclasses
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from experiments._report import environment
from jax_attn import causal, dot_product_attention
from jax_attn.command_line import parse
from jax_attn.kernels import blockwise


@dataclasses.dataclass(frozen=True)
class Config:
    """T = S, N heads of width H; `rounds` are timed, each part once a round."""

    S: int = 4096
    N: int = 12
    H: int = 64
    rounds: int = 7


PRESETS: dict[str, dict[str, Any]] = {"default": {}, "quick": {"S": 1024, "rounds": 3}}


def parts(cfg: Config) -> dict[str, tuple[Any, float]]:
    """Return for each part a compiled function without arguments, and its floating point work."""
    size = min(blockwise.QUERIES, cfg.S)
    across = cfg.S // size
    visits = cfg.N * across * (across + 1) // 2
    q_TH, k_SH = (jax.random.normal(jax.random.key(i), (cfg.S, cfg.H)) for i in range(2))
    s_TS = jax.random.normal(jax.random.key(2), (size, size))

    def cut(x_SH: jax.Array, i: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_SH, i % across * size, size)

    # The carry makes every step need the one before it, and the result need every step.
    def slices(i, o_TH):
        return 0.5 * o_TH + cut(q_TH, i) + cut(k_SH, i)

    def products(i, carry):
        s_TS, o_TH = carry
        s_TS = jnp.einsum("TH,SH->TS", cut(q_TH, i) + o_TH[:1], cut(k_SH, i))
        return s_TS, jnp.einsum("TS,SH->TH", s_TS, cut(k_SH, i))

    def exponential(i, s_TS):
        return jnp.exp(s_TS - 1.0)

    def maximum(i, carry):
        s_TS, m_T = carry
        return s_TS, jnp.maximum(0.5 * m_T, jnp.max(s_TS - m_T[:, None], axis=-1))

    def total(i, carry):
        s_TS, l_T = carry
        return s_TS, 0.5 * l_T + jnp.sum(s_TS - l_T[:, None], axis=-1)

    zeros_T, zeros_TH = jnp.zeros(size), jnp.zeros((size, cfg.H))
    loops = {
        "loop and slices": (slices, zeros_TH, 0.0),
        "two matmuls": (products, (s_TS, zeros_TH), visits * 4.0 * size * size * cfg.H),
        "exponential": (exponential, s_TS, 0.0),
        "maximum of rows": (maximum, (s_TS, zeros_T), 0.0),
        "sum of rows": (total, (s_TS, zeros_T), 0.0),
    }
    made: dict[str, tuple[Any, float]] = {
        name: (partial(jax.jit(partial(jax.lax.fori_loop, 0, visits, step)), init), work)
        for name, (step, init, work) in loops.items()
    }
    q, k, v = (jax.random.normal(jax.random.key(i), (1, cfg.S, cfg.N, cfg.H)) for i in range(3))
    attend = partial(dot_product_attention, mask=causal(), implementation="blockwise")
    made["blockwise, forward"] = partial(jax.jit(attend), q, k, v), 2.0 * cfg.N * cfg.S**2 * cfg.H
    big = jax.random.normal(jax.random.key(3), (2048, 2048))
    made["matmul 2048^3"] = partial(jax.jit(jnp.matmul), big, big), 2.0 * 2048**3
    return made


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__ or "")
    console = rich.console.Console()
    made = parts(cfg)
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(cfg.rounds + 1):
        for name, (run, _) in made.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append((time.perf_counter() - start) * 1e3)
    milliseconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
    whole = milliseconds["blockwise, forward"]
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("part", "ms", "least", "largest", "% of forward", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, (_, work) in made.items():
        ms, times = milliseconds[name], taken[name][1:]
        share = "" if name.startswith("matmul") else f"{100 * ms / whole:.0f}"
        rate = f"{work / ms / 1e6:.0f}" if work else ""
        table.add_row(name, f"{ms:.1f}", f"{min(times):.1f}", f"{max(times):.1f}", share, rate)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))


if __name__ == "__main__":
    main()
