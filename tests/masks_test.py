"""Tests of jax_attn.masks: each mask against matrices written out by hand."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn.masks import Mask, causal, chunks, dense, lengths, prefix, segments, where, window
from jax_attn.shapes import Sizes

B, N, T, S = 2, 3, 5, 7
EVEN = where(lambda b, n, t, s: (t + s) % 2 == 0)


def bits(*drawn: str) -> np.ndarray:
    """One matrix a drawing, its rows apart by spaces: bits("10 11") is [1, 2, 2]."""
    return np.array([[[c == "1" for c in row] for row in rows.split()] for rows in drawn])


def any_kind(x: Any) -> Any:
    """Hide a wrong type from the type checker."""
    return x


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def assert_drawn(mask: Mask, drawn: np.ndarray, q_offset: Any = 0) -> None:
    """Compare [1,1,T,S] of a mask that reads neither b nor n with a drawing [1,T,S]."""
    matrix = mask.materialize(*drawn.shape[1:], q_offset=q_offset)
    assert matrix.dtype == jnp.bool_
    np.testing.assert_array_equal(matrix, drawn[None])


# One matrix for all sequences and heads.

SELF = [
    ("causal", causal(), "10000 11000 11100 11110 11111"),
    ("window_1", window(1), "11000 11100 01110 00111 00011"),
    ("window_2_0", window(2, 0), "10000 11000 11100 01110 00111"),
    ("window_0_2", window(0, 2), "11100 01110 00111 00011 00001"),
    ("window_0", window(0), "10000 01000 00100 00010 00001"),
    ("window_none", window(None), "11111 11111 11111 11111 11111"),
    ("window_none_1", window(None, 1), "11000 11100 11110 11111 11111"),
    ("window_1_none", window(1, None), "11111 11111 01111 00111 00011"),
    ("window_huge", window(2**31 - 1), "11111 11111 11111 11111 11111"),
    ("window_huger", window(1, 2**63), "11111 11111 01111 00111 00011"),
    ("prefix_0", prefix(0), "00000 00000 00000 00000 00000"),
    ("prefix_3", prefix(3), "11100 11100 11100 11100 11100"),
    ("prefix_9", prefix(9), "11111 11111 11111 11111 11111"),
    ("chunks_1", chunks(1), "10000 01000 00100 00010 00001"),
    ("chunks_2", chunks(2), "11000 11000 00110 00110 00001"),
    ("chunks_3", chunks(3), "11100 11100 11100 00011 00011"),
    ("chunks_7", chunks(7), "11111 11111 11111 11111 11111"),
    ("where", EVEN, "10101 01010 10101 01010 10101"),
    ("not_causal", ~causal(), "01111 00111 00011 00001 00000"),
    ("sliding", causal() & window(1), "10000 11000 01100 00110 00011"),
    ("prefix_lm", causal() | prefix(3), "11100 11100 11100 11110 11111"),
    ("strictly_causal", causal() & ~window(0), "00000 10000 11000 11100 11110"),
    ("sinks", causal() & (window(1) | prefix(1)), "10000 11000 11100 10110 10011"),
    ("local", (causal() & chunks(2)) | prefix(1), "10000 11000 10100 10110 10001"),
    ("neither", ~(chunks(2) | prefix(1)), "00111 00111 01001 01001 01110"),
    ("twice_not", ~~chunks(3), "11100 11100 11100 00011 00011"),
    ("nothing", causal() & ~causal(), "00000 00000 00000 00000 00000"),
]


@pytest.mark.parametrize(("mask", "drawn"), [c[1:] for c in SELF], ids=[c[0] for c in SELF])
def test_self_attention(mask: Mask, drawn: str) -> None:
    assert_drawn(mask, bits(drawn))


CROSS = [
    ("causal_wide", causal(), 0, "10000 11000 11100"),
    ("causal_tall", causal(), 0, "100 110 111 111 111"),
    ("causal_decode", causal(), 3, "11110 11111"),
    ("causal_one", causal(), 4, "1111100"),
    ("causal_before", causal(), -2, "000 000 100"),
    ("window_wide", window(1), 0, "1100000 1110000 0111000"),
    ("window_tall", window(1), 0, "110 111 011 001 000"),
    ("window_1_0_decode", window(1, 0), 3, "0011000 0001100"),
    ("window_0_1_decode", window(0, 1), 1, "01100 00110 00011"),
    ("window_before", window(0, 3), -2, "11000 11100 11110"),
    ("prefix_decode", prefix(2), 3, "11000 11000"),
    ("chunks_decode", chunks(3), 2, "1110000 0001110 0001110"),
    ("chunks_before", chunks(2), -2, "00000 00000 11000"),
    ("where_decode", EVEN, 3, "01010 10101"),
    ("prefix_lm_decode", causal() | prefix(4), 1, "11110 11110 11110 11111"),
    ("not_decode", ~(causal() & window(1)), 2, "10011 11001"),
    ("one_pair", causal(), 0, "1"),
]


@pytest.mark.parametrize(
    ("mask", "q_offset", "drawn"), [c[1:] for c in CROSS], ids=[c[0] for c in CROSS]
)
def test_queries_sit_at_q_offset(mask: Mask, q_offset: int, drawn: str) -> None:
    assert_drawn(mask, bits(drawn), q_offset)
    assert_drawn(mask, bits(drawn), np.int64(q_offset))
    rows, keys = bits(drawn).shape[1:]
    traced = jax.jit(lambda m, p: m.materialize(rows, keys, q_offset=p))(mask, q_offset)
    np.testing.assert_array_equal(traced, bits(drawn)[None])


# One matrix a sequence, a head, or both.

IDS_BT = np.array([[0, 0, 1, 1, 1], [4, 4, 4, 9, 4]])
KV_IDS_BS = np.array([[0, 1, 1, 2, 0, 0, 1], [9, 9, 4, 0, 0, 4, 9]])
DENSE = np.random.default_rng(0).random((B, N, T, S)) < 0.5

BATCHED = [
    ("prefix", prefix(np.array([1, 3])), 0, bits("1000 1000", "1110 1110")),
    ("prefix_lm", causal() | prefix(jnp.array([0, 3])), 1, bits("1100 1110", "1110 1110")),
    (
        "segments",
        segments(IDS_BT),
        0,
        bits("11000 11000 00111 00111 00111", "11101 11101 11101 00010 11101"),
    ),
    (
        "segments_of_keys",
        segments(IDS_BT, KV_IDS_BS),
        2,  # ids go with the index, whatever the position
        bits(
            "1000110 1000110 0110001 0110001 0110001",
            "0010010 0010010 0010010 1100001 0010010",
        ),
    ),
    (
        "packed",
        causal() & segments(IDS_BT),
        0,
        bits("10000 11000 00100 00110 00111", "10000 11000 11100 00010 11101"),
    ),
    (
        "segments_one_for_all",
        segments(IDS_BT[:1, :2], KV_IDS_BS[:, :3]),
        0,
        bits("100 100", "000 000"),
    ),
    (
        "lengths",
        lengths(np.array([1, 3]), np.array([2, 4])),
        2,
        bits("1100 0000 0000", "1111 1111 1111"),
    ),
    ("lengths_of_keys", lengths(kv_B=np.array([0, 3])), 0, bits("0000 0000", "1110 1110")),
    ("lengths_of_queries", lengths(q_B=jnp.array([1, 0])), 0, bits("111 000", "000 000")),
    ("not_lengths", ~lengths(kv_B=np.array([0, 3])), 0, bits("1111 1111", "0001 0001")),
    (
        "where_args",
        where(lambda b, n, t, s, gap_B: t - s == gap_B[b], np.array([0, 2])),
        2,
        bits("0010 0001", "1000 0100"),
    ),
    (
        "where_two_args",
        where(lambda b, n, t, s, x, y: (s < x) & (b < y) & (t >= 0), np.int32(2), jnp.array(1)),
        0,
        bits("110 110", "000 000"),
    ),
    ("dense_keys", dense(np.array([[[[1, 0]]], [[[0, 1]]]], bool)), 5, bits("10 10", "01 01")),
    (
        "dense_and_prefix",
        dense(bits("10 11")[None]) | prefix(np.array([1, 0])),
        0,
        bits("10 11", "10 11"),
    ),
]


@pytest.mark.parametrize(
    ("mask", "q_offset", "drawn"), [c[1:] for c in BATCHED], ids=[c[0] for c in BATCHED]
)
def test_each_sequence_has_its_matrix(mask: Mask, q_offset: int, drawn: np.ndarray) -> None:
    matrix = mask.materialize(*drawn.shape[1:], q_offset=q_offset, B=B, N=N)
    assert matrix.dtype == jnp.bool_
    assert matrix.shape[1] == 1
    np.testing.assert_array_equal(matrix[:, 0], drawn)


@pytest.mark.parametrize("kept", range(16))
def test_axes_of_size_one_of_a_dense_mask_broadcast(kept: int) -> None:
    part = DENSE[tuple(slice(None) if kept >> axis & 1 else slice(1) for axis in range(4))]
    matrix = dense(part).materialize(T, S, B=B, N=N, q_offset=3)
    assert matrix.shape == (*part.shape[:2], T, S)  # no copy a sequence or head is made
    np.testing.assert_array_equal(matrix, np.broadcast_to(part, matrix.shape))


def test_heads_can_differ() -> None:
    reach_N = np.array([0, 1, 2])
    mask = causal() & where(lambda b, n, t, s, reach_N: t - s <= reach_N[n], reach_N)
    drawn = bits("100 010 001", "100 110 011", "100 110 111")
    np.testing.assert_array_equal(mask.materialize(3, 3, N=N), drawn[None])


@pytest.mark.parametrize(
    "mask",
    [
        causal() & window(1),
        chunks(2) | prefix(1),
        segments(IDS_BT[:, :3], IDS_BT[:, :0]),
        lengths(kv_B=np.array([1, 0])),
        dense(DENSE[:, :, :3, :0]),
    ],
)
def test_there_may_be_no_keys(mask: Mask) -> None:
    assert mask.materialize(3, 0, B=B, N=N).shape[2:] == (3, 0)


# Masks are frozen pytrees.

PYTREES = [
    causal() & window(2),
    (causal() | prefix(np.array([1, 3]))) & ~chunks(3),
    prefix(2),
    segments(IDS_BT, KV_IDS_BS) & lengths(np.array([5, 3]), None),
    where(lambda b, n, t, s, gap_B: t - s == gap_B[b], np.array([0, 2])) | dense(DENSE),
]


@pytest.mark.parametrize("mask", PYTREES)
def test_flatten_and_unflatten_round_trip(mask: Mask) -> None:
    leaves, tree = jax.tree.flatten(mask)
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is type(mask)
    assert jax.tree.structure(again) == tree
    expected = mask.materialize(T, S, B=B, N=N)
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(again.materialize(T, S, B=B, N=N), expected)


@pytest.mark.parametrize("mask", PYTREES)
def test_masks_pass_through_jit(mask: Mask) -> None:
    expected = mask.materialize(T, S, B=B, N=N)
    inside = jax.jit(lambda m: m.materialize(T, S, B=B, N=N))(mask)
    np.testing.assert_array_equal(inside, expected)
    outside = jax.jit(lambda m: m & ~~m)(mask)
    np.testing.assert_array_equal(outside.materialize(T, S, B=B, N=N), expected)


def test_equal_masks_share_a_trace_and_other_bounds_do_not() -> None:
    traces = []

    @jax.jit
    def draw(mask: Mask) -> jax.Array:
        traces.append(mask)
        return mask.materialize(3, 5)

    for n, reach, expected in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):
        drawn = draw((causal() & window(reach)) | prefix(n))
        assert len(traces) == expected
        np.testing.assert_array_equal(
            drawn, ((causal() & window(reach)) | prefix(n)).materialize(3, 5)
        )


def test_masks_map_over_a_leading_axis() -> None:
    n_B, q_ids, kv_ids = np.array([1, 3]), IDS_BT[:, None], KV_IDS_BS[:, None]
    drawn = jax.vmap(lambda m: m.materialize(T, S))(prefix(n_B))
    np.testing.assert_array_equal(drawn[:, 0, 0], prefix(n_B).materialize(T, S, B=B)[:, 0])
    drawn = jax.vmap(lambda q, kv, n: (segments(q, kv) | prefix(n)).materialize(T, S))(
        q_ids, kv_ids, n_B
    )
    expected = (segments(IDS_BT, KV_IDS_BS) | prefix(n_B)).materialize(T, S, B=B)
    np.testing.assert_array_equal(drawn[:, 0], expected)
    drawn = jax.vmap(lambda p: (causal() & ~EVEN).materialize(T, S, q_offset=p))(n_B)
    for b in range(B):
        alone = (causal() & ~EVEN).materialize(T, S, q_offset=int(n_B[b]))
        np.testing.assert_array_equal(drawn[b], alone)


def test_masks_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        window(1).left = 2  # type: ignore[attr-defined]


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(-1), "window: left must be an int >= 0 or None, got -1"),
        (lambda: window(1, -2), "window: right must be an int >= 0 or None, got -2"),
        (lambda: window(any_kind(1.0)), "window: left must be an int >= 0 or None, got 1.0"),
        (lambda: window(True), "window: left must be an int >= 0 or None, got True"),
        (lambda: chunks(0), "chunks: n must be an int >= 1, got 0"),
        (lambda: chunks(any_kind(2.0)), "chunks: n must be an int >= 1, got 2.0"),
        (lambda: prefix(2.0), "prefix: n must be an int or an int array"),
        (lambda: prefix(True), "n must be integers, got bool"),
        (lambda: prefix(np.ones((2, 3), int)), "n_B needs rank 1"),
        (lambda: segments(np.ones(3, int)), "q_ids_BT needs rank 2"),
        (lambda: segments(np.ones((2, 3))), "q_ids_BT must be integers, got float64"),
        (lambda: segments(IDS_BT, np.ones(3, int)), "kv_ids_BS needs rank 2"),
        (lambda: segments(IDS_BT, np.ones((2, 3))), "kv_ids_BS must be integers, got float64"),
        (lambda: segments([[0, 1]]), "q_ids_BT must be an array with axes BT, got list"),
        (lambda: lengths(), "lengths: give q_B, kv_B or both"),
        (lambda: lengths(np.ones((2, 3), int)), "q_B needs rank 1"),
        (lambda: lengths(kv_B=np.ones(3)), "kv_B must be integers, got float64"),
        (lambda: lengths(kv_B=3), "kv_B must be an array with axes B, got int"),
        (lambda: where(any_kind(3)), "where: fn must be a function of (b, n, t, s), got int"),
        (lambda: dense(np.ones((2, 3), bool)), "mask_BNTS needs rank 4"),
        (lambda: dense(np.ones((2, 3, 5, 7))), "mask_BNTS must be bool, True = attend, got float"),
        (
            lambda: causal() & any_kind(DENSE),
            "a mask composes with masks, got ndarray; wrap a bool array",
        ),
        (lambda: causal() | any_kind(True), "a mask composes with masks, got bool"),
    ],
)
def test_making_a_mask_names_the_argument(make: Any, message: str) -> None:
    with raises(message):
        make()


MISFITS = [
    (prefix(np.array([1, 2, 3])), "n_B has B=3, which neither is 1 nor equals B=2"),
    (segments(IDS_BT[:, :3]), "q_ids_BT has T=3, which neither is 1 nor equals T=5"),
    (segments(IDS_BT), "kv_ids_BS has S=5, which neither is 1 nor equals S=7"),
    (segments(IDS_BT[:, :1], KV_IDS_BS), "q_ids_BT has T=1 but the other arguments have T=5"),
    (segments(IDS_BT, IDS_BT[:, :1]), "kv_ids_BS has S=1 but the other arguments have S=7"),
    (segments(IDS_BT, np.zeros((3, S), int)), "kv_ids_BS has B=3, which neither is 1 nor"),
    (lengths(q_B=np.array([1, 2, 3])), "q_B has B=3, which neither is 1 nor equals B=2"),
    (lengths(kv_B=np.array([1, 2, 3])), "kv_B has B=3, which neither is 1 nor equals B=2"),
    (dense(DENSE[:, :2]), "mask_BNTS has N=2, which neither is 1 nor equals N=3"),
    (dense(DENSE[:, :, :, :3]), "mask_BNTS has S=3, which neither is 1 nor equals S=7"),
    (where(lambda b, n, t, s: s), "where(fn): fn must return bool, got int32"),
    (where(lambda b, n, t, s: (t < s)[0]), "where(fn): fn must return rank 4"),
]


@pytest.mark.parametrize(("mask", "message"), MISFITS, ids=[m for _, m in MISFITS])
@pytest.mark.parametrize(
    "compose",
    [lambda m: m, lambda m: ~m, lambda m: causal() & m, lambda m: m | causal()],
    ids=["alone", "not", "and", "or"],
)
def test_using_a_mask_names_what_does_not_fit(mask: Mask, compose: Any, message: str) -> None:
    with raises(message):
        compose(mask).materialize(T, S, B=B, N=N)
    if "where" not in message:
        with raises(message):
            compose(mask).check(Sizes(B=B, N=N, T=T, S=S))


def test_batch_dependent_masks_want_the_batch_named() -> None:
    with raises("mask_BNTS has B=2, which neither is 1 nor equals B=1"):
        dense(DENSE).materialize(T, S, N=N)
    with raises("n_B has B=2, which neither is 1 nor equals B=1"):
        prefix(np.array([1, 3])).materialize(T, S)
