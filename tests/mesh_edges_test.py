"""Edges of meshes: axes of one entry, heads that fit badly, layouts, names that are wrong."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jax_attn as a
from jax_attn import rope, train

D = 8
# Of types that a checker would refuse.
RULES: Any = dict(a.PARAMS)
NONE: Any = None
FLOAT: Any = 8.0
INT64: Any = np.int64(8)


def params_of(N: int, K: int | None = None, **options: Any) -> Any:
    return a.init_attention(jax.random.key(0), D=D, N=N, K=K, H=4, **options)


def tokens(B: int, T: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, T, D))


def mesh_of(**sizes: int) -> Any:
    devices = int(np.prod(list(sizes.values())))
    return a.make_mesh(**sizes, devices=jax.devices()[:devices])


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mask", [None, a.causal()], ids=["all", "causal"])
@pytest.mark.parametrize("context", ["ring", "zigzag", "all_to_all", None])
def test_one_batch_entry_on_a_data_axis(context: str | None, mask: Any) -> None:
    params, x_BTD = params_of(4), tokens(1, 8)
    order = a.zigzag_order(8, 2) if context == "zigzag" else np.arange(8)
    sizes = {"data": 2, "model": 2} | ({} if context is None else {"context": 2})
    with jax.set_mesh(mesh_of(**sizes)):
        run = jax.jit(partial(a.attention, context=context, mask=mask))
        got = run(params, x_BTD[:, order])
    close(got[:, np.argsort(order)], a.attention(params, x_BTD, mask=mask))


@pytest.mark.few(5)
@pytest.mark.parametrize("context", ["ring", "split_kv", None])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (8, 2), (8, 1), (4, 4), (12, 2)])
def test_any_heads_on_a_model_axis(N: int, K: int, context: str | None) -> None:
    params, x_BTD = params_of(N, K, sinks=True), tokens(2, 8)

    def loss(params: Any, **options: Any) -> jax.Array:
        return jnp.sum(jnp.sin(a.attention(params, x_BTD, mask=a.causal(), **options)))

    # 600 tokens would be a lot here: blockwise is what a mesh is asked to split.
    options = {"context": context} if context else {"implementation": "blockwise"}
    sizes = {"model": 4} | ({"context": 2} if context else {})
    want, wanted = jax.value_and_grad(loss)(params)
    with jax.set_mesh(mesh_of(**sizes)):
        program = jax.jit(jax.value_and_grad(partial(loss, **options))).lower(params).compile()
        got, grads = program(params)
    close(got, want)
    jax.tree.map(close, grads, wanted)
    if not context:
        assert " all-gather(" not in str(program.as_text())


def test_heads_that_fit_no_device_are_named() -> None:
    with jax.set_mesh(mesh_of(model=4, context=2)):
        with pytest.raises(ValueError, match="N=6 and k_BSKH has K=3, which the 4 devices of mesh"):
            a.attention(params_of(6, 3), tokens(2, 8), context="ring")
        with pytest.raises(ValueError, match=r"T=1, which the 2 devices.*split_kv"):
            a.attention(params_of(4), tokens(2, 1), context="ring")
    with jax.set_mesh(mesh_of(model=4)), pytest.warns(UserWarning, match="every device attends"):
        a.attention(params_of(6, 3), tokens(2, 8), implementation="blockwise")


@pytest.mark.parametrize("wrong", ["zig_zag", "rings", "", True, 3])
def test_a_misspelled_context_is_refused_everywhere(wrong: Any) -> None:
    with pytest.raises(ValueError, match="context must be one of 'ring', 'zigzag'"):
        a.attention(params_of(4), tokens(2, 8), context=wrong)
    with (
        jax.set_mesh(mesh_of(context=4)),
        pytest.raises(ValueError, match="context must be one of 'ring', 'zigzag'"),
    ):
        a.attention(params_of(4), tokens(2, 8), context=wrong)


def model_of(T: int | None, dropout: bool = False) -> tuple[Any, Any]:
    layer = partial(
        a.init_block,
        D=D,
        attention=partial(a.init_attention, D=D, N=4, H=4),
        mlp=partial(a.init_mlp, D=D, F=12),
    )
    params = a.init_language_model(jax.random.key(0), V=11, D=D, L=2, layer=layer, T=T)
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(5)} if dropout else {}

    def run(params: Any, tokens_BT: jax.Array, context: str | None = None) -> jax.Array:
        attend = partial(a.attention, mask=a.causal(), context=context)
        return a.language_model(params, tokens_BT, attend=attend, **options)[0]

    return params, run


@pytest.mark.few(2)
@pytest.mark.parametrize("dropout", [False, True], ids=["learned positions", "dropout"])
@pytest.mark.parametrize("context", ["ring", "zigzag", "all_to_all"])
def test_positions_and_dropout_follow_the_layout(context: str, dropout: bool) -> None:
    params, run = model_of(16, dropout)
    tokens_BT = jax.random.randint(jax.random.key(2), (2, 16), 0, 11)
    want = run(params, tokens_BT)
    order = a.zigzag_order(16, 4) if context == "zigzag" else np.arange(16)
    mesh = mesh_of(context=4, data=1)
    with jax.set_mesh(mesh):
        got = jax.jit(partial(run, context=context))(params, tokens_BT[:, order])
    close(got[:, np.argsort(order)], want)
    inside = jax.jit(
        jax.shard_map(
            partial(run, context=context),
            mesh=mesh,
            in_specs=(P(), P(None, "context")),
            out_specs=P(None, "context"),
        )
    )
    close(inside(params, tokens_BT[:, order])[:, np.argsort(order)], want)


def test_positions_that_cannot_be_known_are_refused() -> None:
    params, _ = model_of(16)

    def hidden(params: Any, tokens_BT: jax.Array) -> jax.Array:
        def attend(p: Any, x: Any) -> Any:
            return a.attention(p, x, context="ring")

        return a.language_model(params, tokens_BT, attend=attend)[0]

    split = P(None, "context")
    with pytest.raises(ValueError, match="position_TD needs the positions of its tokens"):
        jax.shard_map(hidden, mesh=mesh_of(context=4), in_specs=(P(), split), out_specs=split)(
            params, jnp.zeros((2, 16), jnp.int32)
        )
    mixer = a.init_static_mixer(jax.random.key(0), D=D, N=2, T=16)
    block = {"mixer": mixer}
    with pytest.raises(ValueError, match="a static mixer mixes by position"):
        a.block(block, tokens(1, 16), attend=partial(a.attention, context="zigzag"))


@pytest.mark.long
def test_cross_attention_with_rope_in_a_context() -> None:
    params, x_BTD, z_BSD = params_of(4), tokens(2, 8), tokens(2, 16)[:, ::-1]
    want = a.attention(params, x_BTD, kv_BSD=z_BSD, rope=rope.plain(4))
    for context in ("ring", "all_to_all", "split_kv"):
        with jax.set_mesh(mesh_of(context=4)):
            got = a.attention(params, x_BTD, kv_BSD=z_BSD, rope=rope.plain(4), context=context)
        close(got, want)


@pytest.mark.long
def test_generate_with_a_cache_that_is_split() -> None:
    params, _ = model_of(None)
    prompt_BT = jax.random.randint(jax.random.key(2), (1, 5), 0, 11)

    def model(context: str | None) -> Any:
        attend = partial(a.attention, mask=a.causal(), context=context)
        return partial(a.language_model, attend=attend)

    options = {"steps": 11, "temperature": 0.0}
    want = a.generate(params, prompt_BT, model=model(None), **options)
    for data, context in ((1, 8), (2, 4)):
        with jax.set_mesh(a.make_mesh(data=data, context=context)):
            got = a.generate(params, prompt_BT, model=model("split_kv"), **options)
        np.testing.assert_array_equal(got, want)


def nothing(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    return jnp.zeros(()), {}


@pytest.mark.parametrize("axes", [("data", "context"), ("data",)])
def test_meshes_that_are_not_auto_are_refused(axes: tuple[str, ...]) -> None:
    mesh = jax.make_mesh((2, 4)[: len(axes)], axes, devices=jax.devices()[: (2, 8)[len(axes) - 1]])
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"of type Explicit, not Auto; use make_mesh"):
        a.shard_step(train.make_train_step(nothing, tx), mesh)
    if "context" in axes:
        with jax.set_mesh(mesh), pytest.raises(ValueError, match="must all be of type Auto"):
            a.attention(params_of(4), tokens(2, 8), context="ring")
    else:
        with pytest.raises(ValueError, match="of type Explicit, not Auto"):
            a.data_parallel(train.make_train_step(nothing, tx, axis="data"), mesh)


def test_a_step_that_averages_only_a_metric_is_refused() -> None:
    def loss(p: Any, b: Any, k: Any) -> Any:
        return jnp.square(b["x_BD"] @ p["w_D"]).mean(), {"m": jax.lax.pmean(1.0, "data")}

    mesh, tx = a.make_mesh(data=8), optax.sgd(0.1)
    with pytest.raises(ValueError, match="step averages over None; make it with make_train_step"):
        a.data_parallel(train.make_train_step(loss, tx), mesh)
    with pytest.raises(ValueError, match="step averages over 'rows'"):
        a.data_parallel(train.make_train_step(loss, tx, axis="rows"), mesh)
    with pytest.raises(ValueError, match="step was made with axis='data', for data_parallel"):
        a.shard_step(train.make_train_step(loss, tx, axis="data"), mesh)
    step = a.data_parallel(train.make_train_step(loss, tx, axis="data"), mesh)
    state = train.init_state({"w_D": jnp.ones(3)}, tx)
    for batch in ({"x_BD": jnp.ones((8, 3)), "n": 3.0}, {"x_BD": jnp.ones((0, 3))}):
        with pytest.raises(ValueError, match="whose first axis 8 devices do not divide"):
            step(state, batch, jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: a.specs({"w_DQ": np.ones((2, 3))}, m), "Q is no axis letter; they are B T S D"),
        (lambda m: a.specs({"lr": 0.1}, m, NONE), "rules must map letters"),
        (lambda m: a.specs({}, m, RULES | {"Q": "model"}), "'Q' is no axis letter"),
        (lambda m: a.specs({}, m, RULES | {"X": "expert"}), "X to mesh axis 'expert', but"),
        (lambda m: a.specs({}, m, RULES | {"X": 3}), "X must map to a mesh axis"),
        (lambda m: a.make_mesh(data=2, devices=[jax.devices()[0]] * 2), "more than once"),
        (lambda m: a.global_batch(lambda r: {"x_B": 1.0}, m, B=8), "axes start in B"),
        (lambda m: a.global_batch(lambda r: {"x_B": np.ones(8)}, m, B=-8), "int >= 1, got -8"),
        (lambda m: a.global_batch(lambda r: {"x_B": np.ones(8)}, m, B=FLOAT), "int >= 1, got 8.0"),
        (lambda m: a.global_batch(lambda r: {"x_B": np.ones(8)}, m, B=9), "take a multiple"),
    ],
)
def test_wrong_trees_rules_and_batches(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(a.make_mesh(data=8))


def test_trees_may_hold_numbers() -> None:
    assert a.specs({"lr": 0.1, "w_DF": np.ones((2, 8))}, a.make_mesh(model=8))["lr"].spec == P()
    assert a.zigzag_order(INT64, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 4, "model": 2}, {"data": 2, "context": 4}, {"data": 2, "model": 4}],
)
def test_experts_process_the_tokens_of_their_device_alone(sizes: dict[str, int]) -> None:
    params = a.init_moe(jax.random.key(0), D=D, F=12, X=4)
    x_BTD = jax.random.normal(jax.random.key(1), (8, 16, D))

    def loss(params: Any, x_BTD: jax.Array) -> Any:
        y_BTD, aux = a.moe(params, x_BTD)
        return jnp.sum(jnp.sin(y_BTD)) + aux["routing"].load_balance, aux

    (want, said), wanted = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BTD)
    mesh = mesh_of(**sizes)
    places = a.specs(params, mesh), a.specs({"x_BTD": x_BTD}, mesh, a.ACTIVATIONS)["x_BTD"]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), in_shardings=places)
        program = step.lower(params, x_BTD).compile()
        (got, told), grads = step(params, x_BTD)
    close(got, want)
    jax.tree.map(close, grads, wanted)
    jax.tree.map(close, told, said)
    # Of the 128 tokens, 2 experts each, no device has all.
    assert not re.search(r"\[256[\],]", str(program.as_text()))
