"""Edits of heads against float64 formulas, and what they leave alone; in one attention layer."""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    attention,
    causal,
    dot_product_attention,
    init_attention,
    intervene,
    lengths,
    window,
)
from tests import formulas, oracle
from tests.attention_cases import QUICK
from tests.formulas import random_like

B, T, S, D, N, K, H, E = 2, 5, 7, 11, 6, 3, 13, 17
jit = partial(jax.jit, compiler_options=QUICK)


def array(*shape: int, seed: int = 1) -> jax.Array:
    return random_like(np.zeros(shape), seed)


INIT = partial(init_attention, D=D, N=N, K=K, H=H, E=E)
PARAMS = formulas.draw(partial(INIT, sinks=True), 2, scale=0.5)
X_BTD, KV_BSD = array(B, T, D), array(B, S, D, seed=2)
CHOSEN_N = np.isin(np.arange(N), [1, 4])  # one of the two heads of a group
HEADS_N = jnp.asarray(CHOSEN_N)
MEAN_NE, OUTPUT_BTNE = array(N, E, seed=3), array(B, T, N, E, seed=4)
KEYS_B = np.array([4, 0])
# name: (options of attention, the pairs its mask allows)
SETTINGS = {
    "causal": ({"mask": causal()}, np.tri(T, dtype=bool)[None, None]),
    "cross": (
        {"kv_BSD": KV_BSD, "mask": lengths(kv_B=KEYS_B), "q_offset": 1},
        (np.arange(S) < KEYS_B[:, None])[:, None, None],
    ),
    "all": ({"kv_BSD": KV_BSD}, np.ones((1, 1, 1, 1), bool)),
}


class Exact:
    """The heads of a layer in float64: values a query head, and outputs under a mask."""

    def __init__(self, options: dict, allowed: np.ndarray) -> None:
        w = formulas.cast(PARAMS, np.float64)
        x, kv = (np.asarray(y, np.float64) for y in (X_BTD, options.get("kv_BSD", X_BTD)))
        q, k, v = (
            np.tensordot(y, w[n], 1) for y, n in ((x, "wq_DNH"), (kv, "wk_DKH"), (kv, "wv_DKE"))
        )
        self.attend = partial(oracle.attend, q, k, v, sinks=w["sinks_N"])
        self.values = np.repeat(v, N // K, axis=2)
        self.allowed = np.broadcast_to(allowed, (B, N, T, kv.shape[1]))
        self.position = np.arange(T)[:, None] + options.get("q_offset", 0)
        self.key = np.arange(kv.shape[1])[None]
        self.o = self.attend(mask=self.allowed).out

    def mixed(self, p: Any) -> np.ndarray:
        p = np.broadcast_to(p, self.allowed.shape)
        return np.einsum("BNTS,BSNE->BTNE", p, self.values)


def pattern(setting: str, *lead: int) -> jax.Array:
    return array(*lead, T, T if setting == "causal" else S, seed=5)


def evenly(e: Exact) -> np.ndarray:
    return e.allowed / np.maximum(e.allowed.sum(axis=-1, keepdims=True), 1)


def near(e: Exact) -> np.ndarray:
    return e.attend(mask=e.allowed & (abs(e.key - e.position) <= 1)).out


# name: (edit of (heads, setting), what the chosen heads put out)
EDITS: dict[str, tuple[Any, Any]] = {
    "zero": (lambda h, s: intervene.zero(h), lambda e, s: np.zeros_like(e.o)),
    "mean": (lambda h, s: intervene.mean(h), lambda e, s: 0 * e.o + e.o.mean(axis=(0, 1))),
    "mean given": (
        lambda h, s: intervene.mean(h, MEAN_NE),
        lambda e, s: 0 * e.o + np.asarray(MEAN_NE, np.float64),
    ),
    "uniform": (lambda h, s: intervene.uniform(h), lambda e, s: e.mixed(evenly(e))),
    "first token": (
        lambda h, s: intervene.first_token(h),
        lambda e, s: e.mixed(e.allowed & (e.key == 0)),
    ),
    "given output": (
        lambda h, s: intervene.given_output(h, OUTPUT_BTNE),
        lambda e, s: np.asarray(OUTPUT_BTNE, np.float64),
    ),
    "pattern": (
        lambda h, s: intervene.given_pattern(h, pattern(s)),
        lambda e, s: e.mixed(np.asarray(pattern(s), np.float64)),
    ),
    "pattern of heads": (
        lambda h, s: intervene.given_pattern(h, pattern(s, 1, N)),
        lambda e, s: e.mixed(np.asarray(pattern(s, 1, N), np.float64)),
    ),
    "knock out": (lambda h, s: intervene.knock_out(h, window(1)), lambda e, s: near(e)),
}


def close(got: Any, want: Any) -> None:
    """Equal but for float32: 32 roundings of the largest, for four products in a row."""
    want = np.asarray(want, np.float64)
    atol = 32 * float(jnp.finfo(jnp.float32).eps) * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def run(setting: str, edits: Any = None, params: dict = PARAMS, **options: Any) -> Any:
    """Return the output and the heads' outputs."""
    options = SETTINGS[setting][0] | options
    y_BTD, aux = attention(params, X_BTD, keep=("o_BTNE",), intervene=edits, **options)
    return y_BTD, aux["kept"]["o_BTNE"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", EDITS)
def test_edit_is_the_formula(kind: str, setting: str) -> None:
    make, formula = EDITS[kind]
    exact = Exact(*SETTINGS[setting])
    want = np.where(CHOSEN_N[:, None], formula(exact, setting), exact.o)
    y_BTD, o_BTNE = run(setting, make(HEADS_N, setting))
    close(o_BTNE, want)
    close(y_BTD, np.tensordot(want, np.asarray(PARAMS["wo_NED"], np.float64), 2))
    assert np.abs(want - exact.o)[:, :, CHOSEN_N].max(axis=(0, 1, 3)).min() > 0.1
    _, computed_BTNE = run(setting)
    np.testing.assert_array_equal(o_BTNE[:, :, ~CHOSEN_N], computed_BTNE[:, :, ~CHOSEN_N])


@pytest.mark.parametrize("kind", ["uniform", "first token", "knock out"])
def test_edit_without_keys_is_zero(kind: str) -> None:
    _, o_BTNE = run("cross", EDITS[kind][0](HEADS_N, "cross"))
    np.testing.assert_array_equal(o_BTNE[1, :, CHOSEN_N], 0.0)
    assert np.abs(o_BTNE[0, 1:, CHOSEN_N]).min(axis=-1).max() > 0


@pytest.mark.parametrize("kind", ["uniform", "first token", "knock out"])
def test_edit_by_the_named_implementation(kind: str, monkeypatch) -> None:
    module, named = importlib.import_module("jax_attn.attention"), []

    def spy(*arrays: Any, **options: Any) -> Any:
        named.append(options["implementation"])
        return dot_product_attention(*arrays, **options)

    monkeypatch.setattr(module, "dot_product_attention", spy)
    edit = EDITS[kind][0](HEADS_N, "cross")
    made = [run("cross", edit, implementation=name)[1] for name in ("dense", "blockwise")]
    close(made[1], made[0])
    assert named == ["dense"] * 2 + ["blockwise"] * 2


BENT = {"score": lambda s, b, n, t, at: s * (at - t), "softcap": 2.0, "scale": 3.0}
BENT |= {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}


def test_uniform_reads_neither_keys_nor_what_makes_logits() -> None:
    edit = intervene.uniform(HEADS_N)
    bad = PARAMS | {"wk_DKH": PARAMS["wk_DKH"] * jnp.nan}
    made = jit(lambda params: run("causal", edit, params, **BENT)[1])(bad)
    close(made[:, :, CHOSEN_N], run("causal", edit)[1][:, :, CHOSEN_N])


def test_knock_out_keeps_everything_else() -> None:
    # A mask that allows everything knocks nothing out, dropout's choice included.
    edit = intervene.knock_out(HEADS_N, window(None))
    bent = jit(lambda edit: run("causal", edit, **BENT)[1])
    close(bent(edit), bent(None))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_pattern_looks_at_no_key_of_weight_0(weight: float) -> None:
    kv_BSD = KV_BSD.at[1, 2].set(jnp.nan)
    p_TS = jnp.ones((T, S)).at[:, 2].set(0.0).at[3, 2].set(weight)
    mask = np.arange(S)[None, None, None] != 2
    edit = intervene.given_pattern(HEADS_N, p_TS)
    _, got = run("all", edit, kv_BSD=kv_BSD, mask=jnp.asarray(mask))
    bad = np.isnan(got).all(axis=-1)
    assert (bad == np.isnan(got).any(axis=-1)).all()
    want = np.zeros((B, T, N), bool)
    want[1, 3] = CHOSEN_N & (weight > 0)
    np.testing.assert_array_equal(bad, want)


def test_pattern_is_not_rounded_to_narrow_values() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    p_TS = pattern("causal")
    edits = intervene.given_pattern(HEADS_N, p_TS)
    y_BTD, aux = attention(
        half, X_BTD.astype(jnp.bfloat16), keep=("o_BTNE", "v_BSKE"), intervene=edits
    )
    assert y_BTD.dtype == aux["kept"]["o_BTNE"].dtype == jnp.bfloat16
    v_BSNE = np.repeat(np.asarray(aux["kept"]["v_BSKE"], np.float64), N // K, axis=2)
    want = np.einsum("TS,BSNE->BTNE", np.asarray(p_TS, np.float64), v_BSNE)[:, :, CHOSEN_N]
    got = np.asarray(aux["kept"]["o_BTNE"][:, :, CHOSEN_N], np.float64)
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-6)  # one rounding to bfloat16


def test_several_edits() -> None:
    first, second = (jnp.arange(N) == n for n in (1, 4))
    _, both = run("causal", (intervene.zero(first), intervene.uniform(second)))
    for n, alone in ((1, intervene.zero(first)), (4, intervene.uniform(second))):
        np.testing.assert_array_equal(both[:, :, n], run("causal", alone)[1][:, :, n])
    # Of two edits of one head the last holds, and it starts from what attention computed.
    edits = [intervene.zero(first), intervene.mean(first)]
    np.testing.assert_array_equal(run("causal", edits)[1], run("causal", edits[-1])[1])
    np.testing.assert_array_equal(run("causal", ())[1], run("causal")[1])


def test_patching() -> None:
    y_BTD, own_BTNE = run("causal")
    same, _ = run("causal", intervene.given_output(HEADS_N, own_BTNE))
    np.testing.assert_array_equal(same, y_BTD)
    _, aux = attention(PARAMS, 2 * X_BTD, mask=causal(), keep=("o_BTNE",))
    other_BTNE = aux["kept"]["o_BTNE"]
    _, patched = run("causal", intervene.given_output(HEADS_N, other_BTNE))
    np.testing.assert_array_equal(patched[:, :, CHOSEN_N], other_BTNE[:, :, CHOSEN_N])
    assert (other_BTNE != own_BTNE).all(axis=-1).any()


def gradient(edits: Any, params: dict = PARAMS) -> dict:
    def loss(params: dict, edits: Any) -> jax.Array:
        return jnp.sum(jnp.sin(attention(params, X_BTD, mask=causal(), intervene=edits)))

    return jit(jax.grad(loss))(params, edits)


def test_gradients_of_a_zeroed_group() -> None:
    # Heads 2 and 3 are all that read key/value head 1: without them their weights do nothing, and
    # the others learn as if the two heads' part of Wo were 0.
    zeroed = np.isin(np.arange(N), [2, 3])
    made = gradient(intervene.zero(jnp.asarray(zeroed)))
    read = ~zeroed[:: N // K]
    for name, alive in (("wq_DNH", ~zeroed), ("wk_DKH", read), ("wv_DKE", read)):
        size = np.abs(np.moveaxis(made[name], 1, 0)).max(axis=(1, 2))
        assert ((size > 0) == alive).all(), name
    np.testing.assert_array_equal(made["wo_NED"][zeroed], 0.0)
    without = PARAMS | {"wo_NED": PARAMS["wo_NED"] * ~zeroed[:, None, None]}
    want = gradient(None, without)
    for name in ("wq_DNH", "wk_DKH", "wv_DKE", "sinks_N"):
        close(made[name], want[name])


@pytest.mark.parametrize(
    ("kind", "dead", "alive"),
    [
        ("uniform", ["wq_DNH", "wk_DKH"], ["wv_DKE", "wo_NED"]),
        ("mean", [], ["wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"]),
        ("given output", ["wq_DNH", "wk_DKH", "wv_DKE"], ["wo_NED"]),
        ("knock out", [], ["wq_DNH", "wk_DKH", "wv_DKE", "wo_NED"]),
    ],
)
def test_gradients_reach_what_an_edited_head_reads(kind, dead, alive) -> None:
    made = gradient(EDITS[kind][0](jnp.ones(N, bool), "causal"))
    for name in dead:
        np.testing.assert_array_equal(made[name], 0.0, name)
    for name in alive:
        assert np.abs(made[name]).max() > 1e-3, name


def test_heads_and_values_may_be_traced() -> None:
    eye, p_TS = jnp.eye(N, dtype=bool), pattern("causal")
    made = jit(jax.vmap(lambda h, p: run("causal", intervene.given_pattern(h, p))[1], (0, None)))(
        eye, p_TS
    )
    for n in range(N):
        close(made[n], run("causal", intervene.given_pattern(eye[n], p_TS))[1])
    none = jit(lambda edit: run("causal", edit)[1])(
        intervene.Edit(~HEADS_N & False, None, None, "zero")
    )
    close(none, run("causal")[1])
