"""Ask for a plan, in a process of its own that ends with this one."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tpu.topology import Slice

if TYPE_CHECKING:
    from tpu.plan import Config

stopping = threading.Event()
_running: set[subprocess.Popen[str]] = set()


def ask(
    cfg: "Config", options: dict[str, Any], slice_: Slice, mesh: dict[str, int]
) -> dict[str, Any]:
    """Compile in a process of its own, whose environment alone is made for it.

    Args:
      cfg, options: the step, and what its function is called with.
      slice_, mesh: for what.
    Returns: the facts, or {"refused": why} or {"failed": why}; with "wrong" an argument is wrong.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    request = {"step": cfg.step or f"{cfg.experiment}:plan_step", "target": slice_.compiler_name,
               "mesh": mesh, "options": options, "cache": cfg.cache}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tpu-plan-") as folder:
        asked, answer = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "result.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "tpu._plan_child", str(asked), str(answer)]
        with _started(command, environment) as process:
            try:
                _, errors = process.communicate(timeout=cfg.limit_s)
            except subprocess.TimeoutExpired:
                return {"failed": f"no answer within --limit_s={cfg.limit_s:g} seconds"}
        if not answer.exists():
            last = [line for line in errors.splitlines() if line.strip()]
            said = last[-1][:200] if last else "it said nothing"
            return {"failed": f"the compiler's process ended with {process.returncode}: {said}"}
        return json.loads(answer.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that does not outlive the block, nor a Ctrl-C in another thread."""
    if stopping.is_set():
        raise KeyboardInterrupt
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    _running.add(process)
    try:
        if stopping.is_set():
            raise KeyboardInterrupt
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        _running.discard(process)


def stop() -> None:
    """End what is being compiled; nothing more is started."""
    stopping.set()
    for process in list(_running):
        process.kill()
