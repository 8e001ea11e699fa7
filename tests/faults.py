"""Break training jobs for real, and count what survived: python -m tests.faults (or: make faults)

Each function breaks `tests.fault_job` in one way `tries` times, and returns what was lost: a line
for every promise that was not kept. `faults_test.py` runs the same with few tries.
"""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import rich.box
import rich.console
import rich.table

from jax_attn.train import manifest
from jax_attn.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0


def start(out: pathlib.Path, options: dict[str, Any], devices: int = 4) -> subprocess.Popen[str]:
    """Start the job; its output is piped, errors beside it in OUT.err."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.fault_job", f"--out={out}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    rank = options.get("rank", 0)
    with open(f"{out}.err{rank or ''}", "a") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a job; return its exit code and the digest it printed."""
    try:
        output = job.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        job.kill()
        return -1, "it hung"
    found = re.search(r"digest (\w+)", output)
    return job.returncode, found[1] if found else ""


def errors(out: pathlib.Path, rank: int = 0) -> str:
    return pathlib.Path(f"{out}.err{rank or ''}").read_text()


def rows(out: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wait_for(found: Callable[[], bool]) -> None:
    """Wait until something is seen, at most as long as is patient."""
    until = time.monotonic() + PATIENCE_S
    while not found() and time.monotonic() < until:
        time.sleep(0.01)


def stepped(out: pathlib.Path, least: int = 1) -> Callable[[], bool]:
    """Whether the job has written rows of so many steps since now."""
    path = out / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0

    def look() -> bool:
        if not path.exists():
            return False
        with open(path, "rb") as file:
            file.seek(before)
            return file.read().count(b'"loss"') >= least

    return look


@functools.cache
def whole(steps: int) -> str:
    """Return the digest of a job of so many steps that nothing befalls."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"steps": steps, "save_every": 10**6}
        return finish(start(pathlib.Path(folder, "whole"), options))[1]


def kill(folder: pathlib.Path, tries: int) -> list[str]:
    """kill -9 at a random instant, again and again, then let it end"""
    # A hundred steps a second at most, killed within one: it never comes to its end.
    steps_in_all = 100 * (tries + 2)
    options = {"steps": steps_in_all, "save_every": 4, "sleep_s": 0.01}
    lost, out, random_ = [], folder / "killed", random.Random(0)
    for _ in range(tries):
        job = start(out, options)
        wait_for(stepped(out))
        time.sleep(random_.random())
        job.send_signal(signal.SIGKILL)
        if finish(job)[0] != -signal.SIGKILL:
            lost.append("the job had ended before it was killed")
        checkpoints = Checkpoints(out / "checkpoints")
        last = max((row["step"] for row in rows(out) if "loss" in row), default=0)
        steps = checkpoints.steps()
        for step in steps:
            lost += [f"step {step}: {line}" for line in manifest.damage(checkpoints.at(step))]
        # Saves are made in the background, one at a time: each is at most a few behind.
        if last > 60 and (not steps or steps[-1] < last - 150):
            lost.append(f"killed after step {last}, but the last save is {steps[-1:]}")
    if finish(start(out, options)) != (0, whole(steps_in_all)):
        lost.append("the state at the end is not that of a job that was never killed")
    return lost


def asked(signals: tuple[int, ...], when: str) -> Callable[[pathlib.Path, int], list[str]]:
    """A signal while the job trains, evaluates or compiles; then start it again"""

    def fault(folder: pathlib.Path, tries: int) -> list[str]:
        options = {"steps": 300, "save_every": 1000, "sleep_s": 0.004}
        more = {
            "training": {},
            "evaluating": {"eval_every": 150, "eval_s": 1.0},
            "compiling": {"compile_s": 2.0},
        }[when]
        lost, random_, expected = [], random.Random(1), whole(300)
        for i in range(tries):
            out = folder / f"{when}{signals[0]}-{i}"
            job = start(out, options | more)
            assert job.stdout is not None
            if when == "evaluating":
                while "evaluating" not in job.stdout.readline():
                    pass
            elif when == "compiling":
                while "compiling" not in job.stdout.readline():
                    pass
            else:
                wait_for(stepped(out))
                time.sleep(0.5 * random_.random())
            for number in signals:
                job.send_signal(number)
            code, _ = finish(job)
            steps = Checkpoints(out / "checkpoints").steps()
            if code != 75:
                lost.append(f"exit code {code}, not 75: {errors(out)[-300:]}")
            if len(steps) != 1:
                lost.append(f"saved at {steps}, not once")
            if finish(start(out, options | more)) != (0, expected):
                lost.append("it did not go on to the state of a job that was never stopped")
        return lost

    fault.__doc__ = f"{signal.Signals(signals[0]).name} while {when}: save once, exit 75, go on"
    return fault


def twice(folder: pathlib.Path, tries: int) -> list[str]:
    """a second Ctrl-C stops at once"""
    lost = []
    for i in range(tries):
        out = folder / f"twice-{i}"
        job = start(out, {"steps": 1000, "sleep_s": 0.004, "eval_every": 1000, "eval_s": 60.0})
        assert job.stdout is not None
        while "evaluating" not in job.stdout.readline():
            pass
        job.send_signal(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        job.send_signal(signal.SIGINT)
        code, _ = finish(job)
        if code != -signal.SIGINT or time.monotonic() - began > 5:
            lost.append(f"exit code {code} after {time.monotonic() - began:.1f} s")
    return lost


def disk(name: str, text: str) -> Callable[[pathlib.Path, int], list[str]]:
    def fault(folder: pathlib.Path, tries: int) -> list[str]:
        options = {"steps": 120, "sleep_s": 0.02}
        lost, expected = [], whole(120)
        for i in range(tries):
            out = folder / f"{name}-{i}"
            begin = 40 + 7 * i
            job = start(out, options | {f"{name}_from": begin, f"{name}_to": begin + 30})
            if finish(job) != (0, expected):
                lost.append(f"training did not go on: {errors(out)[-300:]}")
            if not re.search(r"warning: checkpoint \d+ was NOT saved", errors(out)):
                lost.append("nothing was said")
            checkpoints = Checkpoints(out / "checkpoints")
            if checkpoints.steps()[-1:] != [120]:
                lost.append(f"the last save is {checkpoints.steps()[-1:]}")
            for step in checkpoints.steps():
                lost += [f"step {step}: {line}" for line in manifest.damage(checkpoints.at(step))]
            if [row["step"] for row in rows(out) if "loss" in row] != list(range(120)):
                lost.append("rows of metrics are missing")
        return lost

    fault.__doc__ = text
    return fault


def damage(folder: pathlib.Path, tries: int) -> list[str]:
    """a bit flipped, a file cut, removed or swapped: set aside, the step before restored"""
    options: dict[str, Any] = {"steps": 40, "save_every": 10}
    lost, random_ = [], random.Random(2)
    expected = whole(50)
    finish(start(folder / "sound", options))
    for i in range(tries):
        out = shutil.copytree(folder / "sound", folder / f"damage-{i}")
        newest = Checkpoints(out / "checkpoints").at(40)
        files = sorted(p for p in pathlib.Path(newest, "state").rglob("*") if p.is_file())
        files = [path for path in files if path.stat().st_size]
        victim, other = random_.sample(files, 2)
        content = victim.read_bytes()
        how = ("bit flip", "cut", "removed", "swapped")[i % 4]
        if how == "bit flip":
            at = random_.randrange(len(content))
            victim.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        elif how == "cut":
            victim.write_bytes(content[: len(content) // 2])
        elif how == "removed":
            victim.unlink()
        elif content != other.read_bytes():
            victim.write_bytes(other.read_bytes())
            other.write_bytes(content)
        verified = subprocess.run(
            [sys.executable, "-m", "jax_attn.train.verify", str(out)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if verified.returncode != 1 or "step 40" not in verified.stdout:
            lost.append(f"{how} of {victim.name}: verify says {verified.stdout}")
        if finish(start(out, options | {"steps": 50})) != (0, expected):
            lost.append(f"{how} of {victim.name}: it did not go on from step 30")
        if "checkpoint 40 is damaged" not in errors(out):
            lost.append(f"{how} of {victim.name}: nothing was said")
        if not newest.parent.joinpath("00000040.damaged").exists():
            lost.append(f"{how} of {victim.name}: the damaged step was not kept aside")
    return lost


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start_two(out: pathlib.Path, options: dict[str, Any]) -> list[subprocess.Popen[str]]:
    shared = options | {"count": 2, "port": free_port()}
    return [start(out, shared | {"rank": rank}, devices=2) for rank in range(2)]


def whole_of_two(folder: pathlib.Path, options: dict[str, Any]) -> str:
    """Return the digest of a job of two processes that nothing befalls."""
    first, second = start_two(folder / "whole-two", options)
    digest = finish(first)[1]
    finish(second)
    return digest


def one_of_two(folder: pathlib.Path, tries: int) -> list[str]:
    """SIGTERM to one of two processes: one save, both exit 75; both go on, to the bit"""
    options = {"steps": 300, "save_every": 1000, "sleep_s": 0.01}
    lost, expected = [], whole_of_two(folder, options)
    for i in range(tries):
        out = folder / f"two-{i}"
        jobs = start_two(out, options)
        wait_for(stepped(out))
        jobs[i % 2].send_signal(signal.SIGTERM)
        codes = [finish(job)[0] for job in jobs]
        steps = Checkpoints(out / "checkpoints").steps()
        if codes != [75, 75] or len(steps) != 1 or steps == [300]:
            lost.append(f"exit codes {codes}, saved at {steps}: {errors(out, i % 2)[-300:]}")
        ends = [finish(job) for job in start_two(out, options)]
        if ends != [(0, expected), (0, "")]:
            lost.append(f"they did not reach the state of two that were never stopped: {ends}")
        # Sums over processes round otherwise than sums over the devices of one: only what was
        # saved can be compared to the bit, not what would be trained after it.
        if finish(start(out, options)) != (0, expected):
            lost.append("one process with as many devices reads another state")
    return lost


def one_of_two_killed(folder: pathlib.Path, tries: int) -> list[str]:
    """kill -9 of one of two processes: the other does not hang; started again, both go on"""
    options = {"steps": 150, "save_every": 10, "sleep_s": 0.02}
    lost, expected = [], whole_of_two(folder, options)
    for i in range(tries):
        out = folder / f"killed-{i}"
        jobs = start_two(out, options)
        wait_for(stepped(out, 30))
        jobs[i % 2].kill()
        codes = [finish(job)[0] for job in jobs]
        if codes[1 - i % 2] in (0, -1):
            lost.append(f"exit codes {codes}")
        jobs = start_two(out, options)
        ends = [finish(job) for job in jobs]
        if ends[0] != (0, expected) or ends[1][0] != 0:
            lost.append(f"started again: {ends}, {errors(out)[-300:]}")
    return lost


def gone_for_two(folder: pathlib.Path, tries: int) -> list[str]:
    """a disk that two processes share is gone: both skip the save, and go on"""
    lost = []
    for i in range(tries):
        out = folder / f"gone-for-two-{i}"
        # Slow enough that no save is under way when the disk goes.
        gone = {"gone_from": 18 + i, "gone_to": 25}
        options = {"steps": 30, "save_every": 10, "sleep_s": 0.1, **gone}
        ends = [finish(job) for job in start_two(out, options)]
        if [code for code, _ in ends] != [0, 0]:
            lost.append(f"they did not go on: {ends}, {errors(out)[-300:]}")
        if "checkpoint 20 was NOT saved" not in errors(out):
            lost.append("nothing was said")
        if Checkpoints(out / "checkpoints").steps() != [10, 30]:
            lost.append(f"saved at {Checkpoints(out / 'checkpoints').steps()}")
    return lost


def stalled(folder: pathlib.Path, tries: int) -> list[str]:
    """a process that is stuck is named, with the stacks of its threads"""
    lost = []
    for i in range(tries):
        out = folder / f"stalled-{i}"
        jobs = start_two(out, {"stuck_at": 20, "stuck_rank": 1, "stall_s": 2.0})
        said = r"process 1 of 2 has made no step for \d+ s.* in 'data'[\s\S]*fault_job.py"

        def seen(out: pathlib.Path = out, said: str = said) -> bool:
            return re.search(said, errors(out, 1)) is not None

        wait_for(seen)
        for job in jobs:
            job.kill()
        for job in jobs:
            finish(job)
        if not seen():
            lost.append(f"said: {errors(out, 1)[-300:]}")
    return lost


TERM, INT = signal.SIGTERM, signal.SIGINT
FAULTS: list[tuple[Callable[[pathlib.Path, int], list[str]], int, int]] = [
    # What it is, how often in full, how often in a quick test.
    (kill, 20, 2),
    (asked((TERM,), "training"), 10, 1),
    (asked((TERM,), "evaluating"), 5, 1),
    (asked((TERM,), "compiling"), 5, 1),
    (asked((INT,), "training"), 10, 1),
    (twice, 5, 1),
    (disk("full", "a full disk: training goes on, loudly; what was saved stays"), 5, 1),
    (disk("gone", "a disk that cannot be written: training goes on, loudly"), 5, 1),
    (damage, 20, 4),
    (one_of_two, 10, 1),
    (one_of_two_killed, 6, 1),
    (gone_for_two, 3, 1),
    (stalled, 3, 1),
]


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    console = rich.console.Console()
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("fault", "tries", "survived", "lost", "seconds"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    failed = []
    for fault, full, few in FAULTS:
        tries, text = few if quick else full, (fault.__doc__ or "").strip()
        with console.status(f"{text} ..."), tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            lost = fault(pathlib.Path(folder), tries)
            seconds = time.monotonic() - began
        bad = min(len(lost), tries)
        table.add_row(text, str(tries), str(tries - bad), str(bad), f"{seconds:.0f}")
        failed += lost
    console.print(table)
    for line in failed:
        console.print(f"lost: {line}", markup=False, highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
