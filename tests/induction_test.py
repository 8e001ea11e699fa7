"""Induction heads: rows, scores and smeared keys by brute force; verdicts come out either way."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import induction
from experiments._learn import learn
from jax_attn import (
    Rope,
    attention,
    causal,
    dense_weights,
    language_model,
    make_mesh,
    project_qkv,
    rope,
)
from jax_attn.report import training_progress

SMALL = induction.Config(V=12, T=13, shortest=3, longest=6, D=8, N=2, B=8, looked=16)
LETTERS = ("V", "T", "shortest", "longest", "D", "N", "B", "looked")
TINY = [f"--{name}={getattr(SMALL, name)}" for name in LETTERS]
RUN = [*TINY, "--steps=2", "--frozen_steps=3", "--every=1", "--seeds=2"]


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for one takes a third of the time."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(induction, "read_mesh", lambda text: mesh)


@pytest.mark.usefixtures("one_device")
@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path) -> None:
    assert induction.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    *table, even = summary["table"]
    assert [row["model"] for row in table] == [m.title for m in induction.models(SMALL).values()]
    assert all(len(row["best head's score"]) == 2 for row in table)
    assert even["best head's score"] == pytest.approx(induction.even_score(SMALL), rel=1e-5)
    assert len(summary["verdicts"]) == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*[0, 1, 2] * 3, 0, 1, 2, 3]
    assert np.shape(rows[0]["score_LN"]) == (2, 2, 2)
    assert np.shape(rows[-1]["score_LN"]) == (2, 2, 2)
    assert (tmp_path / "induction.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.skipif(jax.device_count() != 8, reason="splits over 8 devices")
@pytest.mark.parametrize("name", ["deep", "smeared"])
def test_numbers_do_not_depend_on_the_mesh(name: str) -> None:
    model = induction.models(SMALL)[name]
    measured = []
    for mesh in (make_mesh(data=4, model=2), make_mesh(devices=jax.devices()[:1])):
        with training_progress() as progress:
            found = learn(
                model.init,
                partial(induction.loss_of, model.attend),
                induction.optimizer(SMALL, model),
                partial(induction.draw, SMALL, SMALL.B),
                seeds=2,
                steps=2,
                every=1,
                measure=partial(induction.measure, SMALL, model.attend),
                mesh=mesh,
                progress=progress,
                title=model.title,
            )
        measured.append(found.rows)
    for split, alone in zip(*measured, strict=True):
        for key in ("score_LN", "repeat"):
            np.testing.assert_allclose(split[key], alone[key], rtol=1e-3, atol=1e-5)


def test_distinct_tokens_come_back_after_a_random_number_of_them() -> None:
    rows = jax.tree.map(np.asarray, induction.draw(SMALL, 300, jax.random.key(5)))
    assert rows.tokens_BT.shape == (300, SMALL.T + 1)
    assert set(rows.period_B) == {3, 4, 5, 6}
    assert set(rows.tokens_BT.ravel()) == set(range(SMALL.V))
    for tokens_T, period in zip(rows.tokens_BT, rows.period_B, strict=True):
        assert len(set(tokens_T[:period])) == period
        assert (tokens_T[period:] == tokens_T[:-period]).all()
    again = induction.draw(SMALL, 300, jax.random.key(5))
    assert (np.asarray(again.tokens_BT) == rows.tokens_BT).all()
    assert (
        np.asarray(induction.draw(SMALL, 300, jax.random.key(6)).tokens_BT) != rows.tokens_BT
    ).any()


def follows(tokens_BT: np.ndarray) -> np.ndarray:
    """Which pairs have a key right after an earlier occurrence of the query's token, by search."""
    B, T = tokens_BT.shape
    made_BTS = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(1, t + 1):
                made_BTS[b, t, s] = s - 1 < t and tokens_BT[b, s - 1] == tokens_BT[b, t]
    return made_BTS


def test_pairs_are_those_that_a_search_finds() -> None:
    rows = induction.draw(SMALL, 16, jax.random.key(5))
    b, t, s = np.ogrid[:16, : SMALL.T, : SMALL.T]
    pairs_BTS = induction.Follows(rows.period_B)(b, 0, t, s)
    expected_BTS = follows(np.asarray(rows.tokens_BT)[:, : SMALL.T])
    np.testing.assert_array_equal(pairs_BTS, expected_BTS)
    # Each token of the repeat has one at least, and is followed by what stands there.
    repeat_BT = np.arange(SMALL.T)[None] >= np.asarray(rows.period_B)[:, None]
    np.testing.assert_array_equal(expected_BTS.any(axis=2), repeat_BT)
    tokens_BT = np.asarray(rows.tokens_BT)
    for b, t, s in zip(*np.nonzero(expected_BTS), strict=True):
        assert tokens_BT[b, s] == tokens_BT[b, t + 1]


def test_the_score_is_that_of_weights_written_out() -> None:
    model = induction.models(SMALL)["one"]
    params = jax.jit(model.init)(jax.random.key(1))
    seen = jax.jit(partial(induction.measure, SMALL, model.attend))(params)
    rows = induction.draw(SMALL, SMALL.looked, jax.random.key(induction.LOOKED))
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    x_BTD = params["embed_VD"][rows.tokens_BT[:, :-1]]
    x_BTD = x_BTD / jnp.sqrt(jnp.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-6)
    q_BTNH, k_BSKH, _ = project_qkv(layer["attention"], x_BTD, rope=rope.plain(4))
    p_BNTS = np.asarray(dense_weights(q_BTNH, k_BSKH, mask=causal()))
    pairs_BTS = follows(np.asarray(rows.tokens_BT)[:, :-1])
    mass_BNT = (p_BNTS * pairs_BTS[:, None]).sum(axis=-1)
    repeat_BT = np.arange(SMALL.T)[None] >= np.asarray(rows.period_B)[:, None]
    expected_N = [mass_BNT[:, n][repeat_BT].mean() for n in range(2)]
    np.testing.assert_allclose(seen["score_LN"][0], expected_N, rtol=1e-4)
    logits_BTV = jax.jit(partial(language_model, attend=model.attend))(
        params, rows.tokens_BT[:, :-1]
    )[0]
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    right_BT = np.take_along_axis(log_p_BTV, np.asarray(rows.tokens_BT)[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(seen["repeat"], -right_BT[repeat_BT].mean(), rtol=1e-5)


def test_the_score_makes_no_array_of_all_pairs() -> None:
    cfg = induction.Config(V=120, T=251, shortest=100, longest=110, looked=2)
    model = induction.models(cfg)["one"]
    params = jax.eval_shape(model.init, jax.random.key(0))
    rows = jax.eval_shape(partial(induction.draw, cfg, 2), jax.random.key(0))
    step = jax.jit(partial(induction.loss_of, model.attend)).trace(params, rows, None)
    assert "251,251" in str(step.jaxpr)
    look = jax.jit(partial(induction.measure, cfg, model.attend)).trace(params)
    assert "251,251" not in str(look.jaxpr)


@pytest.mark.parametrize("period", [3, 6])
def test_even_attention_has_the_score_that_is_counted(period: int) -> None:
    cfg = dataclasses.replace(SMALL, shortest=period, longest=period)
    model = induction.models(cfg)["one"]
    params = jax.jit(model.init)(jax.random.key(1))
    params["layers"]["attention"]["wq_DNH"] *= 0
    seen = jax.jit(partial(induction.measure, cfg, model.attend))(params)
    np.testing.assert_allclose(seen["score_LN"], induction.even_score(cfg), rtol=1e-5)


@pytest.mark.parametrize(("smear", "score"), [(-40.0, 1.0), (40.0, 0.0)])
def test_a_planted_head_with_smeared_keys_finds_what_followed(smear: float, score: float) -> None:
    """Keys of the token before: all weight on what followed. The token's own: none there."""
    V = SMALL.V
    eye_DNH = jnp.eye(V)[:, None]
    leaves = {"wq_DNH": 30 * eye_DNH, "wk_DKH": eye_DNH, "wv_DKE": eye_DNH}
    leaves |= {"wo_NED": 100 * jnp.eye(V)[None], "smear_K": jnp.array([smear])}
    block = {"attention": leaves, "attention_norm": {"scale_D": jnp.ones(V)}}
    params = {"embed_VD": jnp.eye(V), "layers": jax.tree.map(lambda leaf: leaf[None], block)}
    unturned = Rope(np.zeros(V, np.float32))
    attend = partial(induction.smeared_attention, mask=causal(), turns=unturned)
    seen = jax.jit(partial(induction.measure, SMALL, attend))(params)
    np.testing.assert_allclose(seen["score_LN"], [[score]], atol=1e-4)
    assert (seen["repeat"] < 1e-3) == (score == 1.0)


def test_keys_that_are_not_smeared_are_those_of_attention() -> None:
    params = induction.init_smeared(jax.random.key(0), D=8, N=2)
    assert params["smear_K"].tolist() == [0.0, 0.0]
    x_BTD = jax.random.normal(jax.random.key(1), (3, 5, 8))
    own = {name: leaf for name, leaf in params.items() if name != "smear_K"}
    expected = attention(own, x_BTD, mask=causal(), rope=rope.plain(4))
    smear = partial(induction.smeared_attention, mask=causal(), turns=rope.plain(4))
    y_BTD, _ = smear(params | {"smear_K": jnp.full(2, 50.0)}, x_BTD)
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-5, atol=1e-6)
    # Later tokens do not reach earlier ones, and the first has no key before it.
    half, _ = smear(params, x_BTD)
    changed, _ = smear(params, x_BTD.at[:, 3].add(1.0))
    np.testing.assert_allclose(changed[:, :3], half[:, :3], rtol=1e-5, atol=1e-6)
    assert (np.abs(changed[:, 3:] - half[:, 3:]) > 1e-3).any()


def scores(ends: dict[str, list[float]], *, between: float = 0.05) -> dict[str, np.ndarray]:
    """Plant scores [measurements,seeds,L,N]: one head rises at the last of three intervals."""
    made = {}
    for name, seeds in ends.items():
        made[name] = np.full((4, len(seeds), 2, 3), 0.05)
        made[name][2, :, 1, 2] = between
        made[name][3, :, 1, 2] = seeds
    return made


def test_verdicts_come_out_either_way() -> None:
    good = {"deep": [0.6, 0.9], "one": [0.06, 0.1], "smeared": [0.31, 0.8]}
    bad = {"deep": [0.1, 0.4], "one": [0.2, 0.9], "smeared": [0.29, 0.06]}
    without_deep = [v.holds for v in induction.verdicts(scores(bad))]
    assert without_deep == [False, False, None, False], "one layer is judged beside two that do"
    assert [v.holds for v in induction.verdicts(scores(good))] == [True] * 4
    beside = induction.verdicts(scores(bad | {"deep": [0.6, 0.9]}))
    assert [v.holds for v in beside] == [True, True, False, False]
    ends = {"deep": [0.6, 0.1], "one": [0.05, 0.05], "smeared": [0.5, 0.6]}
    mixed = induction.verdicts(scores(ends))
    assert [v.holds for v in mixed] == [None, None, True, True]
    # A head that rises evenly is a head, but does not jump.
    even = scores(good)
    even["deep"][:, :, 1, 2] = np.linspace(0.05, 0.8, 4)[:, None]
    assert [v.holds for v in induction.verdicts(even)] == [True, False, True, True]


def test_a_jump_is_the_largest_share_of_the_rise() -> None:
    planted = scores({"deep": [0.65, 0.65, 0.45]}, between=0.5)["deep"]
    planted[2, 1] = 0.35
    np.testing.assert_allclose(induction.jump(planted), [0.75, 0.5, np.nan])
    assert induction.steepest(np.array([4.0, 3.0, 1.0])) == pytest.approx(2 / 3)
    assert induction.steepest(np.array([1.0, 1.0])) == 0.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "--steps must be at least 1, got 0"),
        ("--shortest=25", "--shortest=25 is above --longest=24"),
        ("--longest=33", "--longest=33 distinct tokens, but there are --V=32"),
        ("--T=24", "--longest=24 must be below --T=24, to come back"),
        ("--L=1", "--L must be at least 2, got 1: one layer is a model of its own"),
        ("--N=64", "--N=64 heads must divide --D=64 into even widths, for RoPE"),
        ("--learning_rate=0", "--learning_rate must be above 0, got 0.0"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert induction.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
