"""Tests of the cloud backends of tpu.run, driven through a stand-in for `gcloud` on PATH."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fake_gcloud import ACTIVE, FOLDER, NOT_FOUND, Gcloud, node, queue
from tpu import cloud, drive, execute, run, steps
from tpu.compute import Managed
from tpu.steps import Desk
from tpu.topology import find
from tpu.verbs import Job, Place, Reply
from tpu.watch import Budget, Cloud

QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) HttpError 429: Quota limit "
    "'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a."
)
TOO_MANY = "ERROR: (gcloud.compute.tpus) HttpError 429: Quota exceeded for requests per minute"
NO_TYPE = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) INVALID_ARGUMENT: Accelerator type "
    "v5litepod-16 is not available in zone us-west4-a"
)
NO_ROOM = 'ERROR: There is no more capacity in the zone "us-west4-a"; try another'
UP = ["up", "--name=demo", "--target=v5e-16", "--zone=us-west4-a", "--project=my-project"]


@pytest.fixture
def gcloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcloud]:
    fake = Gcloud(tmp_path / "gcloud")
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(FOLDER, str(fake.folder))
    monkeypatch.chdir(tmp_path)
    yield fake
    for supervisor in fake.folder.glob("*/*/tpu-run/*/job/supervisor"):
        script = supervisor.parent.parent / "worker.sh"
        root = f"--root={supervisor.parent.parent}"
        words = ["bash", str(script), "stop", root, "--index=0", "--grace=0", "--kill"]
        subprocess.run(words, capture_output=True)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr(execute, "sleep", pauses.append)
    return pauses


def tree(folder: pathlib.Path) -> None:
    """Make a small git tree here."""
    (folder / "job.py").write_text("import sys, time\nprint(sys.argv[1:], flush=True)\n")
    (folder / "constraints.txt").write_text("")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "job.py", "constraints.txt"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=folder, check=True)


def test_up_asks_once_and_waits(gcloud: Gcloud, slept: list[float], capsys: Any) -> None:
    gcloud.script(
        {"match": "queued-resources describe", "code": 1, "err": NOT_FOUND, "times": 1},
        {"match": "queued-resources describe", "out": queue("WAITING_FOR_RESOURCES"), "times": 2},
        {"match": "queued-resources describe", "out": queue("PROVISIONING"), "times": 1},
        {"match": "tpu-vm describe", "code": 1, "err": NOT_FOUND, "times": 4},
        *ACTIVE,
    )
    assert run.main([*UP, "--capacity=spot"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "demo: waiting WAITING_FOR_RESOURCES",
        "demo: creating PROVISIONING",
        "demo: active, 4 workers",
    ]
    assert gcloud.called("compute tpus queued-resources create") == [
        [
            *("compute", "tpus", "queued-resources", "create", "demo", "--node-id=demo"),
            *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
            *("--spot", "--quiet", "--zone=us-west4-a", "--project=my-project"),
        ]
    ]
    assert slept == [30.0] * 3
    assert run.main(["up", "--name=demo"]) == 0  # is up already
    assert len(gcloud.called("compute tpus queued-resources create")) == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (QUOTA, "ask for more of the quota that is named"),
        (NO_TYPE, "gcloud compute tpus accelerator-types list"),
        (NO_ROOM, "there is no room now"),
        ("ERROR: PERMISSION_DENIED: The caller does not have permission", "roles/tpu.admin"),
        ("ERROR: SERVICE_DISABLED: Cloud TPU API has not been used", "gcloud services enable"),
        ("ERROR: You do not currently have an active account: gcloud auth login", "log in"),
        ("ERROR: (gcloud) unrecognized arguments: --mode=bulk", "gcloud components update"),
        ("ERROR: ALREADY_EXISTS: Resource demo", "something has this name"),
    ],
)
def test_an_error_of_the_tool_says_what_to_do(
    error: str, advice: str, gcloud: Gcloud, slept: list[float], capsys: Any
) -> None:
    gcloud.script({"match": "queued-resources create", "code": 1, "err": error})
    assert run.main(UP) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error[:40]}")
    assert advice in said.partition("\n  do: ")[2]
    assert len(gcloud.called("compute tpus queued-resources create")) == 1
    assert not slept


def test_too_many_requests_are_made_again_with_longer_pauses(
    gcloud: Gcloud, slept: list[float], capsys: Any
) -> None:
    gcloud.script(
        {"match": "queued-resources create", "code": 1, "err": TOO_MANY, "times": 2},
        {"match": "queued-resources describe", "code": 1, "err": NOT_FOUND, "times": 1},
        *ACTIVE,
    )
    assert run.main(UP) == 0
    assert slept == [2.0, 4.0]
    gcloud.script({"match": "queued-resources", "code": 1, "err": TOO_MANY})
    slept.clear()
    assert run.main(["up", "--name=demo"]) == 2  # and not for ever
    assert "do: wait a minute" not in capsys.readouterr().out
    assert slept == list(execute.PAUSES_S)


def test_without_gcloud_it_says_where_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run.main(UP) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: gcloud is not on PATH\n  do: install the Google Cloud CLI")


def start(gcloud: Gcloud, tmp_path: pathlib.Path, **place: Any) -> Desk:
    """Four workers that are up, with a job.py on each, and an interpreter."""
    gcloud.script(*ACTIVE)
    where = Place("demo", "queued", "v5e-16", 0, "us-west4-a", "my-project", **place)
    desk = Desk(where, tmp_path / "runs" / "tpu" / "demo")
    steps.write(desk, "place", where)
    (tmp_path / "tree").mkdir()
    tree(tmp_path / "tree")
    steps.pack(desk, tmp_path / "tree")
    steps.sync(desk, steps.active(desk))
    for i in range(4):
        home = gcloud.folder / "demo" / str(i) / "tpu-run" / "demo"
        (home / "python").write_text(sys.executable + "\n")
    return desk


def ended(desk: Desk) -> list[steps.Row]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        rows = steps.rows(desk, steps.active(desk))
        if all(row.state != "running" for row in rows):
            return rows
        time.sleep(0.1)
    raise AssertionError("it does not end")


def test_words_reach_every_worker_as_they_were_written(
    gcloud: Gcloud, tmp_path: pathlib.Path, capsys: Any
) -> None:
    desk = start(gcloud, tmp_path)
    odd = ["a b", "  two  spaces", "$HOME; false", "it's", '"', "`date`", "--", "ü\n"]
    command = ["python", "job.py", *odd]
    assert run.main(["launch", "--name=demo", "--", *command]) == 0
    rows = ended(desk)
    assert [(row.state, row.exit, row.attempt) for row in rows] == [("ended", 0, 1)] * 4
    assert run.main(["status", "--name=demo"]) == 0
    assert "job: done: all ended with 0" in capsys.readouterr().out
    assert run.main(["logs", "--name=demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for i in range(4):
        assert f"[{i}] {odd!r}" in lines
    (launched,) = [c for c in gcloud.called("compute tpus tpu-vm ssh") if " launch " in c[-3]]
    assert "--worker=all" in launched
    assert "--count=4 --coordinator=10.0.0.2:8476" in launched[-3]


def test_where_one_of_four_does_not_start_none_stays(
    gcloud: Gcloud, tmp_path: pathlib.Path, capsys: Any
) -> None:
    desk = start(gcloud, tmp_path)
    (gcloud.folder / "demo" / "2" / "tpu-run" / "demo" / "python").unlink()
    command = ["python", "-c", "import time; time.sleep(600)"]
    assert run.main(["launch", "--name=demo", "--", *command]) == 2
    said = capsys.readouterr().err
    assert "worker 2: it is not set up; run: python -m tpu.run setup" in said
    assert "worker 1" not in said
    rows = ended(desk)
    assert [row.state for row in rows] == ["ended", "ended", "none", "ended"]
    assert run.main(["stop", "--name=demo", "--grace=1"]) == 0  # nothing runs: no error
    unlocked = [c for c in gcloud.called("compute tpus tpu-vm ssh") if " unlock " in c[-3]]
    assert unlocked


def test_a_worker_that_ssh_does_not_reach_is_named(
    gcloud: Gcloud, tmp_path: pathlib.Path, capsys: Any
) -> None:
    start(gcloud, tmp_path)
    gcloud.dead(3)
    assert run.main(["status", "--name=demo", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in said["workers"]] == ["none"] * 3 + ["unreachable"]
    assert "timed out" in said["workers"][3]["why"]
    assert said["job"]["state"] == "silent"
    assert run.main(["sync", "--name=demo"]) == 2
    assert run.main(["stop", "--name=demo"]) == 1
    assert "not ended on workers [3]" in capsys.readouterr().err
    assert not [c for c in gcloud.called("compute tpus tpu-vm ssh") if " unlock " in c[-3]]


def test_down_checks_that_nothing_is_left(
    gcloud: Gcloud, tmp_path: pathlib.Path, slept: list[float], capsys: Any
) -> None:
    desk = start(gcloud, tmp_path)
    left = json.dumps([{"name": "projects/p/locations/z/nodes/demo"}, {"name": "other"}])
    gcloud.script({"match": "tpu-vm list", "out": left})
    assert run.main(["down", "--name=demo"]) == 1
    assert "error: NOT given back: TPU VM demo\n" in capsys.readouterr().err
    gcloud.script({"match": "tpu-vm list", "code": 1, "err": "ERROR: no network"})
    assert run.main(["down", "--name=demo"]) == 1
    assert "could not be listed: ERROR: no network" in capsys.readouterr().err
    gcloud.script({"match": "delete", "code": 1, "err": NOT_FOUND}, *ACTIVE)
    assert slept
    assert (desk.folder / "place.json").exists()
    assert run.main(["down", "--name=demo"]) == 0
    assert capsys.readouterr().out == "demo: nothing is left\n"
    assert not (desk.folder / "place.json").exists()
    assert run.main(["down", "--name=demo"]) == 2
    assert "no such machines; none are known in runs/tpu" in capsys.readouterr().err


def test_lost_spot_machines_are_asked_for_anew_and_the_same_run_goes_on(
    gcloud: Gcloud, tmp_path: pathlib.Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = start(gcloud, tmp_path, capacity="spot")
    monkeypatch.setattr(steps, "setup", lambda desk, cloud: restore(gcloud))
    steps.write(desk, "job", Job("run-7", ("python", "job.py", "end"), 1))

    def taken() -> None:
        """The machines go, with all that was on them."""
        shutil.rmtree(gcloud.folder / "demo")
        gcloud.script(
            {"match": "queued-resources describe", "out": queue("SUSPENDED"), "times": 1},
            {"match": "queued-resources describe", "code": 1, "err": NOT_FOUND, "times": 1},
            {"match": "queued-resources describe", "out": queue("PROVISIONING"), "times": 1},
            *ACTIVE,
        )

    taken()
    said: list[str] = []
    desk = Desk(desk.place, desk.folder, said.append)
    outcome = drive.watch(desk, Budget(), 30.0, lambda seconds: time.sleep(0.05))
    assert (outcome.done, outcome.left) == (True, ()), said
    logs = desk.folder / "logs" / "run-7-2"
    assert said.pop() == f"the logs are in {logs}"
    for i in range(4):
        assert "['end']" in (logs / f"worker-{i}.log").read_text()
    kinds = [line.split()[1].rstrip(":") for line in said]
    once = [kind for kind, _ in itertools.groupby(kinds)]
    assert once in (
        ["delete", "create", "wait", "prepare", "launch", "wait", "teardown"],
        ["delete", "create", "wait", "prepare", "launch", "teardown"],
    ), said
    assert len(gcloud.called("compute tpus queued-resources create")) == 1
    launched = [c[-3] for c in gcloud.called("compute tpus tpu-vm ssh") if " launch " in c[-3]]
    assert len(launched) == 1
    assert "--run=run-7 --attempt=2" in launched[0]


def restore(gcloud: Gcloud) -> dict[str, str]:
    """What `setup` leaves, without pip."""
    for home in (gcloud.folder / "demo").iterdir():
        (home / "tpu-run" / "demo" / "python").write_text(sys.executable + "\n")
    return {}


def test_watch_ends_where_the_machines_are_refused(
    gcloud: Gcloud, tmp_path: pathlib.Path, slept: list[float]
) -> None:
    desk = start(gcloud, tmp_path)
    steps.write(desk, "job", Job("run-7", ("python",), 1))
    gcloud.script({"match": "queued-resources create", "code": 1, "err": QUOTA})
    outcome = drive.watch(Desk(desk.place, desk.folder, lambda line: None), Budget(), 1.0)
    assert (outcome.done, outcome.left) == (False, ())
    assert "the machines were refused: ERROR" in outcome.reason
    assert "Limit: 0" in outcome.reason


def test_what_the_request_and_its_machines_say() -> None:
    queued = Desk(Place("demo", "queued", "v5e-16", capacity="spot"), pathlib.Path()).backend

    def seen(request: str, machine: str = "") -> Cloud:
        return queued.seen([Reply(0, request), Reply(0, machine)])

    assert seen(queue("FAILED", "no room")).why == "no room"
    assert seen(queue("SUSPENDED")).state == "suspended"
    assert seen(queue("ACTIVE"), node(4)).addresses[0] == "10.0.0.2"
    assert seen(queue("ACTIVE"), node(4, "PREEMPTED")).state == "suspended"
    assert seen(queue("ACTIVE"), node(3)).why == "demo has 3 workers, v5e-16 4"
    for text in ("", "[]", "{}", '{"state": "ACTIVE"}', queue("NEW_STATE")):
        assert seen(text).state == "unknown", text
    assert queued.seen([Reply(1, "", "ERROR: 500"), Reply(1)]).state == "unknown"
    assert queued.seen([Reply(1, "", NOT_FOUND), Reply(1)]).state == "absent"


def test_a_group_of_compute_engine() -> None:
    group = Managed(Place("demo", "compute", "v6e-16", 0, "us-east5-a", "my-project", "spot"))

    def row(i: int, status: str = "RUNNING", **more: Any) -> dict[str, Any]:
        return {"instance": f"zones/z/instances/demo-{i}", "instanceStatus": status, **more}

    def seen(rows: list[dict[str, Any]]) -> Cloud:
        return group.seen([Reply(0, json.dumps(rows))])

    up = seen([row(i, currentAction="NONE") for i in (2, 0, 3, 1)])
    assert (up.state, up.addresses) == ("active", ("demo-0", "demo-1", "demo-2", "demo-3"))
    ((argv, _),) = {(c.argv[:4], c.why) for c in group.everywhere(up, ["x"], "why")[2:3]}
    assert argv == ("gcloud", "compute", "ssh", "demo-2")
    assert seen([row(i) for i in range(3)]).why == "3 of 4 run"
    assert seen([row(0, "TERMINATED"), row(1)]).state == "suspended"
    assert seen([row(0, "", currentAction="DELETING")]).state == "deleting"
    errors = {"errors": {"errors": [{"code": "STOCKOUT", "message": "no room"}]}}
    assert seen([row(0, "", currentAction="CREATING", lastAttempt=errors)]).why == "no room"
    assert group.seen([Reply(1, "", "The resource 'demo' was not found")]).state == "absent"
    machines = Reply(0, json.dumps([{"name": "demo-x1y2"}]))
    assert group.left([Reply(0, "[]"), machines]) == ["machine demo-x1y2"]
    with pytest.raises(ValueError, match="no network"):
        group.left([Reply(1, "", "ERROR: no network"), Reply(0, "[]")])


def test_a_slice_whose_number_means_another_is_asked_for_by_its_shape():
    assert cloud.shape_asked(find("v4:4x4x16")) == ("--type=v4", "--topology=4x4x16")
    assert cloud.shape_asked(find("v4-512")) == ("--accelerator-type=v4-512",)
