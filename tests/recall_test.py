"""Recall of pairs: the rows are what they claim to be, and each verdict can come out either way."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recall
from experiments._learn import learn
from jax_attn import language_model, make_mesh
from jax_attn.report import training_progress

CFG = recall.Config()
SMALL = recall.Config(V=16, T=8, pairs=2, D=6, F=5, L=1)
SIZES = ["--V=16", "--T=8", "--pairs=2", "--D=6", "--F=5", "--B=8", "--asked=16", "--L=1"]
TINY = [*SIZES, "--steps=2", "--every=1", "--seeds=2"]
GOOD = {
    "attention": [1.0, 1.0],
    "attention alone": [1.0, 0.99],
    "static": [0.26, 0.3],
    "none": [0.008] * 2,
}
BAD = {
    "attention": [0.9, 0.98],
    "attention alone": [0.2, 0.3],
    "static": [0.31, 0.9],
    "none": [0.02, 0.0],
}
GOOD["static alone"], BAD["static alone"] = [0.2, 0.25], [0.5, 0.4]
NAMES = {"static": [0.99, 1.0], "static alone": [0.95, 1.0]}


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for one takes a third of the time."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(recall, "read_mesh", lambda text: mesh)


@pytest.mark.usefixtures("one_device")
@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path) -> None:
    assert recall.main([*TINY, "--fixed=true", "--rows=7", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    titles = [model.title for model in recall.models(CFG).values()]
    assert [row["model"] for row in summary["table"]] == [*titles, "7 fixed rows"]
    assert all(len(row["accuracy"]) == 2 for row in summary["table"])
    assert all(len(row["accuracy, fixed rows"]) == 2 for row in summary["table"])
    assert len(summary["verdicts"]) == 7
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] * 8
    assert (tmp_path / "recall.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.skipif(jax.device_count() != 8, reason="splits over 8 devices")
@pytest.mark.parametrize("name", ["static", "fixed"])
def test_numbers_do_not_depend_on_the_mesh(name: str) -> None:
    cfg = dataclasses.replace(SMALL, B=8, asked=16, fixed=True, rows=7)
    model = recall.models(cfg)[name]
    measured = []
    for mesh in (make_mesh(data=4, fsdp=2), make_mesh(devices=jax.devices()[:1])):
        with training_progress() as progress:
            found = learn(
                model.init,
                recall.loss_fn,
                recall.optimizer(cfg, model),
                model.batch,
                seeds=2,
                steps=2,
                every=1,
                measure=partial(recall.measure, cfg),
                mesh=mesh,
                progress=progress,
                title=model.title,
            )
        measured.append(found.rows)
    for split, alone in zip(*measured, strict=True):
        for key in split.keys() & {"loss", "accuracy", "own"}:
            np.testing.assert_allclose(split[key], alone[key], rtol=1e-4)


@pytest.mark.parametrize("make", [recall.fresh_rows, recall.fixed_rows])
@pytest.mark.parametrize("sizes", [{}, {"V": 14, "T": 26, "pairs": 6}, {"power": 1.0}])
def test_rows_are_pairs_then_questions(make, sizes) -> None:
    cfg = recall.Config(**sizes, rows=11)
    S = cfg.pairs
    rows = jax.tree.map(np.asarray, make(cfg, 64, jax.random.key(5)))
    keys_BS, values_BS = rows.tokens_BT[:, 0 : 2 * S : 2], rows.tokens_BT[:, 1 : 2 * S : 2]
    assert (keys_BS > 0).all()
    assert (keys_BS < cfg.V // 2).all()
    assert (values_BS >= cfg.V // 2).all()
    assert (values_BS < cfg.V).all()
    for distinct in (keys_BS, values_BS, rows.asked_BS):
        in_order = np.sort(distinct, axis=1)
        assert (in_order[:, 1:] > in_order[:, :-1]).all()
    np.testing.assert_array_equal(rows.values_BS, values_BS)
    np.testing.assert_array_equal(np.take_along_axis(rows.tokens_BT, rows.asked_BS, 1), keys_BS)
    assert (rows.asked_BS >= 2 * S).all()
    assert (rows.asked_BS < cfg.T).all()
    assert (rows.asked_BS % 2 == 0).all()
    # All else, and the place after each question, is the token between.
    assert ((rows.tokens_BT != 0).sum(axis=1) == 3 * S).all()


def test_fixed_rows_are_few_and_fresh_ones_are_not() -> None:
    for make, least, most in ((recall.fresh_rows, 200, 200), (recall.fixed_rows, 5, 11)):
        made = make(recall.Config(rows=11), 200, jax.random.key(5))
        different = len(np.unique(np.asarray(made.tokens_BT), axis=0))
        assert least <= different <= most


def test_near_places_ask_more_often_and_no_pair_asks_first() -> None:
    rows = recall.fresh_rows(CFG, 20_000, jax.random.key(5))
    slot_BS = (np.asarray(rows.asked_BS) - 2 * CFG.pairs) // 2
    often = np.bincount(slot_BS.ravel(), minlength=28) / len(slot_BS)
    # Draws one after the other, without replacement, weights i^(0.01 - 1).
    rng = np.random.default_rng(0)
    weight = np.arange(1, 29) ** (CFG.power - 1)
    drawn = [rng.choice(28, 4, replace=False, p=weight / weight.sum()) for _ in range(20_000)]
    np.testing.assert_allclose(often, np.bincount(np.ravel(drawn)) / 20_000, atol=0.02)
    first = np.bincount(slot_BS.argmin(axis=1)) / len(slot_BS)
    np.testing.assert_allclose(first, 0.25, atol=0.02)


def test_only_answers_count() -> None:
    """Logits elsewhere reach neither loss nor gradient."""
    params = jax.jit(recall.models(SMALL)["none"].init)(jax.random.key(0))
    rows = recall.fresh_rows(SMALL, 3, jax.random.key(1))
    logits_BTV = jax.jit(language_model)(params, rows.tokens_BT)[0]
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    right = [
        log_p_BTV[b, rows.asked_BS[b, s], rows.values_BS[b, s]] for b in range(3) for s in range(2)
    ]
    key = jax.random.key(0)
    (loss, _), grad = jax.jit(jax.value_and_grad(recall.loss_fn, has_aux=True))(params, rows, key)
    np.testing.assert_allclose(loss, -np.mean(right), rtol=1e-5)
    asked = np.unique(rows.asked_BS)
    silent = np.setdiff1d(np.arange(8), asked)
    assert not np.asarray(grad["position_TD"])[silent].any()
    assert np.asarray(grad["position_TD"])[asked].any(axis=1).all()


def test_wq_and_wk_are_frozen_and_nothing_else() -> None:
    model = recall.models(SMALL)["frozen"]
    tx = recall.optimizer(SMALL, model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    updates = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])(ones)
    moves = {
        str(path[-1].key): bool(leaf.any()) for path, leaf in jax.tree.leaves_with_path(updates)
    }
    assert {name for name, moved in moves.items() if not moved} == {"wq_DNH", "wk_DKH"}
    assert {"wv_DKE", "wo_NED", "w_in_DF", "embed_VD", "position_TD"} <= moves.keys()


@pytest.mark.parametrize(("planted", "holds"), [(GOOD, True), (BAD, False)])
def test_verdicts_come_out_either_way(planted, holds) -> None:
    made = recall.verdicts(planted, NAMES, V=256, pairs=4, questions=4096)
    assert [verdict.holds for verdict in made] == [holds] * 5
    own = [1.0, 1.0] if holds else [0.5, 0.4]
    planted = planted | {"fixed": [0.3, 0.1] if holds else [0.9, 1.0]}
    made = recall.verdicts(planted, NAMES, V=256, pairs=4, questions=4096, own=own)
    assert [verdict.holds for verdict in made] == [holds] * 7


def test_what_was_not_trained_is_not_judged() -> None:
    early = {name: [0.01, 0.01] for name in GOOD}
    made = recall.verdicts(early, NAMES, V=256, pairs=4, questions=4096)
    assert [v.holds for v in made] == [False, False, None, None, None]
    assert "no model with attention recalls" in made[3].measured
    names = NAMES | {"static": [0.95, 0.5]}
    made = recall.verdicts(GOOD, names, V=256, pairs=4, questions=4096)
    assert [v.holds for v in made] == [True, True, None, True, True]
    assert "names no values of the row yet" in made[2].measured


def test_the_band_of_a_guess_is_four_deviations() -> None:
    """Of 4,096 guesses 32 hit on average, with a deviation of 5.63."""
    for hits, holds in ((32, True), (10, True), (54, True), (9, False), (55, False)):
        planted = GOOD | {"none": [hits / 4096] * 2}
        made = recall.verdicts(planted, NAMES, V=256, pairs=4, questions=4096)[4]
        assert made.holds is holds, hits
    few = recall.verdicts(GOOD, NAMES, V=256, pairs=4, questions=100)[4]
    assert few.expected.startswith("at least 0 and")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "--steps must be at least 1, got 0"),
        ("--V=255", "--V=255 must be even, and half of it above --pairs=4"),
        ("--V=8", "--V=8 must be even, and half of it above --pairs=4"),
        ("--T=14", "--T=14 must be even and at least 4 * --pairs=4"),
        ("--power=0", "--power must be above 0 and at most 1, got 0.0"),
        ("--learning_rate=0", "--learning_rate must be above 0, got 0.0"),
        ("--weight_decay=-1", "--weight_decay must be at least 0 and finite, got -1.0"),
        ("--N=5", "N=5 must divide D=64"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recall.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(jax.device_count() != 8, reason="counts on 8 devices")
def test_rows_have_to_be_split_evenly(capsys, tmp_path) -> None:
    assert recall.main(["--B=12", f"--out={tmp_path / 'none'}"]) == 2
    assert "--B=12 rows cannot be split over 8 devices" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
