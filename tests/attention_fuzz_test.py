"""Random attention cases against the float64 oracle: `make fuzz`, not part of `make test`."""

import contextlib

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from jax_attn.compile import build
from jax_attn.kernels import blockwise, native
from tests.attention_cases import FULL, MASKS, Options, Shape, check, library_vjp

PARTS, CASES = 24, 100
INTERVALS = ("causal", "window", "ahead", "prefix_B", "chunks", "segments", "lengths", "packed")


@st.composite
def shapes(draw) -> Shape:
    K, G = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    B, T, S = draw(st.integers(1, 3)), draw(st.integers(1, 19)), draw(st.integers(1, 23))
    return Shape(B, T, S, K * G, K, draw(st.integers(1, 9)), draw(st.integers(1, 9)))


@st.composite
def options(draw, every: bool) -> Options:
    """Options of a call; without `every`, those alone that the C++ kernel takes."""
    bias = draw(st.none() | st.tuples(*(st.sampled_from([0, 1]) for _ in FULL)))
    return Options(
        bias=bias if every else None,
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.5, 3.0, 50.0])),
        scale=draw(st.sampled_from([None, 0.1, 1.0, 2.5])),
        slopes=every and draw(st.booleans()),
        rate=draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])) if every else 0.0,
        q_offset=draw(st.integers(-5, 25)),
    )


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("implementation", ["dense", "blockwise", "native"])
def test_any_case(implementation: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = implementation != "native"
    if implementation == "native":
        path = build()
        monkeypatch.setattr(native, "library", lambda: path)

    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=CASES // 3 + 1, database=None)
    @hypothesis.given(
        shape=shapes(),
        mask=st.sampled_from(sorted(MASKS) if everything else INTERVALS),
        options=options(everything),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        limits=st.none() | st.tuples(st.integers(1, 7), st.integers(1, 7)),
        seed=st.integers(0, 999),
    )
    def run(shape, mask, options, dtype, limits, seed):
        blocks = contextlib.nullcontext()
        if implementation == "blockwise" and limits is not None:
            blocks = blockwise.block_limits(limits)
        with blocks:
            check(implementation, shape, mask, options, dtype, seed=seed)
        library_vjp.cache_clear()

    run()
    jax.clear_caches()
