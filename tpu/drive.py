"""Watch a job: look, ask `next_action`, do it, look again, until it ends.

What was spent is kept in watch.json, so that watching can be stopped and started again.
"""

import contextlib
import dataclasses
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator

from tpu import execute, steps
from tpu.execute import Failed
from tpu.steps import Desk
from tpu.verbs import Job
from tpu.watch import ENDS, Action, Budget, Cloud, Seen, ending, next_action
from tpu.workers import judge

GRACE_S = 30  # the notice that spot machines get
LONGEST_S = 600.0  # between tries of what fails
ALL_LINES = 10**9
LOCKED = {
    "watch": "is being watched already, by another process",
    "work": "is being worked on by another command\n  do: wait until that ended, then again",
}


@dataclasses.dataclass
class Memory:
    """What watching remembers from one look to the next; times in seconds since 1970."""

    began: float
    retries: int = 0
    replaced: int = 0
    requested: float = 0.0
    idle_since: float = 0.0
    silent_since: float = 0.0
    quick_stops: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How watching ended: the reason, what is left to pay for, and whether the job is done."""

    reason: str
    done: bool
    left: tuple[str, ...] = ()


def watch(
    desk: Desk,
    limits: Budget,
    poll_s: float,
    sleep: Callable[[float], None] | None = None,
) -> Outcome:
    """Keep a job running until it ends, then give the machines back.

    Args:
      desk: the place and its folder.
      limits: a budget; what was spent is filled in here.
      poll_s: seconds between looks while there is nothing to do.
      sleep: waits; tests replace it.
    Returns: why it ended.
    Raises: Failed: nothing was synced or launched, or somebody else watches.
    """
    job = steps.read_job(desk)
    if job is None:
        raise Failed("nothing was launched yet\n  do: python -m tpu.run launch")
    steps.check_packed(desk)
    sleep, failures = sleep or execute.sleep, 0
    given_back = Outcome("the machines were given back: `down` ran meanwhile", False)
    with alone(desk, "watch"):
        memory, said, seen = _read(desk), "", Seen("running")
        while True:
            cloud, seen, budget = observe(desk, memory, limits, seen)
            if not _known(desk):
                return given_back
            action = next_action(cloud, seen, budget)
            line = f"{action.kind}: {action.why}"
            if line != said:
                desk.tell(f"{time.strftime('%H:%M:%S')} {line}")
                said = line
            if action.kind in ENDS:
                left = _teardown(desk, cloud, sleep) if action.kind == "teardown" else []
                return Outcome(action.why, seen.state == "done", tuple(left))
            try:
                with alone(desk, "work", wait=True):
                    if not _known(desk):  # or what was given back is made anew
                        return given_back
                    act(desk, action, memory, cloud, seen)
                failures = 0
            except Failed as error:
                if action.kind == "create":
                    left = steps.left(desk, 1)
                    return Outcome(f"the machines were refused: {error}", False, tuple(left))
                desk.tell(f"{action.kind} failed: {error}")
                memory.retries += action.kind in ("prepare", "launch")
                failures += 1
            steps.write(desk, "watch", dataclasses.asdict(memory))
            if failures:
                sleep(min(poll_s * 2.0**failures, max(poll_s, LONGEST_S)))
            elif action.kind in ("wait", "create", "delete"):
                sleep(poll_s)


def observe(desk: Desk, memory: Memory, limits: Budget, before: Seen) -> tuple[Cloud, Seen, Budget]:
    """See the machines and the job, and what was spent. Without machines the job is as before."""
    now = time.time()
    try:
        cloud = steps.look(desk)
        seen = before
        if cloud.state == "active":
            rows = steps.rows(desk, cloud)
            new = any(not row.ready for row in rows if row.state != "unreachable")
            cloud = dataclasses.replace(cloud, ready=not new)
            seen = judge(rows)
    except Failed as error:
        cloud, seen = Cloud("unknown", why=str(error)), before
    if cloud.state not in ("absent", "unknown"):
        memory.requested = 0.0
    cloud = dataclasses.replace(cloud, requested=memory.requested > 0)
    memory.silent_since = (memory.silent_since or now) if seen.state == "silent" else 0.0
    if seen.state == "stopped":
        memory.retries = 0

    def minutes(since: float) -> float:
        return (now - since) / 60 if since else 0.0

    budget = dataclasses.replace(
        limits,
        hours=minutes(memory.began) / 60,
        retries=memory.retries,
        quick_stops=memory.quick_stops,
        replaced=memory.replaced,
        silent_minutes=minutes(memory.silent_since),
        request_minutes=minutes(memory.requested),
    )
    memory.idle_since = (memory.idle_since or now) if ending(seen, budget) else 0.0
    return cloud, seen, dataclasses.replace(budget, idle_minutes=minutes(memory.idle_since))


def act(desk: Desk, action: Action, memory: Memory, cloud: Cloud, seen: Seen) -> None:
    """Do what was chosen.

    Raises: Failed with the tool's error.
    """
    if action.kind == "create":
        memory.requested = time.time()
        steps.create(desk)
    elif action.kind == "delete":
        save_logs(desk, cloud)
        wrong = steps.delete(desk)
        memory.retries, memory.silent_since = 0, 0.0
        memory.replaced += not (cloud.state == "suspended" and cloud.spot)
        if wrong:
            raise Failed("\n".join(wrong))
    elif action.kind == "prepare":
        steps.sync(desk, cloud)
        steps.setup(desk, cloud)
    elif action.kind == "stop":
        steps.stop(desk, cloud, grace_s=GRACE_S if seen.state == "running" else 5, kill=True)
    elif action.kind == "launch":
        memory.retries += seen.state == "infrastructure"
        memory.quick_stops = memory.quick_stops + 1 if seen.quick else 0
        job = steps.read_job(desk)
        assert job is not None  # there when watching began, and only `down` removes it
        steps.launch(desk, cloud, Job(job.run, job.argv, job.attempt + 1))


def save_logs(desk: Desk, cloud: Cloud) -> None:
    """Keep what the workers printed, before their machines go; what fails is told, and no more."""
    if cloud.state != "active":
        return
    lines: dict[str, list[str]] = {}
    try:
        job = steps.read_job(desk)
        assert job is not None  # there when watching began, and only `down` removes it
        folder = desk.folder / "logs" / f"{job.run}-{job.attempt}"
        reading = steps.logs_commands(desk, cloud, ALL_LINES, False)
        for reply in desk.run(reading, steps.SHORT_S):
            for worker, line in re.findall(r"^\[(\d+)\] (.*)$", reply.out, re.MULTILINE):
                if line != "no log yet":
                    lines.setdefault(worker, []).append(line)
        for worker, text in lines.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"worker-{worker}.log").write_text("\n".join(text) + "\n")
    except (ValueError, OSError) as error:
        desk.tell(f"the logs could not be saved: {error}")
        return
    if lines:
        desk.tell(f"the logs are in {folder}")


def _teardown(desk: Desk, cloud: Cloud, sleep: Callable[[float], None]) -> list[str]:
    found: list[str] = []
    save_logs(desk, cloud)
    for again in range(3):
        if again:
            sleep(60.0)
        try:
            with alone(desk, "work", wait=True):
                found = steps.down(desk)
        except Failed as error:
            found = [str(error)]
        if not found:
            break
    return found


def _known(desk: Desk) -> bool:
    return (desk.folder / "place.json").exists()


def _read(desk: Desk) -> Memory:
    path = desk.folder / "watch.json"
    try:
        return Memory(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Memory(time.time())
    except (ValueError, TypeError) as error:
        raise Failed(f"{path} cannot be read ({error}); remove it and watch again") from None


@contextlib.contextmanager
def alone(desk: Desk, name: str, wait: bool = False) -> Iterator[None]:
    """Hold a place's lock: "watch" for the time of watching, "work" for that of one command.

    Raises: Failed where another process holds it, unless this one waits.
    """
    # jax_attn.lock would import jax, which a verb does without.
    with open(desk.folder / f"{name}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Failed(f"{desk.place.name} {LOCKED[name]}") from None
        yield
