"""Tests of jax_attn.softmax: the laws of the algebra, and its numbers against float64.

In every tolerance below, a number that comes out of a few rounded steps on numbers of magnitude
at most `size` may be off by (steps)·eps·size; a sum over S keys takes S more steps. Exponents
round too, by eps·|gap|, but each is weighted by e^gap, and e^gap·gap is below 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn.softmax import Finished, Summary, empty, finish, merge, sink, summarize

R, S, E, P = 5, 13, 3, 4  # rows, keys, width of values, parts
EPS = float(np.finfo(np.float32).eps)
STEPS = S + 8 * P + 8  # a sum over the keys, eight operations a merge, and the last division


def make_logits(
    seed: int, offset: float, spread: float, absent: float, emptied: set[int]
) -> np.ndarray:
    random = np.random.default_rng(seed)
    s_RS = random.normal(offset, spread, (R, S)).astype(np.float32)
    s_RS[random.random((R, S)) < absent] = -np.inf
    s_RS[sorted(emptied)] = -np.inf
    return s_RS


logits = st.builds(
    make_logits,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 300.0, -300.0, 1e4, -1e4]),
    st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    st.sampled_from([0.0, 0.3, 0.9]),
    st.sets(st.integers(0, R - 1), max_size=R),
)
partitions = st.lists(
    st.lists(st.integers(0, P - 1), min_size=S, max_size=S), min_size=R, max_size=R
).map(np.array) | st.lists(st.integers(0, P - 1), min_size=S, max_size=S).map(
    lambda parts: np.tile(parts, (R, 1))
)

V_SE = np.random.default_rng(0).normal(size=(S, E)).astype(np.float32)


def part(s_RS: Any, v_SE: Any = V_SE) -> Summary:
    """One part, whose values are a pytree: a vector and a number a row."""
    return summarize(s_RS, lambda e_RS: {"v": e_RS @ v_SE, "first": e_RS @ v_SE[:, 0]})


class Oracle(NamedTuple):
    p: np.ndarray
    value: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    square: np.ndarray


def oracle(s_RS: Any, v_SE: Any = V_SE) -> Oracle:
    """The textbook formulas, row by row, in float64."""
    rows = []
    for s in np.asarray(s_RS, np.float64):
        there = s > -np.inf
        p = np.zeros(s.shape)
        lse, entropy = -np.inf, 0.0
        if there.any():
            e = np.exp(s[there] - s[there].max())
            p[there] = e / e.sum()
            lse = np.log(e.sum()) + s[there].max()
            entropy = -sum(x * np.log(x) for x in p if x > 0)
        rows.append((p, p @ np.asarray(v_SE, np.float64), lse, entropy, (p**2).sum()))
    return Oracle(*(np.array(column) for column in zip(*rows, strict=True)))


def assert_near(actual: Any, expected: Any, size: Any, steps: int = STEPS) -> None:
    actual = np.asarray(actual, np.float64)
    same = actual == expected  # also -inf
    with np.errstate(invalid="ignore"):  # inf - inf, where they are the same
        error = np.where(same, 0.0, abs(actual - expected))
    assert (error <= steps * EPS * size).all(), (error / EPS).max()


def assert_finished(done: Finished, true: Oracle) -> None:
    size = abs(V_SE).max()
    assert_near(done.value["v"], true.value, size)
    assert_near(done.value["first"], true.value[:, 0], size)
    here = np.where(np.isinf(true.lse), 0.0, abs(true.lse))
    assert_near(done.lse, true.lse, here / STEPS + 1)  # the offset is rounded once
    assert_near(done.entropy, true.entropy, 1 + np.log(S))
    assert_near(done.square, true.square, 1.0)


@jax.jit
def parts_of(s_RS: jax.Array, parts_RS: jax.Array, v_SE: jax.Array) -> list[Summary]:
    """Cut keys into P parts, row by row; a key of another part is not there."""
    return [part(jnp.where(parts_RS == i, s_RS, -jnp.inf), v_SE) for i in range(P)]


def left_fold(parts: list[Summary]) -> Summary:
    return merge(merge(merge(merge(empty(parts[0]), parts[0]), parts[1]), parts[2]), parts[3])


def right_fold(parts: list[Summary]) -> Summary:
    return merge(parts[0], merge(parts[1], merge(parts[2], merge(parts[3], empty(parts[0])))))


def tree_fold(parts: list[Summary]) -> Summary:
    return merge(merge(parts[3], parts[1]), merge(parts[0], parts[2]))


FOLDS = [jax.jit(fold) for fold in (left_fold, right_fold, tree_fold)]


# The laws.


@given(logits, partitions)
def test_any_partition_merges_to_the_whole_in_any_order(
    s_RS: np.ndarray, parts_RS: np.ndarray
) -> None:
    parts = parts_of(s_RS, parts_RS, V_SE)
    true = oracle(s_RS)
    assert_finished(finish(part(s_RS)), true)
    for fold in FOLDS:
        assert_finished(finish(fold(parts)), true)


@given(logits, partitions)
def test_merge_is_commutative_to_the_bit(s_RS: np.ndarray, parts_RS: np.ndarray) -> None:
    parts = parts_of(s_RS, parts_RS, V_SE)
    jax.tree.map(
        np.testing.assert_array_equal, merge(parts[0], parts[1]), merge(parts[1], parts[0])
    )


@given(logits)
def test_empty_is_the_identity_to_the_bit(s_RS: np.ndarray) -> None:
    one = part(s_RS)
    nothing = empty(one)
    for merged in (merge(one, nothing), merge(nothing, one)):
        jax.tree.map(np.testing.assert_array_equal, merged, one)
    jax.tree.map(np.testing.assert_array_equal, merge(nothing, nothing), nothing)
    jax.tree.map(np.testing.assert_array_equal, part(s_RS[:, :0], V_SE[:0]), nothing)


@pytest.mark.parametrize("cuts", [(0, 5, 13), (7, 7), (1, 2, 3), (13, 13, 13)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_slices_of_any_length_merge_to_the_whole(cuts: tuple[int, ...], offset: float) -> None:
    s_RS = make_logits(1, offset, 2.0, 0.2, {3})
    total = empty(part(s_RS))
    for first, end in zip((0, *cuts), (*cuts, S), strict=True):
        total = merge(total, part(s_RS[:, first:end], V_SE[first:end]))
    assert_finished(finish(total), oracle(s_RS))


@pytest.mark.parametrize("offset", [300.0, -300.0, 1e4, -1e4])
def test_offsets_leave_entropy_accurate(offset: float) -> None:
    """log Σe^s - Σp·s would be off by eps·offset: three digits lost at 1e4."""
    s_RS = np.round(make_logits(2, 0.0, 2.0, 0.0, set()) * 8) / 8  # exact at any of the offsets
    plain, moved = (oracle(s_RS + shift).entropy for shift in (0.0, offset))
    np.testing.assert_allclose(moved, plain, rtol=1e-12)
    parts = parts_of(s_RS + np.float32(offset), np.arange(S) % P + np.zeros((R, 1), int), V_SE)
    for fold in FOLDS:
        error = abs(np.asarray(finish(fold(parts)).entropy, np.float64) - plain)
        assert error.max() < EPS * 2 * np.log(S) * 4 < EPS * abs(offset) / 4


def test_parts_far_apart_merge_without_overflow() -> None:
    """The most negative number is what additive masks hold; times a count it is -inf."""
    s_RS = make_logits(12, 0.0, 3.0, 0.0, set())
    s_RS[0, : S // 2] = np.finfo(np.float32).min
    s_RS[1] = np.where(np.arange(S) * P // S, 1e4, -1e4)
    s_RS[2, : S // 2] = np.finfo(np.float32).min
    s_RS[2, S // 2 :] = -np.inf
    s_RS[3] = np.finfo(np.float32).min
    parts = parts_of(s_RS, np.arange(S) * P // S + np.zeros((R, 1), int), V_SE)
    for fold in FOLDS:
        assert_finished(finish(fold(parts)), oracle(s_RS))


def test_a_nan_poisons_its_row_alone_and_is_not_taken_for_an_empty_one() -> None:
    s_RS = make_logits(3, 0.0, 1.0, 0.0, set())
    s_RS[2, 4] = np.nan
    whole, clean = part(s_RS), part(np.zeros((R, S), np.float32))
    for total in (whole, merge(whole, empty(whole)), merge(clean, whole), merge(whole, clean)):
        for field in outputs(total):
            bad = np.isnan(np.asarray(field)).reshape(R, -1)
            assert bad[2].all()
            assert not bad[[0, 1, 3, 4]].any()


def test_leading_axes_are_rows_and_trailing_axes_are_values() -> None:
    random = np.random.default_rng(4)
    s, v = (
        jnp.asarray(random.normal(size=size), jnp.float32) for size in ((2, 5, 7), (2, 7, 3, 11))
    )
    one, other = (
        summarize(s[..., i], lambda e, i=i: jnp.einsum("BTS,BSNE->BTNE", e, v[:, i]))
        for i in (slice(3), slice(3, None))
    )
    done = finish(merge(one, other))
    assert done.value.shape == (2, 5, 3, 11)
    for b in range(2):
        true = oracle(s[b], v[b].reshape(7, -1))
        assert_near(done.value[b].reshape(5, -1), true.value, abs(v).max())
        assert_near(done.entropy[b], true.entropy, 1 + np.log(S))


# Derivatives.


def outputs(total: Summary) -> tuple[Any, ...]:
    done = finish(total)
    return done.value["v"], done.lse, done.entropy, done.square


COTANGENTS = tuple(
    np.random.default_rng(5).normal(size=size).astype(np.float32)
    for size in ((R, E), (R,), (R,), (R,))
)


def true_gradients(s_RS: np.ndarray, weight: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """ds = p·[(g_o·v - g_o·o) + g_lse - g_H (log p + H) + 2 g_c (p - c)],  dv = p^T g_o."""
    true = oracle(s_RS)
    go, gl, gh, gc = (
        w * np.asarray(g, np.float64) for w, g in zip(weight, COTANGENTS, strict=True)
    )
    p, V = true.p, V_SE.astype(np.float64)
    log_p = np.log(np.where(p > 0, p, 1.0))
    inner = (go @ V.T - (go * true.value).sum(-1, keepdims=True)) + gl[:, None]
    inner = inner - gh[:, None] * (log_p + true.entropy[:, None])
    inner = inner + 2 * gc[:, None] * (p - true.square[:, None])
    return p * inner, p.T @ go


@jax.jit
def gradients(
    s_RS: jax.Array, parts_RS: jax.Array, cotangents: Any
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    def through(fold: Any) -> Any:
        def f(s: jax.Array, v: jax.Array) -> Any:
            return outputs(fold(parts_of(s, parts_RS, v)))

        return jax.vjp(f, s_RS, jnp.asarray(V_SE))[1](cotangents)

    whole = jax.vjp(lambda s, v: outputs(part(s, v)), s_RS, jnp.asarray(V_SE))[1](cotangents)
    return (whole, *(through(fold) for fold in (left_fold, right_fold, tree_fold)))


@given(
    logits,
    partitions,
    st.sampled_from([(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]),
)
def test_gradients_of_parts_whole_and_formula_agree(
    s_RS: np.ndarray, parts_RS: np.ndarray, weight: tuple[float, ...]
) -> None:
    ds, dv = true_gradients(s_RS, weight)
    cotangents = tuple(np.float32(w) * g for w, g in zip(weight, COTANGENTS, strict=True))
    # ds sums the paths through value (E products), lse, entropy and square, each below `size`.
    size = sum(abs(g).max() for g in cotangents) * (1 + np.log(S)) * E * abs(V_SE).max()
    for ds_part, dv_part in gradients(s_RS, parts_RS, cotangents):
        assert_near(ds_part, ds, size)
        assert_near(dv_part, dv, R * abs(cotangents[0]).max())
        assert (np.asarray(ds_part)[np.isinf(s_RS)] == 0).all()


def test_row_without_keys_is_zero_with_gradients_exactly_zero() -> None:
    s_RS = make_logits(6, 0.0, 1.0, 0.3, {0, 3})
    done = finish(part(s_RS))
    for row in (0, 3):
        assert not np.asarray(done.value["v"])[row].any()
        assert (done.lse[row], done.entropy[row], done.square[row]) == (-np.inf, 0, 0)
    everything_gone = np.full((R, S), -np.inf, np.float32)
    parts_RS = np.arange(S) % P + np.zeros((R, 1), int)
    for ds, dv in gradients(everything_gone, parts_RS, COTANGENTS):
        np.testing.assert_array_equal(ds, np.zeros((R, S)))
        np.testing.assert_array_equal(dv, np.zeros((S, E)))
    for ds, _ in gradients(s_RS, parts_RS, COTANGENTS):
        np.testing.assert_array_equal(np.asarray(ds)[[0, 3]], np.zeros((2, S)))
        assert np.isfinite(ds).all()
        assert np.asarray(ds)[[1, 2, 4]].any()


def test_no_nan_is_hidden_and_the_maximum_has_no_gradient() -> None:
    gone = jnp.full((R, S), -jnp.inf)
    with jax.debug_nans(True):  # checks every step, as nothing here is compiled as a whole
        done, pull = jax.vjp(lambda s: outputs(merge(part(s), part(s))), gone)
        ds = pull(COTANGENTS)[0]
    assert not np.asarray(ds).any()
    assert not np.asarray(done[0]).any()
    assert not np.asarray(jax.jacrev(lambda s: part(s).maximum)(jnp.ones((R, S)))).any()


@pytest.mark.parametrize("fold", [left_fold, tree_fold])
def test_jvp_is_the_gradient_times_the_tangent(fold: Any) -> None:
    s_RS = make_logits(7, 300.0, 2.0, 0.2, {1})
    random = np.random.default_rng(8)
    ds, dv = (random.normal(size=x.shape).astype(np.float32) for x in (s_RS, V_SE))
    parts_RS = random.integers(0, P, (R, S))

    @jax.jit
    def pushed(s: jax.Array, v: jax.Array) -> Any:
        return jax.jvp(lambda s, v: outputs(fold(parts_of(s, parts_RS, v))), (s, v), (ds, dv))[1]

    tangents = pushed(s_RS, V_SE)
    for i, tangent in enumerate(tangents):
        true_ds, true_dv = true_gradients(s_RS, tuple(float(i == j) for j in range(4)))
        expected = (true_ds * ds).sum() + (true_dv * dv).sum()
        assert np.isfinite(tangent).all()
        size = S * abs(ds).max() * abs(COTANGENTS[i]).sum() * (1 + np.log(S)) * E * abs(V_SE).max()
        assert_near((np.asarray(tangent, np.float64) * COTANGENTS[i]).sum(), expected, size)


def true_hessians(s: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Second derivatives of value, lse, entropy and square of one row, in float64."""
    p = np.exp(s - s.max())
    p /= p.sum()
    rise = np.diag(p) - np.outer(p, p)  # dp_i / ds_j
    mean, log_p = p @ s, np.log(p)
    entropy, c = -(p @ log_p), p @ p
    value = rise * (v - p @ v)[:, None] - np.outer(p, p * (v - p @ v))
    slope = np.diag(p) - np.outer(p, p * (1 + s - mean))
    second = -rise * (log_p + entropy)[:, None] - slope
    square = 2 * rise * (p - c)[:, None] + 2 * p[:, None] * (rise - 2 * (p * (p - c))[None])
    return [value, rise, second, square]


def test_gradient_of_gradient_is_the_second_derivative() -> None:
    there = np.array([True, True, False, True, True, True, False])
    s = np.where(there, np.random.default_rng(9).normal(size=7), -np.inf).astype(np.float32)
    v = V_SE[:7, 0]

    def merged(s: jax.Array) -> jax.Array:
        cuts = (slice(0, 2), slice(2, 3), slice(3, 7))  # the middle part has no key
        one, none, other = (summarize(s[None, i], lambda e, i=i: e @ v[i]) for i in cuts)
        return jnp.stack(finish(merge(merge(none, one), other)))[:, 0]

    twice = jax.jit(jax.jacrev(jax.jacrev(merged)))
    seconds = np.asarray(twice(s))
    expected = true_hessians(np.asarray(s, np.float64)[there], v.astype(np.float64)[there])
    for second, true in zip(seconds, expected, strict=True):
        assert_near(second[np.ix_(there, there)], true, (1 + np.log(S)) * (1 + abs(v).max()))
        assert not second[~there].any()
        assert not second[:, ~there].any()
    gone = np.full(7, -np.inf, np.float32)
    assert not np.asarray(twice(gone)).any()


# The sink.


@given(logits, st.sampled_from([0.0, -3.0, 5.0, 300.0, -300.0, 1e4, -1e4]))
def test_sink_is_one_more_key_with_value_zero(s_RS: np.ndarray, z: float) -> None:
    z_R = np.linspace(z, z + 1, R, dtype=np.float32)
    row = part(s_RS)
    true = oracle(np.column_stack([s_RS, z_R]), np.vstack([V_SE, np.zeros(E)]))
    assert_finished(finish(merge(row, sink(jnp.asarray(z_R), row))), true)
    assert_finished(finish(merge(sink(jnp.asarray(z_R), row), row)), true)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    row = part(make_logits(10, 0.0, 1.0, 0.3, {2}))
    nothing = sink(jnp.full((1,), -jnp.inf), row)
    jax.tree.map(np.testing.assert_array_equal, nothing, empty(row))
    jax.tree.map(np.testing.assert_array_equal, merge(nothing, row), row)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_gradients_reach_the_sink(offset: float) -> None:
    """They are those of the added key; one logit for all rows collects them over the rows."""
    s_RS = make_logits(11, offset, 1.0, 0.3, {2})
    z = np.float32(offset + 0.5)

    @jax.jit
    def pulled(z_1_or_R: jax.Array, s: jax.Array) -> Any:
        def with_sink(z: jax.Array, s: jax.Array) -> Any:
            row = part(s)
            return outputs(merge(row, sink(z, row)))

        return jax.vjp(with_sink, z_1_or_R, s)[1](COTANGENTS)

    true = oracle(np.column_stack([s_RS, np.full(R, z)]), np.vstack([V_SE, np.zeros(E)]))
    go, gl, gh, gc = (np.asarray(g, np.float64) for g in COTANGENTS)
    p = true.p[:, -1]
    inner = -(go * true.value).sum(-1) + gl - gh * (np.log(p) + true.entropy)
    dz_R = p * (inner + 2 * gc * (p - true.square))
    size = sum(abs(g).max() for g in COTANGENTS) * (1 + np.log(S)) * E * abs(V_SE).max()
    dz, ds = pulled(np.full(1, z), s_RS)
    assert_near(dz, dz_R.sum(), R * size)
    assert np.isfinite(ds).all()
    assert not np.asarray(ds)[2].any()
    assert_near(pulled(np.full(R, z), s_RS)[0], dz_R, size)
