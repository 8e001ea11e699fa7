"""The ladder of token mixing: equal sizes, exact counts, verdicts that can come out either way."""

import json
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _character, _counts
from experiments import static_vs_dynamic as experiment
from experiments._static_figures import ladder_figure, loss_figure
from experiments._static_ladder import COLUMNS, DYNAMIC, LADDER, STATIC, columns, models, rungs
from jax_attn import causal, data, static_mixer
from tests.formulas import draw

SMALL = experiment.Config(D=24, N=2, F=96, L=3, T=11)
TINY = ["--D=24", "--N=2", "--F=96", "--L=3", "--T=11", "--B=5", "--steps=2", "--every=1"]
TINY += ["--seeds=2", "--eval_windows=5", "--map_windows=5", "--mesh=data=1"]


@pytest.fixture
def one_device(monkeypatch):
    """--mesh=data=1 is a mesh of one device on a machine that has eight."""
    read = partial(experiment.read_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(experiment, "read_mesh", read)


def written(out, arguments):
    """What a tiny run leaves behind: its summary, and its measurements."""
    assert experiment.main([*TINY, *arguments, f"--out={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    for figure in summary["figures"]:
        assert (out / figure["file"]).stat().st_size > 10_000
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


@pytest.mark.long
def test_writes_all_it_promises(tmp_path, one_device, capsys):
    summary, rows = written(tmp_path, ["--rungs=attention", "--without_mlp=false"])
    assert len(summary["figures"]) == 2
    titles = [row["mixing"] for row in summary["table"]]
    assert titles[:2] == ["attention", "attention, mean maps"]
    assert [row["step"] for row in rows if row["model"] == "attention+mlp"] == [0, 1, 2]
    assert "mean maps in place of attention's cost" in capsys.readouterr().out


@pytest.mark.long
def test_models_without_attention_are_judged_by_the_best(tmp_path, one_device):
    summary, _ = written(tmp_path, ["--rungs=none,uniform", "--without_mlp=false"])
    assert [row["mixing"] for row in summary["table"]][:2] == [
        "each token alone",
        "uniform over the past",
    ]
    assert "not below" in summary["verdicts"][0]["measured"], "two steps teach nothing"


@pytest.mark.long
def test_trains_every_model(tmp_path, one_device):
    summary, rows = written(tmp_path, [])
    assert {row["model"] for row in rows} == {name + s for name in LADDER for s in COLUMNS}
    assert len(summary["table"]) == 16 + _counts.ORDERS
    assert len(summary["verdicts"]) == 12
    assert [v["holds"] for v in summary["verdicts"][-2:]] == [True, True], "exact at any step"


@pytest.mark.parametrize("preset", experiment.PRESETS)
def test_blocks_train_equally_many_numbers(preset):
    cfg = experiment.Config(**{**experiment.PRESETS[preset], "without_mlp": True})
    made = models(cfg)
    assert list(made) == [name + suffix for name in LADDER for suffix in COLUMNS]
    sizes = [model.trained for model in made.values()]
    assert max(sizes) <= 1.02 * min(sizes)
    assert made["attention+mlp"].trained == 4 * cfg.D**2 + 2 * cfg.D * cfg.F + 2 * cfg.D
    assert made["attention"].frozen == made["static"].frozen == 0 < made["frozen"].frozen
    assert made["random"].frozen == made["random"].N * cfg.T**2


def test_each_rung_mixes_by_the_matrix_it_says():
    key = jax.random.key(1)
    x_BTD, other_BTD = (jax.random.normal(k, (2, 11, 24)) for k in jax.random.split(key))
    for name, rung in rungs(SMALL).items():
        params = draw(partial(rung.init, N=2, E=5))
        p_BNTS = rung.weights(params, x_BTD)
        np.testing.assert_allclose(p_BNTS.sum(-1), 1.0, atol=1e-5)
        assert not np.triu(p_BNTS, 1).any()
        values = {"wv_DNE": params.get("wv_DNE", params.get("wv_DKE")), "wo_NED": params["wo_NED"]}
        for b in range(2):
            fixed = {**values, "logits_NTS": jnp.log(p_BNTS[b])}
            y_BTD = static_mixer(fixed, x_BTD[b : b + 1], mask=causal())
            np.testing.assert_allclose(y_BTD[0], rung.run(params, x_BTD)[b], atol=2e-4)
        _, said = experiment.watched(rung)(params, x_BTD)
        assert (said["variance_N"] == 0).all() == (name in STATIC)
        assert (rung.weights(params, other_BTD) == p_BNTS).all() == (name in STATIC)


def test_a_synthesizer_looks_at_the_query_alone():
    rung = rungs(SMALL)["synthesizer"]
    params = draw(partial(rung.init, N=2, E=5))
    x_BTD = jax.random.normal(jax.random.key(0), (1, 11, 24))
    changed = rung.weights(params, x_BTD.at[0, 4].add(1.0)) != rung.weights(params, x_BTD)
    assert changed.any(axis=(0, 1, 3)).tolist() == [t == 4 for t in range(11)]


def test_training_moves_what_it_should():
    made = models(SMALL)
    for name, frozen in (("random", ["logits_NTS"]), ("frozen", ["wq_DNH", "wk_DKH"])):
        model = made[name]
        params = draw(model.init)
        tx = experiment.optimizer(SMALL, model.rung)
        update = jax.jit(tx.update)
        _, state = update(params, tx.init(params), params)  # the first rate of a warm-up is 0
        updates, _ = update(params, state, params)
        part = updates["layers"][model.rung.part]
        assert {leaf for leaf in part if not np.any(part[leaf])} == set(frozen)


def test_mean_maps_of_equal_maps_change_nothing():
    """Without Wq attention is uniform: replaced by its mean it is the same model."""
    model = models(SMALL)["attention+mlp"]
    windows = np.random.default_rng(0).integers(0, 256, (2, 3, 12))
    predict = partial(experiment.predict, SMALL, "attention", model.rung.run)
    replaced = partial(experiment.replaced_loss, SMALL, model.rung, windows[:1], windows[1:])
    params = draw(model.init)
    assert abs(replaced(params) - predict(params, windows[1])[0]) > 1e-3
    params["layers"]["attention"]["wq_DNH"] *= 0
    np.testing.assert_allclose(replaced(params), predict(params, windows[1])[0], rtol=1e-5)


def slow_counts(text: bytes, context: bytes, byte: int) -> float:
    """Witten and Bell's estimate as it is written down."""
    shorter = slow_counts(text, context[1:], byte) if context else 1 / 256
    ends = range(len(context), len(text))
    after = Counter(text[i] for i in ends if text[i - len(context) : i] == context)
    seen = sum(after.values())
    if not seen:
        return shorter
    return (after[byte] + len(after) * shorter) / (seen + len(after))


def test_counts_are_what_the_slow_formula_gives():
    text = b"the cat sat on the mat, the cat sat on that; \xff\x00\xff"
    windows = np.array([list(b"the cat sa"), list(b"e mat\xff\x00\xff12"), list(b"that hat x")])
    p = _counts.probabilities(_counts.count(np.frombuffer(text, np.uint8)), windows)
    assert p.shape == (6, 3, 9)
    for order, row, t in np.ndindex(p.shape):
        window = bytes(windows[row].tolist())
        context = window[max(t + 1 - order, 0) : t + 1]
        np.testing.assert_allclose(p[order, row, t], slow_counts(text, context, window[t + 1]))


def test_probabilities_of_counts_sum_to_1():
    text = data.load_text(T=64).train[:50_000]
    grams = _counts.count(text)
    for context in (b"    def", b"return ", b"\xff\xfe\xfd\xfcab\xff"):
        windows = np.array([[*context, byte] for byte in range(256)])
        p = _counts.probabilities(grams, windows)[:, :, -1]
        assert (p > 0).all()
        np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)


def test_counts_of_a_short_text_and_window():
    grams = _counts.count(np.frombuffer(b"abcdef", np.uint8))
    p = _counts.probabilities(grams, np.array([[97, 98]]))
    assert p.shape == (6, 1, 1)
    assert len(set(p[1:].ravel())) == 1, "one byte of context is all that there is"
    with pytest.raises(ValueError, match="fewer than orders=6"):
        _counts.count(np.frombuffer(b"abc", np.uint8))


COUNTS = np.array([3.1, 2.4, 1.9, 1.6, 1.5, 1.49])
GOOD = {"none": 2.41, "uniform": 2.3, "random": 2.1, "static": 1.9, "synthesizer": 1.85}
GOOD |= {"frozen": 1.8, "attention": 1.7, "mean": 2.5}


def planted(**losses):
    """Final losses of three seeds, and variances of two measurements, of models in both columns."""
    spread = np.array([0.0, 0.004, -0.004])
    loss = {name + s: x + spread for name, x in {**GOOD, **losses}.items() for s in COLUMNS}
    variance = {
        name + s: np.full((2, 3, 4), 0.1 * (name in DYNAMIC)) for name in LADDER for s in COLUMNS
    }
    return loss, variance


def holds(loss, variance):
    return [v.holds for v in experiment.verdicts(COUNTS, loss, variance)]


def test_verdicts_can_come_out_either_way():
    assert holds(*planted()) == [True] * 12
    worse = {"none": 2.6, "uniform": 1.8, "frozen": 2.2, "attention": 2.2, "mean": 2.2}
    assert holds(*planted(**worse)) == [False] * 10 + [True] * 2
    assert holds(*planted(none=2.3))[::5][:2] == [False] * 2, "below the floor is as wrong as above"
    static = GOOD["attention"] + np.array([0.02, 0.005, 0.03])
    assert holds(*planted(static=static))[1] is None, "seeds disagree"
    loss, variance = planted()
    variance["random"][1, :, 3] = 1e-9
    variance["frozen+mlp"][0, 1, 2] = 0.0
    assert holds(loss, variance)[-2:] == [False, None]


def test_what_was_not_trained_is_not_judged():
    loss, variance = planted()
    with_mlp = {name: x for name, x in loss.items() if "+mlp" in name}
    assert columns(with_mlp) == {"+mlp": "with MLP"}
    assert holds(with_mlp, variance) == [True] * 7
    assert holds({"attention": loss["attention"]}, {"attention": variance["attention"]}) == [True]
    assert holds({"none": loss["none"]}, {"none": variance["none"]}) == [True] * 2


def test_figures_of_both_columns():
    loss, variance = planted()
    curves = {name: np.stack([x + 2, x]) for name, x in loss.items() if "mean" not in name}
    for figure, panels in (
        (loss_figure([0, 7], curves, COUNTS), 2),
        (ladder_figure([0, 7], loss, variance, COUNTS), 2),
    ):
        assert len(figure.axes) == panels
        words = [text.get_text() for ax in figure.axes for text in ax.texts]
        assert any("4–5" in word for word in words), "two lines that lie together share a name"


def test_evaluation_windows_reach_from_end_to_end():
    text_bytes = np.arange(70 * 12, dtype=np.uint8)
    windows = _character.chunks(text_bytes, SMALL.T, 70)
    assert windows.shape == (2, 32, 12)
    np.testing.assert_array_equal(windows[0, 0], text_bytes[:12])
    np.testing.assert_array_equal(windows[-1, -1], text_bytes[-12:])
    assert _character.chunks(text_bytes, SMALL.T, 5).shape == (1, 5, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=no-such-file"], "no-such-file"),
        (["--N=3"], "--N=3 heads must divide --D=128"),
        (["--D=12", "--N=4"], "even widths"),
        (["--seeds=0"], "--seeds must be at least 1"),
        (["--learning_rate=0"], "--learning_rate must be above 0"),
        (["--activation=tanh"], "activation must be one of"),
        (["--eval_windows=1"], "--eval_windows must be at least 2"),
        (["--T=600"], "more than 1 % apart"),
        (["--rungs=none,static,atention"], "got 'atention'"),
        (["--B=6", "--mesh=data=8"], "--B=6 rows cannot be split over 8 devices"),
        (["--mesh=context=8"], "leave context out"),
        (["--mesh=data=3"], "there are 8 devices"),
        (["--mesh=model=8"], "N=4"),
        (["--out="], "--out must name a folder"),
    ],
)
def test_wrong_values_are_one_line(arguments, message, capsys, tmp_path):
    out = [] if arguments == ["--out="] else [f"--out={tmp_path / 'out'}"]
    given = [] if any("--mesh" in a or "--B" in a for a in arguments) else ["--B=8"]
    assert experiment.main([*out, *given, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
