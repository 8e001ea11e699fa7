"""Splash attention under the interpreter: the same meanings as everywhere, within the budget."""

import jax.numpy as jnp
import pytest

from jax_attn import dot_product_attention, lengths, segments
from jax_attn.kernels import splash
from tests.attention_cases import Options, check


@pytest.fixture(autouse=True)
def interpreter():
    with splash.interpreted(True):
        yield


@pytest.mark.parametrize(("shape", "mask"), [("mqa", "none"), ("gqa", "lengths")])
def test_any_sizes(shape: str, mask: str) -> None:
    check("splash", shape, mask, Options())


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_windows(mask: str) -> None:
    check("splash", "square", mask, Options(softcap=2.0, scale=1.3))


def test_sinks() -> None:
    check("splash", "square", "causal", Options(sinks=True))


def test_segments_with_lengths_are_refused() -> None:
    """A row whose segment is padding alone would have to be known by its segment."""
    x_BTNH = jnp.ones((1, 4, 1, 8))
    mask = segments(jnp.array([[0, 0, 1, 1]])) & lengths(kv_B=jnp.array([2]))
    with pytest.raises(ValueError, match="takes segments or lengths, not both"):
        dot_product_attention(x_BTNH, x_BTNH, x_BTNH, mask=mask, implementation="splash")
