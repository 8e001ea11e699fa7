"""Scaling: the law is found again, splits do equal work, and verdicts can come out either way."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _power_law, _scaling_figure, _scaling_sizes, scaling
from jax_attn import data, make_mesh

TRUE = _power_law.Law(1.1, 25.0, 0.345, 150.0, 0.36)
SIZES = np.array([7e3, 2e4, 6e4, 2e5])
SEEN = np.array([1e5, 2e5, 4e5, 8e5])
TINY = ["--sizes=2x1,4x1,6x1,8x1", "--split=8x1", "--heads=1", "--H=2", "--T=5", "--B=3"]
TINY += ["--steps=4", "--halvings=2", "--seeds=2", "--eval_windows=6", "--draws=9"]


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling for one takes a third of the time."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(scaling, "read_mesh", lambda text: mesh)


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, one_device: None) -> None:
    assert scaling.main([*TINY, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["table"]) == 4 * 3 + 1
    assert [row["bytes seen"] for row in summary["table"][:3]] == [15, 30, 60]
    assert all(len(row["loss, nats"]) == 2 for row in summary["table"])
    assert summary["table"][-1]["heads"] == 1
    assert summary["table"][-1]["law, nats"] is None
    assert len(summary["verdicts"]) == 9
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] * 5
    assert list(summary["fitted"]) == ["E", "A", "a", "B", "b", "optimum"]
    for number in summary["fitted"].values():
        least, greatest = number["interval"]
        assert least <= greatest
        assert isinstance(number["fit"], float)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def points(sizes: Any = SIZES, seeds: int = 3, noise: float = 0.0) -> np.ndarray:
    """Losses of the true law [sizes, bytes, seeds], with noise that is relative."""
    exact = TRUE(np.asarray(sizes)[:, None, None], SEEN[None, :, None])
    return exact * (1 + noise * np.random.default_rng(0).normal(size=(len(sizes), 4, seeds)))


def test_a_planted_law_is_found_again() -> None:
    law = _power_law.fit(SIZES, SEEN, points()[..., 0])
    np.testing.assert_allclose(law, TRUE, rtol=1e-3)
    assert law.optimum() == pytest.approx(0.36 / 0.705, rel=1e-3)
    law = _power_law.fit(SIZES, SEEN, points(noise=0.003).mean(-1))
    np.testing.assert_allclose(law(SIZES[:, None], SEEN), points()[..., 0], rtol=0.01)


def test_the_law_has_no_negative_part() -> None:
    flat = np.full((4, 4), 2.0)
    law = _power_law.fit(SIZES, SEEN, flat)
    np.testing.assert_allclose(law(SIZES[:, None], SEEN), flat, rtol=1e-6)
    growing = flat + np.linspace(0, 1, 4)[:, None]  # larger is worse: no power of the law does that
    law = _power_law.fit(SIZES, SEEN, growing)
    assert min(law) >= 0
    np.testing.assert_allclose(law(SIZES[:, None], SEEN), np.full((4, 4), 2.38), rtol=0.05)


def test_intervals_hold_the_truth_and_shrink_with_the_noise() -> None:
    widths = []
    for noise in (0.01, 0.001):
        fits = _power_law.resampled(SIZES, SEEN, points(noise=noise), draws=60)
        assert fits.a.shape == (60,)
        for name in ("a", "b", "E"):
            low, high = _power_law.interval(getattr(fits, name))
            assert low <= getattr(TRUE, name) <= high
        widths.append(np.ptp(_power_law.interval(fits.a)))
    assert widths[1] < widths[0] / 3


def test_seeds_of_one_training_are_drawn_together() -> None:
    """A seed that is worse by a factor moves E and the factors, but no exponent."""
    together = points(seeds=2) * np.array([1.0, 1.2])
    together[:, :, 1] = together[:, :, 0]
    fits = _power_law.resampled(SIZES, SEEN, together, draws=20)
    np.testing.assert_allclose(fits.a, TRUE.a, rtol=1e-2)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_too_few_points_for_a_law(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="needs 3 sizes and numbers of bytes"):
        _power_law.fit(SIZES[: shape[0]], SEEN[: shape[1]], np.ones(shape))


@pytest.mark.parametrize("preset", scaling.PRESETS)
def test_splits_do_equal_work(preset: str) -> None:
    cfg = scaling.Config(**scaling.PRESETS[preset])
    made = _scaling_sizes.splits(cfg.split, cfg.heads, cfg.H, cfg.T)
    work = [sum(_scaling_sizes.operations(one, cfg.T)) for one in made.values()]
    assert max(work) <= 1.01 * min(work)
    share = [scaling.attends(one, cfg.T) for one in made.values()]
    assert min(share) < 0.2
    assert max(share) > 0.9
    assert [one.N for one in made.values()] == list(made)


def test_operations_are_those_of_the_products() -> None:
    """Against what XLA counts of the layer's products, without the mask: T keys a query."""
    made = _scaling_sizes.Shape(D=6, L=1, N=3, F=10, H=4)
    T = 5
    tokens = {"TD": (T, 6), "DNH": (6, 3, 4), "TNH": (T, 3, 4), "DF": (6, 10), "TF": (T, 10)}
    products = [("TD,DNH->TNH", 4), ("TNH,SNH->NTS", 2), ("TD,DF->TF", 2)]
    work = 0.0
    for form, times in products:
        shapes = [tokens[part.replace("S", "T")] for part in form.split("->")[0].split(",")]
        arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        cost = jax.jit(partial(jnp.einsum, form)).lower(*arguments).compile().cost_analysis()
        assert cost is not None
        work += times * cost["flops"]
    attends, feeds = _scaling_sizes.operations(made, 2 * T - 1)  # (T' + 1) / 2 = T keys a query
    assert (attends + feeds) * T == work


def test_the_mean_reaches_back_over_a_tenth() -> None:
    """Weights that grow by 1 a step: their mean lags by t / 10 steps, at any t."""
    tx = _scaling_sizes.with_mean(optax.sgd(1.0))
    params = {"model": jnp.zeros(()), "mean": jnp.zeros(())}
    grads = {"model": -jnp.ones(()), "mean": jnp.zeros(())}

    def step(carried: Any, _: None) -> Any:
        params, state = carried
        moves, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, moves)
        return (params, state), params

    (_, _), seen = jax.lax.scan(step, (params, tx.init(params)), None, length=1000)
    t = np.arange(1, 1001)
    np.testing.assert_allclose(seen["model"], t)
    r = _scaling_sizes.RECENT
    lag = (t - 1) / (r + 2)
    np.testing.assert_allclose(t - seen["mean"], lag, atol=0.02)


def test_the_optimizer_moves_model_and_mean() -> None:
    cfg = scaling.Config(warmup=1)
    tx = scaling.optimizer(cfg, _scaling_sizes.shape("sizes", "4x1", 2))
    weights = {"w_D": jnp.array([0.5, -2.0])}
    params = {"model": weights, "mean": {"w_D": jnp.zeros(2)}}
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)  # the first rate of a warm-up is 0
    moves, _ = update(grads, state, params)
    rate = cfg.learning_rate * 4  # (64 / 4) ** 0.5
    expected = -rate * (1 + cfg.weight_decay * np.asarray(weights["w_D"]))
    np.testing.assert_allclose(moves["model"]["w_D"], expected, rtol=1e-3)
    share = (_scaling_sizes.RECENT + 1) / (_scaling_sizes.RECENT + 2)
    np.testing.assert_allclose(moves["mean"]["w_D"], share * (weights["w_D"] + expected), rtol=1e-3)


def test_bytes_and_epochs() -> None:
    cfg = scaling.Config(steps=80, halvings=3)
    assert scaling.lengths(cfg) == [10, 20, 40, 80]
    text = data.Text(np.zeros(51200, np.uint8), np.zeros(0, np.uint8), "zeros", "")
    assert scaling.epochs(cfg, text, 100) == 1.0


SHARES = {1: [1.9, 1.91], 4: [1.8, 1.81], 6: [1.75, 1.76], 10: [1.9, 1.92]}


def judged(losses: Any, noise: float = 0.0, shares: Any = SHARES) -> list[bool | None]:
    fits = _power_law.resampled(SIZES, SEEN, points(noise=noise), draws=40)
    return [v.holds for v in scaling.verdicts(SIZES, SEEN, losses, fits, shares, 4)]


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return points()


def test_verdicts_can_come_out_either_way(exact: np.ndarray) -> None:
    assert judged(exact) == [True] * 9
    worse = exact.copy()
    worse[-1] *= 1.5
    assert judged(worse)[:2] == [False, False]
    worse[..., 0] = exact[..., 0]
    assert judged(worse)[:2] == [None, None], "seeds disagree"
    assert judged(exact, noise=0.05)[2:6] == [False, None, False, None], "wide: says nothing"


def test_another_exponent_is_seen() -> None:
    steep = _power_law.Law(1.0, 1.0, np.full(9, 0.9), 1.0, np.full(9, 0.1))
    made = [v.holds for v in scaling.verdicts(SIZES, SEEN, points(), steep, SHARES, 4)]
    assert made[2:6] == [True, False, True, False]


def test_a_split_must_win_by_more_than_seeds_differ(exact: np.ndarray) -> None:
    noisy = SHARES | {10: [1.9, 2.1]}
    assert judged(exact, shares=noisy)[6:] == [False, False, None]
    best = SHARES | {4: [1.7, 1.71]}
    assert judged(exact, shares=best)[6:] == [False, True, True], "the usual one is the best"
    alone = {N: losses[:1] for N, losses in SHARES.items()}
    assert judged(exact, shares=alone)[6:] == [None] * 3, "what one seed says may be chance"
    least = SHARES | {1: [1.7, 1.7]}
    assert judged(exact, shares=least)[6:] == [True, False, True]


def test_the_picture_shows_what_was_measured(exact: np.ndarray) -> None:
    fits = _power_law.resampled(SIZES, SEEN, points(noise=0.01), draws=20)
    shares = {1: 0.1, 4: 0.4, 6: 0.6, 10: 0.9}
    figure = _scaling_figure.figure(
        SIZES, SEEN, exact, TRUE, fits, shares, SHARES, 4, scaling.PUBLISHED
    )
    left, middle, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["100 kB", "200 kB", "400 kB", "800 kB"]
    assert [text.get_text() for text in middle.texts] == ["Hoffmann", "Besiroglu"]
    assert [text.get_text() for text in right.texts] == ["1", "4\nusual", "6", "10"]
    for line, length in zip(left.lines[::4], SEEN, strict=True):
        x, y = np.asarray(line.get_data())
        assert (min(x), max(x)) == pytest.approx((SIZES[0], SIZES[-1])), "no line beyond the points"
        np.testing.assert_allclose(y, TRUE(x, length))


@pytest.mark.skipif(jax.device_count() != 8, reason="splits over 8 devices")
def test_the_preset_for_a_tpu_is_one_step() -> None:
    mesh = make_mesh(fsdp=8)
    step, (state, rows, key), tokens = scaling.plan_step(mesh, batch=16)
    assert tokens == 16 * 256
    assert rows["tokens_BT"].shape == (16, 257)
    model = state.params["model"]
    assert model["layers"]["mlp"]["w_in_DF"].shape == (8, 512, 2048)
    (moment,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if {"mu", "wv_DKE"} <= {getattr(k, "key", getattr(k, "name", "")) for k in path}
    )
    assert moment.sharding.spec == model["layers"]["attention"]["wv_DKE"].sharding.spec
    assert "fsdp" in moment.sharding.spec
    made = jax.eval_shape(step, state, rows, key)
    assert jax.tree.map(jnp.shape, made[0]) == jax.tree.map(jnp.shape, state)
    with pytest.raises(ValueError, match="must be one of default, quick, tpu"):
        scaling.plan_step(mesh, preset="gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=no-such-file"], "no-such-file"),
        (["--sizes=16"], "a size looks like 64x3"),
        (["--sizes=16x0"], "a size looks like 64x3"),
        (["--sizes=16x1,24x1"], "the width of 24x1 is no multiple of --H=16"),
        (["--sizes=16x1,32x1,48x1"], "needs 4"),
        (["--H=15", "--sizes=15x1,30x1,45x1,60x1"], "--H=15 must be even"),
        (["--heads=1,x"], "--heads looks like 1,2,4"),
        (["--heads=4"], "nothing to compare"),
        (["--heads=11"], "11 heads leave nothing to the MLP"),
        (["--halvings=1"], "--halvings=1 must be at least 2"),
        (["--steps=100"], "halve --steps=100 so often without a rest"),
        (["--steps=80000"], "more than 4; give a longer --data"),
        (["--eval_windows=1000000"], "use a longer text or fewer windows"),
        (["--seeds=0"], "--seeds must be at least 1"),
        (["--learning_rate=0"], "--learning_rate must be above 0"),
        (["--B=6", "--mesh=data=8"], "--B=6 rows cannot be split over 8 devices"),
        (["--mesh=data=3"], "there are 8 devices"),
    ],
)
def test_wrong_values_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert scaling.main([f"--out={tmp_path / 'out'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
