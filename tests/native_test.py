"""The C++ kernel keeps the contract wherever it takes the call, and says why where it does not."""

import pytest

from jax_attn import compile
from tests.attention_cases import MASKS, Options, check

MASKED = [name for name in MASKS if name not in ("where", "dense", "nothing", "prefix_lm", "not")]


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        compile.build()
    except RuntimeError as error:
        pytest.skip(f"the kernel cannot be compiled here: {error}")


@pytest.mark.parametrize("mask", MASKED)
def test_masks(mask: str) -> None:
    check("native", "gqa", mask, Options(sinks=True, q_offset=2))


@pytest.mark.parametrize("shape", ["mha", "mqa", "T1", "S1", "S0", "ones"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes(shape: str, dtype: str) -> None:
    check("native", shape, "causal", Options(sinks=True, softcap=3.0, scale=0.7), dtype)
