"""Tests of jax_attn.report: the JSONL file, the bar on a terminal, the lines elsewhere."""

import fcntl
import io
import json
import os
import pathlib
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jax_attn import report, train

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


# JSONL.


def test_rows_survive_json(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a" / "b" / "metrics.jsonl"
    seeds = np.array([[1.5, np.nan, 3], [-np.inf, np.inf, 0.1]], np.float32)
    with report.jsonl(path) as write:
        write({"step": 0, "loss": 0.1, "seeds": seeds})
        # Readable at once: a run that is killed later has lost nothing.
        assert path.read_text().endswith("\n")
        write({"step": 1, "loss": float("inf")})
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["seeds"][1][:2] == ["-inf", "inf"]
    np.testing.assert_array_equal(np.array(first["seeds"], float).astype(np.float32), seeds)
    assert float(second["loss"]) == np.inf


def test_file_is_appended_to_and_a_torn_line_costs_itself_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        with report.jsonl(path) as write:
            write({"step": step})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    path.write_text('{"step": 0}\n{"ste')
    with report.jsonl(path) as write:
        write({"step": 1})
    assert path.read_text() == '{"step": 0}\n{"ste\n{"step": 1}\n'


def test_path_that_cannot_be_written_fails_before_the_first_row(tmp_path: pathlib.Path) -> None:
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))), report.jsonl(tmp_path):
        pass


def test_a_row_tried_again_is_there_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    with report.jsonl(path) as write:
        for again in (True, True, False, True):
            write({"step": 5}, again=again)
        write({"step": 7}, again=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 5, 7]


class Interrupted(rich.console.Console):
    """A console where Ctrl-C arrives as it prints its third line."""

    lines = 0

    def print(self, *objects: Any, **options: Any) -> None:
        self.lines += 1
        if self.lines == 3:
            raise KeyboardInterrupt


def test_ctrl_c_between_a_row_and_its_line_leaves_the_row_once(tmp_path: pathlib.Path) -> None:
    path, console = tmp_path / "rows.jsonl", Interrupted(file=io.StringIO())

    def step_fn(state: train.TrainState, batch: Any, key: Any) -> Any:
        return state._replace(step=state.step + 1), {"loss": np.float32(2.5)}

    state = train.TrainState(jnp.int32(0), None, None)
    with pytest.raises(KeyboardInterrupt):
        train.fit(
            step_fn, state, lambda step: None, steps=7, key=jax.random.key(0),
            metrics_path=path, progress=report.training_progress(console),
        )  # fmt: skip
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


# Display.


def shown(steps: int, start: int = 0, title: str = "run", tokens: int = 0) -> list[str]:
    console = rich.console.Console(file=io.StringIO(), width=20)
    with report.display(report.training_progress(console), title, start, steps) as show:
        for made in range(start + 1, steps + 1):
            show(made, 1 / made, tokens, 0.0)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21, 37, 39, 997])
def test_at_most_twenty_plain_lines_and_the_first_and_last_step(steps: int) -> None:
    lines = shown(steps)
    assert min(steps, 10) <= len(lines) <= 20
    assert lines[0] == "run  step 1/1  loss 1.0000".replace("/1", f"/{steps}")
    assert f"step {steps}/{steps}  loss {1 / steps:.4f}" in lines[-1]
    assert all("\x1b" not in line for line in lines)


def test_plain_lines_of_a_resumed_run_and_of_a_title_with_brackets() -> None:
    lines = shown(103, start=101, title="heads (4,256,768) [seed 0]", tokens=64)
    assert lines[0] == "heads (4,256,768) [seed 0]  step 102/103  loss 0.0098"
    # One line however narrow the console, with a rate and the time left.
    assert re.fullmatch(
        r"heads .* step 103/103  loss 0\.0097  [\d,]+ tokens/s  ETA 0:00:00", lines[1]
    )
    assert len(lines) == 2


def test_rate_leaves_out_the_first_step_and_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    console = rich.console.Console(file=io.StringIO())
    now = iter([100.0, 112.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    with report.display(report.training_progress(console), "run", 0, 7) as show:
        show(1, 0.5, 50, 3.0)
        show(5, 0.5, 50, 5.0)
    # 4 steps of 50 tokens in 12 - 2 s of training; 2 steps remain at 3 s of wall time each.
    assert isinstance(console.file, io.StringIO)
    assert "loss 0.5000  20 tokens/s  ETA 0:00:06" in console.file.getvalue()


def test_several_runs_share_one_display_on_a_terminal() -> None:
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=80)
    with report.training_progress(console) as progress:
        for title in ("[both] parts", "attention only"):
            with report.display(progress, title, 2, 5) as show:
                show(3, 0.25, 64, 0.0)
                show(5, 0.125, 64, 0.0)
        assert [task.completed for task in progress.tasks] == [5, 5]
        assert not progress.live.console.is_dumb_terminal
        assert progress.live.is_started
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())
    rows = [line for line in text.splitlines() if "loss 0.1250" in line]
    assert any(line.startswith("[both] parts") and "5/5" in line for line in rows)
    assert any(line.startswith("attention only") and "tokens/s" in line for line in rows)
    assert all(len(line) <= 80 for line in rows)


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (40, "loss 2.0312  ETA 0:00:34"),
        (80, "loss 2.0312  377,417 tokens/s  MFU 49.1%  ETA 0:00:34"),
        (120, "loss 2.0312  lr 1.00e-03  377,417 tokens/s  MFU 49.1%  ETA 0:00:34"),
    ],
)
def test_a_narrow_terminal_keeps_the_steps_and_the_time_left(
    width: int, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=width)
    with report.training_progress(console) as progress:
        now = iter([100.0, 107.0])
        monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
        with report.display(progress, "character model", 0, 2000, 1e10, 1e12) as show:
            show(1, 2.5, 768, 0.0, 1e-3)
            show(345, 2.0312, 7680, 0.0, 1e-3)
        monkeypatch.undo()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())
    line = text.rstrip().splitlines()[-1]
    assert line.rstrip().endswith(f"345/2000 {parts}")
    assert line.startswith("c")
    assert "━" in line
    assert len(line) <= width


def test_rate_after_a_rollback_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    console = rich.console.Console(file=io.StringIO())
    now = iter([100.0, 110.0, 500.0, 501.0, 502.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    with report.display(report.training_progress(console), "run", 0, 7) as show:
        for made in (1, 5, 3, 4, 5):
            show(made, 0.5, 50, 0.0)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.partition("0.5000")[2] for line in lines[2:]] == [
        "", "  50 tokens/s  ETA 0:00:03", "  50 tokens/s  ETA 0:00:02"
    ]  # fmt: skip


def test_a_warning_stands_above_the_bar() -> None:
    script = """
import sys
from jax_attn import report
with report.training_progress() as progress:
    with report.display(progress, "run", 0, 5) as show:
        show(3, 0.25, 0, 0.0)
        progress.refresh()
        report.tell_stderr("the disk is full")
"""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = os.environ | {"TERM": "xterm", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdin=slave, stderr=slave
    ) as child:
        os.close(slave)
        screen = b""
        while True:
            try:
                received = os.read(master, 4096)
            except OSError:
                break
            if not received:
                break
            screen += received
    os.close(master)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.decode())
    lines = re.split(r"[\r\n]+", text)
    assert [line.rstrip() for line in lines if "warning" in line] == ["warning: the disk is full"]


RUN = """
import fcntl, pathlib, signal, sys, termios, time
# A test run in the background ignores Ctrl-C, and what it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.stderr.isatty():
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)  # so that Ctrl-C on this terminal reaches this process
import numpy as np
from jax_attn import train

dispatched = 0

def step_fn(state, batch, key):
    global dispatched
    time.sleep(0.01)
    dispatched += 1
    return state._replace(step=state.step + 1), {"loss": np.float32(2.5)}

steps, path = int(sys.argv[1]), sys.argv[2]
state = train.TrainState(np.int32(0), None, None)
try:
    train.fit(step_fn, state, lambda step: None, steps=steps, key=None, metrics_path=path,
              title="both parts", tokens_per_step=64)
except KeyboardInterrupt:
    print("interrupted after", dispatched)
    raise
"""


def test_terminal_shows_a_bar_and_survives_control_c(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", RUN, "100000", str(path)]
    environment = os.environ | {"TERM": "xterm", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True,
        stdin=slave, stdout=subprocess.PIPE, stderr=slave, text=True,
    ) as child:  # fmt: skip
        os.close(slave)
        screen = b""
        interrupted = False
        while True:
            try:
                received = os.read(master, 4096)
            except OSError:  # Linux says EIO when the other side has closed
                break
            if not received:
                break
            screen += received
            if not interrupted and b"tokens/s" in screen:
                os.write(master, b"\x03")
                interrupted = True
        output = child.communicate()[0]
    os.close(master)
    text = screen.decode()
    assert re.search(r"both parts.*━.*/100000.*loss 2\.5000.*tokens/s.*ETA \d+:", text)
    assert "\x1b[?25l" in text, "the bar hides the cursor"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "KeyboardInterrupt" in text[text.rindex("\x1b[?25h") :]
    assert child.returncode != 0
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(len(steps)))
    dispatched = int(output.removeprefix("interrupted after "))
    # The signal may land inside step_fn, after its work and before it has returned anything.
    assert dispatched - len(steps) in (0, 1)


def test_pipe_shows_plain_lines_on_standard_error(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", RUN, "41", str(tmp_path / "metrics.jsonl")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) <= 20
    assert all(line.startswith("both parts  step ") for line in lines)
    assert "step 41/41  loss 2.5000" in lines[-1]


def test_a_reader_that_goes_away_stops_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", "import jax_attn.report as r; r.say('x');" + RUN]
    command = [*command, "97", str(path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        child.stderr.readline()
        child.stderr.close()  # as `2>&1 | head -1` does
    assert child.returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(97))
