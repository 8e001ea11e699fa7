"""Splash attention under the interpreter: the same meanings as everywhere, within the budget."""

import pytest

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
