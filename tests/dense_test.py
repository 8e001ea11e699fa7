"""The dense implementation keeps the contract, and its probabilities are a distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import dense_weights, dot_product_attention
from tests import oracle
from tests.attention_cases import FULL, MASKS, SHAPES, Options, allowed, draw
from tests.attention_contract import AttentionContract
from tests.observe_contract import Observes

Z = SHAPES["gqa"]


class TestDense(AttentionContract, Observes):
    implementation = "dense"


@pytest.mark.parametrize("mask", ["none", "lengths", "prefix_lm"])
@pytest.mark.parametrize("sinks", [False, True])
def test_weights_are_a_distribution(mask: str, sinks: bool) -> None:
    x = draw(Z, Options(bias=FULL, sinks=sinks), "float32")
    arrays = {name: np.asarray(leaf, np.float64) for name, leaf in x.items()}
    options = {"softcap": 3.0, "scale": 0.9, "q_offset": 2}
    pairs = allowed(mask, Z, 2)
    exact = oracle.attend(
        *(arrays[name] for name in "qkv"),
        mask=pairs,
        bias=arrays["bias"],
        sinks=arrays.get("sinks"),
        **options,
    )
    spec = MASKS[mask][0](Z)
    p_BNTS = jax.jit(
        lambda x: dense_weights(
            x["q"],
            x["k"],
            mask=spec,
            bias_BNTS=x["bias"],
            sinks_N=x.get("sinks"),
            **options,
        )
    )(x)
    assert p_BNTS.dtype == np.float32
    assert (p_BNTS >= 0).all()
    assert not np.asarray(p_BNTS)[~pairs].any()
    np.testing.assert_allclose(p_BNTS, exact.p, atol=1e-6)
    total = np.asarray(p_BNTS, np.float64).sum(axis=-1)
    some = pairs.any(axis=-1)
    np.testing.assert_array_equal(total[~some], 0.0)
    if sinks:
        assert (total[some] < 1).all()
    else:
        np.testing.assert_allclose(total[some], 1.0, atol=1e-6)


def test_weights_mix_values_into_the_output() -> None:
    x = draw(Z)
    v_BSNE = np.repeat(np.asarray(x["v"]), Z.N // Z.K, axis=2)
    p_BNTS = np.asarray(jax.jit(dense_weights)(x["q"], x["k"]))
    want = np.einsum("BNTS,BSNE->BTNE", p_BNTS, v_BSNE)
    got = jax.jit(dot_product_attention)(x["q"], x["k"], x["v"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_named_implementation_is_the_default_or_raises() -> None:
    x = jnp.ones((1, 2, 1, 3))
    with pytest.raises(ValueError, match="implementation must be None or one of 'dense', "):
        dot_product_attention(x, x, x, implementation="flash")
