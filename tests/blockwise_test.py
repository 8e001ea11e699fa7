"""The blockwise implementation keeps the contract, in one block and in many."""

import pytest

from jax_attn.kernels import blockwise
from tests.attention_contract import AttentionContract


class TestOneBlock(AttentionContract):
    implementation = "blockwise"


class TestManyBlocks(AttentionContract):
    """Blocks of 3 queries by 5 keys: every size is padded, every mask has blocks of every kind."""

    implementation = "blockwise"

    @pytest.fixture(autouse=True)
    def small_blocks(self):
        with blockwise.block_limits((3, 5)):
            yield
