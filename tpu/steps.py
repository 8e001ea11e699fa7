"""What each verb does: its commands, as data first, and then their replies, checked."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from tpu import execute, local, ship, workers
from tpu.cloud import Queued, not_found
from tpu.compute import Managed
from tpu.execute import Failed
from tpu.local import Local
from tpu.verbs import PORT, Backend, Command, Job, Place, Reply, check, worker
from tpu.watch import Cloud
from tpu.workers import Row

SHORT_S, LONG_S = 180.0, 1800.0  # for a question; for what copies and installs
SCRIPT = pathlib.Path(__file__).with_name("worker.sh")
UNLISTED = "what is left could not be listed"


@dataclasses.dataclass(frozen=True)
class Desk:
    """One place, the folder where this computer keeps what it knows of it, and how to run."""

    place: Place
    folder: pathlib.Path
    tell: Callable[[str], None] = print
    run: execute.Run = execute.run

    @property
    def backend(self) -> Backend:
        """Where the machines come from."""
        if self.place.backend == "local":
            return Local(self.place, str(self.folder.resolve()))
        return Queued(self.place) if self.place.backend == "queued" else Managed(self.place)

    @property
    def outgoing(self) -> list[str]:
        """The files that are copied to each worker."""
        folder, name = self.folder / "outgoing", f"tpu-run-{self.place.name}"
        return [str(folder / f"{name}.tar.gz"), str(folder / f"{name}.sh")]


def write(desk: Desk, name: str, value: Place | Job | Mapping[str, object]) -> None:
    """Keep a value in the folder, replaced in one go."""
    plain = value if isinstance(value, Mapping) else dataclasses.asdict(value)
    desk.folder.mkdir(parents=True, exist_ok=True)
    new = desk.folder / f"{name}.json.new"
    new.write_text(json.dumps(plain, indent=1) + "\n")
    new.replace(desk.folder / f"{name}.json")


def read_place(state: pathlib.Path, name: str) -> Place:
    """Read what `up` kept.

    Raises: ValueError naming the places that are known.
    """
    path = state / name / "place.json"
    try:
        return Place(**json.loads(path.read_text()))
    except FileNotFoundError:
        there = sorted(p.parent.name for p in state.glob("*/place.json"))
        known = f"known here: {', '.join(there)}" if there else f"none are known in {state}"
        raise ValueError(f"--name={name}: no such machines; {known}; `up` makes them") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and run up again") from None


def read_job(desk: Desk) -> Job | None:
    """Read what `launch` kept, if anything was launched.

    Raises: ValueError naming the file that cannot be read.
    """
    path = desk.folder / "job.json"
    try:
        said = json.loads(path.read_text())
        job = Job(said["run"], tuple(said["argv"]), said["attempt"])
        if [type(part) for part in (job.run, job.attempt, *job.argv[:1])] != [str, int, str]:
            raise TypeError("run, argv or attempt is of another type")
        return job
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read ({why}); remove it and launch again") from None


def stand_in(place: Place) -> Cloud:
    """Machines as a dry run has them: nobody was asked for their addresses."""
    if place.backend == "local":
        return Cloud("active", addresses=("127.0.0.1",) * place.count)
    return Cloud("active", addresses=tuple(f"WORKER_{i}" for i in range(place.count)))


# The commands, pure.


def sync_commands(desk: Desk, cloud: Cloud) -> list[list[Command]]:
    """What copies the packed source, and what unpacks it."""
    name = os.path.basename(desk.outgoing[0])
    words = worker(desk.place, "unpack", {"archive": name})
    return [
        desk.backend.send(cloud, desk.outgoing),
        desk.backend.everywhere(cloud, words, "unpack the source"),
    ]


def setup_commands(desk: Desk, cloud: Cloud) -> list[Command]:
    """What installs packages; on this computer the interpreter that runs this is taken."""
    here = desk.place.backend == "local"
    options = {"python": sys.executable} if here else {"extra": "tpu"}
    words = worker(desk.place, "setup", options)
    return desk.backend.everywhere(cloud, words, "install, and say which versions are there")


def launch_commands(desk: Desk, cloud: Cloud, job: Job, port: int) -> list[Command]:
    """What starts the supervisor on every worker, never on one alone."""
    options = {
        "run": job.run,
        "attempt": job.attempt,
        "count": desk.place.count,
        "coordinator": f"{cloud.addresses[0]}:{port}",
    }
    # Several processes here cannot share an accelerator; the job's own `env` comes after and wins.
    before = ("env", "JAX_PLATFORMS=cpu") if desk.place.backend == "local" else ()
    words = worker(desk.place, "launch", options, (*before, *job.argv))
    return desk.backend.everywhere(cloud, words, "start the job")


def status_commands(desk: Desk, cloud: Cloud) -> list[Command]:
    """What asks every worker."""
    return desk.backend.everywhere(cloud, worker(desk.place, "status", {}), "ask")


def stop_commands(
    desk: Desk, cloud: Cloud, grace_s: int, kill: bool, asked: bool
) -> list[list[Command]]:
    """What ends the job on all workers; and then, on a TPU, what removes a lock nobody holds."""
    words = worker(desk.place, "stop", {"grace": grace_s, "kill": kill, "asked": asked})
    steps = [desk.backend.everywhere(cloud, words, "stop what was launched here")]
    if desk.place.backend != "local":
        unlock = worker(desk.place, "unlock", {})
        steps.append(desk.backend.everywhere(cloud, unlock, "remove a lock that nobody holds"))
    return steps


def logs_commands(desk: Desk, cloud: Cloud, lines: int, follow: bool) -> list[Command]:
    """What prints the logs."""
    words = worker(desk.place, "logs", {"lines": lines, "follow": follow})
    return desk.backend.everywhere(cloud, words, "read the log")


# What they do.


def look(desk: Desk) -> Cloud:
    """See the machines."""
    return desk.backend.seen(desk.run(desk.backend.look(), SHORT_S))


def active(desk: Desk) -> Cloud:
    """See the machines, which must be there.

    Raises: Failed saying what state they are in instead.
    """
    cloud = look(desk)
    if cloud.state != "active":
        why = f" ({cloud.why})" if cloud.why else ""
        advice = "run: python -m tpu.run up" if cloud.state == "absent" else "wait, or run: up"
        raise Failed(f"{desk.place.name}: the machines are {cloud.state}{why}\n  do: {advice}")
    return cloud


def ask(desk: Desk, commands: Sequence[Command], state: str, timeout_s: float) -> list[Reply]:
    """Run commands on all workers, each of which must answer with a state.

    Raises: Failed naming each worker that did not, and why.
    """
    replies = desk.run(commands, timeout_s)
    check_answers(desk, replies, state)
    return replies


def check_answers(desk: Desk, replies: Sequence[Reply], state: str) -> None:
    """Refuse replies in which a worker does not answer with a state.

    Raises: Failed naming each worker that did not, and why.
    """
    said = workers.answers(replies)
    whys = workers.complaints(desk.place.count, replies)
    missing = [i for i in range(desk.place.count) if said.get(i, {}).get("state") != state]
    if missing:
        if all(workers.UNSYNCED in whys[i] for i in missing):
            numbers = ", ".join(map(str, missing))
            raise Failed(f"nothing was synced to workers {numbers}\n  do: python -m tpu.run sync")
        lines = [f"worker {i}: {whys[i]}" for i in missing]
        failed = next((reply for reply in replies if reply.code), None)
        explained = execute.explain(failed) if failed else ""
        advice = explained.partition("\n")[2]
        raise Failed("\n".join([*lines, *([advice] if advice else [])]))


def create(desk: Desk) -> None:
    """Ask for the machines.

    Raises: Failed with the tool's error and what to do.
    """
    check(desk.place)
    write(desk, "place", desk.place)
    for reply in execute.in_turn(desk.backend.create(), LONG_S, desk.run):
        if reply.code:
            raise Failed(execute.explain(reply))


def pack(desk: Desk, tree: pathlib.Path) -> ship.Revision:
    """Pack a working tree and the worker's script; a machine made anew later gets the same."""
    archive, script = map(pathlib.Path, desk.outgoing)
    revision = ship.pack(tree, archive, desk.folder.parent)
    shutil.copyfile(SCRIPT, script)
    for name in revision.left_out:
        desk.tell(f"note: {name} is a submodule and was not shipped")
    return revision


def check_packed(desk: Desk) -> None:
    """Refuse what needs an archive before there is one."""
    if not pathlib.Path(desk.outgoing[0]).exists():
        raise Failed("nothing was synced yet\n  do: python -m tpu.run sync")


def sync(desk: Desk, cloud: Cloud) -> None:
    """Copy what was packed to every worker.

    Raises: Failed naming the worker.
    """
    check_packed(desk)
    copies, unpack = sync_commands(desk, cloud)
    for reply in desk.run(copies, LONG_S):
        if reply.code:
            raise Failed(execute.explain(reply))
    ask(desk, unpack, "unpacked", LONG_S)


def setup(desk: Desk, cloud: Cloud) -> dict[str, str]:
    """Install on every worker; return the versions on which all agree.

    Raises: Failed naming the workers that differ, or that differ from constraints.txt.
    """
    check_packed(desk)
    replies = ask(desk, setup_commands(desk, cloud), "ready", LONG_S)
    versions = {i: said["versions"] for i, said in workers.answers(replies).items()}
    if lines := workers.disagreements(versions):
        raise Failed("\n".join(lines) + "\n  do: run setup again; if it stays, down and up")
    found = versions[0]
    if not found.get("jax"):
        raise Failed(f"jax is not installed\n  do: install it for {sys.executable}")
    pins = ship.member(pathlib.Path(desk.outgoing[0]), "constraints.txt")
    lines = workers.unpinned(found, pins)
    if lines and desk.place.backend != "local":
        raise Failed("\n".join(lines) + "\n  do: sync a tree whose constraints.txt is this one")
    for line in lines:
        desk.tell(f"note: {line}")
    return found


def launch(desk: Desk, cloud: Cloud, job: Job, port: int = 0) -> None:
    """Start a job on every worker; where one does not start, none stays.

    The job is remembered only where it started; before that, it is the one before.

    Raises: Failed naming the worker that did not start, or on which a job runs already.
    """
    if not port:
        port = local.free_port() if desk.place.backend == "local" else PORT
    for row in rows(desk, cloud):
        if row.state in ("running", "orphaned"):
            advice = "stop it first: python -m tpu.run stop"
            raise Failed(f"worker {row.worker}: a job runs here\n  do: {advice}")
        if row.state == "unreachable":
            raise Failed(f"worker {row.worker}: {row.why}\n  do: python -m tpu.run status")
    before, replies = read_job(desk), list[Reply]()
    write(desk, "job", job)  # first: what runs must be known, also if this process ends now
    try:
        replies = desk.run(launch_commands(desk, cloud, job, port), SHORT_S)
        check_answers(desk, replies, "launched")
    except Failed as error:
        started = any(said.get("state") == "launched" for said in workers.answers(replies).values())
        if started or "a job runs here" not in str(error):  # or all that runs is somebody else's
            stop(desk, cloud, grace_s=5, kill=True)
        if before is None:
            (desk.folder / "job.json").unlink()
        else:
            write(desk, "job", before)
        raise


def rows(desk: Desk, cloud: Cloud) -> list[Row]:
    """Ask every worker."""
    return workers.read_rows(desk.place.count, desk.run(status_commands(desk, cloud), SHORT_S))


def stop(
    desk: Desk, cloud: Cloud, *, grace_s: int = 60, kill: bool = False, asked: bool = False
) -> list[Row]:
    """End the job on all workers, then remove a lock that nobody holds; say what became of it."""
    ending, *unlocking = stop_commands(desk, cloud, grace_s, kill, asked)
    after = workers.read_rows(desk.place.count, desk.run(ending, SHORT_S + grace_s))
    if all(row.state not in ("running", "orphaned", "unreachable") for row in after):
        for commands in unlocking:
            desk.run(commands, SHORT_S)
    return after


def delete(desk: Desk) -> list[str]:
    """Give the machines back; return what went wrong, which is nothing if they were not there.

    Raises: Failed if processes that were launched in local folders still run.
    """
    if desk.place.backend == "local" and look(desk).state != "absent":
        after = stop(desk, stand_in(desk.place), grace_s=5, kill=True)
        for row in after:
            if row.state in ("running", "orphaned"):
                raise Failed(f"process {row.pid} of worker {row.worker} does not end")
            if row.state == "unreachable":
                raise Failed(
                    f"worker {row.worker} does not say whether its job ended: {row.why}\n"
                    f"  do: end its processes, then remove {desk.folder / 'workers'}"
                )
    wrong = []
    for command in desk.backend.delete():  # one that is not there must not keep the next one
        (reply,) = desk.run([command], LONG_S)
        if reply.code and not not_found(reply.err):
            wrong.append(execute.explain(reply))
    return wrong


def left(desk: Desk, tries: int = 6) -> list[str]:
    """List what may still be paid for; what could not be listed counts as left."""
    found: list[str] = []
    for again in range(tries):
        if again:
            execute.sleep(10.0)
        replies = desk.run(desk.backend.remains(), SHORT_S)
        try:
            found = desk.backend.left(replies)
        except ValueError as error:
            found = [f"{UNLISTED}: {error}"]
        if not found:
            break
    return found


def down(desk: Desk) -> list[str]:
    """Give everything back and check that nothing is left; return what is, or may be."""
    wrong = delete(desk)
    found = left(desk)
    if found:
        return [*found, *wrong]
    for name in ("place", "job", "watch"):
        (desk.folder / f"{name}.json").unlink(missing_ok=True)
    return []
