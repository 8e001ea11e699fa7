"""The blockwise implementation keeps the contract, in many blocks and in one."""

import pytest

from jax_attn.kernels import blockwise
from tests.attention_cases import MASKS, check
from tests.attention_contract import OPTIONS, AttentionContract
from tests.observe_contract import Observes


class TestManyBlocks(AttentionContract, Observes):
    """Blocks of 3 queries by 5 keys: every size is padded, every mask has blocks of every kind."""

    implementation = "blockwise"

    @pytest.fixture(autouse=True)
    def small_blocks(self):
        with blockwise.block_limits((3, 5)):
            yield


@pytest.mark.few(4)
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_one_block(mask: str) -> None:
    check("blockwise", "gqa", mask, OPTIONS["all"])


@pytest.mark.parametrize("mask", ["causal", "packed"])
def test_matmuls_of_bfloat16(mask: str) -> None:
    with blockwise.multiply_narrow(True), blockwise.block_limits((3, 5)):
        check("blockwise", "gqa", mask, OPTIONS["all"], "bfloat16")
        check("blockwise", "mha", mask, OPTIONS["bias, scale, softcap"], "bfloat16")


def test_a_whole_block_and_a_padded_one() -> None:
    with blockwise.block_limits((7, 8)):
        check("blockwise", "mha", "none", OPTIONS["sinks"])
