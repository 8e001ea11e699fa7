"""Linear attention against the sum over pairs in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import dpfp, linear_attention
from jax_attn.linear_attention import positive

B, T, S, K, G, H, E = 2, 11, 13, 3, 2, 5, 7


def arrays(T: int, S: int) -> Any:
    rng = np.random.default_rng(0)
    shapes = (B, T, K * G, H), (B, S, K, H), (B, S, K, E)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def elu1(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def rolled(x: np.ndarray, nu: int) -> np.ndarray:
    r = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    return np.concatenate([r * np.roll(r, i, -1) for i in range(1, nu + 1)], -1)


def oracle(q: Any, k: Any, v: Any, phi: Any, *, causal: bool, normalize: bool) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    s = np.einsum("BTNH,BSNH->BNTS", phi(q), phi(k))
    s = s * np.tri(*s.shape[2:]) if causal else s
    y = np.einsum("BNTS,BSNE->BTNE", s, v)
    total = s.sum(-1).transpose(0, 2, 1)[..., None]
    return np.divide(y, total, out=np.zeros_like(y), where=total != 0) if normalize else y


FEATURES: dict[str, tuple[Any, Any]] = {
    "positive": (positive, elu1),
    "dpfp": (lambda x: dpfp(x, nu=3), lambda x: rolled(x, 3)),
    "none": (None, lambda x: x),
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 4, 128])
def test_it_is_the_sum_over_pairs(name: str, causal: bool, block: int) -> None:
    ours, theirs = FEATURES[name]
    q, k, v = arrays(S if causal else T, S)
    normalize = name != "none"
    made = linear_attention(q, k, v, feature=ours, causal=causal, normalize=normalize, block=block)
    expected = oracle(q, k, v, theirs, causal=causal, normalize=normalize)
    np.testing.assert_allclose(made, expected, rtol=3e-5, atol=3e-5 * np.abs(expected).max())


def test_no_key_and_no_score_give_zero_and_no_gradient() -> None:
    q, k, v = arrays(T, S)
    assert (linear_attention(q, k[:, :0], v[:, :0]) == 0).all()
    assert linear_attention(q[:, :0], k[:, :0], v[:, :0], causal=True).shape == (B, 0, K * G, E)
    nothing = jnp.zeros_like(q)
    grads = jax.grad(lambda q: linear_attention(q, k, v, feature=dpfp).sum())(nothing)
    assert (linear_attention(nothing, k, v, feature=dpfp) == 0).all()
    assert (grads == 0).all()


def test_the_gradient_is_that_of_the_sum() -> None:
    q, k, v = arrays(S, S)
    grad = jax.grad(lambda q: jnp.sin(linear_attention(q, k, v, causal=True, block=4)).sum())(q)
    step = 1e-6
    rng = np.random.default_rng(1)
    way = rng.normal(size=q.shape)

    def at(e: float) -> float:
        return np.sin(oracle(q + e * way, k, v, elu1, causal=True, normalize=True)).sum()

    slope = (at(step) - at(-step)) / (2 * step)
    assert np.vdot(grad, way) == pytest.approx(slope, rel=1e-4)


def test_narrow_arrays_are_summed_in_float32() -> None:
    q, k, v = arrays(T, S)
    narrow: Any = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    made = linear_attention(*narrow)
    assert made.dtype == jnp.bfloat16
    rounded = [np.asarray(x, np.float32) for x in narrow]
    q, k, v = rounded
    expected = oracle(q, k, v, elu1, causal=False, normalize=True)
    np.testing.assert_allclose(np.asarray(made, np.float64), expected, rtol=2**-8, atol=1e-5)
