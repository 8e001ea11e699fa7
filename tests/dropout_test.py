"""Tests of jax_attn.dropout: a pair's fate is a function of (key, b, n, t, s), and looks random."""

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn.dropout import check, keep

B, N, T, S = 2, 3, 131, 127
SIGMAS = 5.0
KEY = jax.random.key(7)


def indices(*sizes: int) -> list[np.ndarray]:
    return list(np.ogrid[tuple(slice(size) for size in sizes)])


def kept(rate: float, key: Any = KEY) -> np.ndarray:
    return np.asarray(keep(key, rate, *indices(B, N, T, S)))


def finalise(h: int) -> int:
    """MurmurHash3's 32-bit finaliser, in plain ints."""
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def plain_hash(words: list[int], index: tuple[int, ...]) -> int:
    state = 0x9E3779B9
    for word in words:
        state = finalise(state ^ word)
    for i in index:
        state = finalise(state ^ (i * 0x85EBCA77 + 1) % 2**32)
    return state


# A pure function of the indices.


@given(
    st.integers(0, 2**31 - 1),
    st.tuples(*[st.integers(0, 2**31 - 1)] * 4),
    st.floats(0, 1, exclude_max=True),
)
def test_fate_is_the_documented_hash(seed: int, index: tuple[int, ...], rate: float) -> None:
    key = jax.random.key(seed)
    words = [int(word) for word in jax.random.key_data(key)]
    expected = plain_hash(words, index) >= int(rate * 2**32)
    assert bool(keep(key, rate, *(jnp.int32(i) for i in index))) == expected


@pytest.mark.parametrize(("rows", "keys"), [(64, 43), (T, 61), (29, S)])
def test_any_blocking_gives_the_same_pairs(rows: int, keys: int) -> None:
    whole = kept(0.3)
    b, n, t, s = indices(B, N, T, S)
    for t0, s0 in itertools.product(range(0, T, rows), range(0, S, keys)):
        block = keep(KEY, 0.3, b, n, t[:, :, t0 : t0 + rows], s[..., s0 : s0 + keys])
        np.testing.assert_array_equal(
            block, whole[:, :, t0 : t0 + rows, s0 : s0 + keys], strict=True
        )


def test_pairs_can_be_asked_one_by_one_or_in_any_order() -> None:
    whole = kept(0.3)
    random = np.random.default_rng(0)
    b, n, t, s = (random.integers(0, size, 101) for size in (B, N, T, S))
    np.testing.assert_array_equal(keep(KEY, 0.3, b, n, t, s), whole[b, n, t, s])
    for i in range(5):
        one = keep(KEY, 0.3, int(b[i]), int(n[i]), int(t[i]), int(s[i]))
        assert one.shape == ()
        assert bool(one) == whole[b[i], n[i], t[i], s[i]]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.int64])
def test_the_index_dtype_does_not_matter(dtype: Any) -> None:
    as_dtype = [i.astype(dtype) for i in indices(2, 3, 5, 7)]
    expected = keep(KEY, 0.5, *indices(2, 3, 5, 7))
    np.testing.assert_array_equal(keep(KEY, 0.5, *as_dtype), expected)


def test_jit_and_vmap_over_keys_agree() -> None:
    keys = jax.random.split(KEY, 3)
    index = indices(2, 3, 5, 7)
    mapped = jax.jit(jax.vmap(lambda key: keep(key, 0.5, *index)))(keys)
    for key, one in zip(keys, mapped, strict=True):
        np.testing.assert_array_equal(one, keep(key, 0.5, *index))
    assert len({one.tobytes() for one in np.asarray(mapped)}) == 3


# Rates.


def test_rate_zero_keeps_every_pair() -> None:
    assert kept(0.0).all()


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.25, 0.5, 0.9, 1 - 2.0**-10])
def test_rate_of_dropped_pairs_is_binomial(rate: float) -> None:
    dropped = ~kept(rate)
    n = dropped.size
    assert abs(dropped.sum() - rate * n) < SIGMAS * math.sqrt(n * rate * (1 - rate))
    # In each row too; the largest of B·N·T deviations has a wider bound.
    if 0.1 <= rate <= 0.9:
        rows = (dropped.sum(axis=-1) - rate * S) / math.sqrt(S * rate * (1 - rate))
        assert abs(rows).max() < SIGMAS + 1
        assert abs((rows**2).mean() - 1) < SIGMAS * math.sqrt(2 / rows.size)


@pytest.mark.parametrize("rate", [1 - 2.0**-32, float(np.nextafter(1, 0))])
def test_rate_just_below_one_drops_every_pair(rate: float) -> None:
    assert not kept(rate).any()


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_higher_rate_drops_a_superset(one: float, other: float) -> None:
    index = indices(2, 3, 5, 7)
    low, high = keep(KEY, min(one, other), *index), keep(KEY, max(one, other), *index)
    assert bool((low | ~high).all())


@pytest.mark.parametrize(
    ("rate", "key"),
    [(0.0, None), (0, None), (0.5, KEY), (float(np.nextafter(1, 0)), jax.random.PRNGKey(0))],
)
def test_good_rates_and_keys_pass(rate: float, key: Any) -> None:
    check(rate, key)


@pytest.mark.parametrize(
    ("rate", "key", "message"),
    [
        (1.0, KEY, "dropout_rate must be a number in [0, 1), got 1.0"),
        (-0.1, KEY, "dropout_rate must be a number in [0, 1), got -0.1"),
        (math.nan, KEY, "dropout_rate must be a number in [0, 1), got nan"),
        ("0.1", KEY, "dropout_rate must be a number in [0, 1), got '0.1'"),
        (0.1, None, "dropout_rate=0.1 needs a dropout_key"),
        (0.1, 7, "dropout_key must be one jax.random key, got 7"),
        (0.1, jnp.ones(2), "dropout_key must be one jax.random key, got Array"),
        (0.1, jax.random.split(KEY, 3), "dropout_key must be one jax.random key, got shape (3,)"),
    ],
)
def test_check_names_rate_and_key(rate: Any, key: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(rate, key)


# Independence.


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """In standard deviations of what independent fair bits would give."""
    signs = np.where(x, 1.0, -1.0) * np.where(y, 1.0, -1.0)
    return float(signs.sum() / math.sqrt(signs.size))


def test_neighbours_are_uncorrelated() -> None:
    bits = kept(0.5)
    for axis, lags in ((0, (1,)), (1, (1, 2)), (2, (1, 2, 8, 64)), (3, (1, 2, 8, 64))):
        for lag in lags:
            size = bits.shape[axis] - lag
            near, far = (np.take(bits, np.arange(size) + i, axis=axis) for i in (0, lag))
            assert abs(correlation(near, far)) < SIGMAS, (axis, lag)
    assert abs(correlation(bits[:, :, 1:, 1:], bits[:, :, :-1, :-1])) < SIGMAS
    assert abs(correlation(bits[:, :, 1:, :-1], bits[:, :, :-1, 1:])) < SIGMAS


def test_transposed_indices_are_uncorrelated() -> None:
    upper = np.triu_indices(S, 1)
    bits = kept(0.5)[:, :, :S]
    assert abs(correlation(bits[..., *upper], bits.swapaxes(2, 3)[..., *upper])) < SIGMAS
    assert abs(correlation(bits[0, 1], bits[1, 0])) < SIGMAS


def test_products_of_four_corners_are_uncorrelated() -> None:
    """A hash that adds or xors its rows and columns is pairwise fine and fails this."""
    signs = np.where(kept(0.5), 1.0, -1.0)
    for lag in (1, 2, 16):
        low, high = signs[:, :, :-lag], signs[:, :, lag:]
        product = low[..., :-lag] * low[..., lag:] * high[..., :-lag] * high[..., lag:]
        assert abs(product.sum()) < SIGMAS * math.sqrt(product.size), lag


@pytest.mark.parametrize("seed", [0, 1, 6, 8])
def test_other_keys_are_uncorrelated(seed: int) -> None:
    assert abs(correlation(kept(0.5), kept(0.5, jax.random.key(seed)))) < SIGMAS
    assert abs(correlation(kept(0.5), kept(0.5, jax.random.fold_in(KEY, seed)))) < SIGMAS
