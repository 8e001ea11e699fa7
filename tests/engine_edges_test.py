"""What a fold over blocks could get wrong and a formula over whole arrays would not."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_attn import (
    causal,
    dot_product_attention,
    explain,
    lengths,
    mean_of,
    segments,
    where,
)
from jax_attn.compile import build
from jax_attn.kernels import blockwise, columns, native, program
from tests.attention_cases import QUICK

jit = partial(jax.jit, compiler_options=QUICK)
DEVICES = 4


@pytest.fixture(autouse=True)
def small_blocks():
    with blockwise.block_limits((4, 5)):
        yield


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def near(got, want) -> None:
    """Equal but for 16 roundings of the largest."""
    eps = float(jnp.finfo(jnp.float32).eps)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=16 * eps * float(jnp.abs(b).max()))


def segmented(q, w, u, ids, implementation):
    return {"mask": causal() & segments(ids)}


def padded(q, w, u, ids, implementation):
    return {"mask": lengths(kv_B=ids[:, 0] + 3)}


def closed_over(q, w, u, ids, implementation):
    return {"mask": where(lambda b, n, t, s: ids[b, t] == ids[b, s])}


def weighted(q, w, u, ids, implementation):
    return {"score": lambda logits, b, n, t, s: logits * w[0, 0] * u}


def bent(q, w, u, ids, implementation):
    return {"score": lambda logits, b, n, t, s: jax.nn.softplus(logits)}


def looped(q, w, u, ids, implementation):
    def score(logits, b, n, t, s):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), logits)

    return {"score": score}


@pytest.mark.long
@pytest.mark.parametrize("options", [segmented, padded, closed_over, weighted, bent, looped])
def test_what_differs_from_shard_to_shard(options) -> None:
    """Masks and scores may close over arrays that are sharded, and over others that are not."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    sharded, whole = PartitionSpec("data"), PartitionSpec()
    # Weights near 1: larger ones make a logit's rounding as many times as large.
    q, w = random(DEVICES, 7, 2, 3), 1.0 + jnp.arange(DEVICES, dtype=jnp.float32)[:, None] / 8
    u, ids = jnp.float32(0.5), (jnp.arange(DEVICES)[:, None] + jnp.arange(7)[None]) // 3

    def loss(q, w, u, ids, implementation):
        more = options(q, w, u, ids, implementation)
        out, seen = dot_product_attention(
            q, q, q, **more, observe=("entropy", "self_mass"), implementation=implementation
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(seen["entropy"] + seen["self_mass"]))

    def shard(q, w, u, ids):
        return jax.lax.psum(loss(q, w, u, ids, "blockwise"), "data")

    def apart(q, w, u, ids):
        return sum(loss(q[i : i + 1], w[i : i + 1], u, ids[i : i + 1], "dense") for i in range(4))

    specs = (sharded, sharded, whole, sharded)
    split = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=whole)
    got, want = (
        jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, w, u, ids) for f in (split, apart)
    )
    near(got, want)


def test_an_explicit_mesh_is_refused_with_the_cure() -> None:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    q = jax.device_put(random(DEVICES, 7, 2, 3), jax.NamedSharding(mesh, PartitionSpec("data")))
    attend = partial(dot_product_attention, implementation="blockwise")
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"q_BTNH is sharded over \['data'\]"):
        jit(attend)(q, q, q)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_functions_are_asked_about_real_pairs_alone(implementation) -> None:
    """T is no multiple of 4, nor S of 5: what a function answers beyond must not matter."""
    T, S = 7, 11
    q, k = random(1, T, 2, 3), random(1, S, 2, 3, seed=1)
    table = jnp.log(1.0 + jnp.arange(S, dtype=jnp.float32))

    def loss(q, k, v, weight):
        def score(logits, b, n, t, s):
            return logits * weight / (T - t) + jnp.take(table, s) / jnp.sqrt(T - t)

        far = mean_of(lambda b, n, t, s: weight / (T - t) / (S - s), name="far")
        out, seen = dot_product_attention(
            q, k, v, score=score, observe=(far,), implementation=implementation
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(seen["far"])

    gradients = jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, k, jnp.float32(1.5))
    with blockwise.block_limits((T, S)):
        want = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, k, jnp.float32(1.5))
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    near(gradients, want)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_a_bias_behind_the_mask_does_not_matter(implementation) -> None:
    x = random(1, 7, 2, 3)
    bias = jnp.where(jnp.tril(jnp.ones((7, 7), bool)), 0.0, -jnp.inf)[None, None]

    def loss(weight, bias):
        out = dot_product_attention(
            x,
            x,
            x,
            bias_BNTS=bias,
            mask=causal(),
            score=lambda logits, b, n, t, s: weight * logits,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out))

    derive = jit(jax.value_and_grad(loss))
    near(derive(jnp.float32(1.5), bias), derive(jnp.float32(1.5), jnp.zeros_like(bias)))


def test_decoding_steps_share_a_program() -> None:
    q, k = random(1, 1, 2, 3), random(1, 40, 2, 3)
    attend = partial(dot_product_attention, q, k, k, mask=causal())
    attend(q_offset=3)
    programs = program._run._cache_size  # pyright: ignore[reportAttributeAccessIssue]
    before = programs()
    for offset in range(4, 9):
        attend(q_offset=offset)
    assert programs() == before
    assert explain(q, k, k, mask=causal()).chosen == "dense"
    long = jax.ShapeDtypeStruct((1, 8192, 2, 3), "float32")
    assert explain(q, long, long, mask=causal()).chosen == "dense"


@pytest.fixture
def compiled(monkeypatch):
    try:
        path = build()
    except RuntimeError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
    monkeypatch.setattr(native, "library", lambda: path)


def test_the_kernel_stays_out_of_programs_for_other_platforms(compiled) -> None:
    x = jax.ShapeDtypeStruct((1, 7, 2, 8), "float32")
    attend = partial(dot_product_attention, mask=causal(), implementation="native")
    for f in (attend, jax.grad(lambda *args: attend(*args).sum())):
        for platform, there in (("tpu", False), ("cpu", True)):
            text = jax.jit(f).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
            assert ("jax_attn_" in text) == there, platform


def test_gradients_of_the_kernel_in_bfloat16(compiled) -> None:
    """Σ dO·out of a rounded out would leave the rows of dS unbalanced, ten times the error."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(3 * rng.normal(size=(1, 16, 1, 8)), jnp.bfloat16) for _ in range(2))
    v = jnp.asarray(5 + rng.normal(size=(1, 16, 1, 8)), jnp.bfloat16)
    c = np.asarray(jnp.asarray(rng.normal(size=(1, 16, 1, 8)), jnp.bfloat16), np.float32)

    def derive(implementation, *inputs):
        def loss(q, k, v):
            out = dot_product_attention(q, k, v, mask=causal(), implementation=implementation)
            return jnp.sum(out * c.astype(out.dtype))

        return jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    exact = derive("dense", *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, rough, want in zip(
        derive("native", q, k, v), derive("dense", q, k, v), exact, strict=True
    ):
        error, unit = (np.linalg.norm(np.float32(x) - want) for x in (got, rough))
        assert error <= 1.5 * unit


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_what_is_common_to_all_logits_costs_the_entropy_nothing(offset) -> None:
    """Rows without keys beside it must not change the reference either."""
    q, k = random(1, 7, 2, 3), random(1, 11, 2, 3, seed=1)
    mask = lengths(q_B=np.array([5]))

    def entropy(offset, dtype=jnp.float32):
        bias = jnp.full((1, 1, 1, 1), offset, dtype)
        more = {"mask": mask, "bias_BNTS": bias, "observe": ("entropy",)}
        x = q.astype(dtype), k.astype(dtype), k.astype(dtype)
        return dot_product_attention(*x, **more, implementation="blockwise")[1]["entropy"]

    with jax.enable_x64(True):
        exact = jit(partial(entropy, dtype=jnp.float64))(0.0)
    # The logits themselves are rounded to the offset's last bit.
    error = np.abs(np.asarray(jit(entropy)(offset)) - np.asarray(exact))
    assert error.max() <= 3 * (1e-7 + 2.0**-24 * abs(offset))


@pytest.mark.parametrize("huge", [1e4, 3e38, np.inf, np.nan])
def test_the_entropy_of_a_row_does_not_depend_on_another_row(huge) -> None:
    q, k = random(1, 7, 2, 3), random(1, 11, 2, 3, seed=1)

    @jit
    def entropy(q):
        more = {"mask": lengths(kv_B=np.array([9])), "observe": ("entropy", "argmax_key")}
        return dot_product_attention(q, k, k, **more, implementation="blockwise")[1]

    got, want = entropy(q.at[:, 2].mul(huge)), entropy(q)
    for name in got:
        others = [np.delete(np.asarray(x[name]), 2, axis=1) for x in (got, want)]
        np.testing.assert_allclose(*others, rtol=0, atol=1e-6)


BAD = {
    "none": ({"k": None}, r"k_BSKH must be an array with axes BSKH, got None"),
    "number": ({"bias_BNTS": 3.0}, r"bias_BNTS must be a floating-point array, got float"),
    "list": ({"implementation": ["dense"]}, r"implementation must be None or one of"),
    "float8": ({"q": jnp.ones((1, 7, 2, 3), jnp.float8_e4m3fn)}, r"q_BTNH is float8_e4m3fn: cast"),
    "offset": ({"q_offset": 2**31}, r"q_offset must fit into int32, got 2147483648"),
    "scale": ({"scale": 10**400}, r"scale must be a finite number, got 1000"),
    "bool": ({"scale": jnp.bool_(True)}, r"scale must be a real scalar"),
    "key": (
        {"dropout_rate": 0.1, "dropout_key": jnp.zeros(5, jnp.uint32)},
        r"dropout_key must be one jax.random key, got shape \(5,\)",
    ),
    "score": ({"score": lambda logits: logits}, r"score\(logits, b, n, t, s\) failed: .*argument"),
    "complex": ({"score": lambda x, b, n, t, s: x * 1j}, r"score must return floating-point"),
    "all pairs": (
        {"score": lambda x, b, n, t, s: x + jnp.ones((1, 1, 7, 7))},
        r"\(it is called on blocks of pairs\), got \(1, 1, 7, 7\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name) -> None:
    given, says = BAD[name]
    x = {"q": random(1, 7, 2, 3), "k": random(1, 7, 2, 3), "v": random(1, 7, 2, 3)} | given
    q, k, v = (x.pop(part) for part in "qkv")
    with pytest.raises(ValueError, match=says):
        dot_product_attention(q, k, v, **x)


def test_no_width_to_compare_by() -> None:
    nothing, v = random(1, 7, 2, 0), random(1, 7, 2, 3)
    with pytest.raises(ValueError, match="q_BTNH has H=0"):
        dot_product_attention(nothing, nothing, v)


def test_numpy_arrays_take_the_dtype_that_jax_gives_them(recwarn) -> None:
    x: Any = np.ones((1, 7, 2, 3))
    bias: Any = np.zeros((1, 1, 7, 7))
    out = dot_product_attention(x, x, x, bias_BNTS=bias, mask=causal())
    assert out.dtype == jnp.float32
    assert not recwarn


def test_the_largest_key_is_found_where_its_logit_is_rounded_in_two_ways(monkeypatch) -> None:
    """As on a CPU where each copy of a logit is contracted otherwise: no entry is the maximum."""
    s = random(1, 2, 3, 5, 16).at[0, 0, 0, 0].set(-jnp.inf)
    exact = jnp.max
    monkeypatch.setattr(jnp, "max", lambda s, axis: exact(s, axis=axis) * (1 + 2**-22))
    _, first = columns._first_largest(s)
    np.testing.assert_array_equal(first, jnp.argmax(s, axis=-1))
