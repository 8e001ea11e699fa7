"""One worker's folder and its worker.sh, from a test's side."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE_S = 240.0  # on a busy machine; no test waits for a time


def wait_for(found: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < until, f"it never came: {what}"
        time.sleep(0.05)


class Worker:
    """One worker's folder, and its script."""

    def __init__(self, home: pathlib.Path) -> None:
        self.root, self.job = home / "tpu-run" / "demo", home / "tpu-run" / "demo" / "job"

    def prepare(self) -> None:
        """What `sync` and `setup` leave."""
        (self.root / "source").mkdir(parents=True)
        shutil.copyfile(ROOT / "tpu" / "worker.sh", self.root / "worker.sh")
        (self.root / "python").write_text(f"{sys.executable}\n")

    def __call__(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        script = ["bash", str(self.root / "worker.sh"), verb, f"--root={self.root}", "--index=1"]
        return subprocess.run([*script, *words], capture_output=True, text=True, timeout=PATIENCE_S)

    def launch(self, code: str, *options: str) -> subprocess.CompletedProcess[str]:
        named = ("--run=demo", "--count=2", "--coordinator=127.0.0.1:8476", *options)
        return self("launch", *named, "--", "python", "-c", code)

    def status(self) -> dict[str, Any]:
        done = self("status")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ended(self) -> dict[str, Any]:
        wait_for(lambda: self.status()["state"] != "running", "its end")
        return self.status()

    def pid(self, name: str = "pid") -> int:
        return int((self.job / name).read_text().split()[0])

    def attempt(self) -> int:
        return int((self.job / "attempt").read_text())
