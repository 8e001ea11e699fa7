"""Tests of jax_attn.rope: frequencies against the papers' formulas, rotations against float64."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn.rope import Rope, linear, llama3, plain, rotate, yarn

B, T, N, H = 2, 5, 3, 14
EPS = float(np.finfo(np.float32).eps)
FLOAT: Any = 4.0


def normal(*sizes: int, seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), dtype)


def turned(x: Any, frequency: np.ndarray, position: Any, magnitude: float = 1.0) -> np.ndarray:
    """Turn complex numbers x_i + j·x_(i + H/2) in float64, one at a time."""
    x = np.asarray(x, np.float64)
    position = np.broadcast_to(np.asarray(position), x.shape[:2])
    y = np.empty_like(x)
    half = x.shape[-1] // 2
    for b, t, n, i in np.ndindex(*x.shape[:-1], half):
        z = complex(x[b, t, n, i], x[b, t, n, i + half])
        z *= magnitude * np.exp(1j * float(position[b, t]) * float(frequency[i]))
        y[b, t, n, i], y[b, t, n, i + half] = z.real, z.imag
    return y


def assert_turned(y: jax.Array, x: Any, rope: Rope, position: Any) -> None:
    """The angle p·w, up to max|p|, is rounded once; products, sum and magnitude four times."""
    expected = turned(x, rope.frequency_H, position, rope.magnitude)
    size = rope.magnitude * (abs(np.asarray(x, np.float64)).max() * 2)
    tolerance = (abs(np.asarray(position)).max() + 8) * EPS * size
    if y.dtype != jnp.float32:
        tolerance = tolerance + float(jnp.finfo(y.dtype).eps) / 2 * abs(expected)
    assert (abs(np.asarray(y, np.float64) - expected) <= tolerance).all()


# Frequencies.


def base_frequencies(H: int, theta: float) -> list[float]:
    return [1.0 / theta ** (2 * i / H) for i in range(H // 2)]


def llama3_frequencies(
    H: int, factor: float, low: float, high: float, original: int, theta: float
) -> list[float]:
    """The three branches by wavelength of the published reference."""
    new = []
    for w in base_frequencies(H, theta):
        wavelength = 2 * math.pi / w
        if wavelength < original / high:
            new.append(w)
        elif wavelength > original / low:
            new.append(w / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            new.append((1 - smooth) * w / factor + smooth * w)
    return new


def yarn_frequencies(
    H: int, factor: float, original: int, fast: float, slow: float, theta: float
) -> list[float]:
    """The published reference: a correction range over the index, and a linear ramp in it."""

    def correction_dim(rotations: float) -> float:
        return (H * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(fast)), 0)
    high = min(math.ceil(correction_dim(slow)), H - 1)
    end = high + 0.001 if low == high else high
    new = []
    for i, w in enumerate(base_frequencies(H, theta)):
        ramp = min(max((i - low) / (end - low), 0.0), 1.0)
        keep = 1 - ramp
        new.append((w / factor) * (1 - keep) + w * keep)
    return new


def assert_frequencies(rope: Rope, expected: list[float]) -> None:
    assert rope.frequency_H.dtype == np.float32
    half = len(expected)
    np.testing.assert_array_equal(rope.frequency_H[:half], rope.frequency_H[half:])
    np.testing.assert_allclose(rope.frequency_H[:half], expected, rtol=EPS, atol=0)


widths = st.sampled_from([2, 14, 64, 128])
thetas = st.sampled_from([1e4, 5e5, 1e6]) | st.floats(2.0, 1e7)
factors = st.sampled_from([1.0, 4.0, 8.0]) | st.floats(1.0, 64.0)


@given(widths, thetas)
def test_plain_is_the_geometric_series(H: int, theta: float) -> None:
    rope = plain(H, theta=theta)
    assert_frequencies(rope, base_frequencies(H, theta))
    assert rope.magnitude == 1.0


@given(widths, thetas, factors)
def test_linear_divides_every_frequency(H: int, theta: float, factor: float) -> None:
    rope = linear(H, theta=theta, factor=factor)
    assert_frequencies(rope, [w / factor for w in base_frequencies(H, theta)])
    assert rope.magnitude == 1.0


@given(
    widths,
    factors,
    st.floats(0.1, 4.0),
    st.floats(0.1, 8.0),
    st.sampled_from([512, 8192, 32768]),
    thetas,
)
def test_llama3_is_its_three_branches(
    H: int, factor: float, low: float, gap: float, original: int, theta: float
) -> None:
    options = {"factor": factor, "low": low, "high": low + gap, "original": original}
    rope = llama3(H, **options, theta=theta)
    assert_frequencies(rope, llama3_frequencies(H, **options, theta=theta))
    assert rope.magnitude == 1.0


def test_llama3_by_default_is_llama_3_1() -> None:
    expected = llama3_frequencies(128, 8.0, 1.0, 4.0, 8192, 500_000.0)
    assert_frequencies(llama3(128), expected)
    ratios = np.divide(base_frequencies(128, 500_000.0), expected)
    kinds = [np.isclose(ratios, 1).sum(), np.isclose(ratios, 8).sum()]
    assert min(*kinds, 64 - sum(kinds)) > 0  # each of the three branches is taken


@given(
    widths,
    factors,
    st.sampled_from([2048, 4096, 32768]),
    st.floats(0.5, 4.0),
    st.floats(0.1, 60.0),
    st.sampled_from([1e4, 5e5, 1e6]),
)
def test_yarn_is_its_correction_range_and_ramp(
    H: int, factor: float, original: int, slow: float, gap: float, theta: float
) -> None:
    options = {"factor": factor, "original": original, "fast": slow + gap, "slow": slow}
    rope = yarn(H, **options, theta=theta)
    assert_frequencies(rope, yarn_frequencies(H, **options, theta=theta))
    assert rope.magnitude == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-15)


def test_yarn_by_default_keeps_fast_pairs_and_slows_slow_ones() -> None:
    rope = yarn(128, factor=4.0, original=4096)
    assert_frequencies(rope, yarn_frequencies(128, 4.0, 4096, 32.0, 1.0, 1e4))
    ratios = plain(128).frequency_H[:64] / rope.frequency_H[:64]
    turns = 4096 * plain(128).frequency_H[:64] / (2 * math.pi)
    np.testing.assert_allclose(ratios[turns > 40], 1, rtol=2 * EPS)
    np.testing.assert_allclose(ratios[turns < 0.8], 4, rtol=2 * EPS)
    assert (np.diff(ratios) > -4 * EPS).all()
    assert ((ratios > 1.1) & (ratios < 3.9)).any()


@pytest.mark.parametrize("make", [linear, llama3])
def test_factor_one_is_plain(make: Any) -> None:
    np.testing.assert_allclose(
        make(H, factor=1.0, theta=1e4).frequency_H, plain(H).frequency_H, rtol=EPS
    )


# Rotations.

ROPES = [
    plain(H),
    linear(H, factor=3.0),
    llama3(H, original=128),
    yarn(H, factor=4.0, original=512),
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("start", [0, 1000])
def test_rotate_turns_complex_numbers(rope: Rope, start: int) -> None:
    x_BTNH = normal(B, T, N, H)
    position_BT = start + jnp.array([[0, 1, 2, 3, 4], [7, 5, 0, 5, 90]])
    y_BTNH = rotate(x_BTNH, rope, position_BT)
    assert y_BTNH.shape == x_BTNH.shape
    assert_turned(y_BTNH, x_BTNH, rope, position_BT)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept_and_rounded_once(dtype: Any) -> None:
    x_BTNH = normal(B, T, N, H, dtype=dtype)
    position_BT = 100 + jnp.arange(T)[None]
    y_BTNH = rotate(x_BTNH, plain(H), position_BT)
    assert y_BTNH.dtype == dtype
    assert_turned(y_BTNH, x_BTNH, plain(H), position_BT)


def test_positions_of_one_sequence_serve_all() -> None:
    x_BTNH, position_BT = normal(B, T, N, H), jnp.array([[3, 1, 4, 1, 5]])
    np.testing.assert_array_equal(
        rotate(x_BTNH, plain(H), position_BT),
        rotate(x_BTNH, plain(H), jnp.tile(position_BT, (B, 1))),
    )


def test_positions_may_be_fractions() -> None:
    x_BTNH, position_BT = normal(B, T, N, H), jnp.array([[0.0, 0.5, -1.25, 3.75, 7.0]])
    assert_turned(rotate(x_BTNH, plain(H), position_BT), x_BTNH, plain(H), position_BT)


@given(st.sampled_from(ROPES), st.integers(0, 99), st.integers(0, 99), st.integers(-99, 99))
def test_products_depend_on_the_distance_alone(rope: Rope, p: int, s: int, shift: int) -> None:
    q, k = normal(1, 1, 1, H, seed=1), normal(1, 1, 1, H, seed=2)

    def product(p: int, s: int) -> float:
        turned_q = rotate(q, rope, jnp.full((1, 1), p))
        turned_k = rotate(k, rope, jnp.full((1, 1), s))
        return float(np.vdot(np.asarray(turned_q, np.float64), np.asarray(turned_k, np.float64)))

    size = rope.magnitude**2 * float(np.linalg.norm(q) * np.linalg.norm(k))
    steps = abs(p) + abs(s) + abs(p + shift) + abs(s + shift) + 16
    assert abs(product(p + shift, s + shift) - product(p, s)) <= steps * EPS * size


def test_products_do_depend_on_the_distance() -> None:
    x = jnp.ones((1, T, 1, H))
    y = np.asarray(rotate(x, plain(H), jnp.arange(T)[None]))[0, :, 0]
    assert (abs(np.diff(y @ y[0])) > 0.1).all()


@pytest.mark.parametrize("rope", ROPES)
def test_norm_is_kept_times_the_magnitude(rope: Rope) -> None:
    x_BTNH = normal(B, T, N, H)
    y_BTNH = rotate(x_BTNH, rope, 17 * jnp.arange(T)[None])
    before, after = (np.linalg.norm(np.asarray(z, np.float64), axis=-1) for z in (x_BTNH, y_BTNH))
    np.testing.assert_allclose(after, rope.magnitude * before, rtol=8 * EPS)


def test_frequency_zero_leaves_coordinates_to_the_bit() -> None:
    part = plain(6).frequency_H[:3]
    half = np.concatenate([part, np.zeros(H // 2 - 3, np.float32)])
    rope = Rope(np.concatenate([half, half]))
    x_BTNH = normal(B, T, N, H)
    y_BTNH = rotate(x_BTNH, rope, 1 + jnp.arange(T)[None])
    still = rope.frequency_H == 0
    assert still.sum() == H - 6
    np.testing.assert_array_equal(y_BTNH[..., still], x_BTNH[..., still])
    assert (np.asarray(y_BTNH != x_BTNH)[..., ~still]).all()
    moved = np.asarray(x_BTNH)[..., ~still]
    alone = rotate(jnp.asarray(moved), plain(6), 1 + jnp.arange(T)[None])
    np.testing.assert_array_equal(y_BTNH[..., ~still], alone)


def test_position_zero_leaves_vectors_to_the_bit() -> None:
    x_BTNH = normal(B, T, N, H, dtype=jnp.bfloat16)
    y_BTNH = rotate(x_BTNH, plain(H), jnp.zeros((1, T), int))
    np.testing.assert_array_equal(y_BTNH, x_BTNH)


def test_gradient_turns_back() -> None:
    rope, position_BT = ROPES[-1], 3 * jnp.arange(T)[None]
    x_BTNH, c_BTNH = normal(B, T, N, H), normal(B, T, N, H, seed=3)
    _, pull = jax.vjp(jax.jit(lambda x: rotate(x, rope, position_BT)), x_BTNH)
    assert_turned(pull(c_BTNH)[0], c_BTNH, rope, -np.asarray(position_BT))


def test_rope_passes_through_jit() -> None:
    x_BTNH, position_BT = normal(B, T, N, H), jnp.arange(T)[None]
    y_BTNH = jax.jit(rotate)(x_BTNH, ROPES[-1], position_BT)
    assert_turned(y_BTNH, x_BTNH, ROPES[-1], position_BT)


# What is refused.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain(7), "rope: H must be an even int >= 2, got 7"),
        (lambda: plain(0), "rope: H must be an even int >= 2, got 0"),
        (lambda: plain(FLOAT), "rope: H must be an even int >= 2, got 4.0"),
        (lambda: plain(4, theta=1.0), "rope: theta must be > 1, got 1.0"),
        (lambda: plain(4, theta=math.nan), "rope: theta must be > 1, got nan"),
        (lambda: linear(4, factor=0.5), "rope: factor must be >= 1.0, got 0.5"),
        (lambda: linear(4, factor=math.nan), "rope: factor must be >= 1.0, got nan"),
        (lambda: llama3(4, factor=0), "rope: factor must be >= 1.0, got 0"),
        (lambda: llama3(4, low=4.0, high=1.0), "needs 0 < low < high, got low=4.0, high=1.0"),
        (lambda: llama3(4, original=0), "rope: original must be >= 1, got 0"),
        (lambda: yarn(4, factor=0, original=8), "rope: factor must be >= 1.0, got 0"),
        (lambda: yarn(4, factor=2.0, original=0), "rope: original must be >= 1, got 0"),
        (
            lambda: yarn(4, factor=2.0, original=8, fast=1.0, slow=2.0),
            "needs 0 < slow < fast, got slow=2.0, fast=1.0",
        ),
        (
            lambda: rotate(normal(B, T, N, H), plain(4), jnp.ones((1, T))),
            "frequency_H has H=4 but x_BTNH has H=14",
        ),
        (
            lambda: rotate(normal(B, T, N, H), plain(H), jnp.ones((3, T))),
            "position_BT has shape (3, 5) but x_BTNH has B=2, T=5",
        ),
        (
            lambda: rotate(normal(B, T, N, H), plain(H), jnp.ones((1, 1))),
            "position_BT has shape (1, 1) but x_BTNH has B=2, T=5",
        ),
        (
            lambda: rotate(normal(B, T, N, H), plain(H), jnp.ones(T)),
            "position_BT needs rank 2",
        ),
        (
            lambda: rotate(jnp.ones((B, T, N, H), int), plain(H), jnp.ones((1, T))),
            "x_BTNH must be floating point, got int32",
        ),
    ],
)
def test_errors_name_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
