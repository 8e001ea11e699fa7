"""Longer windows: the same bytes at every length, ways to know positions, verdicts either way."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _character, length
from experiments._character import Character
from jax_attn import (
    alibi,
    alibi_slopes,
    attention,
    causal,
    data,
    language_model,
    make_mesh,
    rope,
)

MODEL = Character(D=8, N=2, L=2, T=8, B=2, steps=2)
TINY = ["--model.D=8", "--model.N=2", "--model.L=2", "--model.T=8", "--model.B=2"]
RUN = [*TINY, "--model.steps=2", "--every=2", "--eval_windows=6", "--seeds=2"]
WAYS = length.ways(MODEL)


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])  # compiling for one takes a third of the time
    monkeypatch.setattr(length, "read_mesh", lambda text: mesh)
    assert length.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    table = {row["positions"]: row for row in summary["table"]}
    assert list(table) == [way.title for way in WAYS.values()]
    for name, way in WAYS.items():
        row = table[way.title]
        assert (row["4T"] is None) == (row["2T"] is None) == (name == "learned")
        assert (row["T, slid"] is None) == (way.model != name)
        assert all(4 < loss < 8 for loss in row["T, nats"])
        # All that are RoPE are the same model at T.
        assert row["T, nats"] == table[WAYS[way.model].title]["T, nats"]
    assert len(summary["verdicts"]) == 7
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2] * 4
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 10_000


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(partial(length.init, MODEL, False))(jax.random.key(1))


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """Windows of 4T + 1 bytes, [chunks,B,33]."""
    return length.windows_of(length.Config(model=MODEL, eval_windows=6), data.load_text(None))


def plainly(attend: Any, params: dict, windows: np.ndarray) -> np.ndarray:
    """The cross entropy of all bytes of [B,T+1] but the first, by the library's own formula."""
    run = jax.jit(partial(language_model, attend=attend, feed=_character.feed))
    logits_BTV, _ = run(params, jnp.asarray(windows[:, :-1]))
    log_p = np.asarray(jax.nn.log_softmax(logits_BTV))
    return -np.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0]


@pytest.mark.parametrize("name", ["rope", "alibi", "none"])
def test_one_attention_serves_all_ways(name, params, windows) -> None:
    options = {
        "rope": {"rope": rope.plain(4)},
        "alibi": {"score": alibi(alibi_slopes(2))},
        "none": {},
    }
    expected = plainly(partial(attention, mask=causal(), **options[name]), params, windows[0])
    got = jax.jit(length.nats)(WAYS[name].at(1), params, windows[0])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_every_length_predicts_the_same_bytes(params, windows) -> None:
    """A model that knows its own byte alone loses the same at every length; others do not."""
    blind = jax.tree.map(lambda x: x, params)
    blind["layers"]["attention"]["wo_NED"] = jnp.zeros_like(params["layers"]["attention"]["wo_NED"])
    readers = [jax.jit(partial(length.by_position, factor * 8)) for factor in length.FACTORS]
    losses = {}
    for who, model in (("blind", blind), ("seeing", params)):
        read = [reader(WAYS["none"].at(1), model, windows) for reader in readers]
        assert [curve.shape for curve in read] == [(8,), (16,), (32,)]
        losses[who] = [np.asarray(curve[-8:]) for curve in read]
    np.testing.assert_allclose(losses["blind"][1], losses["blind"][0], rtol=1e-5)
    np.testing.assert_allclose(losses["blind"][2], losses["blind"][0], rtol=1e-5)
    assert np.abs(losses["seeing"][1] - losses["seeing"][0]).max() > 1e-3
    # Their mean over positions is the loss of those bytes.
    flat = windows.reshape(-1, 33)
    expected = plainly(partial(attention, mask=causal()), params, flat[:, -9:])
    np.testing.assert_allclose(losses["seeing"][0], expected.mean(0), rtol=1e-4)


def test_slid_windows_reach_no_further_than_one_and_give_each_byte_once(params, windows) -> None:
    knows = WAYS["rope"].at(1)
    got = np.asarray(jax.jit(partial(length.slid, 8))(knows, params, windows))
    assert got.shape == (32,)
    flat = windows.reshape(-1, 33)
    attend = partial(attention, mask=causal(), rope=rope.plain(4))
    np.testing.assert_allclose(got[:8], plainly(attend, params, flat[:, :9]).mean(0), rtol=1e-4)
    for position in (8, 13, 31):
        end = position // 2 * 2 + 2  # slid by T/4 = 2: where the window with this byte ends
        near = plainly(attend, params, flat[:, end - 8 : end + 1]).mean(0)
        np.testing.assert_allclose(got[position], near[position - end], rtol=1e-4)


def test_a_table_has_no_row_beyond_the_trained_length(windows) -> None:
    learned = jax.eval_shape(partial(length.init, MODEL, True), jax.random.key(1))
    assert learned["position_TD"].shape == (8, 8)
    assert WAYS["learned"].factors == (1,)
    with pytest.raises(ValueError, match="ends at T=16 but position_TD has T=8"):
        jax.eval_shape(partial(length.by_position, 16), WAYS["learned"].at(2), learned, windows)


def test_ways_are_those_of_the_papers() -> None:
    wide = length.ways(dataclasses.replace(MODEL, D=64, T=64))
    plain = rope.plain(32)
    for name in ("rope", "linear", "ntk", "llama3", "yarn"):
        assert wide[name].at(1).rope == plain
        assert not wide[name].at(4).slopes_N.any()
    frequency = {name: wide[name].at(4).rope.frequency_H for name in wide}
    np.testing.assert_allclose(frequency["linear"], plain.frequency_H / 4, rtol=1e-6)
    # NTK-aware: the fastest pair stays, the slowest is slowed by the whole factor.
    ratio = frequency["ntk"] / plain.frequency_H
    np.testing.assert_allclose(ratio[[0, 15]], [1, 1 / 4], rtol=1e-5)
    assert (np.diff(ratio[:16]) < 0).all()
    assert wide["yarn"].at(4).rope == rope.yarn(32, factor=4, original=64)
    assert wide["llama3"].at(2).rope == rope.llama3(32, factor=2, original=64, theta=10_000.0)
    assert wide["rope"].at(4).rope == plain
    for name in ("alibi", "none"):
        assert not frequency[name].any()
    assert wide["alibi"].at(4).slopes_N.tolist() == alibi_slopes(2).tolist()
    assert not wide["none"].at(4).slopes_N.any()
    assert {way.model for way in wide.values()} == {"rope", "alibi", "none", "learned"}


def planted(**losses: tuple[float, float, float]) -> dict[str, dict[int, np.ndarray]]:
    """Plant losses at T, 2T and 4T, three seeds alike."""
    made = {"linear": (2.0, 2.1, 2.4), "yarn": (2.0, 2.0, 2.1), "none": (2.1, 2.15, 2.3)}
    return {
        name: {factor: np.full(3, x) for factor, x in zip(length.FACTORS, values, strict=True)}
        for name, values in (made | losses).items()
    }


def test_verdicts_come_out_either_way() -> None:
    good = planted(alibi=(2.0, 1.98, 1.97), rope=(2.0, 2.3, 3.0))
    slid = {"alibi": np.full(3, 1.975)}
    assert [v.holds for v in length.verdicts(good, slid)] == [True] * 7
    bad = planted(alibi=(2.0, 2.02, 2.05), rope=(2.0, 1.99, 1.98), linear=(2.0, 2.0, 2.0))
    late = {"alibi": np.full(3, 2.1)}
    assert [v.holds for v in length.verdicts(bad, late)] == [False] * 7
    mixed = planted(alibi=(2.0, 1.98, 1.97), rope=(2.0, 2.3, 3.0))
    mixed["alibi"][4][0] = 2.2
    mixed["rope"][2][1] = np.nan
    found = [v.holds for v in length.verdicts(mixed, slid)]
    assert found == [True, None, True, None, None, True, True]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--eval_windows=0", "--eval_windows must be at least 1, got 0"),
        ("--model.T=10", "--model.T must be a multiple of 4, got 10"),
        ("--model.N=4", "--model.D=8 over --model.N=4 heads must be at least 4 wide"),
        ("--model.N=3", "--model.N=3 heads must divide --model.D=8 into even widths"),
        ("--eval_windows=1000000", "text_bytes has "),
        ("--model.B=9", "--model.B=9 rows cannot be split over 8 devices"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "8 devices" in message and jax.device_count() != 8:
        pytest.skip("splits over 8 devices")
    given = {option.partition("=")[0]: option for option in [*RUN, "--model.B=8", argument]}
    assert length.main(list(given.values())) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_presets_can_be_run() -> None:
    for preset in length.PRESETS.values():
        model = {k.removeprefix("model."): v for k, v in preset.items() if "." in k}
        own = {k: v for k, v in preset.items() if "." not in k}
        start = dataclasses.replace(length.MODEL, **{"B": 8, **model})
        length.check(dataclasses.replace(length.Config(), model=start, **own))
