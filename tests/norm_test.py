"""Tests of jax_attn.norm against the formulas in float64."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn.norm import init_layer_norm, init_rms_norm, norm, rms_norm

B, T, D = 2, 3, 13
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# In units of eps: each of D squares, D sums, mean, root, division and two products rounds once.
STEPS = 2 * D + 8


def arrays(dtype: Any, seed: int = 0, size: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    x_BTD = jnp.asarray(random.normal(0, size, (B, T, D)), dtype)
    return (
        x_BTD,
        jnp.asarray(random.normal(1, 1, D), dtype),
        jnp.asarray(random.normal(0, 1, D), dtype),
    )


def plain_rms(x: np.ndarray, scale: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def plain_layer(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return (x - x.mean(-1, keepdims=True)) / spread * scale + bias


def wide(*xs: Any) -> Any:
    return [np.asarray(x, np.float64) for x in xs]


def assert_near(actual: jax.Array, expected: np.ndarray, dtype: Any, size: Any) -> None:
    """Allow float32 arithmetic on numbers of a size, and one rounding to the dtype."""
    assert actual.dtype == dtype
    tolerance = STEPS * np.finfo(np.float32).eps * size
    if dtype != jnp.float32:
        tolerance = tolerance + float(jnp.finfo(dtype).eps) / 2 * abs(expected)
    error = abs(np.asarray(actual, np.float64) - expected)
    assert (error <= tolerance).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_is_its_formula(dtype: Any, epsilon: float) -> None:
    x_BTD, scale_D, _ = arrays(dtype)
    expected = plain_rms(*wide(x_BTD, scale_D), epsilon=epsilon)
    assert_near(rms_norm(x_BTD, scale_D, epsilon=epsilon), expected, dtype, abs(expected))
    for x in (x_BTD[0, 0], x_BTD[0], x_BTD[:, :, None, None]):
        expected = plain_rms(*wide(x, scale_D), epsilon=epsilon)
        actual = rms_norm(x, scale_D, epsilon=epsilon)
        assert actual.shape == x.shape
        assert_near(actual, expected, dtype, abs(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_bias_is_rms_norm(dtype: Any) -> None:
    x_BTD, scale_D, _ = arrays(dtype)
    expected = plain_rms(*wide(x_BTD, scale_D))
    assert_near(norm({"scale_D": scale_D}, x_BTD), expected, dtype, abs(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 16.0])
def test_norm_with_bias_is_layer_norm(dtype: Any, offset: float) -> None:
    x_BTD, scale_D, bias_D = arrays(dtype)
    x_BTD = x_BTD + jnp.asarray(offset, dtype)
    x, scale, bias = wide(x_BTD, scale_D, bias_D)
    expected = plain_layer(x, scale, bias)
    # The mean, and the difference to it, round in proportion to the numbers before centring.
    relative = 1 + abs(x).max() / x.std(-1, keepdims=True)
    size = relative * (1 + abs(expected - bias)) * (1 + abs(scale)) + abs(bias)
    assert_near(norm({"scale_D": scale_D, "bias_D": bias_D}, x_BTD), expected, dtype, size)


@given(st.integers(0, 99), st.integers(-20, 20))
def test_rms_is_the_scale_whatever_the_size(seed: int, exponent: int) -> None:
    x_BTD, _, _ = arrays(jnp.float32, seed)
    y = np.asarray(rms_norm(x_BTD * 2.0**exponent, jnp.full(D, 3.0), epsilon=0.0), np.float64)
    rms = np.sqrt((y**2).mean(-1))
    assert (abs(rms / 3 - 1) <= STEPS * np.finfo(np.float32).eps).all()


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_large_and_small_numbers_neither_overflow_nor_vanish(size: float) -> None:
    """In float16 the square of 1e4 would be infinite and that of 1e-4 zero."""
    x_BTD, scale_D, _ = arrays(jnp.float16, size=size)
    y = norm({"scale_D": scale_D}, x_BTD)
    expected = plain_rms(*wide(x_BTD, scale_D))
    assert_near(y, expected, jnp.float16, abs(expected))


def test_zeros_stay_zero_with_finite_gradients() -> None:
    x_BTD, scale_D, bias_D = jnp.zeros((B, T, D)), jnp.ones(D), jnp.full(D, 2.0)
    assert not rms_norm(x_BTD, scale_D).any()
    np.testing.assert_array_equal(norm({"scale_D": scale_D, "bias_D": bias_D}, x_BTD), 2.0)
    gradient = jax.grad(lambda x: rms_norm(x, scale_D).sum())(x_BTD)
    np.testing.assert_allclose(gradient, 1e3, rtol=STEPS * float(np.finfo(np.float32).eps))


def test_gradients_are_those_of_the_formula() -> None:
    """Of y = x·r·g with r = 1/rms, and output gradient c: dx = r·g·c - x·r³·mean(x·g·c)."""
    x_BTD, scale_D, _ = arrays(jnp.float32)
    c_BTD, _, _ = arrays(jnp.float32, seed=1)
    _, pull = jax.vjp(rms_norm, x_BTD, scale_D)
    dx, dscale = pull(c_BTD)
    x, g, c = wide(x_BTD, scale_D, c_BTD)
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    parts = abs(r * g * c) + abs(x) * r**3 * abs(x * g * c).mean(-1, keepdims=True)
    eps = np.finfo(np.float32).eps
    expected = r * g * c - x * r**3 * (x * g * c).mean(-1, keepdims=True)
    assert (abs(np.asarray(dx) - expected) <= 2 * STEPS * eps * parts).all()
    expected = (x * r * c).sum((0, 1))
    assert (
        abs(np.asarray(dscale) - expected) <= 2 * STEPS * eps * abs(x * r * c).sum((0, 1))
    ).all()


def test_init_makes_the_identity_scale() -> None:
    assert {n: x.tolist() for n, x in init_rms_norm(D).items()} == {"scale_D": [1.0] * D}
    tree = init_layer_norm(D, jnp.bfloat16)
    assert {n: x.tolist() for n, x in tree.items()} == {"scale_D": [1.0] * D, "bias_D": [0.0] * D}
    assert {x.dtype for x in tree.values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, jnp.ones(5)), "scale has shape (5,) but x ends in (13,)"),
        (lambda x: rms_norm(x, jnp.ones((1, D))), "scale has shape (1, 13) but x ends in (13,)"),
        (lambda x: rms_norm(x.astype(int), jnp.ones(D)), "x must be floating point, got int32"),
        (lambda x: norm({"scale_D": jnp.ones(5)}, x), "scale_D has D=5 but x_BTD has D=13"),
        (lambda x: norm(init_layer_norm(D) | {"bias_D": jnp.ones(5)}, x), "bias_D has D=5 but"),
        (lambda x: norm(init_rms_norm(D), x[0]), "x_BTD needs rank 3"),
        (lambda x: norm({"bias_D": jnp.ones(D)}, x), "norm: leaf 'scale_D' is missing"),
        (lambda x: norm({"scales_D": jnp.ones(D)}, x), "unknown leaf 'scales_D', did you mean"),
        (
            lambda x: norm(init_rms_norm(D), x.astype(int)),
            "x_BTD must be floating point, got int32",
        ),
        (lambda x: init_rms_norm(0), "D (model width) must be an int >= 1, got 0"),
    ],
)
def test_errors_name_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(jnp.ones((B, T, D)))
