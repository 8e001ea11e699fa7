"""Tests of jax_attn.params: leaves declared by name, drawn, counted and checked."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_attn.params import check_leaves, count, draw, fan_in, normal, ones, zeros

SIZES = {"D": 3, "F": 5, "N": 2, "H": 7}
LEAVES = {"w_in_DF": normal(1.0), "w_out_FD": normal(0.5), "scale_D": ones, "wq_DNH": normal(2.0)}


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


# Drawing.


def test_leaves_have_the_shapes_of_their_names() -> None:
    tree = draw(jax.random.key(0), LEAVES, SIZES)
    assert {name: leaf.shape for name, leaf in tree.items()} == {
        "w_in_DF": (3, 5),
        "w_out_FD": (5, 3),
        "scale_D": (3,),
        "wq_DNH": (3, 2, 7),
    }


@given(st.sets(st.sampled_from(["b_F", "bias_D", "sinks_N", "w_gate_DF"])), st.randoms())
def test_other_leaves_and_their_order_leave_a_leaf_bit_equal(extra: set[str], random: Any) -> None:
    names = [*LEAVES, *extra]
    random.shuffle(names)
    tree = draw(jax.random.key(1), {n: LEAVES.get(n, normal(3.0)) for n in names}, SIZES)
    for name, leaf in draw(jax.random.key(1), LEAVES, SIZES).items():
        np.testing.assert_array_equal(tree[name], leaf)


def test_each_leaf_and_each_key_draws_its_own_numbers() -> None:
    leaves = {"a_DF": normal(1.0), "b_DF": normal(1.0)}
    one, two = (draw(jax.random.key(seed), leaves, SIZES) for seed in (0, 1))
    drawn = [one["a_DF"], one["b_DF"], two["a_DF"], two["b_DF"]]
    numbers = np.concatenate([np.ravel(leaf) for leaf in drawn])
    assert np.unique(numbers).size == numbers.size


def test_normal_has_mean_zero_and_its_std() -> None:
    n, sigmas = 131 * 127, 5.0
    leaf = draw(jax.random.key(2), {"w_DF": normal(0.02)}, {"D": 131, "F": 127})["w_DF"]
    x = np.asarray(leaf, np.float64)
    assert abs(x.mean()) < sigmas * 0.02 / math.sqrt(n)
    assert abs(x.std() / 0.02 - 1) < sigmas / math.sqrt(2 * n)
    # The share beyond two standard deviations tells a normal from a truncated one.
    share = math.erfc(2 / math.sqrt(2))
    assert abs((abs(x) > 0.04).mean() - share) < sigmas * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("sizes", [(3,), (3, 5), (2, 3, 7)])
def test_fan_in_has_variance_one_over_the_product(sizes: tuple[int, ...]) -> None:
    expected = draw(jax.random.key(5), {"w_DF": normal(math.prod(sizes) ** -0.5)}, SIZES)
    np.testing.assert_array_equal(
        draw(jax.random.key(5), {"w_DF": fan_in(*sizes)}, SIZES)["w_DF"], expected["w_DF"]
    )


def test_draw_names_a_size_of_zero_that_fan_in_was_given() -> None:
    with raises("D (model width) must be an int >= 1, got 0"):
        draw(jax.random.key(0), {"w_DF": fan_in(0)}, {"D": 0, "F": 5})


def test_ones_and_zeros_are_what_they_say() -> None:
    tree = draw(jax.random.key(3), {"scale_D": ones, "bias_F": zeros}, SIZES)
    assert tree["scale_D"].tolist() == [1.0] * 3
    assert tree["bias_F"].tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_leaf_has_the_dtype(dtype: Any) -> None:
    tree = draw(jax.random.key(4), LEAVES, SIZES, dtype)
    assert {leaf.dtype for leaf in tree.values()} == {np.dtype(dtype)}


def test_draw_names_the_leaf_the_letter_and_the_dtype() -> None:
    with raises("w_DX needs a size for X (experts)"):
        draw(jax.random.key(0), {"w_DX": zeros}, SIZES)
    with raises("D (model width) must be an int >= 1, got -3"):
        draw(jax.random.key(0), {"w_D": zeros}, {"D": -3})
    with raises("dtype must be floating point, got int32"):
        draw(jax.random.key(0), {"w_D": zeros}, SIZES, jnp.int32)


# Checking.


def test_required_and_optional_leaves_pass() -> None:
    check_leaves("mlp", {"w_DF": 0}, ["w_DF"], ["b_F"])
    check_leaves("mlp", {"b_F": 0, "w_DF": 0}, ["w_DF"], ["b_F"])
    check_leaves("none", {}, [])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"w_DF": 0, "bF": 0},
            "mlp: unknown leaf 'bF', did you mean 'b_F'? Known: w_DF, b_F",
        ),
        ({"w_DF": 0, "momentum": 0}, "mlp: unknown leaf 'momentum'. Known: w_DF, b_F"),
        ({"w_DF": 0, 3: 0}, "mlp: unknown leaf 3. Known: w_DF, b_F"),
        ({"b_F": 0}, "mlp: leaf 'w_DF' is missing; params has: b_F"),
        ({}, "mlp: leaf 'w_DF' is missing; params has: "),
        ([0, 0], "mlp: params must be a dict of leaves, got list"),
        (None, "mlp: params must be a dict of leaves, got NoneType"),
    ],
)
def test_check_leaves_names_owner_and_leaf(params: Any, message: str) -> None:
    with raises(message):
        check_leaves("mlp", params, ["w_DF"], ["b_F"])


# Counting.


def test_count_sums_sizes_of_arrays_and_structs() -> None:
    tree = draw(jax.random.key(0), LEAVES, SIZES)
    expected = 3 * 5 + 5 * 3 + 3 + 3 * 2 * 7
    assert count(tree) == expected
    assert count({"layers": tree, "head": [jnp.ones(())]}) == expected + 1
    assert count(jax.eval_shape(lambda: tree)) == expected
    assert count({}) == 0
