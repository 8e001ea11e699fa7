"""The sweep of learning rates: cases by hand, the entropy bound by search, verdicts either way."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _character, _sensitivity, stability
from experiments._entropy_bound import (
    LENGTHS,
    SIGMAS,
    compare_with_bound,
    extremal_row,
    least_entropy,
    random_rows,
)
from experiments._learn import learn_cases
from jax_attn import control, make_mesh
from jax_attn.report import training_progress

MODEL = _character.Character(D=8, N=2, L=1, T=8, B=2)
SMALL = stability.Config(model=MODEL, rates="1,100", eval_windows=4, floor=1.0, weight=0.7)
TINY = [f"--model.{name}={getattr(MODEL, name)}" for name in ("D", "N", "L", "T", "B")]
RUN = [*TINY, "--model.steps=2", "--every=1", "--rates=1,100", "--eval_windows=4", "--seeds=2"]
WINDOWS_BT = jax.random.randint(jax.random.key(1), (2, MODEL.T + 1), 0, 256)


@pytest.mark.long
def test_writes_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(devices=jax.devices()[:1])  # compiling for one takes a third of the time
    monkeypatch.setattr(stability, "read_mesh", lambda text: mesh)
    assert stability.main([*RUN, f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = [name for made in stability.cases(SMALL).values() for name in made]
    assert [row["model"] for row in summary["table"]] == names
    assert len(names) == len(set(names)) == 8
    assert all(len(row["loss, nats"]) == 2 for row in summary["table"])
    assert [v["holds"] for v in summary["verdicts"][-3:]] == [True] * 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 3
    assert {row["model"] for row in rows} == set(names)
    assert np.shape(rows[-1]["first_mass_LN"]) == (2, 1, 2)
    for file in ("stability.png", "heads.png"):
        assert (tmp_path / file).stat().st_size > 10_000


# The bound on entropy.


def entropy(rows: np.ndarray) -> np.ndarray:
    p = np.exp(rows - rows.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=1)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_bound_is_the_least_of_all_rows_of_three(sigma: float) -> None:
    """Rows of three with mean 0 and norm sigma lie on a circle, so that all can be looked at."""
    angle = np.linspace(0, 2 * np.pi, 120_001)[:, None]
    a, b = np.array([1, -1, 0]) / math.sqrt(2), np.array([1, 1, -2]) / math.sqrt(6)
    least = entropy(sigma * (np.cos(angle) * a + np.sin(angle) * b)).min()
    assert least_entropy(sigma, 3) - 1e-12 <= least <= least_entropy(sigma, 3) + 1e-6


@pytest.mark.parametrize("T", [2, 5, 12])
def test_descending_from_anywhere_ends_on_the_bound_not_below(T: int) -> None:
    rng = np.random.default_rng(0)
    for sigma in (0.5, 2.0, 4.0):
        rows = random_rows(rng, sigma, T)[::4]
        for step in np.geomspace(0.3, 1e-4, 400):
            p = np.exp(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
            slope = -p * (np.log(p) + entropy(rows)[:, None])
            rows = rows - step * sigma * slope / np.linalg.norm(slope, axis=1, keepdims=True)
            rows -= rows.mean(axis=1, keepdims=True)
            rows *= sigma / np.linalg.norm(rows, axis=1, keepdims=True)
        above = entropy(rows).min() - least_entropy(sigma, T)
        assert -1e-12 <= above <= 1e-5


def test_the_bound_is_the_theorem_and_its_row_is_extremal() -> None:
    for T in (2, 7, 64):
        for sigma in (0.3, 3.0, 20.0):
            beta = math.exp(-sigma * math.sqrt(T / (T - 1)))
            bound = math.log(1 + (T - 1) * beta)
            bound += sigma * math.sqrt(T * (T - 1)) * beta / (1 + (T - 1) * beta)
            assert least_entropy(sigma, T) == pytest.approx(bound, rel=1e-12)
            row = extremal_row(sigma, T)
            assert row.sum() == pytest.approx(0, abs=1e-12)
            assert np.linalg.norm(row) == pytest.approx(sigma)
            assert entropy(row[None]) == pytest.approx(bound, abs=1e-12)
    assert least_entropy(0.0, 5) == pytest.approx(math.log(5))


def test_random_rows_have_the_norm_they_should() -> None:
    for T in LENGTHS:
        rows = random_rows(np.random.default_rng(1), 4.0, T)
        np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 4.0)


def test_attention_keeps_to_the_bound() -> None:
    found = compare_with_bound()
    assert set(found["extremal"]) == {(T, sigma) for T in LENGTHS for sigma in SIGMAS}
    assert max(np.abs(x).max() for x in found["extremal"].values()) < 1e-12
    assert min(x.min() for x in found["random"].values()) > -1e-12


# What is trained.


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(partial(stability.init, SMALL, "plain"))(jax.random.key(0))


def test_cases_are_rates_and_one_way_clips() -> None:
    made = stability.cases(SMALL)
    assert list(made["norm"]) == ["QK-norm, rate 0.001", "QK-norm, rate 0.1"]
    for way, cases in made.items():
        assert [case["times"] for case in cases.values()] == [1.0, 100.0]
        assert {case["tau"] for case in cases.values()} == {100.0 if way == "clip" else math.inf}


def test_a_case_multiplies_the_update() -> None:
    params, gradient = {"w_D": jnp.ones(3)}, {"w_D": jnp.array([0.1, -0.2, 0.3])}
    updates = []
    for times in (1.0, 30.0):
        tx = stability.optimizer(SMALL, {"times": times})
        state, update = tx.init(params), params
        for _ in range(2):  # the first has rate 0
            update, state = jax.jit(tx.update)(gradient, state, params)
        updates.append(update["w_D"])
    assert np.abs(updates[0]).min() > 0
    np.testing.assert_allclose(updates[1], 30 * updates[0], rtol=1e-6)


def test_qk_norm_adds_scales_to_the_same_weights(params: Any) -> None:
    normed = jax.jit(partial(stability.init, SMALL, "norm"))(jax.random.key(0))
    layers = normed["layers"]["attention"]
    assert layers.pop("q_scale_H").shape == layers.pop("k_scale_H").shape == (1, 4)
    jax.tree.map(np.testing.assert_allclose, normed, params)


def test_a_clip_rescales_heads_above_tau_alone(params: Any) -> None:
    metrics = {"largest_LN": jnp.array([[50.0, 400.0]])}
    wq = params["layers"]["attention"]["wq_DNH"]
    made = stability.clip({"tau": 100.0}, params, metrics)["layers"]["attention"]["wq_DNH"]
    np.testing.assert_array_equal(made[:, :, 0], wq[:, :, 0])
    np.testing.assert_allclose(made[:, :, 1], wq[:, :, 1] / 2, rtol=1e-6)
    same = stability.clip({"tau": math.inf}, params, metrics)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    scales = {"q_scale_H": jnp.ones((1, 4)), "k_scale_H": jnp.ones((1, 4))}
    normed = {"layers": {"attention": params["layers"]["attention"] | scales}}
    assert stability.clip({"tau": 100.0}, normed, metrics) is normed


def test_after_a_clip_the_largest_logit_is_tau(params: Any) -> None:
    """With small weights tau is half of the largest logit, with large ones the config's."""
    ratio = jax.jit(partial(stability.after_a_clip, SMALL, np.asarray(WINDOWS_BT)))
    attention = params["layers"]["attention"]
    for times in (0.5, 30.0):
        scaled = attention | {name: attention[name] * times for name in ("wq_DNH", "wk_DKH")}
        made = ratio(params | {"layers": params["layers"] | {"attention": scaled}})
        assert float(made) == pytest.approx(1, abs=1e-4)


def test_the_floor_is_a_penalty_on_rows_that_can_reach_it(params: Any) -> None:
    @jax.jit
    def both(params: Any) -> Any:
        plain, _ = stability.loss_of(
            SMALL, False, {"weight": 0.7}, params, WINDOWS_BT, jax.random.key(2)
        )
        floored = stability.loss_of(
            SMALL, True, {"weight": 0.7}, params, WINDOWS_BT, jax.random.key(2)
        )
        _, seen = stability.seen_by(SMALL, ("entropy", "max_logit"), params, WINDOWS_BT)
        return plain, floored, seen

    plain, (floored, measured), seen = both(params)
    # log 2 < 1 < log 3: rows 0 and 1 cannot reach a floor of 1.
    missing = control.entropy_floor(seen["entropy"][:, :, 2:], floor=1.0)
    assert float(missing) > 0
    np.testing.assert_allclose(floored - plain, 0.7 * missing, rtol=1e-3)
    np.testing.assert_allclose(measured["largest_LN"], seen["max_logit"].max(axis=(1, 2)))


# Many cases at once.


def quadratic(case: Any, params: Any, rows_BD: jax.Array, key: jax.Array) -> Any:
    """Overflows in the case whose curvature is too large."""
    loss = case["curvature"] * jnp.square(params["w_D"] - rows_BD.mean(0)).sum()
    return loss, {"w_D": params["w_D"]}


def learned(tmp_path: Path, cases: Any, after: Any = None, mesh: Any = None) -> Any:
    with training_progress() as progress:
        return learn_cases(
            lambda key: {"w_D": jax.random.normal(key, (3,))},
            quadratic,
            lambda case: optax.chain(optax.sgd(1.0), optax.scale(case["rate"])),
            lambda key: jax.random.normal(key, (4, 3)),
            cases=cases,
            seeds=2,
            steps=4,
            every=2,
            measure=lambda case, params: {"now_D": params["w_D"] * case["rate"]},
            mesh=mesh or make_mesh(devices=jax.devices()[:1]),
            progress=progress,
            title="quadratic",
            log=tmp_path / "metrics.jsonl",
            after=after,
        )


def test_cases_are_trained_apart(tmp_path: Path) -> None:
    slow, fast = {"rate": 0.1, "curvature": 1.0}, {"rate": 0.3, "curvature": 1.0}
    wild = {"rate": 0.1, "curvature": 3e38}
    both = learned(tmp_path, {"slow": slow, "wild": wild, "fast": fast})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["slow", "wild", "fast"] * 3
    alone = learned(tmp_path, {"fast": fast})["fast"]
    for ours, theirs in zip(both["fast"].rows, alone.rows, strict=True):
        for name, values in theirs.items():
            np.testing.assert_allclose(ours[name], values, rtol=1e-6, err_msg=name)
    assert both["fast"].rows[-1]["skipped"].tolist() == [0, 0]
    # Seeds begin alike in all cases; a step that overflows changes nothing, and is counted.
    starts = [made.rows[0]["now_D"] for made in both.values()]
    np.testing.assert_allclose(starts[2], 3 * starts[0], rtol=1e-6)
    assert both["wild"].rows[-1]["skipped"].tolist() == [4, 4]
    np.testing.assert_array_equal(both["wild"].params["w_D"] * 0.1, starts[1])


@pytest.mark.skipif(jax.device_count() != 8, reason="splits over 8 devices")
def test_cases_do_not_depend_on_the_mesh(tmp_path: Path) -> None:
    cases = {"slow": {"rate": 0.1, "curvature": 1.0}, "fast": {"rate": 0.3, "curvature": 1.0}}
    alone = learned(tmp_path, cases)
    split = learned(tmp_path, cases, mesh=make_mesh(data=4, model=2))
    for name in cases:
        assert split[name].params["w_D"].shape == (2, 3)
        for ours, theirs in zip(split[name].rows, alone[name].rows, strict=True):
            for key, values in theirs.items():
                np.testing.assert_allclose(ours[key], values, rtol=1e-5, atol=1e-7)


def test_parameters_change_after_updates_that_were_made(tmp_path: Path) -> None:
    cases = {
        "tame": {"rate": 0.0, "curvature": 1.0, "to": 5.0},
        "wild": {"rate": 0.0, "curvature": 3e38, "to": 5.0},
    }
    made = learned(
        tmp_path, cases, lambda case, params, metrics: {"w_D": params["w_D"] + case["to"]}
    )
    begun = learned(tmp_path, {"tame": cases["tame"]})["tame"].params["w_D"]
    np.testing.assert_allclose(made["tame"].params["w_D"], begun + 20, rtol=1e-6)
    np.testing.assert_array_equal(made["wild"].params["w_D"], begun)


# Verdicts.


def test_sensitivity_is_the_mean_above_the_best_rate() -> None:
    losses = np.array([[3.0, 2.0], [2.0, 2.5], [9.0, np.nan]])
    np.testing.assert_allclose(_sensitivity.sensitivity(losses, [6.0, 5.0]), [5 / 3, 3.5 / 3])
    assert _sensitivity.sensitivity(np.full((3, 1), np.nan), [6.0]).tolist() == [0.0]
    np.testing.assert_allclose(_sensitivity.too_high(losses, [6.0, 5.0], [1, 0]), [4.0, 1.75])
    assert np.isnan(_sensitivity.too_high(losses, [6.0, 5.0], [2, 0])).tolist() == [True, False]


def test_the_page_has_the_sensitivities_of_the_published_losses() -> None:
    folder = Path(stability.__file__).parent
    table = json.loads((folder / "results" / "stability.json").read_text())["table"]
    page = (folder / "README.md").read_text(encoding="utf-8")
    losses = {
        title: np.array([r["loss, nats"] for r in table if r["model"].startswith(f"{title}, rate")])
        for title in stability.WAYS.values()
    }
    best = losses[stability.WAYS["plain"]].argmin(0)
    far = np.full(3, np.inf)  # all losses are below those at init
    for title, loss in losses.items():
        (row,) = [
            line for line in page.splitlines() if line.startswith(f"| {title}") and "[" in line
        ]
        cells = [cell.strip() for cell in row.split("|")]
        all_rates = _sensitivity.sensitivity(loss, far)
        assert cells[4].startswith(f"{all_rates.mean():.3f} [{all_rates.min():.3f}, ")
        assert cells[5] == f"{_sensitivity.too_high(loss, far, best).mean():.3f}"


def judged(*, good: bool) -> list[bool | None]:
    flat, steep = np.array([[2.2, 2.2], [2.0, 2.0], [2.3, 2.3]]), np.array([[2.2], [2.0], [4.0]])
    plain, held = (steep.repeat(2, 1), flat) if good else (flat, steep.repeat(2, 1))
    off = 0.0 if good else 1e-3
    made = stability.verdicts(
        start=np.array([5.5, 5.6]),
        losses={"plain": plain, "norm": held, "clip": held, "floor": held},
        largest=np.array([[5.0, 5.0], [9.0, 9.0], [80.0, 70.0] if good else [6.0, 7.0]]),
        lowest=np.array([[2.0, 2.0], [1.0, 1.0], [0.1, 0.2] if good else [0.9, 0.8]]),
        above=np.array([[0.0, 0.0], [0.0, 0.0], [0.1, 0.2] if good else [0.0, 0.0]]),
        clipped=np.array([1.0, 1.0]) + 2 * off,
        bound={"extremal": {(4, 1.0): np.array([off])}, "random": {(4, 1.0): np.array([-off])}},
    )
    return [v.holds for v in made]


def test_verdicts_come_out_either_way() -> None:
    assert judged(good=True) == [True] * 12
    assert judged(good=False) == [False] * 12


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.steps=0", "--model.steps must be at least 1, got 0"),
        ("--rates=1", "--rates looks like 1,10,100, two apart at least; got '1'"),
        ("--rates=1,1.0001", "--rates looks like 1,10,100, two apart at least; got '1,1.0001'"),
        ("--rates=1,x", "--rates looks like 1,10,100, two apart at least; got '1,x'"),
        ("--rates=0,1", "--rates looks like 1,10,100, two apart at least; got '0,1'"),
        ("--rates=1,inf", "--rates looks like 1,10,100, two apart at least; got '1,inf'"),
        ("--tau=0", "--tau must be above 0, got 0.0"),
        ("--weight=0", "--weight must be above 0, got 0.0"),
        ("--floor=9", "--floor must lie between 0 and log(T) = 4.159 nats"),
        ("--model.N=64", "--model.N=64 heads must divide --model.D=64 into even widths"),
        ("--mesh=date=8", "a mesh looks like data=2"),
        ("--out=", "--out must name a folder"),
    ],
)
def test_wrong_arguments_are_one_line(argument, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stability.main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
