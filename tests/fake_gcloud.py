"""A stand-in for `gcloud`, put on PATH: it writes down what it is asked and says what it is told.

In its folder, named by FAKE_GCLOUD:
  calls.jsonl   each argument list, as it came
  script.json   replies: {"match": "words in the arguments", "code", "out", "err", "times"}; the
                first that matches and has times left answers; without times it always does
  hosts         how many workers a TPU VM has
  NODE/0, ...   folders in which `tpu-vm ssh` and `scp` do what they are asked, one a worker
  dead          numbers of workers that ssh does not reach
"""

import fcntl
import json
import os
import pathlib
import shlex
import stat
import subprocess
import sys
from typing import Any

FOLDER = "FAKE_GCLOUD"


class Gcloud:
    """The stand-in, from a test's side."""

    def __init__(self, folder: pathlib.Path, hosts: int = 4) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "hosts").write_text(str(hosts))
        self.script()
        program = folder / "bin" / "gcloud"
        words = shlex.join([sys.executable, "-I", "-S", str(pathlib.Path(__file__).resolve())])
        program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def script(self, *replies: dict[str, Any]) -> None:
        """Replace the replies."""
        (self.folder / "script.json").write_text(json.dumps(replies))

    def dead(self, *numbers: int) -> None:
        """Let ssh not reach these workers."""
        (self.folder / "dead").write_text(" ".join(map(str, numbers)))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def called(self, words: str) -> list[list[str]]:
        """The calls whose arguments begin with words."""
        return [call for call in self.calls if " ".join(call).startswith(words)]


def queue(state: str, message: str = "") -> str:
    """What `queued-resources describe` prints."""
    found: dict[str, Any] = {"state": state}
    if message:
        found["failedData"] = {"error": {"code": 8, "message": message}}
    return json.dumps({"name": "projects/p/locations/z/queuedResources/demo", "state": found})


def node(hosts: int, state: str = "READY") -> str:
    """What `tpu-vm describe` prints."""
    ends = [{"ipAddress": f"10.0.0.{i + 2}", "port": 8470} for i in range(hosts)]
    return json.dumps({"name": "demo", "state": state, "networkEndpoints": ends})


NOT_FOUND = "ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource 'demo' was not found"
ACTIVE = (
    {"match": "queued-resources describe", "out": queue("ACTIVE")},
    {"match": "tpu-vm describe", "out": node(4)},
)


def answer(folder: pathlib.Path, arguments: list[str]) -> dict[str, Any] | None:
    """Take the next reply from the script."""
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        path = folder / "script.json"
        replies = json.loads(path.read_text())
        for reply in replies:
            if reply["match"] in " ".join(arguments) and reply.get("times", 1) > 0:
                if "times" in reply:
                    reply["times"] -= 1
                    path.write_text(json.dumps(replies))
                return reply
    return None


def each(folder: pathlib.Path, name: str) -> list[tuple[int, pathlib.Path]]:
    """The folders of a node's workers, made where they are not there."""
    count = int((folder / "hosts").read_text())
    homes = [(i, folder / name / str(i)) for i in range(count)]
    for _, home in homes:
        home.mkdir(parents=True, exist_ok=True)
    return homes


def ssh(folder: pathlib.Path, name: str, words: list[str]) -> int:
    """Do on each worker what --command says, as sshd does: by a shell, at home."""
    (command,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    dead = folder / "dead"
    away = set(map(int, dead.read_text().split())) if dead.exists() else set()
    children, worst = [], 0
    for i, home in each(folder, name):
        if i in away:
            print(f"ssh: connect to host 10.0.0.{i + 2} port 22: timed out", file=sys.stderr)
            worst = 255
            continue
        env = os.environ | {"HOME": str(home), "TPU_WORKER_ID": str(i)}
        children.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=env))
    for child in children:
        worst = worst or child.wait()
    return worst


def scp(folder: pathlib.Path, words: list[str]) -> int:
    """Copy files to the home of each worker."""
    paths = [word for word in words if not word.startswith("--")]
    *files, target = paths
    for _, home in each(folder, target.rstrip(":")):
        subprocess.run(["cp", *files, str(home)], check=True)
    return 0


def main(arguments: list[str]) -> int:
    folder = pathlib.Path(os.environ[FOLDER])
    reply = answer(folder, arguments)
    if reply is not None:
        sys.stdout.write(reply.get("out", ""))
        sys.stderr.write(reply.get("err", ""))
        return reply.get("code", 0)
    if arguments[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:
        return ssh(folder, arguments[4], arguments[5:])
    if arguments[:4] == ["compute", "tpus", "tpu-vm", "scp"]:
        return scp(folder, arguments[4:])
    if "list" in arguments:
        print("[]")
        return 0
    if "describe" in arguments:
        print(NOT_FOUND, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
