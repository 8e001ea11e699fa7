"""A key/value cache whose entries lie on several devices is one cache."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_attn as a
from jax_attn import rope
from tests import formulas
from tests.context_test import jit, mesh_of

B, S, D, N, K, H, V, L = 2, 24, 12, 8, 4, 4, 11, 2
LAYER = partial(
    a.init_block,
    D=D,
    attention=partial(a.init_attention, D=D, N=N, K=K, H=H, sinks=True),
    mlp=partial(a.init_mlp, D=D, F=8),
)
MODEL = formulas.draw(partial(a.init_language_model, V=V, D=D, L=L, layer=LAYER), 3, scale=0.5)
ATTENTION = jax.tree.map(lambda leaf: leaf[0], MODEL["layers"]["attention"])
X_BTD = jnp.asarray(np.float32(np.random.default_rng(0).normal(size=(B, S, D))))
ROUGH_BNTS = np.random.default_rng(1).random((B, 1, 5, S)) < 0.7
EPS = float(np.finfo(np.float32).eps)


def close(got: Any, want: Any) -> None:
    """Float32 sums in another order: 16 roundings of the largest number."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=16 * EPS * float(np.abs(b).max()), equal_nan=True
        ),
        got,
        want,
    )


def feed(context: str | None, params: Any, x_BTD: jax.Array) -> Any:
    """A prompt of 9 tokens, which crosses two borders of 4 devices, then 5 more with a rough mask,
    then one that lies on the last device; all that came out, and the cache."""
    shape = (B, S // 4, K, H) if context == "inside" else (B, S, K, H)
    cache = {name: jnp.zeros(shape) for name in ("k_BSKH", "v_BSKE")}
    attend = partial(
        a.attention, rope=rope.plain(H), context=None if context is None else "split_kv"
    )
    outs = []
    for first, count, mask in (
        (0, 9, a.causal()),
        (jnp.int32(9), 5, jnp.asarray(ROUGH_BNTS)),
        (22, 1, None),
    ):
        part = x_BTD[:, first : first + count] if isinstance(first, int) else x_BTD[:, 9:14]
        more = {"mask": mask, "observe": ("entropy", "argmax_key"), "q_offset": first}
        y_BTD, aux = attend(params, part, cache=cache, **more)
        cache = aux["cache"]
        outs.append((y_BTD, aux["seen"]))
    return outs, cache


def one_device() -> Any:
    return jit(partial(feed, None))(ATTENTION, X_BTD)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "sizes", [{"context": 4}, {"data": 2, "context": 4}, {"context": 2, "model": 4}], ids=str
)
def test_prefill_and_steps_under_a_mesh(sizes: dict[str, int]) -> None:
    with jax.set_mesh(mesh_of(**sizes)):
        close(jit(partial(feed, "whole"))(ATTENTION, X_BTD), one_device())


def test_prefill_and_steps_inside_shard_map() -> None:
    run = jax.shard_map(
        partial(feed, "inside"),
        mesh=mesh_of(context=4),
        in_specs=P(),
        out_specs=(P(), P(None, "context")),
    )
    close(jit(run)(ATTENTION, X_BTD), one_device())


def model(context: str | None) -> Any:
    return partial(
        a.language_model,
        attend=partial(a.attention, mask=a.causal(), rope=rope.plain(H), context=context),
    )


def test_generation_makes_the_same_tokens() -> None:
    prompt_BT = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, 7)))

    def run(context: str | None) -> jax.Array:
        key = jax.random.key(4)
        return jit(partial(a.generate, steps=18, temperature=2.0, model=model(context), key=key))(
            MODEL, prompt_BT
        )

    want = run(None)
    with jax.set_mesh(mesh_of(context=4)):
        np.testing.assert_array_equal(run("split_kv"), want)
    assert len(np.unique(want[:, 7:])) > 3


def test_a_step_moves_nothing_of_the_cache() -> None:
    """What travels is what comes out of the heads, and a device holds its part of the cache."""
    mesh = mesh_of(context=8)
    held = jax.ShapeDtypeStruct(
        (B, 4096, K, H), "float32", sharding=jax.NamedSharding(mesh, P(None, "context"))
    )

    def step(params: Any, x_BTD: jax.Array, cache: Any, q_offset: jax.Array) -> Any:
        more = {"cache": cache, "q_offset": q_offset, "context": "split_kv"}
        y_BTD, aux = a.attention(params, x_BTD, **more)
        return y_BTD, aux["cache"]

    with jax.set_mesh(mesh):
        made = (
            jax.jit(step, donate_argnums=2)
            .lower(ATTENTION, X_BTD[:, :1], {"k_BSKH": held, "v_BSKE": held}, jnp.int32(5))
            .compile()
        )
    text = made.as_text() or ""
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    assert "all-reduce" in text
    spent = made.memory_analysis()
    assert spent is not None
    part = 2 * B * 4096 // 8 * K * H * 4
    assert part <= spent.argument_size_in_bytes < 1.2 * part
    assert spent.alias_size_in_bytes == part
    assert spent.temp_size_in_bytes < 2 * part  # k and v with heads before keys


@pytest.mark.parametrize("q_offset", [20, jnp.int32(20), jnp.int32(-1)], ids=str)
def test_a_cache_that_is_full(q_offset: Any) -> None:
    cache = {name: jnp.zeros((B, S, K, H)) for name in ("k_BSKH", "v_BSKE")}

    def step(cache: Any, at: Any) -> Any:
        more = {"cache": cache, "context": "split_kv", "q_offset": at}
        return a.attention(ATTENTION, X_BTD[:, :5], **more)

    with jax.set_mesh(mesh_of(context=4)):
        if isinstance(q_offset, int):
            with pytest.raises(ValueError, match=r"S=24, too short for q_offset=20 \+ T=5 tokens"):
                step(cache, q_offset)
        else:
            y_BTD, _ = jit(step)(cache, q_offset)
            assert np.isnan(y_BTD).all()


def test_what_does_not_go_with_a_split_cache() -> None:
    cache = {name: jnp.zeros((B, 23, K, H)) for name in ("k_BSKH", "v_BSKE")}
    with jax.set_mesh(mesh_of(context=4)):
        with pytest.raises(ValueError, match=r"context='ring' does not go with cache.*split_kv"):
            a.attention(ATTENTION, X_BTD[:, :1], cache=cache, context="ring")
        with pytest.raises(ValueError, match=r"k_BSKH has S=23, which the 4 devices .* context do"):
            a.attention(ATTENTION, X_BTD[:, :1], cache=cache, context="split_kv")
    with pytest.raises(ValueError, match=r"context='split_kv' needs the mesh axis 'context'"):
        a.attention(ATTENTION, X_BTD[:, :1], cache=cache, context="split_kv")
