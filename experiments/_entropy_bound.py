"""The least entropy that a row of attention can have, by how far its logits are from their mean.

A row of T logits within sigma of their mean, in the Euclidean norm, has at least

    log(1 + (T-1) b) + sigma sqrt(T (T-1)) b / (1 + (T-1) b),    b = exp(-sigma sqrt(T / (T-1)))

nats (arXiv:2303.06296, theorem 3.1, where sigma bounds the row's norm by those of Wq, Wk and the
input). One logit above T - 1 equal ones reaches it: the gap between them is sigma sqrt(T / (T-1)).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn import dot_product_attention

LENGTHS = (2, 3, 8, 64, 512)
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
RANDOM = 512  # rows for each length and sigma


def least_entropy(sigma: Any, T: Any) -> Any:
    """Compute the bound, in nats: no row of T logits within sigma of their mean has less."""
    rest = (T - 1) * np.exp(-sigma * np.sqrt(T / (T - 1)))
    return np.log1p(rest) + sigma * np.sqrt(T / (T - 1)) * rest / (1 + rest)


def extremal_row(sigma: float, T: int) -> np.ndarray:
    """Make the row that reaches it: one logit above T - 1 equal ones, mean 0, norm sigma."""
    row = np.full(T, -1 / math.sqrt(T * (T - 1)))
    row[0] = math.sqrt((T - 1) / T)
    return sigma * row


def random_rows(rng: np.random.Generator, sigma: float, T: int) -> np.ndarray:
    """Draw rows [rows,T] of mean 0 and norm sigma: normal ones, and ones raised at a few places."""
    normal = rng.normal(size=(RANDOM // 2, T))
    raised = np.argsort(rng.random((RANDOM // 2, T))) < rng.integers(1, T, (RANDOM // 2, 1))
    rows = np.concatenate([normal, raised + 0.1 * rng.normal(size=raised.shape)])
    rows -= rows.mean(1, keepdims=True)
    return sigma * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def entropies(rows: np.ndarray) -> np.ndarray:
    """Let attention say the entropy of rows of logits [rows,S], in float64."""
    with jax.enable_x64(True):
        k_BSKH = jnp.asarray(rows)[:, :, None, None]
        q_BTNH = jnp.ones_like(k_BSKH[:, :1])
        _, seen = jax.jit(partial(dot_product_attention, scale=1.0, observe=("entropy",)))(
            q_BTNH, k_BSKH, jnp.zeros_like(k_BSKH)
        )
        return np.asarray(seen["entropy"][:, 0, 0])


def compare_with_bound() -> dict[str, dict[tuple[int, float], np.ndarray]]:
    """Measure how far above the bound entropies are, by length and sigma."""
    made: dict[str, dict[tuple[int, float], np.ndarray]] = {"extremal": {}, "random": {}}
    rng = np.random.default_rng(0)
    for T in LENGTHS:
        drawn = [random_rows(rng, sigma, T) for sigma in SIGMAS]
        rows = np.concatenate([np.stack([extremal_row(s, T) for s in SIGMAS]), *drawn])
        found = entropies(rows)
        for i, sigma in enumerate(SIGMAS):
            low = least_entropy(sigma, T)
            start = len(SIGMAS) + i * RANDOM
            made["extremal"][T, sigma] = found[i : i + 1] - low
            made["random"][T, sigma] = found[start : start + RANDOM] - low
    return made
