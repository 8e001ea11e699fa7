"""The products of weights of a training step by themselves, in XLA and in PyTorch."""

import time
from typing import Any

import jax
import numpy as np


def shapes(D: int, L: int, V: int, rows: int) -> list[tuple[int, int, int]]:
    """List (m, k, n) of every product of weights in a step, forward and both of backward.

    Attention's own two products are left out: they are a batch of small ones, 2 % of the
    work at T=64.
    """
    layer = [(D, D)] * 4 + [(D, 4 * D), (4 * D, D)]
    each = [(rows, k, n) for k, n in layer * L + [(D, V)]]
    return [size for m, k, n in each for size in ((m, k, n), (m, n, k), (k, m, n))]


def milliseconds(D: int, L: int, V: int, rows: int, rounds: int = 15) -> dict[str, list[float]]:
    """Time all of them in XLA, as one program, and in PyTorch, in turns; float32.

    Returns: milliseconds of every round for "XLA", "PyTorch".
    """
    import torch  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32))
        for m, k, n in shapes(D, L, V, rows)
    ]
    in_jax = jax.device_put(pairs)
    in_torch = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]
    multiply = jax.jit(lambda pairs: [a @ b for a, b in pairs])
    turns: dict[str, Any] = {
        "XLA": lambda: jax.block_until_ready(multiply(in_jax)),
        "PyTorch": lambda: [a @ b for a, b in in_torch],
    }
    took: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name in list(turns)[:: 1 if i % 2 else -1]:
            began = time.perf_counter()
            turns[name]()
            if i:  # the first compiles
                took[name].append(1e3 * (time.perf_counter() - began))
    return took
