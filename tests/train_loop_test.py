"""Tests of jax_attn.train.loop: what the loop around a step does."""

import contextlib
import os
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_attn import train
from jax_attn.train import loop
from jax_attn.train.optimizer import AverageState
from jax_attn.train.training import Training
from tests.trained_model import (
    KEY,
    PARTS,
    batch_fn,
    init_params,
    jsonl_rows,
    loss_fn,
    loss_rows,
)


def make_run(**options: Any) -> tuple[train.StepFn, train.TrainState]:
    tx = optax.adam(1e-2)
    step_fn = jax.jit(train.make_train_step(loss_fn, tx, parts=PARTS), **options)
    return step_fn, train.init_state(init_params(KEY), tx)


def test_fit_lowers_the_loss_and_compiles_once() -> None:
    traces = 0

    def counted(params: Any, batch: Any, key: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        return loss_fn(params, batch, key)

    tx = optax.adam(3e-2)
    step_fn = jax.jit(train.make_train_step(counted, tx), donate_argnums=0)
    state = train.init_state(init_params(KEY), tx)
    state, history = train.fit(step_fn, state, batch_fn, steps=101, key=KEY)
    losses = [row["loss"] for row in history.train]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert [row["step"] for row in history.train] == list(range(101))
    assert int(state.step) == 101
    assert traces == 1


def fake_state(step: int) -> train.TrainState:
    return train.TrainState(np.int32(step), None, None)  # type: ignore[arg-type]


class FakeMetric:  # tells when it is fetched
    def __init__(self, value: float, on_fetch: Callable[[], object]) -> None:
        self.value, self.on_fetch = value, on_fetch

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.on_fetch()
        return np.asarray(self.value)


def fake_step_fn(events: list[str], losses: dict[int, float] | None = None) -> Any:
    def step_fn(state: Any, batch: Any, key: Any) -> Any:
        events.append(f"dispatch {state.step}")
        fetched = f"fetch {state.step}"
        loss = FakeMetric((losses or {}).get(int(state.step), 0.5), lambda: events.append(fetched))
        return state._replace(step=state.step + 1), {"loss": loss}

    return step_fn


def test_metrics_are_fetched_after_the_next_step_is_dispatched() -> None:
    events: list[str] = []
    train.fit(fake_step_fn(events), fake_state(0), lambda step: None, steps=3, key=KEY)
    once = list(dict.fromkeys(events))
    assert once == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "fetch 2"]


def test_run_in_two_pieces_equals_the_loop_written_by_hand(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run()
    whole, losses = state, []
    for step in range(7):
        whole, metrics = step_fn(whole, batch_fn(step), KEY)
        losses.append(float(metrics["loss"]))
    path = tmp_path / "new" / "metrics.jsonl"
    asked: list[int] = []

    def recorded(step: int) -> np.ndarray:
        asked.append(step)
        return batch_fn(step)

    half, _ = train.fit(step_fn, state, recorded, steps=3, key=KEY, metrics_path=path)
    rest, tail = train.fit(step_fn, half, recorded, steps=7, key=KEY, metrics_path=path)
    assert asked == list(range(7))
    jax.tree.map(np.testing.assert_array_equal, rest, whole)
    assert [row["step"] for row in tail.train] == [3, 4, 5, 6]
    assert [row["loss"] for row in loss_rows(path)] == losses
    same, nothing = train.fit(step_fn, rest, recorded, steps=7, key=KEY, metrics_path=path)
    assert same is rest
    assert nothing == train.History([], [], [], {})
    assert len(loss_rows(path)) == 7


def test_log_every_and_evaluations(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run(donate_argnums=0)
    x_BD = batch_fn(1_000_003)

    def evaluate(params: Any) -> dict[str, Any]:
        return {"loss": loss_fn(params, jnp.asarray(x_BD), KEY)[0], "two": 2}

    first_loss = float(evaluate(state.params)["loss"])
    state, history = train.fit(
        step_fn, state, batch_fn, steps=11, key=KEY, log_every=3, evaluate=evaluate, eval_every=4,
        metrics_path=tmp_path / "m.jsonl",
    )  # fmt: skip
    assert [row["step"] for row in history.train] == [0, 3, 6, 9, 10]
    assert [row["step"] for row in history.eval] == [0, 4, 8, 11]
    assert history.eval[0]["eval/loss"] == first_loss
    assert history.eval[-1]["eval/loss"] == float(evaluate(state.params)["loss"])
    rows = loss_rows(tmp_path / "m.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 3, 4, 6, 8, 9, 10, 11]
    assert [row for row in rows if "loss" in row] == history.train
    assert [row for row in rows if "eval/loss" in row] == history.eval
    assert [row["time_s"] for row in rows] == sorted(row["time_s"] for row in rows)
    # A resumed run does not evaluate again where the run before it ended.
    for steps, eval_every, expected in ((13, 12, [12, 13]), (16, 0, [16])):
        options = {"steps": steps, "evaluate": evaluate, "eval_every": eval_every}
        state, history = train.fit(step_fn, state, batch_fn, key=KEY, **options)
        assert [row["step"] for row in history.eval] == expected


def test_seeds_under_vmap_record_lists(tmp_path: pathlib.Path, capsys: Any) -> None:
    tx = optax.adam(1e-2)
    step = train.make_train_step(loss_fn, tx, parts=PARTS)
    init_keys, keys = jax.random.split(KEY, (2, 3))
    states = jax.vmap(lambda key: train.init_state(init_params(key), tx))(init_keys)
    step_fn = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
    path = tmp_path / "m.jsonl"
    states, history = train.fit(step_fn, states, batch_fn, steps=2, key=keys, metrics_path=path)
    rows = loss_rows(path)
    assert [row["loss"] for row in rows] == [row["loss"].tolist() for row in history.train]
    for seed in range(3):
        state = train.init_state(init_params(init_keys[seed]), tx)
        alone = train.fit(jax.jit(step), state, batch_fn, steps=2, key=keys[seed])[1]
        for row, expected in zip(rows, alone.train, strict=True):
            for name in set(expected) - {"step", "time_s"}:
                np.testing.assert_allclose(row[name][seed], expected[name], rtol=1e-4)
    assert f"step 2/2  loss {np.mean(rows[1]['loss']):.4f}" in capsys.readouterr().err
    uneven = states._replace(step=jnp.array([2, 2, 3]))
    with pytest.raises(ValueError, match=r"same for every seed, got \[2, 3\]"):
        train.fit(step_fn, uneven, batch_fn, steps=5, key=keys)


def test_interrupt_leaves_the_file_complete_and_is_raised(tmp_path: pathlib.Path) -> None:
    step_fn, state = make_run()
    path = tmp_path / "m.jsonl"

    def interrupted(step: int) -> np.ndarray:
        if step == 3:
            raise KeyboardInterrupt
        return batch_fn(step)

    with pytest.raises(KeyboardInterrupt):
        train.fit(step_fn, state, interrupted, steps=7, key=KEY, metrics_path=path)
    assert [row["step"] for row in jsonl_rows(path)] == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_loss_that_is_not_finite_stops_training(tmp_path: pathlib.Path, value: float) -> None:
    events: list[str] = []
    step_fn = fake_step_fn(events, {2: value})
    path = tmp_path / "m.jsonl"
    with pytest.raises(FloatingPointError, match=f"^step 2: loss is {value}$"):
        train.fit(
            step_fn,
            fake_state(0),
            lambda step: None,
            steps=7,
            key=KEY,
            metrics_path=path,
            log_every=5,
        )
    assert [(row["step"], row["loss"]) for row in loss_rows(path)] == [(0, 0.5), (2, str(value))]
    # One step further was on its way when the metrics came in, and no more.
    assert "dispatch 3" in events
    assert "dispatch 4" not in events


def test_update_that_is_not_finite_stops_training_though_the_loss_is_finite() -> None:
    def root(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.sqrt(params["w"]).sum(), {}

    state = train.init_state({"w": jnp.zeros(3)}, optax.sgd(0.1))
    step_fn = jax.jit(train.make_train_step(root, optax.sgd(0.1)))
    message = (
        r"^step 2: update_norm is inf, the last of 3 steps in a row whose update was left out$"
    )
    with pytest.raises(FloatingPointError, match=message):
        train.fit(step_fn, state, lambda step: None, steps=9, key=KEY, give_up_after=3)
    # An optimizer that refuses such an update keeps the run alive.
    tx = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=5)
    step_fn = jax.jit(train.make_train_step(root, tx))
    state = train.init_state({"w": jnp.zeros(3)}, tx)
    history = train.fit(step_fn, state, lambda step: None, steps=2, key=KEY)[1]
    assert [row["update_norm"] for row in history.train] == [0, 0]


class Kept(train.Run):
    """A run that remembers what it was asked to save."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, tell=lambda text: None)
        self.kept: list[int] = []

    def save(self, step: int, state: Any, *, metrics: Any) -> None:
        self.kept.append(step)


@pytest.mark.parametrize(
    ("at", "evaluations", "saved"),
    [(0, 1, [0]), (1, 2, [0]), (2, 3, [4]), (3, 4, [4])],
)
def test_a_stop_asked_for_in_an_evaluation_makes_no_step_after_it(
    tmp_path: pathlib.Path, at: int, evaluations: int, saved: list[int]
) -> None:
    asked, events = 0, []

    def evaluate(params: Any) -> dict[str, float]:
        nonlocal asked
        if asked == at:
            os.kill(os.getpid(), signal.SIGTERM)
        asked += 1
        return {"loss": 1.0}

    state = fake_state(0)._replace(opt_state=AverageState(jnp.ones(1)))  # evaluated too
    run = Kept(tmp_path)
    with pytest.raises(train.Stopped):
        train.fit(
            fake_step_fn(events), state, lambda step: None, steps=9, key=KEY, run=run,
            evaluate=evaluate, eval_every=4,
        )  # fmt: skip
    assert asked == evaluations
    assert run.kept == saved
    assert f"dispatch {sum(saved)}" not in events


def test_a_stop_that_comes_with_a_rollback_is_obeyed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[int] = []

    def harmed(self: Training, row: Any) -> bool:
        if row["step"] != 2 or back:
            return False
        back.append(1)
        self.made, self.state = 1, fake_state(1)
        self.waiting.clear()
        return True

    @contextlib.contextmanager
    def requests() -> Iterator[Callable[[int], bool]]:
        yield lambda step: step == 4  # once, as with several processes

    monkeypatch.setattr(Training, "harmed", harmed)
    monkeypatch.setattr(loop, "stop_requests", requests)
    run = Kept(tmp_path)
    with pytest.raises(train.Stopped):
        train.fit(fake_step_fn([]), fake_state(0), lambda step: None, steps=9, key=KEY, run=run)
    assert run.kept == [2]


def test_each_run_of_skipped_steps_is_told_but_not_too_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    training = Training(
        fake_step_fn([]), fake_state(0), lambda step: None, 9, KEY, None, told.append, 10, False
    )
    clock = iter([0.0, 1.0, 2.0, 3.0, 100.0, 101.0])
    monkeypatch.setattr("jax_attn.train.training.time.perf_counter", lambda: next(clock))
    for step, in_row in enumerate([1, 2, 0, 1, 0, 1]):
        training.harmed({"step": step, "loss": np.nan, "skipped_in_row": in_row})
    assert [text.partition(":")[0] for text in told] == ["step 0", "step 5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"eval_every": -2}, "eval_every must be at least 0, got -2"),
        ({"steps": 2.5}, "steps must be an int, got 2.5"),
        ({"steps": True}, "steps must be an int, got True"),
        ({"eval_every": 1.5}, "eval_every must be an int, got 1.5"),
        ({"run": "runs/x"}, r"run must be a train.Run, for example train.Run\('runs/x'\)"),
        ({"state": {"w": 1}}, "state must be a TrainState, see init_state, got dict"),
        ({"sinks": print}, "sinks must be a sequence of functions of a row, got <built-in"),
        ({"profile": (1, 3), "metrics_path": "m.jsonl"}, r"last < steps=3, got \(1, 3\)"),
        ({"tokens_per_step": -1}, "tokens_per_step must be at least 0, got -1"),
        ({"eval_every": 2}, "eval_every is 2 but evaluate is None"),
        ({"step_fn": lambda s, b, k: (s, {"accuracy": 1})}, "have no 'loss', only accuracy"),
        ({"step_fn": lambda s, b, k: (s, {"loss": 1, "step": 1})}, "may not be named step: taken"),
    ],
)
def test_fit_rejects(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"step_fn": fake_step_fn([]), "state": fake_state(0), "steps": 3}
    arguments |= {"batch_fn": lambda step: None, "key": KEY} | change
    with pytest.raises(ValueError, match=message):
        train.fit(**arguments)
