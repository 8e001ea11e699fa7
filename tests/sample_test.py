"""Sampling: the limits that are the argmax, and frequencies against probabilities."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn import sample

V, DRAWS = 7, 40_009
KEY = jax.random.key(0)
LOGITS_V = np.array([0.3, -1.0, 2.0, 1.1, 1.2, -3.0, 0.0], np.float32)
RISING = np.argsort(LOGITS_V)


@given(seed=st.integers(0, 2**31))
def test_limits_are_the_argmax(seed) -> None:
    rng = np.random.default_rng(seed)
    logits_BV = jnp.asarray(rng.standard_normal((5, V)), jnp.float32)
    best_B = np.argmax(logits_BV, axis=-1)
    key = jax.random.key(seed)
    for made in (
        sample(None, logits_BV, temperature=0.0),
        sample(key, logits_BV, temperature=0.0, top_k=3, top_p=0.5),
        sample(key, logits_BV, top_k=1),
        sample(key, logits_BV, top_p=1e-6),
        sample(key, logits_BV, temperature=1e-6),
        sample(key, logits_BV, temperature=100.0, top_k=1, top_p=0.9),
    ):
        assert made.dtype == jnp.int32
        np.testing.assert_array_equal(made, best_B)


def probabilities(temperature=1.0, top_k=None, top_p=None):
    """The formula in float64: sort, cut, divide."""
    p = np.exp(LOGITS_V.astype(np.float64) / temperature)
    p /= p.sum()
    falling = np.argsort(-p)
    keep = falling[:top_k]
    if top_p is not None:
        mass = np.cumsum(p[keep] / p[keep].sum())
        keep = keep[: int(np.searchsorted(mass, top_p)) + 1]
    p = np.where(np.isin(np.arange(V), keep), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_k": V},
        {"top_p": 0.5},
        {"top_p": 0.85},
        {"top_p": 1.0},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.7},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options) -> None:
    # A count is binomial: five standard deviations, and what is cut off never appears.
    logits_BV = jnp.broadcast_to(LOGITS_V, (DRAWS, V))
    made = np.asarray(jax.jit(partial(sample, **options))(KEY, logits_BV))
    count = np.bincount(made, minlength=V)
    assert count.size == V
    p = probabilities(**options)
    assert (np.abs(count - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p))).all()
    assert ((count > 0) == (p > 0)).all()


def test_nucleus_is_the_smallest_set_that_reaches_the_mass() -> None:
    logits_BV = jnp.broadcast_to(jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125])), (DRAWS, 4))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.74, {1, 2}), (0.76, {0, 1, 2, 3})):
        assert set(np.unique(sample(KEY, logits_BV, top_p=top_p))) == kept, top_p


def test_ties_at_a_border_stay_in() -> None:
    logits_BV = jnp.broadcast_to(jnp.array([1.0, 3.0, 1.0, 3.0, 0.0]), (DRAWS, 5))
    assert set(np.unique(sample(KEY, logits_BV, top_k=1))) == {1, 3}
    assert set(np.unique(sample(KEY, logits_BV, top_k=3))) == {0, 1, 2, 3}
    assert set(np.unique(sample(KEY, logits_BV, top_p=0.01))) == {1, 3}
    assert (sample(None, logits_BV, temperature=0.0) == 1).all()


def test_a_mass_of_one_cuts_nothing_off() -> None:
    # Rounding the sum of so many equal terms must not lose the last of them.
    n = 10_007
    logits_BV = jnp.zeros((101, n))
    options: dict[str, Any]
    for options in ({}, {"top_p": 1.0}):
        made = sample(KEY, logits_BV.at[:, 0].set(1e-3), **options)
        np.testing.assert_array_equal(made, sample(KEY, logits_BV.at[:, 0].set(1e-3)))


def test_a_forbidden_token_is_never_drawn() -> None:
    logits_BV = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.5]), (DRAWS, 4))
    options: dict[str, Any]
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"temperature": 50.0}):
        assert set(np.unique(sample(KEY, logits_BV, **options))) == {1, 3}


def test_an_unknown_logit_gives_no_token() -> None:
    logits_BV = jnp.asarray(np.stack([LOGITS_V, LOGITS_V])).at[1, 4].set(jnp.nan)
    options: dict[str, Any]
    for options in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}):
        made = sample(KEY, logits_BV, **options)
        assert int(made[0]) in range(V)
        assert int(made[1]) == -1


def test_the_draw_is_a_function_of_the_key() -> None:
    logits_BV = jnp.broadcast_to(LOGITS_V, (101, V))
    np.testing.assert_array_equal(sample(KEY, logits_BV), sample(KEY, logits_BV))
    assert (sample(KEY, logits_BV) != sample(jax.random.key(1), logits_BV)).any()
    # Row by row: more sequences leave the first ones as they were.
    np.testing.assert_array_equal(sample(KEY, logits_BV[:7]), sample(KEY, logits_BV)[:7])
    half = sample(KEY, logits_BV.astype(jnp.bfloat16))
    assert half.dtype == jnp.int32
