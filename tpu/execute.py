"""Run commands: several at once, again where a provider asks for patience, and explain failures."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tpu.cloud import last
from tpu.verbs import Command, Reply

Run = Callable[[Sequence[Command], float], list[Reply]]

AT_ONCE = 16
PAUSES_S = (2.0, 4.0, 8.0, 16.0, 32.0)  # between tries, where a provider says: too many requests

QUOTA = re.compile(r"quota (limit )?'?[\w-]+'? (has been )?(exceeded|exhausted)|limit: *0\b", re.I)
TOO_MANY = re.compile(
    r"(error|code|status)\W{1,3}429\b|rate_?limit_?exceeded|too many requests|"
    r"per (minute|second)\b",
    re.I,
)
# What a tool says, and what helps. The first that is found counts.
ADVICE = (
    (re.compile(r"worker\.sh: No such file"),
     "nothing was synced to this worker yet: python -m tpu.run sync"),
    (QUOTA, "ask for more of the quota that is named (console: IAM & Admin, Quotas), take a zone "
     "where you have some, or another --capacity; requests that failed or were suspended count "
     "until they are deleted: gcloud compute tpus queued-resources list --zone=..."),
    (TOO_MANY, "wait a minute and try again"),
    (re.compile(r"no more capacity|stockout|RESOURCE_POOL_EXHAUSTED|insufficient \w* ?capacity",
     re.I), "there is no room now: try again later, another zone, or --capacity=spot"),
    (re.compile(r"accelerator ?type .*(not (found|available|supported)|unknown|invalid)|"
     r"(not available|not supported|does not exist) in (zone|location)|"
     r"machine type .* does not exist|invalid location|location .* (not found|is not found)", re.I),
     "this zone has no such TPU; list what it has: gcloud compute tpus accelerator-types list "
     "--zone=ZONE, and where there are others: https://cloud.google.com/tpu/docs/regions-zones"),
    (re.compile(r"SERVICE_DISABLED|API has not been used|is not enabled|accessNotConfigured"),
     "turn the API on: gcloud services enable tpu.googleapis.com compute.googleapis.com"),
    (re.compile(r"PERMISSION_DENIED|\b403\b|does not have permission|Required '"),
     "your account needs roles/tpu.admin and roles/iam.serviceAccountUser on this project; see "
     "which one is used: gcloud auth list"),
    (re.compile(r"gcloud auth login|UNAUTHENTICATED|no active account|Reauthentication", re.I),
     "log in: gcloud auth login"),
    (re.compile(r"unrecognized arguments|Invalid choice", re.I),
     "this gcloud is too old for what is asked: gcloud components update (or your system's own "
     "packages)"),
    (re.compile(r"ALREADY_EXISTS|already exists"),
     "something has this name; look: python -m tpu.run status --name=NAME, or choose another"),
    (re.compile(r"Permission denied \(publickey|Connection (refused|timed out|closed)|"
     r"port 22: ", re.I),
     "ssh does not get there: try gcloud compute tpus tpu-vm ssh NAME --zone=ZONE by hand once; a "
     "firewall must let port 22 in, and a new machine needs a minute"),
)  # fmt: skip


class Failed(ValueError):
    """A command that failed; the message is its own error and what to do."""


def explain(reply: Reply) -> str:
    """Put what to do after what a tool said.

    Example:
      >>> print(explain(Reply(1, "", "ERROR: UNAUTHENTICATED: no valid credentials")))
      ERROR: UNAUTHENTICATED: no valid credentials
        do: log in: gcloud auth login
    """
    said = last(reply)
    for pattern, advice in ADVICE:
        if pattern.search(reply.err or reply.out):
            return f"{said}\n  do: {advice}"
    return said


def rate_limited(reply: Reply) -> bool:
    """Whether the same request may succeed a little later; a quota that is used up will not.

    Example:
      >>> rate_limited(Reply(1, "", "HttpError 429: Too many requests"))
      True
      >>> rate_limited(Reply(1, "", "429: Quota limit 'TPUV6E' has been exceeded. Limit: 0"))
      False
    """
    return reply.code != 0 and bool(TOO_MANY.search(reply.err)) and not QUOTA.search(reply.err)


def run(commands: Sequence[Command], timeout_s: float) -> list[Reply]:
    """Run commands at once and return what each said; none of them can wait for a keyboard.

    Args:
      commands: what to run.
      timeout_s: for each; one that takes longer is ended, and its code is 124.
    Raises: Failed where a program is not installed.
    Example:
      >>> run([Command(("echo", "hello"), "to say so")], 60.0)
      [Reply(code=0, out='hello\\n', err='')]
    """
    _check_installed(commands)
    replies = _at_once(commands, timeout_s)
    for pause in PAUSES_S:
        again = [i for i, reply in enumerate(replies) if rate_limited(reply)]
        if not again:
            break
        print(f"{last(replies[again[0]])}; trying again in {pause:g} s", file=sys.stderr)
        sleep(pause)
        for i, reply in zip(again, _at_once([commands[i] for i in again], timeout_s), strict=True):
            replies[i] = reply
    return replies


def in_turn(commands: Sequence[Command], timeout_s: float, run: Run) -> list[Reply]:
    """Run commands one after another, up to the first that fails.

    Example:
      >>> both = [Command(("false",), ""), Command(("true",), "")]
      >>> [reply.code for reply in in_turn(both, 60.0, run)]
      [1]
    """
    replies: list[Reply] = []
    for command in commands:
        replies += run([command], timeout_s)
        if replies[-1].code:
            break
    return replies


def sleep(seconds: float) -> None:
    """Wait; tests replace it."""
    time.sleep(seconds)


def stream(commands: Sequence[Command], write: Callable[[str], None]) -> int:
    """Run commands that print for as long as they like; write lines that a worker prefixed.

    The rest are ssh's own words; they are told where a command fails. Ctrl-C ends all commands.

    Returns: 0, or the code of one that failed by itself.
    Raises: Failed where a program is not installed; BrokenPipeError from `write`.
    Example:
      >>> stream([Command(("echo", "[0] step 1"), "")], print)
      [0] step 1
      0
    """
    _check_installed(commands)
    lock, running, readers = threading.Lock(), [], list[threading.Thread]()
    words: dict[int, str] = {}
    unread = threading.Event()  # nobody reads what is written: | head

    def read(child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        with child.stdout as lines:
            for line in lines:
                with lock:
                    if not re.match(r"\[\d+\] ", line):
                        words[child.pid] = words.get(child.pid, "")[-2000:] + line
                        continue
                    try:
                        write(line.rstrip("\n"))
                    except BrokenPipeError:
                        unread.set()
                        return

    try:
        for command in commands:
            child = _start(command, subprocess.STDOUT)
            running.append(child)
            readers.append(threading.Thread(target=read, args=(child,), daemon=True))
            readers[-1].start()
        for reader in readers:
            while reader.is_alive() and not unread.is_set():
                reader.join(0.2)
        if unread.is_set():
            raise BrokenPipeError
        for child in running:
            if child.wait():
                said = Reply(child.returncode, "", words.get(child.pid, ""))
                write(f"error: {explain(said)}")
        return max((abs(child.returncode) for child in running), default=0)
    except KeyboardInterrupt:
        return 0
    finally:
        for child in running:
            _end(child)
        for reader in readers:
            reader.join(5.0)


def _check_installed(commands: Sequence[Command]) -> None:
    for program in {command.argv[0] for command in commands}:
        if shutil.which(program) is None:
            advice = (
                "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then: "
                "gcloud auth login"
            )
            what = advice if program == "gcloud" else f"install {program}"
            raise Failed(f"{program} is not on PATH\n  do: {what}")


def _at_once(commands: Sequence[Command], timeout_s: float) -> list[Reply]:
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(pool.map(lambda command: _once(command, timeout_s, running), commands))
        except BaseException:  # Ctrl-C: nothing that was started stays, and nothing is waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for child in running:
                _end(child)
            raise


def _once(command: Command, timeout_s: float, running: list[subprocess.Popen[str]]) -> Reply:
    child = _start(command, subprocess.PIPE)
    running.append(child)
    try:
        out, err = child.communicate(timeout=timeout_s)
        return Reply(child.returncode, out, err)
    except subprocess.TimeoutExpired:
        _end(child)
        late = f"{command.argv[0]} did not answer within {timeout_s:g} s\n"
        out, err = child.communicate(timeout=5.0)  # what the others said meanwhile
        return Reply(124, out, err + late)
    finally:
        _end(child)


def _start(command: Command, errors: int) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command.argv,
            cwd=command.cwd or None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours; what they start ends with them
        )
    except OSError as error:
        raise Failed(f"{command.why}: {error.filename}: {error.strerror}") from None


def _end(child: subprocess.Popen[str]) -> None:
    """End a command that still runs, with all that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
