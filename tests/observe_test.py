"""Observing through the layers: what attention, blocks, stacks and models report, and no change of
their output. tests/observe_contract.py has the statistics themselves."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_attn import (
    attention,
    block,
    causal,
    dot_product_attention,
    generate,
    head_summary,
    init_attention,
    init_block,
    init_language_model,
    init_mlp,
    intervene,
    language_model,
    mean_of,
    project_qkv,
    rope,
    stack,
    where,
    window_mass,
)
from tests import formulas
from tests.attention_cases import QUICK
from tests.formulas import random_like
from tests.intervene_test import close

B, T, S, D, N, K, H, E, F, V, L = 2, 5, 19, 7, 3, 1, 4, 13, 17, 23, 11
EPS = float(np.finfo(np.float32).eps)
jit = partial(jax.jit, compiler_options=QUICK)
LAYER = partial(
    init_block,
    D=D,
    attention=partial(init_attention, D=D, N=N, K=K, H=H, E=E, qk_norm=True),
    mlp=partial(init_mlp, D=D, F=F),
)
MODEL = formulas.draw(partial(init_language_model, V=V, D=D, L=L, layer=LAYER), 3, scale=0.5)
X_BTD = random_like(np.zeros((B, T, D)), 1)
TOKENS_BT = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)))


PARAMS = jax.tree.map(lambda leaf: leaf[0], MODEL["layers"]["attention"])


def parity(b, n, t, s):
    return (s - t) % 2


NAMES = ("lse", "entropy", "max_logit", "argmax_key")
OBSERVE: Any = (*NAMES, window_mass(1), mean_of(parity))
EVERY = {*NAMES, "window_mass", "parity"}
OPTIONS = {"mask": causal(), "rope": rope.plain(H)}
ATTEND = partial(attention, **OPTIONS)
SEEING = partial(ATTEND, observe=OBSERVE)


def close_seen(got: dict, want: dict) -> None:
    assert set(got) == set(want) == EVERY
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("cross", [False, True])
def test_attention_reports_what_the_scores_do(cross: bool) -> None:
    kv_BSD = random_like(np.zeros((B, S, D)), 2) if cross else None
    offset = 2 if cross else 0
    more = {"scale": 0.7, "softcap": 3.0, "q_offset": offset}

    @jit
    def both(params, x_BTD):
        kept = ("q_BTNH", "k_BSKH", "v_BSKE")
        y_BTD, aux = SEEING(params, x_BTD, kv_BSD=kv_BSD, keep=kept, **more)
        qkv = project_qkv(params, x_BTD, kv_BSD, rope=OPTIONS["rope"], q_offset=offset)
        _, seen = dot_product_attention(*qkv, mask=causal(), observe=OBSERVE, **more)
        return y_BTD, aux, dict(zip(kept, qkv, strict=True)), seen

    y_BTD, aux, kept, seen = both(PARAMS, X_BTD)
    assert set(aux) == {"seen", "kept"}
    close_seen(aux["seen"], seen)
    jax.tree.map(close, aux["kept"], kept)
    assert aux["seen"]["lse"].shape == (B, T, N)
    # Not observed, it returns its output and no more.
    plain = jit(lambda params, x: ATTEND(params, x, kv_BSD=kv_BSD, **more))(PARAMS, X_BTD)
    np.testing.assert_array_equal(plain, y_BTD)


@pytest.mark.parametrize("S", [64, 61])
def test_argmax_is_the_first_of_the_largest_keys(S: int) -> None:
    """Small integers tie often, within a row's parts and across them; the rows see 0 to S keys."""
    rng = np.random.default_rng(0)
    q_BTNH, k_BSNH = (jnp.asarray(rng.integers(-1, 2, (B, S, N, 2)), jnp.float32) for _ in range(2))
    s_BTNS = np.einsum("BTNH,BSNH->BTNS", q_BTNH, k_BSNH) / np.sqrt(np.float32(2.0))
    before = np.tri(S, k=-1, dtype=bool)
    want = np.where(before[None, :, None], s_BTNS, -np.inf).argmax(-1)
    want[:, 0] = -1

    @partial(jit, static_argnums=2)
    def run(q_BTNH, k_BSNH, implementation):
        options: Any = {"observe": ("argmax_key",), "implementation": implementation}
        mask = causal() & where(lambda b, n, t, s: t != s)
        return dot_product_attention(q_BTNH, k_BSNH, k_BSNH, mask=mask, **options)[1]

    for implementation in ("blockwise", "dense"):
        got = run(q_BTNH, k_BSNH, implementation)["argmax_key"]
        np.testing.assert_array_equal(got, want, err_msg=implementation)


def test_statistics_of_two_halves_of_the_keys_merge() -> None:
    """With w_i = e^(lse_i - lse) the share of half i, H = Σ w_i (H_i - log w_i), Σp² = Σ w_i² q_i,
    and means weigh by w_i; the second half's keys begin at 0, so its queries begin earlier."""
    q_BTNH = random_like(np.zeros((B, S, N, H)), 3)
    k_BSKH, v_BSKE = random_like(np.zeros((B, S, K, H)), 4), random_like(np.zeros((B, S, K, E)), 5)
    names = ("lse", "max_logit", "entropy", "effective_keys", "expected_distance", "argmax_key")
    first = 11
    observe = partial(
        dot_product_attention, mask=causal(), scale=1.0, observe=(*names, window_mass(3))
    )
    ends = ((slice(None, first), 0), (slice(first, None), -first))
    (o, whole), *halves = (
        jit(partial(observe, q_offset=offset))(q_BTNH, k_BSKH[:, part], v_BSKE[:, part])
        for part, offset in ((slice(None), 0), *ends)
    )
    assert (np.asarray(halves[1][1]["lse"])[:, :first] == -np.inf).all()
    lse = np.logaddexp.reduce([np.asarray(seen["lse"], np.float64) for _, seen in halves])
    w = [np.exp(seen["lse"] - lse) for _, seen in halves]

    def mean(of):
        return sum(w * np.asarray(of(seen), float) for w, (_, seen) in zip(w, halves, strict=True))

    surprise = sum(-w * np.log(np.where(w > 0.0, w, 1.0)) for w in w)
    participation = sum(
        w**2 / np.where(w > 0.0, seen["effective_keys"], 1.0)
        for w, (_, seen) in zip(w, halves, strict=True)
    )
    tops = [np.asarray(seen["max_logit"]) for _, seen in halves]
    left, right = (np.asarray(seen["argmax_key"]) for _, seen in halves)
    want = {
        "lse": lse,
        "max_logit": np.maximum(tops[0], tops[1]),
        "entropy": mean(lambda seen: seen["entropy"]) + surprise,
        "effective_keys": 1.0 / participation,
        "expected_distance": mean(lambda seen: seen["expected_distance"]),
        "argmax_key": np.where(tops[1] > tops[0], first + right, left),
        "window_mass": mean(lambda seen: seen["window_mass"]),
    }
    assert set(whole) == set(want)
    close(o, sum(w[..., None] * np.asarray(o, float) for w, (o, _) in zip(w, halves, strict=True)))
    for name, x in want.items():
        close(whole[name], x)


def test_what_is_kept_is_what_was_asked_for() -> None:
    y_BTD, aux = ATTEND(PARAMS, X_BTD, keep=("o_BTNE",))
    assert list(aux) == ["kept"]
    assert list(aux["kept"]) == ["o_BTNE"]
    close(np.tensordot(aux["kept"]["o_BTNE"], PARAMS["wo_NED"], 2), y_BTD)
    assert SEEING(PARAMS, X_BTD, observe=())[1] == {"seen": {}}


def test_observing_sees_no_edits_and_leaves_a_cache_alone() -> None:
    attend = partial(ATTEND, PARAMS, X_BTD, observe=NAMES)
    cache = {"k_BSKH": jnp.zeros((B, S, K, H)), "v_BSKE": jnp.zeros((B, S, K, E))}
    y_BTD, aux = attend(cache=cache)
    assert list(aux) == ["cache", "seen"]
    plain, bare = ATTEND(PARAMS, X_BTD, cache=cache)
    np.testing.assert_array_equal(plain, y_BTD)
    jax.tree.map(np.testing.assert_array_equal, aux["cache"], bare["cache"])
    seen = attend()[1]["seen"]
    jax.tree.map(close, aux["seen"], seen)
    edited, after = attend(intervene=intervene.zero(jnp.ones(N, bool)))
    jax.tree.map(np.testing.assert_array_equal, after["seen"], seen)
    np.testing.assert_array_equal(edited, 0.0)


def test_stack_reports_every_layer() -> None:
    attend = partial(SEEING, keep=("q_BTNH", "k_BSKH", "v_BSKE"))
    _, aux = jit(lambda x: stack(MODEL["layers"], x, attend=attend))(X_BTD)
    assert list(aux) == ["attention"]
    seen, kept = aux["attention"]["seen"], aux["attention"]["kept"]
    for name in EVERY:
        assert seen[name].shape == (L, B, T, N), name

    @jit
    def scores(q_BTNH, k_BSKH, v_BSKE):
        return dot_product_attention(q_BTNH, k_BSKH, v_BSKE, mask=causal(), observe=OBSERVE)[1]

    one = jit(partial(block, attend=attend))
    x_BTD = X_BTD
    for at in range(L):
        close_seen(
            {name: seen[name][at] for name in seen}, scores(**{n: kept[n][at] for n in kept})
        )
        # And block after block.
        x_BTD, said = one(jax.tree.map(lambda leaf, at=at: leaf[at], MODEL["layers"]), x_BTD)
        assert set(said["attention"]) == {"seen", "kept"}
        for name in kept:
            close(kept[name][at], said["attention"]["kept"][name])


def test_reduced_on_the_spot() -> None:
    run = jit(lambda tokens, attend: language_model(MODEL, tokens, attend=attend), static_argnums=1)
    edges = {"entropy": jnp.array([0.0, 0.5, 1.0, 2.0])}
    reduce = partial(head_summary, edges=edges)
    _, rows = run(TOKENS_BT, SEEING)
    _, aux = run(TOKENS_BT, partial(SEEING, reduce=reduce))
    made, seen = aux["attention"]["seen"], rows["attention"]["seen"]
    assert set(made) == EVERY
    for name, numbers in made.items():
        x = np.asarray(seen[name], np.float64)
        assert numbers["mean"].shape == (L, N)
        close(numbers["mean"], x.mean(axis=(1, 2)))
        np.testing.assert_array_equal(numbers["min"], x.min(axis=(1, 2)))
        np.testing.assert_array_equal(numbers["max"], x.max(axis=(1, 2)))
    assert made["entropy"]["counts"].shape == (L, N, 3)
    np.testing.assert_array_equal(made["entropy"]["counts"].sum(axis=-1), B * T)


def loss(params: dict, attend: Any, remat: str | None) -> Any:
    logits_BTV, aux = language_model(params, TOKENS_BT, attend=attend, remat=remat)
    return jnp.mean(jnp.sin(logits_BTV)), (logits_BTV, aux)


@pytest.mark.long
@pytest.mark.parametrize("remat", [None, "full", "dots"])
def test_model_and_its_gradient_do_not_change(remat: str | None) -> None:
    derive = jit(jax.grad(loss, has_aux=True), static_argnums=(1, 2))
    want, (plain_BTV, nothing) = derive(MODEL, ATTEND, remat)
    got, (logits_BTV, aux) = derive(MODEL, SEEING, remat)
    assert nothing == {}
    assert set(aux["attention"]["seen"]) == EVERY
    np.testing.assert_array_equal(logits_BTV, plain_BTV)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_generation_is_the_same_under_observation() -> None:
    made = [
        generate(
            MODEL, TOKENS_BT, steps=3, temperature=0.0, model=partial(language_model, attend=a)
        )
        for a in (ATTEND, SEEING)
    ]
    np.testing.assert_array_equal(made[0], made[1])


# Numbers a head.


def test_head_summary_is_the_formula() -> None:
    x = np.random.default_rng(5).normal(size=(L, B, T, N)).astype(np.float32)
    x[0, :, :, 1] = -np.inf  # a head without keys
    x[2, 1, 3] = -np.inf
    edges = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)
    x[1, 0, :4, 0] = edges  # an edge opens the bin to its right
    made = head_summary({"lse": jnp.asarray(x)}, edges={"lse": jnp.asarray(edges)})["lse"]
    for at, n in np.ndindex(L, N):
        rows = x[at, :, :, n][np.isfinite(x[at, :, :, n])].astype(np.float64)
        got = {name: np.asarray(leaf)[at, n] for name, leaf in made.items()}
        assert got["min"] == rows.min(initial=np.inf)
        assert got["max"] == rows.max(initial=-np.inf)
        mean = rows.mean() if rows.size else 0.0
        atol = B * T * EPS * abs(rows).max(initial=0.0)  # a rounding of each term that is summed
        np.testing.assert_allclose(got["mean"], mean, rtol=0, atol=atol)
        inside = np.clip(rows, -1.0, 1.9)  # rows outside count into the first or last bin
        np.testing.assert_array_equal(got["counts"], np.histogram(inside, edges)[0])
    assert made["counts"].dtype == jnp.int32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_head_summary_shows_a_head_that_diverges(bad: float) -> None:
    x_BTN = jnp.zeros((B, T, N)).at[0, 1, 2].set(bad)
    made = head_summary({"entropy": x_BTN}, edges={"entropy": jnp.array([-1.0, 1.0, 2.0])})
    made = made["entropy"]
    for name in ("mean", "max"):
        np.testing.assert_array_equal(made[name], [0.0, 0.0, bad], err_msg=name)
    assert made["counts"].sum(-1).tolist() == [B * T, B * T, B * T - np.isnan(bad)]


@pytest.mark.parametrize("sinks", [False, True])
def test_no_keys_are_the_row_without_keys(sinks: bool) -> None:
    q_BTNH, k_BSKH = random_like(np.zeros((B, T, N, H)), 1), random_like(np.zeros((B, S, K, H)), 2)
    sinks_N = jnp.arange(N, dtype=jnp.float32) if sinks else None
    names = ("lse", "max_logit", "entropy", "effective_keys", "expected_distance", "argmax_key")
    options: Any = {"sinks_N": sinks_N, "observe": (*names, "first_mass", window_mass(2, name="w"))}
    got = dot_product_attention(q_BTNH, k_BSKH[:, :0], k_BSKH[:, :0], **options)[1]
    nothing = jnp.zeros((1, 1, 1, 1), bool)
    want = dot_product_attention(q_BTNH, k_BSKH, k_BSKH, mask=nothing, **options)[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert set(got) == {*names, "first_mass", "w"}


def test_a_mean_may_be_a_number() -> None:
    x_BTNH = random_like(np.zeros((B, T, N, H)), 1)
    for implementation in ("dense", "blockwise"):
        one = mean_of(lambda b, n, t, s: 1.0, name="one")
        made = dot_product_attention(
            *(x_BTNH, x_BTNH, x_BTNH), observe=(one,), implementation=implementation
        )
        close(made[1]["one"], np.ones((B, T, N)))


@pytest.mark.parametrize("shape", [(0, T, N), (B, 0, N)])
def test_head_summary_of_no_rows(shape: tuple[int, ...]) -> None:
    made = head_summary({"entropy": jnp.zeros(shape)})["entropy"]
    for name, want in (("mean", 0.0), ("min", np.inf), ("max", -np.inf)):
        np.testing.assert_array_equal(made[name], np.full(N, want))
