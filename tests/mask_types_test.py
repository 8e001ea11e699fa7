"""Tests of jax_attn.mask_types: what a mask says of a block is never wrong."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_attn.masks import Mask, causal, chunks, dense, lengths, prefix, segments, where, window

B, N, T, S = 2, 3, 5, 7
b, n, t, s = np.ogrid[:B, :N, :T, :S]
everywhere = np.ones((B, N, T, S), bool)


class Case(NamedTuple):
    """A mask, and its matrix by a formula of its own as a function of q_offset."""

    mask: Mask
    matrix: Callable[[int], np.ndarray]

    def __repr__(self) -> str:
        return str(jax.tree.map(np.ndarray.tolist, self.mask))


def window_case(left: int | None, right: int | None) -> Case:
    low = -T - 99 if left is None else -left
    high = S + 99 if right is None else right
    return Case(
        window(left, right), lambda q: everywhere & (low <= s - (t + q)) & (s - (t + q) <= high)
    )


def where_case(gap_N: np.ndarray) -> Case:
    mask = where(lambda b, n, t, s, gap_N: (t + s) % gap_N[n] == b % 2, gap_N)
    return Case(mask, lambda q: everywhere & ((t + q + s) % gap_N[n] == b % 2))


def dense_case(kept: tuple[bool, ...], share: float, seed: int) -> Case:
    shape = tuple(size if keep else 1 for size, keep in zip(everywhere.shape, kept, strict=True))
    array = np.random.default_rng(seed).random(shape) < share
    return Case(dense(array), lambda q: everywhere & array)


def segments_case(q_ids: np.ndarray, kv_ids: np.ndarray) -> Case:
    equal = q_ids[:, None, :, None] == kv_ids[:, None, None, :]
    return Case(segments(q_ids, kv_ids), lambda q: everywhere & equal)


def lengths_case(q_B: np.ndarray | None, kv_B: np.ndarray | None) -> Case:
    rows = everywhere if q_B is None else t < q_B[:, None, None, None]
    keys = everywhere if kv_B is None else s < kv_B[:, None, None, None]
    return Case(lengths(q_B, kv_B), lambda q: everywhere & rows & keys)


def prefix_case(count: Any) -> Case:
    column = np.reshape(count, (-1, 1, 1, 1))
    return Case(prefix(count), lambda q: everywhere & (s < column))


def ints(shape: tuple[int, ...], high: int) -> st.SearchStrategy[np.ndarray]:
    size = int(np.prod(shape))
    numbers = st.lists(st.integers(0, high), min_size=size, max_size=size)
    return numbers.map(lambda x: np.array(x).reshape(shape))


bounds = st.none() | st.integers(0, 6)
windows = st.builds(window_case, bounds, bounds)
chunked = st.integers(1, 8).map(
    lambda size: Case(chunks(size), lambda q: everywhere & ((t + q) // size == s // size))
)
static_prefixes = (st.integers(-1, 9) | st.integers(0, 9).map(np.int64)).map(prefix_case)
prefixes = (ints((B,), 9) | ints((1,), 9)).map(prefix_case)
sorted_ids = [ints((B, size), 3).map(lambda ids: np.sort(ids, axis=1)) for size in (T, S)]
segmented = st.builds(segments_case, sorted_ids[0], sorted_ids[1]) | st.builds(
    segments_case, ints((1, T), 1), ints((B, S), 1)
)
limited = st.builds(lengths_case, ints((B,), 6), st.none() | ints((B,), 8)) | st.builds(
    lengths_case, st.none(), ints((B,), 8)
)
arrays = st.builds(
    dense_case,
    st.tuples(*[st.booleans()] * 4),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 99),
)
functions = st.lists(st.integers(1, 3), min_size=N, max_size=N).map(
    lambda gaps: where_case(np.array(gaps))
)


def composed(parts: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    return st.one_of(
        parts.map(lambda x: Case(~x.mask, lambda q: ~x.matrix(q))),
        st.builds(
            lambda x, y: Case(x.mask & y.mask, lambda q: x.matrix(q) & y.matrix(q)), parts, parts
        ),
        st.builds(
            lambda x, y: Case(x.mask | y.mask, lambda q: x.matrix(q) | y.matrix(q)), parts, parts
        ),
    )


leaves = st.one_of(
    windows, chunked, static_prefixes, prefixes, segmented, limited, arrays, functions
)
cases = st.recursive(leaves, composed, max_leaves=4)
offsets = st.integers(-4, 9)


def ranges(size: int) -> st.SearchStrategy[tuple[int, int]]:
    every = [(first, end) for first in range(size) for end in range(first + 1, size + 1)]
    return st.sampled_from(every)


def kind(block: np.ndarray) -> str:
    return "none" if not block.any() else "all" if block.all() else "mixed"


# Blocks.


@settings(max_examples=60)
@given(cases, ranges(T), ranges(S), offsets)
def test_none_and_all_are_never_said_wrongly(
    case: Case, rows: tuple[int, int], keys: tuple[int, int], q_offset: int
) -> None:
    matrix = case.matrix(q_offset)
    drawn = case.mask.materialize(T, S, q_offset=q_offset, B=B, N=N)
    np.testing.assert_array_equal(np.broadcast_to(drawn, matrix.shape), matrix)
    said = case.mask.classify(rows, keys, q_offset=q_offset)
    truth = kind(matrix[:, :, slice(*rows), slice(*keys)])
    assert said in (truth, "mixed")


@settings(max_examples=300)
@given(windows | chunked | static_prefixes, ranges(T), ranges(S), offsets)
def test_window_chunks_and_prefix_are_classified_exactly(
    case: Case, rows: tuple[int, int], keys: tuple[int, int], q_offset: int
) -> None:
    truth = kind(case.matrix(q_offset)[:, :, slice(*rows), slice(*keys)])
    assert case.mask.classify(rows, keys, q_offset=q_offset) == truth
    opposite = {"none": "all", "all": "none", "mixed": "mixed"}[truth]
    assert (~case.mask).classify(rows, keys, q_offset=q_offset) == opposite


@given(prefixes | limited | arrays, ranges(T), ranges(S))
def test_all_is_found_in_prefixes_lengths_and_arrays(
    case: Case, rows: tuple[int, int], keys: tuple[int, int]
) -> None:
    truth = kind(case.matrix(0)[:, :, slice(*rows), slice(*keys)])
    assert (case.mask.classify(rows, keys) == "all") == (truth == "all")


@given(prefixes | arrays, ranges(T), ranges(S))
def test_none_is_found_in_prefixes_and_arrays(
    case: Case, rows: tuple[int, int], keys: tuple[int, int]
) -> None:
    truth = kind(case.matrix(0)[:, :, slice(*rows), slice(*keys)])
    assert case.mask.classify(rows, keys) == truth


@pytest.mark.parametrize(
    ("mask", "rows", "keys", "expected"),
    [
        (causal() & window(2), (3, 5), (0, 1), "none"),
        (causal() & window(2), (3, 4), (1, 4), "all"),
        (causal() & ~window(2), (4, 5), (0, 2), "all"),
        (causal() | prefix(2), (0, 1), (0, 2), "all"),
        (causal() | prefix(2), (0, 2), (2, 5), "none"),
        (causal() & segments(np.array([[0, 0, 1, 1, 2]])), (2, 4), (0, 2), "none"),
        (segments(np.array([[0, 0, 1, 1, 2]])), (2, 4), (2, 4), "all"),
        (segments(np.array([[0, 0, 1, 1, 2]])), (1, 3), (1, 3), "mixed"),
        (lengths(np.array([2, 3]), np.array([4, 5])), (0, 2), (0, 4), "all"),
        (lengths(np.array([2, 3]), np.array([4, 5])), (3, 5), (0, 4), "none"),
        (lengths(np.array([2, 3]), np.array([4, 5])), (0, 2), (5, 7), "none"),
        (lengths(np.array([2, 3]), np.array([4, 5])), (0, 2), (3, 5), "mixed"),
        (causal() & where(lambda b, n, t, s: t < 9), (0, 1), (1, 2), "none"),
    ],
)
def test_blocks_worth_skipping_are_found(
    mask: Mask, rows: tuple[int, int], keys: tuple[int, int], expected: str
) -> None:
    assert mask.classify(rows, keys) == expected


@pytest.mark.parametrize("ids", [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 1, 2]])
@pytest.mark.parametrize("negate", [False, True])
def test_a_block_that_reaches_over_the_end_is_bounded(ids: list[int], negate: bool) -> None:
    """The last block of a loop may be ragged: its array is then read shifted, still safe."""
    ids_BT = np.array([ids])
    mask = ~segments(ids_BT) if negate else segments(ids_BT)
    some, every = mask.coverage(3, 4, 3, 2)
    block = (ids_BT[0, 3:, None] == ids_BT[0, None, 3:]) != negate
    assert bool(some) or not block.any()
    assert not every or block.all()


def test_classify_names_an_empty_range() -> None:
    with pytest.raises(ValueError, match=r"t_range needs 0 <= first < end, got \(3, 3\)"):
        causal().classify((3, 3), (0, 1))
    with pytest.raises(ValueError, match=r"s_range needs 0 <= first < end, got \(-1, 1\)"):
        causal().classify((0, 1), (-1, 1))


# Static and traced.


@pytest.mark.parametrize(
    "mask", [causal(), window(2), window(None), ~causal(), causal() & ~window(1) | prefix(2)]
)
@pytest.mark.parametrize("number", [int, np.int32, np.int64])
def test_static_masks_answer_statically_even_while_tracing(mask: Mask, number: Any) -> None:
    def said(_: jax.Array) -> jax.Array:
        some, every = mask.coverage(number(3), 2, number(0), 3, number(1))
        return jnp.asarray([bool(some), bool(every)])  # a traced answer has no bool

    block = np.asarray(mask.materialize(5, 3, q_offset=1))[0, 0, 3:]
    np.testing.assert_array_equal(jax.jit(said)(jnp.ones(2)), [block.any(), block.all()])


@pytest.mark.parametrize(
    "mask",
    [
        causal() & window(1),
        ~window(2, 1) | prefix(1),
        chunks(3) & ~causal(),
        causal() | prefix(np.array([1, 3])),
        causal() & segments(np.array([[0, 0, 1, 1, 2]]), np.array([[0, 0, 0, 1, 1, 1, 2]])),
        ~lengths(np.array([2, 3]), np.array([4, 5])),
        dense(np.random.default_rng(0).random((B, N, T, S)) < 0.95) | chunks(2),
        causal() & where(lambda b, n, t, s: t == s),
    ],
)
def test_traced_coverage_agrees_with_static(mask: Mask) -> None:
    nt, ns = 2, 3
    blocks = list(itertools.product(range(T - nt + 1), range(S - ns + 1), (-1, 0, 3)))

    @jax.jit
    def traced(mask: Mask, blocks: np.ndarray) -> jax.Array:
        def bound(block: jax.Array) -> jax.Array:
            some, every = mask.coverage(block[0], nt, block[1], ns, block[2])
            return jnp.stack([jnp.asarray(some), jnp.asarray(every)])

        return jax.vmap(bound)(jnp.asarray(blocks))

    static = [[bool(x) for x in mask.coverage(t0, nt, s0, ns, q)] for t0, s0, q in blocks]
    np.testing.assert_array_equal(traced(mask, np.array(blocks)), static)
    assert len({tuple(x) for x in static}) > 1
