"""Tests of jax_attn.shapes: what follows from the letters that a name ends in."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jax_attn.shapes import ALPHABET, Sizes, axes, dims, fits, floating, integer, shape, spec

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
SIZES = dict(zip(ALPHABET, PRIMES, strict=True))

suffixes = st.lists(st.sampled_from(sorted(ALPHABET)), min_size=1, max_size=5, unique=True)


def array(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


# The letters of a name.


@given(suffixes)
def test_axes_are_the_letters_behind_the_last_underscore(letters: list[str]) -> None:
    suffix = "".join(letters)
    for name in (f"x_{suffix}", f"w_in_{suffix}", f"B_{suffix}"):
        assert axes(name) == suffix


@pytest.mark.parametrize("name", ["length", "x_", "", "x_BTq", "x_btd", "x_BTD_y", "x_B1", "x_BQ"])
def test_name_without_a_suffix_has_no_axes(name: str) -> None:
    assert axes(name) == ""


# Sizes.


@given(suffixes)
def test_dims_binds_each_letter_to_its_size(letters: list[str]) -> None:
    suffix = "".join(letters)
    sizes = dims(**{f"x_{suffix}": array(*(SIZES[letter] for letter in letters))})
    assert sizes[suffix[::-1]] == tuple(SIZES[letter] for letter in letters[::-1])
    assert all(getattr(sizes, letter) == SIZES[letter] for letter in letters)
    assert not any(hasattr(sizes, letter) for letter in set(ALPHABET) - set(letters))


def test_dims_takes_anything_with_a_shape_and_skips_none() -> None:
    sizes = dims(x_BT=np.ones((2, 3)), y_TS=jnp.ones((3, 0)), bias_BNTS=None)
    assert (sizes.B, sizes.T, sizes.S) == (2, 3, 0)
    assert dims(bias_BNTS=None)[""] == ()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"q_BTNH": array(2, 3, 5, 7), "k_BSKH": array(2, 11, 5, 13)},
            "k_BSKH has H=13 but q_BTNH has H=7",
        ),
        (
            {"x_BT": array(2, 3), "y_TB": array(5, 2)},
            "y_TB has T=5 but x_BT has T=3",
        ),
        ({"x_BT": array(1, 3), "y_B": array(2)}, "y_B has B=2 but x_BT has B=1"),
        ({"x_BT": array(2, 3), "y_B": array(1)}, "y_B has B=1 but x_BT has B=2"),
        ({"x_DD": array(2, 3)}, "x_DD has D=3 but x_DD has D=2"),
        ({"x_BTD": array(2, 3)}, "x_BTD needs rank 3, one axis for each of B T D, but has rank 2"),
        ({"x_B": array()}, "x_B needs rank 1, one axis for each of B, but has rank 0: shape ()"),
        ({"length": array(2)}, "length has no axis suffix such as _BTD; known letters: BTSD"),
        ({"x_BT": [[1, 2]]}, "x_BT must be an array with axes BT, got list"),
        ({"x_BT": 3.0}, "x_BT must be an array with axes BT, got float"),
    ],
)
def test_dims_names_argument_letter_and_sizes(arrays: dict[str, Any], message: str) -> None:
    with raises(message):
        dims(**arrays)


def rebind_by_attribute(sizes: Sizes) -> None:
    sizes.T = 5


def rebind_by_key(sizes: Sizes) -> None:
    sizes["T"] = (5,)


def rebind_within_a_key(sizes: Sizes) -> None:
    sizes["ST"] = (7, 5)


@pytest.mark.parametrize("rebind", [rebind_by_attribute, rebind_by_key, rebind_within_a_key])
def test_sizes_refuses_to_rebind_a_letter(rebind: Any) -> None:
    sizes = Sizes(B=2, T=3)
    with raises("T=5 but T=3 is known already"):
        rebind(sizes)
    assert sizes["BT"] == (2, 3)


def test_sizes_takes_new_letters_and_the_same_size_again() -> None:
    sizes = Sizes(B=2, T=3)
    sizes.T, sizes.G = 3, 5
    sizes["TS"] = (3, 0)
    assert sizes["BTSG"] == (2, 3, 0, 5)


@pytest.mark.parametrize("T", [3, 1])
@pytest.mark.parametrize("S", [7, 1, 0])
def test_fits_takes_the_size_or_one(T: int, S: int) -> None:
    sizes = Sizes(B=2, N=5, T=3, S=S)
    fits(sizes, bias_BNTS=array(1, 5, T, S), n_B=None)
    fits(sizes, bias_BNTS=array(2, 1, T, 1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"bias_BNTS": array(1, 5, 3, 11)},
            "bias_BNTS has S=11, which neither is 1 nor equals S=7 of the other arguments",
        ),
        (
            {"n_B": array(3)},
            "n_B has B=3, which neither is 1 nor equals B=2 of the other arguments",
        ),
        (
            {"n_B": array(0)},
            "n_B has B=0, which neither is 1 nor equals B=2 of the other arguments",
        ),
        ({"n_B": array()}, "n_B needs rank 1 (B, size 1 to broadcast), but has rank 0: shape ()"),
        ({"n_B": [2, 3]}, "n_B must be an array with axes B, got list"),
        ({"n": array(2)}, "n has no axis suffix"),
    ],
)
def test_fits_names_argument_letter_and_sizes(arrays: dict[str, Any], message: str) -> None:
    with raises(message):
        fits(Sizes(B=2, N=5, T=3, S=7), **arrays)


def test_fits_tells_a_length_of_zero_from_other_lengths() -> None:
    with raises("x_BS has S=3, which neither is 1 nor equals S=0 of the other arguments"):
        fits(Sizes(B=2, S=0), x_BS=array(2, 3))


# Kinds of numbers.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, np.float64])
def test_floating_takes_floats_and_integer_names_them(dtype: Any) -> None:
    x = jax.ShapeDtypeStruct((2,), np.dtype(dtype))
    floating(x=x, y=None)
    with raises(f"tokens must be integers, got {np.dtype(dtype)}"):
        integer(ids=np.arange(2), tokens=x)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.int64])
def test_integer_takes_integers_and_floating_names_them(dtype: Any) -> None:
    x = np.zeros(2, dtype)
    integer(x=x, y=None)
    with raises(f"x must be floating point, got {np.dtype(dtype)}"):
        floating(x=x)


def test_bool_is_neither() -> None:
    for check in (floating, integer):
        with raises("got bool"):
            check(x=np.zeros(2, bool))


# Shapes of leaves.


@given(suffixes)
def test_shape_is_in_the_order_of_the_letters(letters: list[str]) -> None:
    expected = tuple(SIZES[letter] for letter in letters)
    assert shape(f"w_{''.join(letters)}", SIZES) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"D": 3}, "w_DF needs a size for F (MLP hidden width)"),
        ({"D": 3, "F": 0}, "F (MLP hidden width) must be an int >= 1, got 0"),
        ({"D": 3, "F": 5.0}, "F (MLP hidden width) must be an int >= 1, got 5.0"),
        ({"D": True, "F": 5}, "D (model width) must be an int >= 1, got True"),
    ],
)
def test_shape_names_the_letter(sizes: dict[str, Any], message: str) -> None:
    with raises(message):
        shape("w_DF", sizes)


# Specs.


@pytest.mark.parametrize(
    ("letters", "rules", "expected"),
    [
        ("DNH", {"D": "fsdp", "N": "model"}, PartitionSpec("fsdp", "model", None)),
        ("HND", {"D": "fsdp", "N": "model"}, PartitionSpec(None, "model", "fsdp")),
        ("LDF", {"D": ("data", "fsdp"), "F": None}, PartitionSpec(None, ("data", "fsdp"), None)),
        ("", {"D": "fsdp"}, PartitionSpec()),
    ],
)
def test_spec_has_one_entry_a_letter(letters: str, rules: Any, expected: PartitionSpec) -> None:
    assert spec(letters, rules) == expected
    assert len(spec(letters, rules)) == len(letters)


@pytest.mark.parametrize(
    ("letters", "rules", "message"),
    [
        ("DQ", {}, "unknown axis letter 'Q'; the alphabet is BTSDNKGHEFVLX"),
        ("D", {"d": "fsdp"}, "unknown axis letter 'd'"),
        ("DNH", {"D": "x", "H": "x"}, "mesh axis 'x' would shard both D and H of DNH"),
        ("DN", {"D": ("x", "y"), "N": "y"}, "mesh axis 'y' would shard both D and N of DN"),
        ("DN", {"D": "y", "N": ("x", "y")}, "mesh axis 'y' would shard both D and N of DN"),
    ],
)
def test_spec_names_the_letter_or_the_mesh_axis(letters: str, rules: Any, message: str) -> None:
    with raises(message):
        spec(letters, rules)


def test_rules_may_share_a_mesh_axis_that_one_array_does_not_use_twice() -> None:
    rules = {"D": "x", "F": "x", "B": "x"}
    assert spec("BT", rules) == PartitionSpec("x", None)
    assert spec("FN", rules) == PartitionSpec("x", None)
