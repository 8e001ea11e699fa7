"""Tests of tpu/worker.sh: the supervisor of one worker, with jobs that are really killed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.one_worker import Worker, wait_for


@pytest.fixture
def worker(tmp_path: pathlib.Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    made.prepare()
    yield made
    made("stop", "--grace=0", "--kill")


def test_a_job_gets_its_place_and_its_end_is_kept(worker: Worker) -> None:
    assert worker.status()["state"] == "none"
    code = "import os, sys; print(sorted(os.environ.items()), os.getcwd()); sys.exit(75)"
    done = worker.launch(code, "--attempt=3")
    assert json.loads(done.stdout) == {"worker": 1, "state": "launched"}
    said = worker.ended()
    assert (said["state"], said["exit"], said["attempt"], said["run"]) == ("ended", 75, 3, "demo")
    log = worker("logs").stdout
    for text in (
        "('JAX_COORDINATOR_ADDRESS', '127.0.0.1:8476')",
        "('JAX_NUM_PROCESSES', '2')",
        "('JAX_PROCESS_ID', '1')",
        "('TPU_RUN_ID', 'demo')",
        f"'{worker.root / 'source'}'",
        "[1] --- ended with 75",
    ):
        assert text in log
    assert all(line.startswith("[1] ") for line in log.splitlines())


@pytest.mark.parametrize("name", ["SIGABRT", "SIGKILL", "SIGSEGV"])
def test_a_signal_is_an_exit_code(worker: Worker, name: str) -> None:
    worker.launch("import time; time.sleep(600)")
    os.kill(worker.pid(), getattr(signal, name))
    assert worker.ended()["exit"] == 128 + getattr(signal, name)


def test_one_job_at_a_time(worker: Worker) -> None:
    assert worker.launch("import time; time.sleep(600)").returncode == 0
    # No terminal and no ssh that ends takes them along.
    supervisor = worker.pid("supervisor")
    assert os.getsid(supervisor) == supervisor
    wait_for(lambda: os.getsid(worker.pid()) == worker.pid(), "a session of the job's own")
    for refused in (worker.launch("pass"), worker("unpack", "--archive=x"), worker("setup")):
        assert refused.returncode == 1
        assert "worker 1: a job runs here" in refused.stderr
    assert worker.status()["beat"] is not None
    assert json.loads(worker("stop").stdout)["exit"] == 143
    assert worker.launch("pass").returncode == 0


def test_stop_kills_only_what_was_launched_and_only_if_told(worker: Worker) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    worker.launch(f"{deaf}print(6 * 7, flush=True)\ntime.sleep(600)")
    wait_for(lambda: "[1] 42" in worker("logs").stdout, "its first line")
    assert json.loads(worker("stop", "--grace=0").stdout)["state"] == "running"
    killed = json.loads(worker("stop", "--grace=0", "--kill", "--asked").stdout)
    assert (killed["state"], killed["exit"], killed["asked"]) == ("ended", 137, True)
    # A number that was used again is not ours.
    (worker.job / "pid").write_text(f"{other.pid} 1\n")
    (worker.job / "supervisor").write_text(f"{other.pid} 1\n")
    worker("stop", "--grace=0", "--kill")
    assert other.poll() is None
    other.kill()
    other.wait()


def test_without_its_supervisor_a_job_is_no_longer_trusted(worker: Worker) -> None:
    worker.launch("import time; time.sleep(600)")
    os.kill(worker.pid("supervisor"), signal.SIGKILL)
    wait_for(lambda: worker.status()["state"] == "orphaned", "the orphan")
    assert "a job runs here" in worker.launch("pass").stderr
    os.kill(worker.pid(), signal.SIGKILL)
    wait_for(lambda: worker.status()["state"] == "lost", "the loss")


def test_sigterm_to_the_supervisor_reaches_the_job(worker: Worker) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(6 * 7, "
    worker.launch(f"{code}flush=True); time.sleep(600)")
    wait_for(lambda: "[1] 42" in worker("logs", "--lines=1").stdout, "its first line")
    os.kill(worker.pid("supervisor"), signal.SIGTERM)
    assert worker.ended()["exit"] == 75


def test_a_program_behind_a_wrapper_may_save(worker: Worker) -> None:
    saver = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(15, save)\nprint(6 * 7, flush=True)\ntime.sleep(600)"
    )
    (worker.root / "source" / "saver.py").write_text(saver)
    command = ["bash", "-c", "python saver.py; echo finished"]
    for stop in (lambda: worker("stop", "--kill"), lambda: os.kill(worker.pid("supervisor"), 15)):
        worker("launch", "--run=demo", "--count=2", "--coordinator=x:1", "--", *command)
        wait_for(lambda: "[1] 42" in worker("logs", "--lines=1").stdout, "its first line")
        stop()
        assert worker.ended()["exit"] == 128 + signal.SIGTERM  # what the wrapper makes of it
        (worker.root / "source" / "saved").unlink()


def test_of_two_launches_at_once_one_is_refused(worker: Worker) -> None:
    words = ["bash", str(worker.root / "worker.sh"), "launch", f"--root={worker.root}", "--index=1"]
    words += ["--run=demo", "--count=1", "--coordinator=x:1", "--", "sleep", "600"]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    said = [child.communicate() for child in both]
    assert sorted(child.returncode for child in both) == [0, 1], said
    assert "a job runs here" in "".join(errors for _, errors in said)


def test_an_exit_code_that_a_full_disk_lost_is_no_error_of_the_script(worker: Worker) -> None:
    worker.launch("pass")
    said = worker.ended()
    assert (said["exit"], 0 <= said["ran"] < 60) == (0, True)
    (worker.job / "exit").write_text("")
    said = worker.status()
    assert (said["state"], said["exit"], said["ended"], said["ran"]) == ("lost", None, None, None)


def test_what_the_job_had_started_ends_with_it(worker: Worker) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    worker.launch(code)
    assert worker.ended()["exit"] == 0
    child = int(worker("logs").stdout.splitlines()[-2].split()[1])

    def gone() -> bool:
        status = pathlib.Path(f"/proc/{child}/stat")
        return not status.exists() or ") Z " in status.read_text()

    wait_for(gone, "the end of its child")


def test_logs_are_cut_by_size_and_lose_nothing_recent(worker: Worker) -> None:
    worker.launch("for i in range(30000): print('line', i)", "--log-bytes=10000")
    worker.ended()
    logs = [worker.job / name for name in ("log.3", "log.2", "log.1", "log")]
    assert sorted(worker.job.glob("log*")) == sorted(logs)
    # A log may grow by one read of the pipe; it starts anew at the end of a line.
    assert all(path.stat().st_size <= 10000 + 65536 for path in logs)
    assert all(path.read_bytes().endswith(b"\n") for path in logs)
    assert len(worker("logs", "--lines=1000000").stdout.splitlines()) == sum(
        path.read_text().count("\n") for path in logs
    )
    lines = [line for path in logs for line in path.read_text().splitlines()]
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line")]
    assert numbers == list(range(numbers[0], 30000))


def test_what_is_missing_is_said(worker: Worker) -> None:
    assert worker("logs").stdout == "[1] no log yet\n"
    (worker.root / "python").unlink()
    assert "it is not set up; run: python -m tpu.run setup" in worker.launch("pass").stderr
    assert "unknown option --what" in worker("status", "--what").stderr
    assert "unknown verb 'dance'" in worker("dance").stderr
    shutil.rmtree(worker.root / "source")
    assert "no source is here; run: python -m tpu.run sync" in worker.launch("pass").stderr
    script = ["bash", str(worker.root / "worker.sh"), "status", f"--root={worker.root}"]
    env = {"PATH": os.environ["PATH"], "TPU_WORKER_ID": "2"}
    done = subprocess.run([*script, "--first=4"], env=env, capture_output=True, text=True)
    assert json.loads(done.stdout)["worker"] == 6
    done = subprocess.run(script, env=env | {"TPU_WORKER_ID": "x"}, capture_output=True, text=True)
    assert "its number must be one, got 'x'" in done.stderr


def test_setup_makes_an_environment_from_the_pins(worker: Worker, tmp_path: pathlib.Path) -> None:
    """With a stand-in for the interpreter: what it is asked, not what pip does."""
    asked, programs = tmp_path / "asked", tmp_path / "programs"
    programs.mkdir()
    fake = programs / "python3.13"
    fake.write_text(
        f'#!/bin/sh\necho "$*" >>{asked}\n'
        'if [ "$1" = -m ] && [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        'if [ "$1" = -I ]; then echo "{\\"worker\\": $4, \\"state\\": \\"ready\\"}"; fi\n'
    )
    fake.chmod(0o755)
    words = ["bash", str(worker.root / "worker.sh"), "setup", f"--root={worker.root}"]
    env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    (worker.root / "python").unlink()
    done = subprocess.run(
        [*words, "--index=1", "--extra=tpu"], env=env, capture_output=True, text=True
    )
    assert done.stdout == '{"worker": 1, "state": "ready"}\n', done.stderr
    lines = asked.read_text()
    assert f"-m venv {worker.root}/venv" in lines
    assert "-c constraints.txt -e .[tpu]" in lines
    assert (worker.root / "python").read_text() == f"{worker.root}/venv/bin/python\n"
