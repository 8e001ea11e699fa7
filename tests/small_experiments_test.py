"""Experiments that take seconds: each runs, and its verdicts can come out either way."""

import json
import pathlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    _findings,
    cat_on_the_mat,
    fast_weights,
    gradient_step,
    rank_collapse,
)

TINY: dict[ModuleType, list[str]] = {
    cat_on_the_mat: ["--D=4", "--F=4", "--steps=2", "--every=1"],
    fast_weights: ["--H=2", "--keys=3,8", "--steps=2"],
    gradient_step: ["--d=2", "--pairs=3", "--B=8", "--asked=64", "--steps=2"],
    rank_collapse: ["--T=4"],
}


@pytest.mark.parametrize(
    "experiment",
    # Many programs: a minute of compiling.
    [pytest.param(x, marks=pytest.mark.long) if x is rank_collapse else x for x in TINY],
    ids=lambda module: module.__name__,
)
def test_it_writes_what_it_promises(
    experiment: ModuleType, tmp_path: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rank_collapse, "SIZES", {"float32": {"D": 8, "N": 2}, "float64": {"D": 4, "N": 2}}
    )
    assert experiment.main([*TINY[experiment], "--seeds=2", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["question"].endswith("?")
    assert summary["config"]["seeds"] == 2
    assert summary["table"]
    assert {v["verdict"] for v in summary["verdicts"]} <= {"holds", "does not hold", "undecided"}
    for figure in summary["figures"]:
        assert (tmp_path / figure["file"]).stat().st_size > 10_000
        assert figure["caption"].endswith((".", ")."))
    assert "wrote " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "argument", "message"),
    [
        (cat_on_the_mat, "--N=3", "--N=3 heads must divide --D=32"),
        (cat_on_the_mat, "--mesh=data=8", "--mesh: one sentence is not split over devices"),
        (fast_weights, "--keys=8,1", "--keys looks like 8,16,32, each at least 2"),
        (fast_weights, "--keys=", "--keys looks like 8,16,32, each at least 2"),
        (gradient_step, "--B=9", "--B=9 contexts cannot be split over 8 devices"),
        (gradient_step, "--pairs=0", "--pairs looks like 10,20,40"),
        (rank_collapse, "--L=2", "--L must be at least 4"),
        (rank_collapse, "--B=9", "--B=9 rows cannot be split over 8 devices"),
        (rank_collapse, "--seeds=0", "--seeds must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(
    experiment: ModuleType, argument: str, message: str, tmp_path: pathlib.Path, capsys: Any
) -> None:
    assert experiment.main([argument, f"--out={tmp_path / 'none'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def holds(verdicts: list[_findings.Verdict]) -> list[bool | None]:
    return [verdict.holds for verdict in verdicts]


def test_one_word_at_a_time_cannot_be_better_than_counting() -> None:
    floor = cat_on_the_mat.FLOOR
    found = {"none": [floor + 1e-5] * 2, "uniform": [1e-4] * 2, "attention": [1e-4] * 2}
    assert holds(cat_on_the_mat.verdicts(found)) == [True, True, True]
    found = {"none": [floor - 0.1] * 2, "uniform": [floor] * 2, "attention": [1e-4, 0.1]}
    assert holds(cat_on_the_mat.verdicts(found)) == [False, False, None]


def test_a_matrix_holds_as_many_keys_as_it_has_features() -> None:
    bounds = {
        (way, S): [fast_weights.bound(way, 4, S)] * 2
        for way in fast_weights.WAYS
        for S in (5, 8, 9, 32)
    }
    assert bounds["linear", 8] == [0.25] * 2
    assert bounds["dpfp", 8] == [0.0] * 2
    assert holds(fast_weights.verdicts(4, bounds)) == [True, True, True]
    for way in fast_weights.WAYS:
        least = 9 if way == "dpfp" else 5  # one key more than features
        for planted in (0.05, -0.05):  # worse than the bound; better, which cannot be
            for S in (least, 32):
                found = bounds | {(way, S): [fast_weights.bound(way, 4, S) + planted] * 2}
                assert holds(fast_weights.verdicts(4, found)).count(False) == 1
    apart = {("linear", S): [fast_weights.bound("linear", 4, S)] * 2 for S in (8, 16)}
    apart["linear", 8][0] += 0.05
    apart["linear", 16][1] += 0.02
    assert holds(fast_weights.verdicts(4, bounds | apart))[0] is False, "each at another S"
    apart["linear", 16][1] -= 0.021  # below the bound, less than the other is above it
    assert holds(fast_weights.verdicts(4, bounds | apart))[0] is False
    found = bounds | {("dpfp", 8): [0.2, 0.2]}
    assert holds(fast_weights.verdicts(4, found)) == [True] * 3, "not beyond its 8 features"


def test_the_best_answers_of_a_matrix_are_at_the_bound() -> None:
    """Keys in d groups, orthogonal features: each answer is the mean of its group."""
    group = np.repeat(np.arange(4), 3)
    params = {name: jnp.asarray(np.eye(4)[group] * 40 - 20) for name in ("q_SH", "k_SH")}
    made = float(fast_weights.error("linear", params))
    assert made == pytest.approx(fast_weights.bound("linear", 4, 12), abs=1e-5)


def test_one_step_of_descent_has_the_error_it_is_said_to_have() -> None:
    d, N = 3, 7
    rows = gradient_step.contexts(jax.random.key(0), 200_000, N, d)
    wrong_B = gradient_step.descent(rows["tokens_BTD"]) - rows["answer_B"]
    assert float(jnp.square(wrong_B).mean()) == pytest.approx(gradient_step.least(d, N), rel=0.03)
    good = {N: {"error": [gradient_step.least(d, N)] * 2, "apart": [0.001, 0.002]}}
    assert holds(gradient_step.verdicts(d, good)) == [True, True]
    bad = {N: {"error": [1.1 * gradient_step.least(d, N)] * 2, "apart": [0.001, 0.2]}}
    assert holds(gradient_step.verdicts(d, bad)) == [False, None]


def test_the_slope_is_that_of_what_falls_by_powers() -> None:
    r_L = np.array([1.0, 0.4, 0.4**3, 0.4**9, 0.4**27, 1e-16, 1e-16])
    np.testing.assert_allclose(rank_collapse.slopes(r_L[None], "float64"), [3.0])
    slow_L = 0.9 ** np.arange(40)
    np.testing.assert_allclose(rank_collapse.slopes(slow_L[None], "float64"), [1.0])
    assert np.isnan(rank_collapse.slopes(np.ones((1, 5)), "float64")).all()


def test_what_is_left_of_tokens_is_judged_either_way() -> None:
    cubed = np.array([[0.4**3**i for i in range(4)] + [1e-16]] * 2)
    gone = ("attention", "mlp", "half", "causal", "causal_mlp")
    left = dict.fromkeys(gone, 1e-7) | dict.fromkeys(rank_collapse.SKIPPED, 0.99)

    def planted(turned: bool) -> dict[tuple[str, str, str], np.ndarray]:
        made = {
            (kind, init, "float32"): np.full((2, 5), 1 - r if turned else r)
            for kind, r in left.items()
            for init in rank_collapse.INITS
        }
        slow = 0.4 ** np.array([[1.0, 2.0, 3.0, 4.0, 5.0]] * 2)
        for kind in gone:
            geometric = kind.startswith("causal") != turned
            made[kind, "fan_in", "float64"] = slow if geometric else cubed
        return made

    assert holds(rank_collapse.verdicts(planted(turned=False))) == [True] * 16
    assert holds(rank_collapse.verdicts(planted(turned=True))) == [False] * 16
    seeds = planted(turned=False)
    seeds["both", "gpt2", "float32"][0, -1] = 0.6
    assert holds(rank_collapse.verdicts(seeds)) == [True] * 14 + [None, True]


def test_a_causal_layer_reads_no_later_token() -> None:
    params = rank_collapse.draw(jax.random.key(0), "fan_in", 3, 4, 2, jnp.float32)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 5, 4))
    other_BTD = x_BTD.at[:, 3:].set(7.0)
    for kind in rank_collapse.KINDS:
        y_BTD, moved_BTD = (rank_collapse.layer(kind, params, x) for x in (x_BTD, other_BTD))
        same = bool(jnp.all(jnp.abs(moved_BTD - y_BTD)[:, :3] < 1e-6))
        assert same == kind.startswith("causal"), kind


def test_what_is_left_of_equal_tokens_is_nothing() -> None:
    x_BTD = jnp.ones((2, 5, 3)).at[1].set(jax.random.normal(jax.random.key(0), (5, 3)))
    left_B = rank_collapse.left_over(x_BTD)
    assert left_B[0] == 0
    assert 0.5 < left_B[1] <= 1
