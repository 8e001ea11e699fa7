"""What runs, what would, what is refused, and how much memory it takes."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from jax_attn import (
    alibi,
    alibi_slopes,
    causal,
    dense_weights,
    dispatch,
    dot_product_attention,
    explain,
    segments,
    strict,
    where,
    window,
)
from jax_attn.kernels.fused import Simple, simple
from jax_attn.kernels.processor import backend


def struct(S: int, H: int = 8, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, S, 2, H), dtype)


def test_few_pairs_are_written_out_and_many_are_not() -> None:
    assert explain(struct(256), struct(256), struct(256)).chosen == "dense"
    assert explain(struct(257), struct(256), struct(256)).chosen == "blockwise"
    with strict():
        assert explain(struct(8), struct(8), struct(8)).chosen == "blockwise"


def test_every_implementation_is_accounted_for() -> None:
    told = explain(struct(4096), struct(4096), struct(4096))
    assert {told.chosen, *told.others} == set(dispatch.IMPLEMENTATIONS)
    assert told.others["native"].startswith("is not compiled here: run python -m jax_attn.compile")
    assert told.others["cudnn"] == "needs a GPU, and JAX runs on cpu"
    assert told.others["splash"] == "needs a TPU, and JAX runs on cpu"
    assert told.others["dense"] == "would run, but takes O(T·S) memory"
    if importlib.util.find_spec("tokamax") is None:
        assert told.others["tokamax"].startswith("is not installed")
    first, *rest = str(told).splitlines()
    assert first == f"blockwise: {told.why}"
    assert "  not cudnn: needs a GPU, and JAX runs on cpu" in rest


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_named_one_that_cannot_run_raises_with_its_reason(name: str) -> None:
    x_BTNH = jnp.ones((1, 5, 2, 3))
    with pytest.raises(ValueError, match=f"implementation='{name}' needs a"):
        dot_product_attention(x_BTNH, x_BTNH, x_BTNH, implementation=name)
    told = explain(x_BTNH, x_BTNH, x_BTNH, implementation=name)
    assert told.chosen is None
    assert told.why.startswith(f"{name} was named, but needs a")


def test_unknown_names_are_listed() -> None:
    x_BTNH = jnp.ones((1, 5, 2, 3))
    for call in (dot_product_attention, explain):
        with pytest.raises(ValueError, match=r"None or one of 'dense', 'blockwise', .*'flash'"):
            call(x_BTNH, x_BTNH, x_BTNH, implementation="flash")


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="k_BSKH has H=9 but q_BTNH has H=8"):
        explain(struct(5), struct(5, H=9), struct(5))


def test_strict_reaches_into_compiled_functions() -> None:
    x_BTNH = jnp.ones((1, 5, 2, 3))
    attend = jax.jit(lambda x: dot_product_attention(x, x, x, implementation="dense"))
    attend(x_BTNH)
    with strict(), pytest.raises(ValueError, match=re.escape("'dense' takes O(T·S) memory (T=5")):
        attend(x_BTNH)
    attend(x_BTNH)
    with strict(), pytest.raises(ValueError, match=re.escape("dense_weights takes O(T·S) memory")):
        dense_weights(x_BTNH, x_BTNH)


@pytest.mark.parametrize("order", ["gradient", "gradient of gradient"])
def test_memory_is_linear_and_the_program_does_not_grow(order: str) -> None:
    """Temporaries double with S, nothing has T·S elements, and the HLO keeps its length."""
    made = []
    for S in (2048, 4096):
        x_BTNH = jnp.zeros((1, S, 2, 8))

        def loss(q):
            return dot_product_attention(q, q, q, mask=causal(), implementation="blockwise").sum()

        def twice(q):
            return jnp.square(jax.grad(loss)(q)).sum()

        derive = jax.grad(loss if order == "gradient" else twice)
        program = jax.jit(derive).lower(x_BTNH).compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None
        assert memory is not None
        assert f"{S},{S}" not in text
        made.append((memory.temp_size_in_bytes, text.count("\n")))
    (small, short), (large, long) = made
    assert large < 2.2 * small
    assert long < 1.1 * short


def test_a_mesh_says_what_a_program_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert backend() == "tpu"
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert backend() == "cpu"


def test_works_per_shard_with_gradients() -> None:
    """Inside shard_map an array may vary over the mesh or not; both forms give the whole's."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (4, 7, 2, 5)) for key in keys)
    slopes_N = alibi_slopes(2)

    def loss(q, k, v, slopes_N, implementation):
        out = dot_product_attention(
            q, k, v, mask=causal(), score=alibi(slopes_N), implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    def shard(q, k, v, slopes_N):
        return jax.lax.psum(loss(q, k, v, slopes_N, "blockwise"), "data")

    spec = (P("data"), P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=P()))
    got = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3)))(q, k, v, slopes_N)
    want = jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, slopes_N, "dense")
    for a, b in zip(got, want, strict=True):
        assert jnp.abs(a - b).max() < 8 * 1.2e-7 * jnp.abs(b).max()


def test_functions_may_close_over_traced_arrays() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 7, 2, 5)) for i in range(3))

    def loss(weight, limit, implementation):
        mask = where(lambda b, n, t, s: s < limit + t)
        out = dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            score=lambda logits, b, n, t, s: logits * weight,
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out))

    got, want = (
        jax.jit(jax.value_and_grad(loss), static_argnums=2)(0.7, 2, name)
        for name in ("blockwise", "dense")
    )
    assert abs(got[0] - want[0]) < 1e-5
    assert abs(got[1] - want[1]) < 1e-5
    assert want[1] != 0


def test_masks_that_the_kernels_of_others_know() -> None:
    ids = jnp.zeros((1, 4), jnp.int32)
    assert simple(None) == Simple()
    assert simple(causal() & window(3, 5)) == Simple(3, 0)
    read = simple(causal() & segments(ids))
    assert read is not None
    assert len(read.segments) == 1
    assert simple(causal() | window(3)) is None
    assert simple(~causal()) is None
