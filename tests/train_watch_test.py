"""Tests of what watches a run: ledger, recompiles, watchdog, traces, sinks, signals, curves."""

import functools
import io
import json
import pathlib
import resource
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from jax_attn import report, train
from jax_attn.train import loop, sinks, watch
from jax_attn.train import report as train_report
from jax_attn.train.watch import Compiles, Ledger, Pace, Trace, watchdog
from jax_attn.view.curves import plot_curves
from tests.trained_model import KEY, B, D, batch_fn, init_params, jsonl_rows, loss_fn

TX = optax.sgd(0.1)


def start() -> train.TrainState:
    return train.init_state(init_params(KEY), TX)


def step_fn() -> Any:
    return jax.jit(train.make_train_step(loss_fn, TX), donate_argnums=0)


# Ledger.


def test_the_ledger_adds_up_to_the_wall_clock(tmp_path: pathlib.Path) -> None:
    def slow(step: int) -> Any:
        time.sleep(0.02)
        return batch_fn(step)

    def evaluate(params: Any) -> dict[str, float]:
        time.sleep(0.05)
        return {"loss": 1.0}

    step, state = step_fn(), start()
    began = time.perf_counter()
    _, history = train.fit(
        step, state, slow, steps=20, key=KEY, evaluate=evaluate, eval_every=5,
        run=train.Run(tmp_path, save_every=5),
    )  # fmt: skip
    wall = time.perf_counter() - began
    spent = history.seconds
    assert abs(sum(spent.values()) - wall) < 0.01 * wall + 0.01
    assert spent["data"] >= 0.4
    assert spent["eval"] >= 0.25
    assert {"compile", "compute", "save", "restore", "write", "loop"} < set(spent)
    # What no part holds is the loop itself.
    assert spent["loop"] < 0.1 * wall
    last = jsonl_rows(tmp_path / "metrics.jsonl")[-1]
    assert {f"seconds/{name}" for name in spent} == set(last) - {"step"}


def test_entries_of_the_ledger_nest() -> None:
    began = time.perf_counter()
    ledger = Ledger()
    with ledger("a"):
        time.sleep(0.03)
        with ledger("b"):
            time.sleep(0.05)
        assert ledger.open == "a"
    with pytest.raises(KeyError), ledger("b"):
        raise KeyError
    assert ledger.open == "loop"
    spent = ledger.close()
    assert spent["a"] >= 0.03
    assert spent["b"] >= 0.05
    assert spent["a"] + spent["b"] <= time.perf_counter() - began


# Recompiles.


def test_a_second_compile_says_what_changed(tmp_path: pathlib.Path) -> None:
    def shrinks(step: int) -> Any:
        return batch_fn(step)[: B if step < 5 else B - 1]

    told: list[str] = []
    run = train.Run(tmp_path, tell=told.append)
    _, history = train.fit(step_fn(), start(), shrinks, steps=8, key=KEY, run=run)
    expected = f"step 5 compiled again: batch: float32[{B - 1},{D}], was float32[{B},{D}]"
    assert told == [expected] == [row["event"] for row in history.events]
    assert {"step": 6, "event": expected} in jsonl_rows(tmp_path / "metrics.jsonl")
    with pytest.raises(RuntimeError, match="strict: step 5 compiled again"):
        train.fit(step_fn(), start(), shrinks, steps=8, key=KEY, strict=True)
    train.fit(step_fn(), start(), batch_fn, steps=8, key=KEY, strict=True)


def test_every_kind_of_change_is_named() -> None:
    run = jax.jit(lambda state, batch, key: state)
    compiles = Compiles(run)

    def changed(state: Any, batch: Any = 0) -> Any:
        run(state, batch, KEY)
        return compiles.changed(state, batch, KEY)

    assert changed({"w": jnp.ones(3)}) is None
    assert changed({"w": jnp.ones(3)}) is None
    assert "bfloat16[3], was float32[3]" in changed({"w": jnp.ones(3, jnp.bfloat16)})[0]
    assert "was not there" in changed({"w": jnp.ones(3), "v": jnp.ones(2)})[0]
    placed = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert any("float32[3] on {CpuDevice(id=1)}" in line for line in changed({"w": placed}))
    with jax.default_matmul_precision("float32"):
        assert "a setting of JAX" in changed({"w": placed})[0]


def test_a_second_compile_is_booked_as_one() -> None:
    class Step:
        calls = 0

        def _cache_size(self) -> int:
            return 1 + (self.calls > 2)

        def __call__(self, state: Any, batch: Any, key: Any) -> Any:
            time.sleep(0.1 if self.calls in (0, 2) else 0)
            self.calls += 1
            return state._replace(step=state.step + 1), {"loss": 1.0}

    state = train.TrainState(jnp.int32(0), None, None)
    history = train.fit(Step(), state, lambda step: None, steps=4, key=KEY)[1]
    assert history.seconds["compile"] >= 0.2
    assert history.seconds["compute"] < 0.1


def test_rates_are_in_the_rows_and_leave_out_what_is_no_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = Ledger()
    pace = Pace(ledger, 50, 1e10, 1e11)
    now = iter([100.0, 112.0, 120.0, 121.0])
    monkeypatch.setattr(watch.time, "perf_counter", lambda: next(now))
    assert pace(1) == {}
    ledger.seconds["eval"] = 2.0
    assert pace(5) == {"tokens_per_s": 20.0, "mfu": pytest.approx(0.04)}
    assert pace(3) == {}  # after a rollback
    assert pace(4)["tokens_per_s"] == 50.0
    monkeypatch.undo()
    history = train.fit(
        step_fn(), start(), batch_fn, steps=3, key=KEY, tokens_per_step=B, flops_per_step=1.0
    )[1]
    assert [sorted({"tokens_per_s", "flops_per_s", "mfu"} & set(row)) for row in history.train] == [
        [], ["flops_per_s", "tokens_per_s"], ["flops_per_s", "tokens_per_s"]
    ]  # fmt: skip


# Watchdog and traces.


def test_a_watchdog_of_no_seconds_is_off() -> None:
    with watchdog(Ledger(), lambda: 0, 0):
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_a_stall_is_told_once_with_stacks(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    ledger, made = Ledger(), 0
    with watchdog(ledger, lambda: made, 0.2), ledger("data"):
        time.sleep(0.9)
        made = 1
    text = capfd.readouterr().err
    assert text.count("process 0 of 1 has made no step") == 1
    assert "in 'data'" in text
    assert "train_watch_test.py" in text


def test_a_trace_of_some_steps_is_written(tmp_path: pathlib.Path) -> None:
    train.fit(
        step_fn(), start(), batch_fn, steps=6, key=KEY, metrics_path=tmp_path / "m.jsonl",
        profile=(2, 3),
    )  # fmt: skip
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    for wrong in ((3, 2), (-1, 2), (3, 6)):
        with pytest.raises(ValueError, match="profile must be"):
            Trace(wrong, 6, tmp_path)
    with pytest.raises(ValueError, match="profile needs a folder"):
        train.fit(step_fn(), start(), batch_fn, steps=6, key=KEY, profile=(2, 3))


# Sinks.


def test_a_sink_that_raises_or_hangs_stops_nothing() -> None:
    rows: list[Any] = []
    hang = threading.Event()

    def raises(row: Any) -> None:
        raise RuntimeError("no network")

    def hangs(row: Any) -> None:
        hang.wait(20)

    told: list[str] = []
    began = time.monotonic()
    with sinks.running([raises, hangs, rows.append], told.append, patience_s=0.3) as send:
        for step in range(1500):
            send({"step": step})
            time.sleep(0.0005)
    assert time.monotonic() - began < 10
    hang.set()
    assert [row["step"] for row in rows] == list(range(1500))
    text = "\n".join(told)
    assert text.count("sink raises failed and loses rows, training goes on: RuntimeError") == 1
    assert "sink hangs is 1000 rows behind and loses rows" in text
    assert "sink hangs still hangs after 0 s" in text


def test_a_sink_that_failed_gets_the_rows_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_PAUSE_S", 0.01)
    rows: list[int] = []

    def now_and_then(row: Any) -> None:
        if row["step"] in (1, 2, 4):
            raise SystemExit  # would end the thread without a word
        rows.append(row["step"])

    told: list[str] = []
    with sinks.running([now_and_then], told.append) as send:
        for step in range(6):
            send({"step": step})
    assert rows == [0, 3, 5]
    assert [text.partition(" failed")[0] for text in told] == ["sink now_and_then"] * 2


def test_waiting_for_sinks_at_the_end_is_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "running", functools.partial(sinks.running, patience_s=0.3))
    hang = threading.Event()

    def hangs(row: Any) -> None:
        hang.wait(20)

    history = train.fit(
        lambda state, batch, key: (state._replace(step=state.step + 1), {"loss": 1.0}),
        train.TrainState(jnp.int32(0), None, None), lambda step: None, steps=2, key=KEY,
        sinks=[hangs],
    )[1]  # fmt: skip
    hang.set()
    assert history.seconds["write"] >= 0.3


def test_tensorboard_reads_what_is_written(tmp_path: pathlib.Path) -> None:
    train.fit(
        step_fn(), start(), batch_fn, steps=3, key=KEY, sinks=[train.tensorboard(tmp_path)]
    )  # fmt: skip
    files = list(tmp_path.glob("events.out.tfevents*"))
    assert len(files) == 1
    assert files[0].read_bytes().count(b"grad_norm") == 3


def test_rows_that_cannot_be_written_are_kept(tmp_path: pathlib.Path) -> None:
    told: list[str] = []
    with report.jsonl(tmp_path / "m.jsonl", None, told.append) as write:
        write({"step": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        try:
            write({"step": 1, "long": "x" * 50})
            write({"step": 2})
        finally:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        write({"step": 3})
    assert [row["step"] for row in jsonl_rows(tmp_path / "m.jsonl")] == [0, 1, 2, 3]
    assert len(told) == 1
    assert "cannot be written, training goes on" in told[0]


def test_fit_in_a_thread_trains_without_signals(tmp_path: pathlib.Path) -> None:
    made: list[int] = []

    def work() -> None:
        run = train.Run(tmp_path)
        made.append(int(train.fit(step_fn(), start(), batch_fn, steps=3, key=KEY, run=run)[0].step))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert made == [3]


# Display and curves.


def test_learning_rate_and_share_of_the_peak_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for peak, expected in ((0.0, "0.02 TFLOP/s"), (1e11, "MFU 20.0%")):
        console = rich.console.Console(file=io.StringIO())
        now = iter([100.0, 102.0])
        monkeypatch.setattr(report.time, "perf_counter", lambda now=now: next(now))
        progress = report.training_progress(console)
        with report.display(progress, "run", 0, 7, 1e10, peak) as show:
            show(1, 0.5, 50, 0.0, 1e-3)
            show(5, 0.5, 50, 0.0, 2e-3)
        assert isinstance(console.file, io.StringIO)
        line = console.file.getvalue().splitlines()[1]
        assert f"lr 2.00e-03  100 tokens/s  {expected}  ETA" in line


def test_a_report_of_two_runs(tmp_path: pathlib.Path, capsys: Any) -> None:
    for name in ("first", "<second>"):
        told: list[str] = []
        run = train.Run(tmp_path / name, config={"name": name, "D": 5}, tell=told.append)
        train.fit(
            step_fn(), start(), lambda step: batch_fn(step)[: B - (step > 7)], steps=120, key=KEY,
            evaluate=lambda p: {"loss": 2.0}, eval_every=40, run=run,
        )  # fmt: skip
    argv = [str(tmp_path / "first"), str(tmp_path / "<second>"), f"--out={tmp_path / 'out'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *argv])
        train_report.main()
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "out" / "curves.html").read_text()
    assert not any(word in page for word in ("http://", "https://", "<script", "<link", "<second>"))
    for text in (
        "&lt;second&gt;",
        "compiled again",
        "Where the time went",
        "<td><b>name",
        "compute",
        "Python at most",
    ):
        assert text in page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match="2"):
            train_report.main()
    assert "error: " in capsys.readouterr().err


def test_curves_reject_and_leave_out() -> None:
    rows = [{"step": i, "loss": 1.0, "skipped": 0, "odd": [1.0, 3.0]} for i in range(3)]
    labels = [axes.get_ylabel() for axes in plot_curves({"a": rows}).axes]
    assert labels == ["loss (nats)"]
    line = plot_curves({"a": rows}, metrics=["odd"]).axes[0].lines[0]
    assert list(np.ravel(np.asarray(line.get_ydata()))) == [2, 2, 2]
    with pytest.raises(ValueError, match="no run has any of x; rows have loss, odd, skipped, step"):
        plot_curves({"a": rows}, metrics=["x"])
    with pytest.raises(ValueError, match="runs is empty"):
        plot_curves({})
    with pytest.raises(ValueError, match="metrics must be a sequence of names, got 'loss'"):
        plot_curves({"a": rows}, metrics="loss")


def test_rows_of_a_file_that_is_no_run(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n{"st')
    assert [row["step"] for row in train_report.read_rows(path)] == [0, 2]  # killed twice
    path.write_text('{"step": 0}\nstep 1\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not JSON: step 1"):
        train_report.read_rows(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"m\.jsonl is not text"):
        train_report.read_rows(path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        train_report.read_config(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json has no 'config'"):
        train_report.read_config(tmp_path)
    path.write_text(json.dumps([1]) + "\n")
    with pytest.raises(ValueError, match="line 1: no row of metrics"):
        train_report.read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        train_report.read_rows(path)
