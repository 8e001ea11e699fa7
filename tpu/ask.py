"""Ask another process, which may hang or crash, for the parts of the self-test."""

import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "tpu.selftest")
END_S = 10.0  # for a process to end by itself: one that is killed leaves libtpu's lock file


class Child:
    """A process that answers in lines of JSON, and is killed, not waited for, when it is late."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 closed in end
        try:
            # Its standard input is a pipe that closes when this process ends, however it does.
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
            )
        except OSError:
            self.errors.close()
            raise
        self.answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # cut off where it was killed
                    self.answers.put(json.loads(line))
        self.answers.put(None)

    def end(self, patience_s: float) -> str:
        """Wait a little, kill it, and say how it ended and what it said last."""
        how = ""
        try:
            how = _how(self.process.wait(patience_s))
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(END_S)
                how = "it was killed"
            except subprocess.TimeoutExpired:
                how = f"process {self.process.pid} cannot be killed, restart the machine"
        finally:
            self.process.kill()  # does nothing to one that has ended
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.reader.join(1)
            self.errors.seek(0)
            said = [line.strip() for line in self.errors.read()[-20_000:].splitlines()]
            self.errors.close()
        last = next((line for line in reversed(said) if line), "")
        return f"{how}; it said last: {last[:300]}" if last else how


def ask(
    parts: Sequence[str],
    sizes: Mapping[str, Any],
    limit_s: float,
    tell: Callable[[str], None],
    command: Sequence[str] = COMMAND,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run parts of the self-test in a child process; where one hangs or crashes, go on after it.

    Args:
      parts: names in `tpu.selftest.PARTS`, in their order.
      sizes: what else the parts are told.
      limit_s: seconds that the child may take for each thing it says it does.
      tell: gets a line when something new is done.
      command: of the child; the parts are added to it.
    Returns: an iterator of (part, answer): {"result"}, {"error"} or {"late"}. It ends early where
      the child does not get as far as its first part: the others would not either.
    Example:
      >>> list(ask(["devices"], {}, 5.0, print, ["true"]))[0][1]["error"]
      'the process ended while starting: exit code 0'
    """
    left = list(parts)
    while left:
        spec = {"parts": left, "limit_s": limit_s, **sizes}
        try:
            child = Child([*command, json.dumps(spec)])
        except OSError as error:  # no memory, no disk
            yield left[0], {"error": f"no process could be started: {error.strerror}"}
            return
        doing, problem, patience_s = "starting", "", 0.0
        try:
            while left and not problem:
                answer = child.answers.get(timeout=limit_s)
                if answer is None:
                    problem, patience_s = f"the process ended while {doing}", END_S
                elif "doing" in answer:
                    doing = answer["doing"]
                    tell(doing)
                elif "fatal" in answer:
                    yield left[0], {"error": answer["fatal"]}
                    return
                else:
                    left.remove(answer["part"])
                    yield answer["part"], answer
            patience_s = END_S
        except Empty:
            problem = f"no answer within {limit_s:g} s while {doing}"
        finally:
            ended = child.end(patience_s)
        if problem:
            kind = "error" if patience_s else "late"
            yield left[0], {kind: f"{problem}: {ended}"}
            if doing != left[0]:  # it had not begun its first part
                return
            left = left[1:]


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
