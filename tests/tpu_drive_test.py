"""Tests of launching and watching with workers that say what a test tells them to."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from tpu import drive, execute, options, run, steps
from tpu.execute import Failed
from tpu.steps import Desk
from tpu.verbs import Command, Job, Place, Reply
from tpu.watch import Action, Budget, Cloud, Seen

RUNNING = {"state": "running", "attempt": 1, "ready": True}
BUSY = "worker {}: a job runs here (process 7); stop it first: python -m tpu.run stop"
OLD, NEW = Job("old", ("python", "old.py"), 3), Job("new", ("python", "new.py"))


class Workers:
    """Two workers in folders; what each says to a verb, and what they were asked."""

    def __init__(self, folder: pathlib.Path, *rows: dict[str, Any]) -> None:
        self.rows = list(rows) or [{"state": "none", "ready": True}] * 2
        self.launched: list[str] = ["", ""]  # or why it is not
        self.asked: list[str] = []
        self.told: list[str] = []
        self.desk = Desk(Place("demo", "local", workers=2), folder, self.told.append, self.run)
        steps.write(self.desk, "place", self.desk.place)
        (self.desk.folder / "outgoing").mkdir()
        pathlib.Path(self.desk.outgoing[0]).touch()

    def run(self, commands: Sequence[Command], timeout_s: float) -> list[Reply]:
        program = commands[0].argv[0]
        verb = commands[0].argv[2] if program == "bash" else program
        self.asked.append(verb)
        return [self.reply(verb, i) for i in range(len(commands))]

    def reply(self, verb: str, i: int) -> Reply:
        if verb == "ls":
            there = "rm" not in self.asked
            return Reply(0 if there else 2, "0\n1\n" if there else "")
        if verb == "launch" and self.launched[i]:
            return Reply(1, "", self.launched[i].format(i) + "\n")
        if verb == "logs":
            return Reply(0, f"[{i}] a line\n[{i}] another\n")
        if verb in ("cp", "rm", "mkdir"):
            return Reply(0)
        if "unreachable" in self.rows[i].values():
            return Reply(1, "", f"worker {i}: no answer\n")
        said = self.rows[i] | ({"state": "launched"} if verb == "launch" else {})
        return Reply(0, json.dumps({"worker": i, **said}) + "\n")

    def launch(self) -> None:
        steps.launch(self.desk, Cloud("active", addresses=("127.0.0.1",) * 2), NEW, 1)


@pytest.mark.parametrize("state", ["running", "orphaned", "unreachable"])
def test_nothing_is_started_while_a_job_runs_on_one_worker(
    state: str, tmp_path: pathlib.Path
) -> None:
    workers = Workers(tmp_path / "demo", {"state": state}, {"state": "lost"})
    steps.write(workers.desk, "job", OLD)
    with pytest.raises(Failed, match=r"worker 0: (a job runs here|no answer)"):
        workers.launch()
    assert workers.asked == ["status"]
    assert steps.read_job(workers.desk) == OLD


def test_a_launch_that_is_refused_takes_back_what_it_started(tmp_path: pathlib.Path) -> None:
    """Also where another computer's job came in between."""
    workers = Workers(tmp_path / "demo")
    workers.launched = [BUSY, ""]
    with pytest.raises(Failed, match="worker 0: a job runs here"):
        workers.launch()
    assert workers.asked == ["status", "launch", "stop"]
    assert steps.read_job(workers.desk) is None

    steps.write(workers.desk, "job", OLD)
    workers.launched, workers.asked = ["it is not set up", ""], []
    with pytest.raises(Failed, match="worker 0: it is not set up"):
        workers.launch()
    assert workers.asked == ["status", "launch", "stop"]
    assert steps.read_job(workers.desk) == OLD  # watching goes on with this one

    workers.launched, workers.asked = [BUSY, BUSY], []
    with pytest.raises(Failed, match="worker 1: a job runs here"):
        workers.launch()
    assert workers.asked == ["status", "launch"]  # none of it is ours

    workers.launched = ["", ""]
    workers.launch()
    assert steps.read_job(workers.desk) == NEW


@pytest.mark.parametrize("verb", ["sync", "setup", "launch", "stop", "down"])
def test_one_command_at_a_time(verb: str, tmp_path: pathlib.Path, capsys: Any) -> None:
    workers = Workers(tmp_path / "demo")
    words = [verb, "--name=demo", f"--state={tmp_path}", *(["--", "x"] if verb == "launch" else [])]
    with drive.alone(workers.desk, "work"):
        assert run.main(words) == 2
    assert "demo is being worked on by another command\n  do: wait" in capsys.readouterr().err


def test_watching_waits_longer_after_each_failure(tmp_path: pathlib.Path) -> None:
    workers = Workers(tmp_path / "demo", *[{"state": "none", "ready": False}] * 2)
    steps.write(workers.desk, "job", OLD)
    pauses: list[float] = []
    drive.watch(workers.desk, Budget(max_replaced=0), 30.0, pauses.append)
    assert pauses == [60.0, 120.0, 240.0, 480.0]
    assert sum(line.startswith("prepare failed: worker 0") for line in workers.told) == 4


def test_watching_begins_only_with_something_to_ship(tmp_path: pathlib.Path) -> None:
    workers = Workers(tmp_path / "demo")
    steps.write(workers.desk, "job", OLD)
    shutil.rmtree(workers.desk.folder / "outgoing")
    with pytest.raises(Failed, match=r"nothing was synced yet\n  do: python -m tpu.run sync"):
        drive.watch(workers.desk, Budget(), 30.0)
    assert not workers.asked


def test_logs_are_kept_before_machines_go(tmp_path: pathlib.Path) -> None:
    error = {"state": "ended", "exit": 1, "ended": 5, "attempt": 3, "ready": True}
    workers = Workers(tmp_path / "demo", error, error)
    steps.write(workers.desk, "job", OLD)
    drive.watch(workers.desk, Budget(), 30.0)
    assert workers.asked.index("logs") < workers.asked.index("rm")
    folder = workers.desk.folder / "logs" / "old-3"
    assert workers.told[-1] == f"the logs are in {folder}"
    assert (folder / "worker-1.log").read_text() == "a line\nanother\n"


def test_logs_are_kept_before_machines_are_replaced(tmp_path: pathlib.Path) -> None:
    workers = Workers(tmp_path / "demo")
    steps.write(workers.desk, "job", OLD)
    seen, memory = steps.look(workers.desk), drive.Memory(0.0)
    drive.act(workers.desk, Action("delete", "broken"), memory, seen, Seen("infrastructure"))
    assert workers.asked.index("logs") < workers.asked.index("rm")
    assert (workers.desk.folder / "logs" / "old-3" / "worker-0.log").exists()


def test_logs_that_cannot_be_kept_do_not_keep_the_machines(tmp_path: pathlib.Path) -> None:
    workers = Workers(tmp_path / "demo", RUNNING, RUNNING)
    steps.write(workers.desk, "job", OLD)
    (workers.desk.folder / "logs").touch()
    drive.save_logs(workers.desk, steps.look(workers.desk))
    assert "the logs could not be saved: [Errno " in workers.told[-1]


def test_a_job_that_stops_at_once_again_and_again_is_given_up(tmp_path: pathlib.Path) -> None:
    saved = {"state": "ended", "exit": 75, "ended": 5, "ran": 1, "attempt": 3, "ready": True}
    workers = Workers(tmp_path / "demo", saved, saved)
    steps.write(workers.desk, "job", OLD)
    outcome = drive.watch(workers.desk, Budget(), 30.0)
    assert outcome.reason.endswith(
        "within a minute of the start, 4 times in a row: it gets nowhere"
    )
    assert workers.asked.count("launch") == 3
    assert not outcome.done


def test_up_does_not_wait_for_ever_for_a_request_that_vanished(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(tmp_path / "demo")
    workers.asked = ["rm"]  # nothing is there, also after it was asked for
    pauses: list[float] = []
    monkeypatch.setattr(execute, "sleep", pauses.append)
    with pytest.raises(Failed, match=r"the request does not show after 10 minutes\n  do: down"):
        run.up(workers.desk, options.parse("up", ["--name=demo"]))
    assert sum(pauses) == 600.0


def test_folders_of_a_worker_that_does_not_answer_stay(tmp_path: pathlib.Path) -> None:
    workers = Workers(tmp_path / "demo", {"state": "ended"}, {"state": "unreachable"})
    with pytest.raises(Failed, match="worker 1 does not say whether its job ended: no answer"):
        steps.down(workers.desk)
    assert "rm" not in workers.asked
