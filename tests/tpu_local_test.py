"""Tests of tpu.run with folders as workers: real processes, stopped, killed and watched."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.one_worker import PATIENCE_S, ROOT, Worker, wait_for
from tpu import drive, run, steps
from tpu.steps import Desk
from tpu.watch import Budget
from tpu.workers import Row

STATE = "--state=state"
TINY = ["--preset=quick", "--D=16", "--L=1", "--T=16", "--steps=250", "--eval_every=250"]
TINY += ["--eval_windows=12", "--save_every=100", "--log_every=1"]
QUICKLY = "XLA_FLAGS=--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The main job, with steps long enough to be stopped between two of them on a fast machine.
SLOWLY = """
import runpy, sys, time
from jax_attn import data
make = data.batch
def batch(text, seed, step, *, B, T, rows):
    time.sleep(0.02)
    return make(text, seed, step, B=B, T=T, rows=rows)
data.batch = batch
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: pathlib.Path) -> Iterator[None]:
    """Also after a test that fails."""
    yield
    for home in (tmp_path / "state" / "demo" / "workers").glob("*"):
        Worker(home)("stop", "--grace=0", "--kill")


def shipped(folder: pathlib.Path) -> None:
    """Make a git tree of what a job needs, with a file changed and one that git does not know."""
    for name in ("jax_attn", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("constraints.txt", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    (folder / ".gitignore").write_text("state/\nout/\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "constraints.txt").write_text("# changed\n")
    (folder / "slowly.py").write_text(SLOWLY)


def test_from_up_to_down_through_a_stop_and_a_kill(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped(tmp_path)
    out, said = tmp_path / "out", []

    def do(verb: str, *words: str) -> str:
        code = run.main([verb, "--name=demo", STATE, *words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    def steps_made() -> int:
        path = out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return max((row["step"] for row in rows if "loss" in row), default=0)

    do("up", "--backend=local", "--workers=2")
    folder = tmp_path / "state" / "demo"
    desk = Desk(steps.read_place(tmp_path / "state", "demo"), folder)
    homes = [Worker(folder / "workers" / str(i)) for i in range(2)]

    def rows() -> list[Row]:
        return steps.rows(desk, steps.active(desk))

    def exits() -> list[int | None]:
        return [row.exit for row in rows()]

    try:
        assert "with changes" in do("sync")
        assert "jax " in do("setup")
        command = ["env", QUICKLY, "python", "slowly.py", "experiments.character_lm"]
        command += [f"--out={out}", *TINY]
        do("launch", "--run=night-7", "--", *command)
        wait_for(lambda: steps_made() > 5, "the first steps")
        os.kill(homes[1].pid(), signal.SIGTERM)
        wait_for(lambda: exits() == [75, 75], "both to save and stop")
        assert "job: stopped: all saved and stopped" in do("status")
        before = steps_made()

        def again(seconds: float) -> None:
            """While watching waits: once the run has gone on, kill one worker."""
            time.sleep(seconds)
            if homes[0].attempt() == 2 and steps_made() < 249:
                wait_for(lambda: steps_made() > before, "steps of the second start")
                os.kill(homes[0].pid(), signal.SIGKILL)
                wait_for(lambda: rows()[0].exit == 137, "the kill")
                assert run.main(["status", "--name=demo", STATE]) == 1
                said.append(capsys.readouterr().out.splitlines()[-1])

        told = Desk(desk.place, desk.folder, said.append)
        outcome = drive.watch(told, Budget(max_hours=1.0, idle_teardown=-1), 0.2, again)
        assert (outcome.done, exits()) == (True, [0, 0]), said
        text = "\n".join(said)
        assert "launch: it stopped and saved: the same run goes on" in text
        assert "job: FAILED: worker 0 ended with 137 (killed)" in text
        assert "launch: worker 0 ended with 137 (killed): start 1 of 3" in text
        assert [(row.attempt, row.run) for row in rows()] == [(3, "night-7")] * 2
        assert steps_made() == 249
        logs = do("logs", "--lines=1000")
        assert "[0] --- run night-7, attempt 3" in logs
        assert "goes on from step" in logs
    finally:
        assert run.main(["down", "--name=demo", STATE]) == 0
    assert not (desk.folder / "workers").exists()


def test_a_kill_is_a_failure_at_once_and_watch_starts_all_anew(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Three times on the same machines; then they are replaced, twice; then it gives up."""
    monkeypatch.chdir(tmp_path)
    assert run.main(["up", "--name=demo", "--backend=local", "--workers=2", STATE]) == 0
    shipped(tmp_path)
    assert run.main(["sync", "--name=demo", STATE]) == 0
    assert run.main(["setup", "--name=demo", STATE]) == 0
    homes = [Worker(tmp_path / "state" / "demo" / "workers" / str(i)) for i in range(2)]
    command = ["python", "-c", "import time; time.sleep(600)"]
    assert run.main(["launch", "--name=demo", STATE, "--", *command]) == 0
    capsys.readouterr()
    survivor = homes[0].pid()
    os.kill(homes[1].pid(), signal.SIGKILL)
    wait_for(lambda: homes[1].status()["state"] == "ended", "the kill")
    assert run.main(["status", "--name=demo", STATE]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "job: FAILED: worker 1 ended with 137 (killed)"
    )
    said: list[str] = []

    def kill(seconds: float) -> None:
        if homes[1].job.exists() and homes[1].status()["state"] == "running":
            os.kill(homes[1].pid(), signal.SIGKILL)
            wait_for(lambda: homes[1].status()["state"] == "ended", "the kill")

    desk = Desk(steps.read_place(tmp_path / "state", "demo"), tmp_path / "state" / "demo")
    desk = Desk(desk.place, desk.folder, said.append)
    outcome = drive.watch(desk, Budget(max_replaced=1), 0.05, kill)
    assert "worker 1 ended with 137 (killed), after 3 more starts" in outcome.reason
    assert "and 1 replacements did not help" in outcome.reason
    assert (outcome.done, outcome.left) == (False, ())
    kinds = [line.split()[1].rstrip(":") for line in said]
    assert kinds.count("launch") == 3 + 4, said
    assert kinds.count("delete") == kinds.count("create") == kinds.count("prepare") == 1
    assert not homes[0].root.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(survivor, 0)


def test_watch_does_not_make_anew_what_down_gave_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["up", "--name=demo", "--backend=local", "--workers=1", STATE]) == 0
    shipped(tmp_path)
    for verb in (
        ["sync"],
        ["setup"],
        ["launch", "--", "python", "-c", "import time; time.sleep(600)"],
    ):
        assert run.main([verb[0], "--name=demo", STATE, *verb[1:]]) == 0
    said: list[str] = []
    desk = Desk(steps.read_place(tmp_path / "state", "demo"), tmp_path / "state" / "demo")
    desk = Desk(desk.place, desk.folder, said.append)

    def give_back(seconds: float) -> None:
        with pytest.raises(steps.Failed, match="is being watched already"):
            drive.watch(desk, Budget(), 0.05)
        assert run.main(["down", "--name=demo", STATE]) == 0

    outcome = drive.watch(desk, Budget(), 0.05, give_back)
    assert "given back" in outcome.reason
    assert len(said) == 1
    assert not (desk.folder / "workers").exists()


def test_logs_follow_until_ctrl_c(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.main(["up", "--name=demo", "--backend=local", "--workers=2", STATE]) == 0
    homes = [Worker(tmp_path / "state" / "demo" / "workers" / str(i)) for i in range(2)]
    assert run.main(["logs", "--name=demo", STATE]) == 1
    assert "  do: nothing was synced to this worker yet" in capsys.readouterr().out
    for home in homes:
        home.prepare()
        home.job.mkdir()
        (home.job / "log").write_text("first\n")
    words = [sys.executable, "-m", "tpu.run", "logs", "-f", "--name=demo", STATE]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    following = subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True)
    assert following.stdout is not None
    assert sorted(following.stdout.readline() for _ in range(2)) == ["[0] first\n", "[1] first\n"]
    with open(homes[1].job / "log", "a") as log:
        log.write("second\n")
    assert following.stdout.readline() == "[1] second\n"
    following.send_signal(signal.SIGINT)
    out, err = following.communicate(timeout=PATIENCE_S)
    assert (following.returncode, out, err) == (0, "", "")
    assert run.main(["down", "--name=demo", STATE]) == 0
