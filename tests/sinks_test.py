"""Sinks: a cache by brute force, weights written out, verdicts that come out either way."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _character, sinks
from jax_attn import (
    attention,
    causal,
    data,
    dense_weights,
    init_attention,
    language_model,
    make_mesh,
    norm,
    project_qkv,
    rope,
)

MODEL = _character.Character(D=8, N=2, L=1, T=10, B=2)
SMALL = sinks.Config(model=MODEL, times=3)
TINY = [f"--model.{name}={getattr(MODEL, name)}" for name in ("D", "N", "L", "T", "B")]
RUN = [*TINY, "--model.steps=2", "--every=1", "--eval_windows=6", "--seeds=2", "--times=3"]


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])  # compiling for one takes a third of the time
    monkeypatch.setattr(sinks, "read_mesh", lambda text: mesh)
    assert sinks.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["model"] for row in summary["table"]] == [m.title for m in sinks.MODELS.values()]
    for row, model in zip(summary["table"], sinks.MODELS.values(), strict=True):
        assert all(len(row[name]) == 2 for name in ("loss afresh", "last T", "all"))
        assert (max(row["on its own sink"]) > 0.01) == (model.sink != "none")
        assert len(row["by layer"].split()) == 1
    assert len(summary["verdicts"]) == 8
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 3
    assert {row["model"] for row in rows} == set(sinks.MODELS)
    assert (tmp_path / "sinks.png").stat().st_size > 10_000


def test_no_text_has_the_byte_that_rows_begin_with() -> None:
    text = data.load_text()
    assert text.train.min() > sinks.FIRST < text.heldout.min()


def test_rows_begin_alike_or_anywhere() -> None:
    windows = jnp.arange(1, 9).reshape(2, 4)
    assert sinks.begun({"fixed": jnp.bool_(True)}, windows).tolist() == [[0, 2, 3, 4], [0, 6, 7, 8]]
    assert (sinks.begun({"fixed": jnp.bool_(False)}, windows) == windows).all()


# Reading on.

ROOM, KEPT, H = 6, 2, 4
X_BTD = jax.random.normal(jax.random.key(2), (2, 17, 8))


@pytest.fixture(scope="module")
def layer() -> Any:
    params = jax.jit(partial(init_attention, D=8, N=2, sinks=True))(jax.random.key(0))
    return params | {"sinks_N": jnp.array([0.3, -0.8])}


def turn(x_H: np.ndarray, position: int) -> np.ndarray:
    """RoPE by hand: halves are the two coordinates of pairs."""
    angle = position * 10_000.0 ** (-2 * np.arange(H // 2) / H)
    a, b = x_H[: H // 2], x_H[H // 2 :]
    made = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(made)


@pytest.mark.parametrize("kept", [0, KEPT])
def test_streaming_is_a_cache_with_positions_of_its_own(layer: Any, kept: int) -> None:
    stream = jax.jit(partial(sinks.streaming_attention, turns=rope.plain(H), room=ROOM, kept=kept))
    y_BTD = stream(layer, X_BTD)
    q, k, v = (np.asarray(x, np.float64)[0] for x in project_qkv(layer, X_BTD))
    sink_N = np.asarray(layer["sinks_N"], np.float64)
    wo_NED = np.asarray(layer["wo_NED"], np.float64)
    for t in range(X_BTD.shape[1]):
        cache = list(range(t + 1))
        if len(cache) > ROOM:
            cache = cache[:kept] + cache[-(ROOM - kept) :]
        assert len(cache) <= ROOM
        y_D = np.zeros(8)
        for n in range(2):
            query = turn(q[t, n], len(cache) - 1)
            e = [math.exp(query @ turn(k[s, n], i) / math.sqrt(H)) for i, s in enumerate(cache)]
            o_E = sum(w * v[s, n] for w, s in zip(e, cache, strict=True))
            y_D += o_E / (sum(e) + math.exp(sink_N[n])) @ wo_NED[n]
        np.testing.assert_allclose(y_BTD[0, t], y_D, rtol=1e-4, atol=1e-5)


def test_streaming_is_attention_as_long_as_the_cache_holds_all(layer: Any) -> None:
    @jax.jit
    def both(layer: Any) -> Any:
        stream = partial(sinks.streaming_attention, turns=rope.plain(H), room=17, kept=KEPT)
        return stream(layer, X_BTD), attention(layer, X_BTD, mask=causal(), rope=rope.plain(H))

    np.testing.assert_allclose(*both(layer), rtol=1e-5, atol=1e-6)


def test_afresh_covers_all_bytes_after_the_first_window_once() -> None:
    T, times = 10, 3
    index = sinks.afresh(T, times)
    # Inputs are all but the last byte; the last half of them counts.
    assert index[:, :-1][:, T // 2 :].ravel().tolist() == list(range(T, times * T))
    assert index.max() == times * T
    assert (np.diff(index, axis=1) == 1).all()


# Training and measuring.


@pytest.fixture(scope="module")
def params() -> Any:
    """A model whose heads look sharply, with sinks of their own."""
    made = jax.jit(partial(sinks.init, SMALL, True))(jax.random.key(3))
    leaves = made["layers"]["attention"]
    assert leaves["sinks_N"].tolist() == [[0.0, 0.0]]
    leaves |= {"wq_DNH": 6 * leaves["wq_DNH"], "sinks_N": jnp.array([[1.5, -1.0]])}
    return made


def test_a_sink_that_is_not_learned_has_logit_0_and_no_gradient(params: Any) -> None:
    windows_BT = jax.random.randint(jax.random.key(1), (2, 11), 1, 256)

    @jax.jit
    def gradient(learned: jax.Array, params: Any) -> Any:
        case = {"fixed": jnp.bool_(False), "learned": learned}
        fn = jax.value_and_grad(
            lambda p: sinks.loss_of(SMALL, case, p, windows_BT, jax.random.key(2))[0]
        )
        loss, made = fn(params)
        return loss, made["layers"]["attention"]["sinks_N"]

    leaves = params["layers"]["attention"] | {"sinks_N": jnp.zeros((1, 2))}
    zero = params | {"layers": params["layers"] | {"attention": leaves}}
    loss, slope = gradient(jnp.bool_(True), params)
    assert np.abs(slope).min() > 0
    still, slope = gradient(jnp.bool_(False), params)
    assert slope.tolist() == [[0.0, 0.0]]
    assert still != loss
    assert still == gradient(jnp.bool_(True), zero)[0]


def test_measured_weights_are_those_written_out(params: Any) -> None:
    heldout = np.asarray(jax.random.randint(jax.random.key(4), (2, 3, 11), 1, 256))
    case = {"fixed": jnp.bool_(True), "learned": jnp.bool_(True)}
    seen = jax.jit(partial(sinks.measure, SMALL, heldout))(case, params)
    tokens_BT = heldout.reshape(6, 11).copy()
    tokens_BT[:, 0] = sinks.FIRST
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])

    @jax.jit
    def written_out(params: Any) -> jax.Array:
        x_BTD = norm(layer["attention_norm"], params["embed_VD"][tokens_BT[:, :-1]])
        q_BTNH, k_BSKH, _ = project_qkv(layer["attention"], x_BTD, rope=rope.plain(4))
        return dense_weights(q_BTNH, k_BSKH, mask=causal(), sinks_N=layer["attention"]["sinks_N"])

    p_BNTS = np.asarray(written_out(params))
    first_BN = p_BNTS[..., 0].mean(axis=2)
    np.testing.assert_allclose(seen["first_LN"][0], first_BN.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(seen["own_LN"][0], 1 - p_BNTS.sum(3).mean((0, 2)), rtol=1e-4)
    share_N = (first_BN > sinks.SINK).mean(axis=0)
    assert 0 < share_N.mean() < 1  # else it says little
    np.testing.assert_allclose(seen["sink_LN"][0], share_N, rtol=1e-6)


def test_losses_by_position_are_those_of_the_models(params: Any) -> None:
    windows = np.asarray(jax.random.randint(jax.random.key(5), (1, 2, 31), 1, 256))
    case = {"fixed": jnp.bool_(True), "learned": jnp.bool_(True)}
    read = jax.jit(partial(sinks.read_on, SMALL, windows))(case, params)
    assert [read[way].shape for way in ("all", "last", "kept", "afresh")] == [(30,)] * 3 + [(20,)]
    for way in ("last", "kept"):  # within the first window all ways are one
        np.testing.assert_allclose(read[way][:10], read["all"][:10], rtol=1e-5)
        assert np.abs(read[way][10:] - read["all"][10:]).max() > 1e-4
    short_BT = windows[0, :, 15:26].copy()
    short_BT[:, 0] = sinks.FIRST
    logits_BTV = jax.jit(partial(language_model, attend=_character.attend(MODEL)))(
        params, short_BT[:, :-1]
    )[0]
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    nats_BT = -np.take_along_axis(log_p_BTV, short_BT[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(read["afresh"][10:15], nats_BT[:, 5:].mean(axis=0), rtol=1e-5)


# Verdicts.


def judged(*, good: bool) -> list[bool | None]:
    names = ("open", "fixed", "open, learned", "fixed, learned")
    shares = {name: np.full((2, 2, 4), 0.3 if good else 0.01) for name in names}
    first = {name: np.full((2, 2, 4), 0.1) for name in names}
    losses = {name: {"last": np.array([2.5, 2.6]), "kept": np.array([2.5, 2.6])} for name in names}
    for name in ("open", "fixed"):
        if good:
            first[name][:, 1, 2] = 0.6
        else:
            first[f"{name}, learned"][:, 1, 2] = 0.6
        dropped = losses[name if good else f"{name}, learned"]
        dropped["last"] = dropped["last"] + 0.4
    return [v.holds for v in sinks.verdicts(shares, first, losses)]


def test_verdicts_come_out_either_way() -> None:
    assert judged(good=True) == [True] * 8
    assert judged(good=False) == [False] * 8


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.steps=0", "--model.steps must be at least 1, got 0"),
        ("--kept=0", "--kept must be at least 1, got 0"),
        ("--kept=64", "--model.T=64 must be even and above --kept=64"),
        ("--model.T=63", "--model.T=63 must be even and above --kept=4"),
        ("--times=1", "--times must be at least 2 to read on, got 1"),
        ("--eval_windows=10000", "text_bytes has "),
        ("--model.data=nowhere.txt", "'nowhere.txt' does not exist"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    mesh = make_mesh(devices=jax.devices()[:1])
    if not argument.startswith("--mesh"):
        monkeypatch.setattr(sinks, "read_mesh", lambda text: mesh)
    assert sinks.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
