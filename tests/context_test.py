"""A sequence split over devices gives what one device gives: every way, every option, derivatives.

One device in float64 is exact here, and its float32 run says what error float32 may make.
"""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_attn import (
    attention,
    causal,
    context_attention,
    dense,
    dot_product_attention,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    language_model,
    mean_of,
    rope,
    segments,
    window,
    window_mass,
    zigzag_order,
)
from jax_attn.intervene import zero
from jax_attn.kernels import blockwise
from jax_attn.train import next_token_loss
from tests import formulas, oracle
from tests.attention_cases import QUICK

DEVICES = 4
B, T, N, K, H, E = 2, 24, 8, 4, 5, 3  # a device has T / DEVICES = 6, zigzag two runs of 3
jit = partial(jax.jit, compiler_options=QUICK)
SPLIT = P(None, "context")
EPS = float(np.finfo(np.float32).eps)
CONTEXTS = ("ring", "zigzag", "all_to_all", "split_kv")


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:count])


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def inputs(dtype: str = "float32") -> dict[str, Any]:
    x = {"q": random(0, B, T, N, H), "k": random(1, B, T, K, H), "v": random(2, B, T, K, E)}
    x |= {"bias": random(3, 1, N, T, T), "sinks": random(4, N), "w": np.float64(0.3)}
    x |= {"g": random(5, B, T, N)}
    return {name: jnp.asarray(np.float32(leaf), dtype) for name, leaf in x.items()}


IDS_BT = jnp.asarray(np.sort(np.random.default_rng(6).integers(0, 3, (B, T))))
ROUGH_BNTT = jnp.asarray(np.random.default_rng(7).random((B, 1, T, T)) < 0.4)


def wave(b, n, t, s):
    return jnp.cos(1.0 * t + 2 * s * n + b)


def everything(x: dict[str, Any]) -> dict[str, Any]:
    """Nearly every option at once; rows 0 and 1 of the first entry see no key."""

    def score(logits, b, n, t, s):
        return logits + x["w"] * jnp.cos(1.0 * (t - s) * (n + 1))

    names = ("lse", "max_logit", "entropy", "effective_keys", "expected_distance", "first_mass")
    names = (*names, "self_mass", "argmax_key", "min_entropy", "max_prob")
    mask = causal() & segments(IDS_BT) & dense(ROUGH_BNTT.at[0, :, :2].set(False))
    options = {"mask": mask, "score": score, "softcap": 3.0, "dropout_rate": 0.25}
    options |= {"dropout_key": jax.random.key(1), "bias_BNTS": x["bias"], "sinks_N": x["sinks"]}
    return options | {"observe": (*names, window_mass(2), mean_of(wave), mean_of(x["g"]))}


def plain(x: dict[str, Any]) -> dict[str, Any]:
    """No mask and no option but scale."""
    return {"scale": 0.3 * x["w"], "observe": ()}


def far(x: dict[str, Any]) -> dict[str, Any]:
    """A window that leaves most devices nothing to do with each other."""
    return {"mask": window(3, 1), "q_offset": -1, "observe": ("entropy",)}


def whole(options: Any, x: dict[str, Any]) -> Any:
    made = options(x)
    return dot_product_attention(x["q"], x["k"], x["v"], implementation="blockwise", **made)


@lru_cache
def one_device(options: Any, of: Any) -> tuple[Any, Any]:
    """Return what one device makes of it in float32 and in float64."""
    run = partial(of, partial(whole, options))
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, jit(run)(inputs("float64")))
    return jit(run)(inputs()), want


def split(options: Any, context: str, x: dict[str, Any]) -> Any:
    """Run on devices, from and to arrays in the order of the sequence."""
    order = np.asarray(zigzag_order(T, DEVICES)) if context == "zigzag" else np.arange(T)
    queries = P() if context == "split_kv" else SPLIT
    specs = {"q": queries, "k": SPLIT, "v": SPLIT, "sinks": P(), "w": P(), "g": P()}
    specs["bias"] = P(None, None, None if context == "split_kv" else "context")

    def part(x):
        made = options(x)
        with blockwise.block_limits((2, 2)):
            return context_attention(x["q"], x["k"], x["v"], context=context, **made)

    mesh = mesh_of(context=DEVICES)
    run = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=queries)
    moved = {name: x[name][:, order] for name in "qkv"} | {"bias": x["bias"][:, :, order]}
    return jax.tree.map(lambda leaf: leaf[:, np.argsort(order)], run(x | moved))


def loss(run: Any, x: dict[str, Any]) -> jax.Array:
    out, seen = run(x)
    # Of T positions or keys an error is T times as large as of a probability.
    units = {"expected_distance": 1 / T, "effective_keys": 1 / T, "argmax_key": 0.0}
    seen = {name: leaf * units.get(name, 1.0) for name, leaf in seen.items()}
    parts = [jnp.where(jnp.isfinite(leaf), leaf, 0.0) for leaf in (out, *seen.values())]
    return sum((jnp.sum(jnp.sin(leaf)) for leaf in parts), jnp.zeros(()))


def derive(run: Any, x: dict[str, Any]) -> Any:
    """Return outputs, gradients to all inputs, and the tangent of the output along them."""
    moved = {name: jnp.cos(3.0 * leaf) for name, leaf in x.items()}
    return run(x), jax.grad(partial(loss, run))(x), jax.jvp(lambda x: run(x)[0], (x,), (moved,))[1]


def assert_same(got: Any, rough: Any, want: Any) -> None:
    paths = jax.tree_util.tree_flatten_with_path(want)[0]
    assert len(paths) > 5
    for (path, w), a, b in zip(paths, jax.tree.leaves(got), jax.tree.leaves(rough), strict=True):
        name, a = jax.tree_util.keystr(path), np.asarray(a)
        if a.dtype == np.int32:
            np.testing.assert_array_equal(a, w, err_msg=name)
            continue
        there = np.isfinite(w)
        np.testing.assert_array_equal(a[~there], w[~there], err_msg=name)
        a, b, w = (np.where(there, x, 0.0) for x in (a, b, w))
        # Eight roundings as everywhere, and two for each part that merges; of a sum over all pairs,
        # which cancel, roundings add up like a random walk.
        count = np.sqrt(B * N * T * T) if w.ndim == 0 else 8 + 2 * DEVICES
        floor = np.full(w.shape, count * EPS * np.abs(w).max(initial=0.0))
        oracle.assert_within(name, a, b, w, floor)


@pytest.mark.few(4)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("options", [pytest.param(everything, marks=pytest.mark.long), plain, far])
def test_the_same_as_one_device(context: str, options: Any) -> None:
    got = jit(partial(derive, partial(split, options, context)))(inputs())
    assert_same(got, *one_device(options, derive))


def twice(run, x):
    def norm(x):
        grads = jax.grad(partial(loss, run))(x)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))

    return jax.grad(norm)(x)


@pytest.mark.long
@pytest.mark.parametrize("context", ["ring", "zigzag"])
def test_gradient_of_the_gradient(context: str) -> None:
    got = jit(partial(twice, partial(split, far, context)))(inputs())
    assert_same(got, *one_device(far, twice))


@pytest.mark.few(4)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_junk_is_seen_by_those_alone_who_attend_to_it(context: str, junk: float) -> None:
    """A bad key reaches later rows on its own and other devices, and no row before it."""
    x = inputs()
    bad = x | {"v": x["v"].at[0, 9, 2].set(junk)}

    def options(x):
        return {"mask": causal(), "observe": ("entropy",)}

    run = jit(partial(split, options, context))
    (clean, _), (got, _) = run(x), run(bad)
    assert np.isnan(got[0, 9:, 4:6]).all()  # both query heads that read key/value head 2
    touched = np.zeros(got.shape, bool)
    touched[0, 9:, 4:6] = True
    np.testing.assert_array_equal(np.asarray(got)[~touched], np.asarray(clean)[~touched])


@pytest.mark.parametrize("context", ["ring", "zigzag", "all_to_all"])
def test_bfloat16(context: str) -> None:
    x = {name: leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in inputs().items()}

    def narrow(run, x):
        return run({name: leaf.astype(jnp.bfloat16) for name, leaf in x.items()})[0]

    one = partial(whole, plain)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(leaf, "float64") for name, leaf in x.items()}
        want = np.asarray(jit(one)(wide)[0])
    got = jit(partial(narrow, partial(split, plain, context)))(x)
    assert got.dtype == jnp.bfloat16
    # The parts are float32 until they have merged: the output is rounded once.
    error = np.abs(np.asarray(got, np.float64) - want)
    assert error.max() <= 2.0**-8 * np.abs(want).max()


# Under jit and a mesh.

LAYER = partial(
    init_block,
    D=12,
    attention=partial(init_attention, D=12, N=8, K=4, H=4, sinks=True),
    mlp=partial(init_mlp, D=12, F=8),
)
PARAMS = formulas.draw(partial(init_language_model, V=11, D=12, L=2, layer=LAYER), 3, scale=0.5)
TOKENS_BT = np.random.default_rng(8).integers(0, 11, (4, T + 1))


@pytest.mark.parametrize(
    ("context", "sizes"),
    [
        pytest.param("ring", {"data": 2, "context": 4}, marks=pytest.mark.long),
        pytest.param("zigzag", {"data": 2, "context": 2, "model": 2}, marks=pytest.mark.long),
        pytest.param("all_to_all", {"fsdp": 2, "context": 2, "model": 2}, marks=pytest.mark.long),
    ],
)
def test_a_model_on_a_mesh(context: str, sizes: dict[str, int]) -> None:
    """Loss, what is observed, and parameters after a step of SGD; dropout and RoPE know where a
    token stands."""

    def step(context, order, params):
        x_BT, y_BT = (jnp.asarray(x[:, order]) for x in (TOKENS_BT[:, :-1], TOKENS_BT[:, 1:]))
        more = {"rope": rope.plain(4), "observe": ("entropy", "first_mass"), "dropout_rate": 0.1}
        attend = partial(attention, mask=causal(), context=context, **more)

        def mean_loss(params):
            key = jax.random.key(2)
            logits_BTV, aux = language_model(params, x_BT, attend=attend, dropout_key=key)
            return next_token_loss(logits_BTV, y_BT), aux["attention"]["seen"]

        (value, seen), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        seen = jax.tree.map(lambda x: x[:, :, np.argsort(order)], seen)
        return value, seen, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    straight = np.arange(T)
    order = straight
    if context == "zigzag":
        order = np.asarray(zigzag_order(T, sizes["context"]))
    one = partial(step, None, straight)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), PARAMS)
        want = jax.tree.map(np.asarray, jit(one)(wide))
    with jax.set_mesh(mesh_of(**sizes)):
        got = jit(partial(step, context, order))(PARAMS)
    assert_same(got, jit(one)(PARAMS), want)


def here(x: dict[str, Any]) -> dict[str, Any]:
    """No function that closes over traced arrays, for which the compiler has to find a way."""
    return everything(x) | {"score": None, "mask": causal() & segments(IDS_BT) & dense(ROUGH_BNTT)}


@pytest.mark.long
def test_blocks_on_a_mesh_know_their_place() -> None:
    """Without a context batch entries and heads alone are split; nothing is gathered."""
    mesh = mesh_of(data=2, model=2)
    places = {"q": P("data", None, "model"), "bias": P(None, "model"), "sinks": P("model")}
    places |= {"k": places["q"], "v": places["q"]}
    x = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, places.get(name, P())))
        for name, leaf in inputs().items()
    }
    one = partial(whole, here)
    with jax.set_mesh(mesh):
        assert_same(jit(partial(derive, one))(x), *one_device(here, derive))
        text = jax.jit(lambda x: one(x)[0]).lower(x).compile().as_text() or ""
    assert "all-gather" not in text


# Wrong arguments.


def run_split(x: Any, **options: Any) -> Any:
    def part(x):
        return context_attention(x, x, x, **options)

    mesh = mesh_of(context=DEVICES)
    return jax.shard_map(part, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)(x)


WRONG: Any = {
    "context must be one of 'ring', .* got 'rings'": lambda x: run_split(x, context="rings"),
    "context='ring' needs the mesh axis 'context'": lambda x: context_attention(
        x, x, x, context="ring"
    ),
    "cuts a device's tokens into two runs, but it has T=3": lambda x: run_split(
        x[:, :12], context="zigzag"
    ),
    "all_to_all' gives each of 4 devices .* K=2": lambda x: run_split(
        x[:, :, :2], context="all_to_all"
    ),
    r"q_ids_BT has T=6": lambda x: run_split(x, context="ring", mask=segments(IDS_BT[:, :6])),
    "2 \\* devices = 10 must divide T=24": lambda x: zigzag_order(T, 5),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_arguments_are_named(says: str) -> None:
    x_BTNH = jnp.zeros((B, T, N, H))
    with pytest.raises(ValueError, match=says):
        WRONG[says](x_BTNH)


LAYER_PARAMS = jax.tree.map(lambda leaf: leaf[0], PARAMS["layers"]["attention"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "context='ring' needs the mesh axis 'context': call under jax.set_mesh"),
        ({"implementation": "dense"}, "context='ring' does not go with implementation"),
        ({"intervene": zero(jnp.ones(N, bool))}, "context='ring' does not go with intervene"),
    ],
)
def test_attention_names_what_does_not_go_with_it(options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(LAYER_PARAMS, jnp.zeros((B, T, 12)), context="ring", **options)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"context": 5}, "q_BTNH has T=24, which the 5 devices of mesh axis context do not divide"),
        (
            {"context": 2, "model": 3},
            "q_BTNH has N=8 and k_BSKH has K=4, which the 3 devices of mesh axis model do not",
        ),
        (
            {"data": 3, "context": 2},
            r"q_BTNH has B=2, which the 3 devices of mesh axes data \* fsdp do not divide",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_named(sizes: dict[str, int], says: str) -> None:
    with jax.set_mesh(mesh_of(**sizes)), pytest.raises(ValueError, match=says):
        jax.jit(partial(attention, context="ring"))(LAYER_PARAMS, jnp.zeros((B, T, 12)))
