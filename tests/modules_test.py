"""Flax shells: the same leaves and, on the same leaves, bit-equal outputs."""

import ast
import inspect
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_attn import (
    attention,
    block,
    causal,
    gated_mlp,
    head_summary,
    init_attention,
    init_block,
    init_gated_mlp,
    init_language_model,
    init_mlp,
    init_moe,
    init_static_mixer,
    language_model,
    mlp,
    modules,
    moe,
    rope,
    static_mixer,
    window_mass,
)
from jax_attn.language_model import causal_attention
from tests.formulas import draw, random_like

B, T, S, D, F, X, V, L, H = 2, 5, 3, 8, 11, 7, 13, 2, 4
KEY = jax.random.key(0)
X_BTD = random_like(np.zeros((B, T, D)), 1)
TOKENS_BT = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)))
EVERY = {"K": 2, "H": H, "E": 5, "bias": True, "qk_norm": True, "sinks": True}
HOW = {"mask": causal(), "rope": rope.plain(H), "scale": 0.7, "softcap": 3.0}
BLOCK = partial(
    init_block, D=D, attention=partial(init_attention, D=D, N=2), mlp=partial(init_mlp, D=D, F=F)
)
MLP_BLOCK = partial(init_block, D=D, mlp=partial(init_mlp, D=D, F=F))
# name: (shell, its function, its initialiser, input)
SHELLS = {
    "attention": (
        modules.Attention(N=2),
        attention,
        partial(init_attention, D=D, N=2),
        X_BTD,
    ),
    "attention with everything": (
        modules.Attention(N=6, **EVERY, **HOW),
        partial(attention, **HOW),
        partial(init_attention, D=D, N=6, **EVERY),
        X_BTD,
    ),
    "mlp": (modules.MLP(F=F), mlp, partial(init_mlp, D=D, F=F), X_BTD),
    "mlp with bias": (
        modules.MLP(F=F, bias=True, activation="relu"),
        partial(mlp, activation="relu"),
        partial(init_mlp, D=D, F=F, bias=True),
        X_BTD,
    ),
    "gated_mlp": (
        modules.GatedMLP(F=F, activation="gelu"),
        partial(gated_mlp, activation="gelu"),
        partial(init_gated_mlp, D=D, F=F),
        X_BTD,
    ),
    "moe": (modules.MoE(F=F, X=X), moe, partial(init_moe, D=D, F=F, X=X), X_BTD),
    "plain moe": (
        modules.MoE(F=F, X=X, k=3, gated=False, renormalize=True, activation="relu"),
        partial(moe, k=3, renormalize=True, activation="relu"),
        partial(init_moe, D=D, F=F, X=X, gated=False),
        X_BTD,
    ),
    "static_mixer": (
        modules.StaticMixer(N=2, T=T, E=3, mask=causal()),
        partial(static_mixer, mask=causal()),
        partial(init_static_mixer, D=D, N=2, T=T, E=3),
        X_BTD,
    ),
    "uniform mixer": (
        modules.StaticMixer(N=2),
        static_mixer,
        partial(init_static_mixer, D=D, N=2),
        X_BTD,
    ),
    "block": (
        modules.Block(
            init_attend=partial(init_attention, D=D, N=2),
            init_feed=partial(init_moe, D=D, F=F, X=X),
            attend=causal_attention,
            feed=moe,
        ),
        partial(block, attend=causal_attention, feed=moe),
        partial(
            init_block,
            D=D,
            attention=partial(init_attention, D=D, N=2),
            mlp=partial(init_moe, D=D, F=F, X=X),
        ),
        X_BTD,
    ),
    "mixer block": (
        modules.Block(init_mix=partial(init_static_mixer, D=D, N=2, T=T)),
        block,
        partial(init_block, D=D, mixer=partial(init_static_mixer, D=D, N=2, T=T)),
        X_BTD,
    ),
    "language_model": (
        modules.LanguageModel(V=V, D=D, L=L, layer=BLOCK),
        language_model,
        partial(init_language_model, V=V, D=D, L=L, layer=BLOCK),
        TOKENS_BT,
    ),
    "language_model of mlps": (
        modules.LanguageModel(V=V, D=D, L=L, layer=MLP_BLOCK),
        language_model,
        partial(init_language_model, V=V, D=D, L=L, layer=MLP_BLOCK),
        TOKENS_BT,
    ),
    "language_model with everything": (
        modules.LanguageModel(V=V, D=D, L=L, layer=BLOCK, T=T, tied=False, remat="full"),
        partial(language_model, remat="full"),
        partial(init_language_model, V=V, D=D, L=L, layer=BLOCK, T=T, tied=False),
        TOKENS_BT,
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in SHELLS.items()]


def assert_equal_trees(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def kinds(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(("shell", "function", "init", "x"), CASES)
def test_shell_and_function_are_bit_equal_on_one_tree(shell, function, init, x) -> None:
    variables = jax.eval_shape(shell.init, KEY, x)
    assert list(variables) == ["params"]
    # Names, nesting, shapes and dtypes.
    assert kinds(variables["params"]) == kinds(jax.eval_shape(init, KEY))
    params = draw(init)
    run, plain = shell.apply, function
    if "layers" in params:
        run, plain = jax.jit(run), jax.jit(plain)
    assert_equal_trees(run({"params": params}, x), plain(params, x))


def test_jit_of_a_shell() -> None:
    shell, function, init, x = SHELLS["attention with everything"]
    params = draw(init)
    made = jax.jit(shell.apply)({"params": params}, x)
    assert_equal_trees(made, jax.jit(function)(params, x))


@pytest.mark.parametrize("name", ["attention with everything", "uniform mixer"])
def test_leaves_are_drawn_alike(name) -> None:
    # Not the same numbers, for Flax folds its own path into the key, but the same distributions.
    shell, _, init, x = SHELLS[name]
    made, own = jax.jit(shell.init)(KEY, x)["params"], jax.jit(init)(KEY)
    for (path, left), right in zip(
        jax.tree.leaves_with_path(made), jax.tree.leaves(own), strict=True
    ):
        if np.ptp(right) == 0:
            np.testing.assert_array_equal(left, right)
        else:
            # Standard deviations of n normal draws scatter by 1/sqrt(2n): five of each.
            ratio = float(jnp.std(left) / jnp.std(right))
            assert abs(ratio - 1) < 10 / (2 * left.size) ** 0.5, path


@pytest.mark.parametrize("name", ["attention", "mlp", "gated_mlp", "moe", "static_mixer"])
def test_param_dtype(name) -> None:
    shell, _, _, x = SHELLS[name]
    half = shell.clone(param_dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(jax.eval_shape(half.init, KEY, x))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_cross_attention_and_a_mask_for_one_call() -> None:
    shell = modules.Attention(N=2, mask=causal())
    params = draw(SHELLS["attention"][2])
    variables, kv_BSD = {"params": params}, random_like(np.zeros((B, S, D)), 3)
    np.testing.assert_array_equal(
        shell.apply(variables, X_BTD, kv_BSD),
        attention(params, X_BTD, kv_BSD=kv_BSD, mask=causal()),
    )
    mask = jnp.ones((1, 1, T, T), bool)
    np.testing.assert_array_equal(
        shell.apply(variables, X_BTD, mask=mask), attention(params, X_BTD, mask=mask)
    )


OBSERVE: Any = ("entropy", "max_logit", window_mass(1))


def test_observations_are_sown() -> None:
    function, init = SHELLS["attention with everything"][1:3]
    shell = modules.Attention(N=6, **EVERY, **HOW, observe=OBSERVE)
    assert list(jax.eval_shape(shell.init, KEY, X_BTD)) == ["params"]
    variables = {"params": draw(init)}
    y_BTD, aux = function(variables["params"], X_BTD, observe=OBSERVE)
    made, state = shell.apply(variables, X_BTD, mutable="intermediates")
    np.testing.assert_array_equal(made, y_BTD)
    assert_equal_trees(state, {"intermediates": {"seen": (aux["seen"],)}})
    # Nobody listens, or nothing is asked for: the output alone.
    np.testing.assert_array_equal(shell.apply(variables, X_BTD), y_BTD)
    made, state = shell.clone(observe=None).apply(variables, X_BTD, mutable="intermediates")
    np.testing.assert_array_equal(made, function(variables["params"], X_BTD))
    assert state == {}


@pytest.mark.parametrize("name", ["block", "language_model"])
def test_observations_come_through_aux(name) -> None:
    shell, function, init, x = SHELLS[name]
    attend = partial(causal_attention, observe=OBSERVE, reduce=head_summary)
    variables = {"params": draw(init)}
    made = jax.jit(shell.clone(attend=attend).apply)(variables, x)
    assert_equal_trees(made, jax.jit(partial(function, attend=attend))(variables["params"], x))
    lead = (L,) if name == "language_model" else ()
    seen = made[1]["attention"]["seen"]
    assert sorted(seen) == ["entropy", "max_logit", "window_mass"]
    assert seen["entropy"]["mean"].shape == (*lead, 2)
    plain = jax.jit(shell.apply)(variables, x)
    np.testing.assert_array_equal(made[0], plain[0])


DROPPING = {
    "attention": modules.Attention(N=2, dropout_rate=0.5),
    "block": SHELLS["block"][0].clone(dropout_rate=0.5),
    "language_model": SHELLS["language_model"][0].clone(dropout_rate=0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_uses_its_own_rng(name) -> None:
    shell, x = DROPPING[name], SHELLS[name][3]
    jax.eval_shape(shell.init, KEY, x)  # no "dropout" rng is asked for
    variables = {"params": draw(SHELLS[name][2])}
    plain = jax.jit(SHELLS[name][0].apply)(variables, x)
    assert_equal_trees(jax.jit(shell.apply)(variables, x), plain)

    @jax.jit
    def dropped(key):
        made = shell.apply(variables, x, deterministic=False, rngs={"dropout": key})
        return made if name == "attention" else made[0]

    first = dropped(jax.random.key(0))
    np.testing.assert_array_equal(first, dropped(jax.random.key(0)))
    assert (first != dropped(jax.random.key(1))).any()
    assert (first != (plain if name == "attention" else plain[0])).any()
    with pytest.raises(Exception, match="dropout"):
        shell.apply(variables, x, deterministic=False)


@pytest.mark.parametrize("name", ["attention", "mlp", "language_model of mlps"])
def test_nnx_users_get_the_same(name) -> None:
    shell, function, init, x = SHELLS[name]
    wrapped = nnx.bridge.ToNNX(shell, rngs=nnx.Rngs(0)).lazy_init(x)
    state = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    assert kinds(state) == kinds(jax.eval_shape(init, KEY))
    assert_equal_trees(wrapped(x), function(state, x))


def test_shells_compose_in_flax() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x_BTD):
            x_BTD = x_BTD + modules.Attention(N=2, name="attention")(x_BTD)
            return x_BTD + nn.jit(modules.MLP)(F=F, name="mlp")(x_BTD)

    variables: Any = Two().init(KEY, X_BTD)
    params = variables["params"]
    assert sorted(params) == ["attention", "mlp"]
    x_BTD = X_BTD + attention(params["attention"], X_BTD)
    x_BTD = x_BTD + jax.jit(mlp)(params["mlp"], x_BTD)
    np.testing.assert_array_equal(Two().apply(variables, X_BTD), x_BTD)


def test_every_shell_is_short() -> None:
    shells = [
        node
        for node in ast.parse(inspect.getsource(modules)).body
        if isinstance(node, ast.ClassDef)
    ]
    assert {type(case[0]).__name__ for case in SHELLS.values()} == {node.name for node in shells}
    for node in shells:
        (call,) = (part for part in node.body if isinstance(part, ast.FunctionDef))
        assert call.end_lineno is not None
        assert call.end_lineno - call.body[0].lineno <= 30, node.name
