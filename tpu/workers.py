"""What workers say: a row for each, one verdict on the job, and whether they agree."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpu.cloud import last
from tpu.verbs import Reply
from tpu.watch import DIVERGED, INFRASTRUCTURE, STOPPED, Seen

TERMINATED = 143  # SIGTERM before the job could listen: the machine was going down
CODES = {
    0: "done",
    1: "error",
    2: "wrong argument",
    126: "the command cannot be executed",
    127: "the command was not found",
    STOPPED: "stopped and saved",
    DIVERGED: "diverged",
    134: "aborted: a peer was gone, or a check of the runtime failed",
    137: "killed",
    139: "segmentation fault",
    TERMINATED: "terminated before it could save",
}
UNSYNCED = "worker.sh: No such file"  # what bash says where nothing was copied yet
QUICK_S = 60  # who stops sooner after a start has hardly made progress
TOGETHER_S = 2  # supervisors look every 0.5 s, later on a busy machine; clocks differ
SILENT_S = 30  # a supervisor writes every 2 s


@dataclasses.dataclass(frozen=True)
class Row:
    """One worker, as it describes itself.

    Attributes:
      state: "none", "running", "ended", "orphaned" (its supervisor was killed), "lost" (killed with
        its supervisor, or the machine started anew), or "unreachable".
      exit, ended, ran: the job's exit code; when, in seconds since 1970 by the worker's clock; and
        how many seconds it ran.
      beat: seconds since the supervisor's last sign.
      asked: whether somebody stopped it by hand.
      ready: whether it was set up.
    """

    worker: int
    state: str = "unreachable"
    exit: int | None = None
    ended: int | None = None
    ran: int | None = None
    beat: int | None = None
    pid: int | None = None
    attempt: int | None = None
    run: str = ""
    asked: bool = False
    ready: bool = False
    revision: str = ""
    why: str = ""


def answers(replies: Sequence[Reply]) -> dict[int, dict[str, Any]]:
    """Pick out the lines of JSON in which workers say their number; ssh prints others between.

    Example:
      >>> answers([Reply(0, 'Connecting...\\n{"worker": 1, "state": "none"}\\n')])
      {1: {'worker': 1, 'state': 'none'}}
    """
    found = {}
    for reply in replies:
        for line in reply.out.splitlines():
            if not line.startswith('{"worker": '):
                continue
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if isinstance(said, dict) and isinstance(said.get("worker"), int):
                found[said["worker"]] = said
    return found


def read_rows(count: int, replies: Sequence[Reply]) -> list[Row]:
    """Make a row for each worker; one that did not answer is unreachable, and says why.

    Example:
      >>> rows = read_rows(2, [Reply(255, '{"worker": 0, "state": "running"}', "ssh: timed out")])
      >>> [(row.state, row.why) for row in rows]
      [('running', ''), ('unreachable', 'ssh: timed out')]
    """
    said, whys = answers(replies), complaints(count, replies)
    return [_row(i, said.get(i), whys[i]) for i in range(count)]


def _row(worker: int, said: Mapping[str, Any] | None, why: str) -> Row:
    if said is not None:
        names = {field.name for field in dataclasses.fields(Row)}
        return Row(**{name: value for name, value in said.items() if name in names})
    if UNSYNCED in why:  # a new machine
        return Row(worker, "none", why="nothing was synced yet")
    return Row(worker, why=why)


def complaints(count: int, replies: Sequence[Reply]) -> dict[int, str]:
    """Find, for each worker, what was said about it where it did not answer."""
    texts = [reply.err for reply in replies if reply.err]
    failed = [reply for reply in replies if reply.code]
    whys = {}
    for i in range(count):
        own = re.search(rf"^worker {i}: (.*)$", "\n".join(texts), re.MULTILINE)
        alone = replies[i] if len(replies) == count else None
        if own:
            whys[i] = own[1]
        elif alone is not None:
            whys[i] = last(alone) if alone.code else "it did not answer"
        else:
            whys[i] = last(failed[0]) if failed else "it did not answer"
    return whys


def judge(rows: Sequence[Row]) -> Seen:
    """Say what became of a job from what became of its parts.

    Where several parts failed, the one that ended first is the cause: the others followed. Among
    those that ended within two seconds of it, a kill counts before an error, an error before an
    abort, which a lost peer brings about, and all before SIGTERM, by which the others are ended.

    Example:
      >>> judge([Row(0, "running"), Row(1, "ended", exit=137, ended=5)])
      Seen(state='infrastructure', why='worker 1 ended with 137 (killed)', survivors=1, ...)
    """
    asked = any(row.asked for row in rows)
    alive = sum(row.state in ("running", "orphaned") for row in rows)
    away = [row for row in rows if row.state == "unreachable"]
    if away:
        return Seen("silent", f"no answer from {_names(away)}: {away[0].why}", alive, asked)
    if all(row.state == "none" for row in rows):
        return Seen("none")
    newest = max((row.attempt or 0 for row in rows), default=0)
    for row in rows:
        if row.state == "orphaned":
            why = f"the supervisor of worker {row.worker} was killed"
            return Seen("infrastructure", why, alive, asked)
    bad = [row for row in rows if row.state == "ended" and row.exit not in (0, STOPPED)]
    if bad:
        soon = min(row.ended or 0 for row in bad) + TOGETHER_S
        near = [row for row in bad if (row.ended or 0) <= soon]
        first = min(near, key=lambda row: (_rank(row.exit), row.ended or 0, row.worker))
        why = f"worker {first.worker} ended with {code(first.exit)}"
        return Seen(_kind(first.exit), why, alive, asked)
    lost = [row for row in rows if row.state in ("lost", "none") or (row.attempt or 0) < newest]
    if lost:
        return Seen("infrastructure", f"{_names(lost)} lost the job", alive, asked)
    if alive:
        late = [row for row in rows if row.state == "running" and (row.beat or 0) > SILENT_S]
        note = f", no sign of {_names(late)} for {late[0].beat} s" if late else ""
        return Seen("running", f"{alive} of {len(rows)} run{note}", alive, asked)
    saved = [row for row in rows if row.exit == STOPPED]
    others = [row for row in rows if row.exit != STOPPED]
    if not saved:
        return Seen("done", "all ended with 0", 0, asked)
    why = "all saved and stopped"
    if others:
        why = f"{_names(saved)} saved and stopped, {_names(others)} ended with 0"
    quick = all(row.ran is not None and row.ran < QUICK_S for row in saved)
    return Seen("stopped", why, 0, asked, quick)


def code(number: int | None) -> str:
    """Write an exit code and what it means.

    Example:
      >>> code(75)
      '75 (stopped and saved)'
    """
    meaning = CODES.get(number if number is not None else -1)
    return f"{number} ({meaning})" if meaning else str(number)


def _kind(number: int | None) -> str:
    if number == DIVERGED:
        return "diverged"
    return "infrastructure" if number in (*INFRASTRUCTURE, TERMINATED) else "user"


def _rank(number: int | None) -> int:
    return {137: 0, 139: 0, 134: 2, TERMINATED: 3}.get(number or 0, 1)


def _names(rows: Iterable[Row]) -> str:
    numbers = [str(row.worker) for row in rows]
    return f"worker {numbers[0]}" if len(numbers) == 1 else f"workers {', '.join(numbers)}"


def disagreements(versions: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Name the workers whose versions are not those of most.

    Example:
      >>> disagreements({0: {"jax": "0.12"}, 1: {"jax": "0.11"}, 2: {"jax": "0.12"}})
      ['worker 1 has jax 0.11, the others 0.12']
    """
    lines = []
    for name in sorted({name for found in versions.values() for name in found}):
        each = {worker: found.get(name, "") for worker, found in versions.items()}
        most = max(sorted(set(each.values())), key=list(each.values()).count)
        lines += [
            f"worker {worker} has {name} {version or 'not at all'}, the others {most or 'not'}"
            for worker, version in sorted(each.items())
            if version != most
        ]
    return lines


def unpinned(versions: Mapping[str, str], constraints: str) -> list[str]:
    """Name what differs from a file of pins.

    Example:
      >>> pins = 'jax==1 ; python_version < "3.12"\\njax==2 ; python_version >= "3.12"'
      >>> unpinned({"python": "3.13.1", "jax": "1"}, pins)
      ['jax is 1, constraints.txt says 2']
    """
    minor = int(versions.get("python", "0.0").split(".")[1])
    lines = []
    for line in constraints.splitlines():
        found = re.fullmatch(
            r'([\w.-]+)==([\w.]+)(?: ; python_version (<|>=) "3\.(\d+)")?', line.strip()
        )
        if found is None:
            continue
        name, version, how, other = found.groups()
        if how and (minor < int(other)) != (how == "<"):
            continue
        name = name.lower().replace("_", "-")
        if name in versions and versions[name] != version:
            lines.append(f"{name} is {versions[name] or 'missing'}, constraints.txt says {version}")
    return lines
