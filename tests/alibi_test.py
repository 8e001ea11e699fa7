"""Tests of jax_attn.alibi against the paper's formula, written as loops in float64."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn.alibi import alibi, alibi_slopes
from jax_attn.dot_product import dense_weights
from jax_attn.masks import causal

B, N, T, S, H = 2, 3, 5, 7, 11
SLOPES_N = np.array([0.25, 0.0625, 1.5], np.float32)
EPS = float(np.finfo(np.float32).eps)
FLOAT: Any = 4.0


def normal(*sizes: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.float32)


def authors_slopes(N: int) -> list[float]:
    """A geometric series for a power of two, else that of the power below and every other one."""
    power = 1
    while power * 2 <= N:
        power *= 2
    start = 2 ** (-8 / power)
    series = [start * start**i for i in range(power)]
    return series if power == N else series + authors_slopes(2 * power)[0::2][: N - power]


@pytest.mark.parametrize("N", [1, 2, 3, 5, 8, 11, 12, 16, 31, 64])
def test_slopes_are_the_authors(N: int) -> None:
    slopes_N = alibi_slopes(N)
    assert slopes_N.dtype == jnp.float32
    assert slopes_N.shape == (N,)
    np.testing.assert_allclose(slopes_N, authors_slopes(N), rtol=N * 2.0**-50 + EPS / 2)


def test_slopes_of_eight_heads_are_those_in_the_paper() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def distances(q_offset: int) -> np.ndarray:
    return np.array([[abs(q_offset + t - s) for s in range(S)] for t in range(T)])


@pytest.mark.parametrize("q_offset", [0, 3])
def test_weights_are_the_formula(q_offset: int) -> None:
    q_BTNH, k_BSKH = normal(B, T, N, H), normal(B, S, N, H, seed=1)
    weights = dense_weights(
        q_BTNH, k_BSKH, score=alibi(jnp.asarray(SLOPES_N)), mask=causal(), q_offset=q_offset
    )
    for b, n, t in np.ndindex(B, N, T):
        q, k = np.asarray(q_BTNH[b, t, n], np.float64), np.asarray(k_BSKH[b, :, n], np.float64)
        logits = k @ q / np.sqrt(H) - SLOPES_N[n] * distances(q_offset)[t]
        e = np.where(np.arange(S) <= q_offset + t, np.exp(logits), 0.0)
        # Each of H products and sums, and each of S keys, rounds once, on numbers up to |q·k|.
        size = 1 + abs(k * q).sum(-1).max() / np.sqrt(H) + abs(logits).max()
        error = abs(np.asarray(weights[b, n, t], np.float64) - e / e.sum())
        assert (error <= (2 * H + S + 8) * EPS * size).all()


def test_gradient_reaches_the_slopes() -> None:
    logits, c = normal(B, N, T, S), normal(B, N, T, S, seed=2)
    index = [jnp.asarray(i) for i in np.ogrid[:B, :N, :T, :S]]
    _, pull = jax.vjp(lambda m: alibi(m)(logits, *index), jnp.asarray(SLOPES_N))
    terms = np.asarray(c, np.float64) * distances(0)
    tolerance = terms[0, 0].size * B * EPS * abs(terms).sum((0, 2, 3))
    assert (abs(np.asarray(pull(c)[0]) + terms.sum((0, 2, 3))) <= tolerance).all()


def test_a_block_of_pairs_gets_what_the_whole_gets() -> None:
    logits = normal(B, N, T, S)
    b, n, t, s = (jnp.asarray(i) for i in np.ogrid[:B, :N, :T, :S])
    score = alibi(jnp.asarray(SLOPES_N))
    whole = score(logits, b, n, t, s)
    block = score(logits[:, :, 2:, 3:], b, n, t[:, :, 2:], s[..., 3:])
    np.testing.assert_array_equal(block, whole[:, :, 2:, 3:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alibi_slopes(0), "alibi_slopes: N must be an int >= 1, got 0"),
        (lambda: alibi_slopes(FLOAT), "alibi_slopes: N must be an int >= 1, got 4.0"),
        (lambda: alibi(jnp.ones((1, 3))), "slopes_N needs rank 1"),
        (lambda: alibi(jnp.arange(3)), "slopes_N must be floating point, got int32"),
        (
            lambda: dense_weights(normal(B, T, N, H), normal(B, S, N, H), score=alibi(jnp.ones(5))),
            "slopes_N has N=5 but q_BTNH has N=3",
        ),
    ],
)
def test_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
