"""Rent machines, run a job on all of them, watch it, and give them back.

python -m tpu.run VERB --name=NAME [--option=value ...] [-- COMMAND ...]

  up       ask for machines and wait for them
             --target=v5e-16 --zone=ZONE --project=PROJECT [--capacity=spot|reserved]
             or --backend=local --workers=2: folders here as workers, no cloud
  sync     ship this git tree, uncommitted changes and all, to every worker
  setup    install from constraints.txt; check that every worker has the same versions
  launch   start COMMAND on every worker, under a supervisor that outlives this terminal
  status   a row for each worker
  logs     the logs of all workers; -f follows until Ctrl-C
  stop     SIGTERM to the job on all workers; --kill after --grace seconds
  watch    keep it running: ask for lost spot machines anew, start the same run again, and give
           the machines back when it ends (after --idle-teardown=10 minutes) or after
           --max-hours=24
  down     give everything back and check that nothing is left

--dry-run prints a verb's commands and runs none; for machines that are not up, give it the options
of up too. VERB --help explains its options.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from tpu import drive, execute, steps
from tpu.execute import Failed
from tpu.steps import Desk
from tpu.verbs import Command, Job, check_job, check_name, written
from tpu.watch import Budget
from tpu.workers import Row, judge

NAMES = ("up", "sync", "setup", "launch", "status", "logs", "stop", "watch", "down")
ONE_AT_A_TIME = ("sync", "setup", "launch", "stop", "down")
FAILURES = ("infrastructure", "user", "diverged")


def show(groups: Sequence[Sequence[Command]]) -> int:
    """Print commands instead of running them."""
    print("\n".join(written(group) for group in groups if group))
    return 0


def up(desk: Desk, options: Any) -> int:
    backend = desk.backend
    if options.dry_run:
        return show([backend.create(), backend.look()])
    cloud, said, absent_s = steps.look(desk), "", 0.0
    if cloud.state == "unknown":
        raise Failed(f"the state of {options.name} cannot be seen: {cloud.why}")
    if cloud.state in ("suspended", "failed"):
        raise Failed(f"{options.name} is {cloud.state} ({cloud.why})\n  do: down, then up again")
    if cloud.state == "absent":
        steps.create(desk)
        cloud = steps.look(desk)
    while options.wait and cloud.state != "active":
        if cloud.state in ("suspended", "failed"):
            raise Failed(f"{options.name} is {cloud.state} ({cloud.why})\n  do: down, then up")
        if cloud.state == "absent" and absent_s >= 60 * Budget().max_request_minutes:
            raise Failed(
                f"{options.name}: the request does not show after {absent_s / 60:.0f} minutes\n"
                "  do: down, which checks that nothing is left, then up"
            )
        line = f"{options.name}: {cloud.state} {cloud.why}".rstrip()
        if line != said:
            print(said := line, flush=True)
        execute.sleep(options.poll_s)
        absent_s = absent_s + options.poll_s if cloud.state == "absent" else 0.0
        cloud = steps.look(desk)
    print(f"{options.name}: {cloud.state}, {desk.place.count} workers")
    return 0


def sync(desk: Desk, options: Any) -> int:
    if options.dry_run:
        return show(steps.sync_commands(desk, steps.stand_in(desk.place)))
    cloud = steps.active(desk)
    with busy("copying to every worker"):
        revision = steps.pack(desk, pathlib.Path.cwd())
        steps.sync(desk, cloud)
    print(f"{desk.place.count} workers have {revision}")
    return 0


def setup(desk: Desk, options: Any) -> int:
    if options.dry_run:
        return show([steps.setup_commands(desk, steps.stand_in(desk.place))])
    with busy("installing on every worker"):
        versions = steps.setup(desk, steps.active(desk))
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    print(f"{desk.place.count} workers have {found}")
    return 0


def launch(desk: Desk, options: Any, argv: Sequence[str]) -> int:
    before = steps.read_job(desk)
    run = options.run or desk.place.name
    attempt = before.attempt + 1 if before is not None and before.run == run else 1
    job = Job(run, tuple(argv), attempt)
    check_job(desk.place, job)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    if options.dry_run:
        cloud = steps.stand_in(desk.place)
        starts = steps.launch_commands(desk, cloud, job, options.port or steps.PORT)
        return show([steps.status_commands(desk, cloud), starts])
    steps.launch(desk, steps.active(desk), job, options.port)
    (desk.folder / "watch.json").unlink(missing_ok=True)  # a job by hand starts a new count
    print(f"run {job.run}, attempt {job.attempt}: started on {desk.place.count} workers")
    return 0


def status(desk: Desk, options: Any) -> int:
    if options.dry_run:
        cloud = steps.stand_in(desk.place)
        return show([desk.backend.look(), steps.status_commands(desk, cloud)])
    cloud = steps.look(desk)
    rows = steps.rows(desk, cloud) if cloud.state == "active" else []
    seen = judge(rows) if rows else None
    if options.json:
        said = {
            "place": dataclasses.asdict(desk.place),
            "machines": dataclasses.asdict(cloud),
            "job": dataclasses.asdict(seen) if seen else None,
            "workers": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(said, indent=1))
    else:
        why = f" ({cloud.why})" if cloud.why else ""
        print(f"machines: {cloud.state}{why}")
        if rows and seen:
            print_rows(rows)
            state = "FAILED" if seen.state in FAILURES else seen.state
            state = "stopped by hand" if state != "done" and seen.ended and seen.asked else state
            print(f"job: {state}{': ' + seen.why if seen.why else ''}")
    unseen = cloud.state == "unknown" or (seen is not None and seen.state == "silent")
    return 1 if unseen or (seen is not None and seen.state in FAILURES) else 0


def busy(text: str) -> contextlib.AbstractContextManager[Any]:
    """Say on a terminal what takes a while."""
    return rich.console.Console(stderr=True).status(f"{text} ...")


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table on a terminal, plain lines elsewhere."""
    names = ("worker", "state", "exit", "sign", "start", "run", "revision", "note")
    cells = [
        (
            str(row.worker),
            row.state,
            "-" if row.exit is None else str(row.exit),
            "-" if row.beat is None or row.state != "running" else f"{row.beat} s ago",
            "-" if row.attempt is None else str(row.attempt),
            row.run or "-",
            row.revision[:8] or "-",
            row.why or "-",
        )
        for row in rows
    ]
    console = rich.console.Console()
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        for line in (names, *cells):
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(padded).rstrip())
        return
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    columns = {name: column for name, *column in zip(names, *cells, strict=True)}
    shown = {name: column for name, column in columns.items() if set(column) != {"-"}}
    for name in shown:
        table.add_column(name, overflow="fold")
    for line in zip(*shown.values(), strict=True):
        table.add_row(*(rich.text.Text(cell) for cell in line))
    console.print(table)


def logs(desk: Desk, options: Any) -> int:
    if options.lines < 0:
        raise ValueError(f"--lines must be at least 0, got {options.lines}")
    cloud = steps.stand_in(desk.place) if options.dry_run else steps.active(desk)
    commands = steps.logs_commands(desk, cloud, options.lines, options.follow)
    if options.dry_run:
        return show([commands])
    return 1 if execute.stream(commands, lambda line: print(line, flush=True)) else 0


def stop(desk: Desk, options: Any) -> int:
    if options.grace < 0:
        raise ValueError(f"--grace must be at least 0 seconds, got {options.grace}")
    if options.dry_run:
        cloud = steps.stand_in(desk.place)
        return show(steps.stop_commands(desk, cloud, options.grace, options.kill, True))
    cloud = steps.active(desk)
    rows = steps.stop(desk, cloud, grace_s=options.grace, kill=options.kill, asked=True)
    print_rows(rows)
    going = [row.worker for row in rows if row.state in ("running", "orphaned", "unreachable")]
    if going:
        print(f"error: not ended on workers {going}; try again, with --kill", file=sys.stderr)
    return 1 if going else 0


def watch(desk: Desk, options: Any) -> int:
    if not options.max_hours > 0:
        raise ValueError(f"--max_hours must be above 0, got {options.max_hours}")
    if options.dry_run:
        cloud = steps.stand_in(desk.place)
        return show([desk.backend.look(), steps.status_commands(desk, cloud)])
    limits = Budget(max_hours=options.max_hours, idle_teardown=options.idle_teardown)
    try:
        outcome = drive.watch(desk, limits, options.poll_s)
    except KeyboardInterrupt:
        print(
            "\nwatching stopped; the machines stay, and are paid for, until: "
            f"python -m tpu.run down --name={options.name} --state={options.state}",
            file=sys.stderr,
        )
        return 130
    print(f"ended: {outcome.reason}")
    complain(outcome.left)
    return 0 if outcome.done and not outcome.left else 1


def down(desk: Desk, options: Any) -> int:
    if options.dry_run:
        return show([desk.backend.delete(), desk.backend.remains()])
    with busy("giving back, and looking whether anything is left"):
        found = steps.down(desk)
    complain(found)
    if not found:
        print(f"{options.name}: nothing is left")
    return 1 if found else 0


def complain(found: Sequence[str]) -> None:
    """Name what may still be paid for."""
    for line in found:
        print(f"error: NOT given back: {line}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 2 where it cannot be done, with one line that says why.

    Example:
      >>> main(["status"])
      2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    words, command = argv[:at], argv[at + 1 :]
    verb = words[0] if words else ""
    if verb in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if verb not in NAMES:
        known = ", ".join(NAMES)
        print(f"error: the verb must be one of {known}, got {verb!r}; --help", file=sys.stderr)
        return 2
    words = ["--follow" if word == "-f" and verb == "logs" else word for word in words[1:]]
    try:
        return _do(verb, words, command)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        advice = "\n  do: name a folder that can be written, --state=FOLDER"
        print(f"error: {error}{advice if error.filename else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was given back", file=sys.stderr)
        return 130


def _do(verb: str, words: Sequence[str], command: Sequence[str]) -> int:
    from tpu import options as known  # here: it imports JAX, and Ctrl-C meanwhile is no traceback

    machines, words = known.divide(verb, words)
    options = known.parse(verb, words)
    check_name(options.name)
    if command and verb != "launch":
        raise ValueError(f"{verb} takes no command after --")
    if verb in ("up", "watch"):
        known.check_poll(options.poll_s)
    state = pathlib.Path(options.state)
    if verb == "up":
        place = known.place_for_up(options, state)
    elif machines:
        place = known.place_for_up(known.parse("up", [*machines, "--dry-run"]), state)
    else:
        place = steps.read_place(state, options.name)
    desk = Desk(place, state / options.name)
    with contextlib.ExitStack() as stack:
        if verb in ONE_AT_A_TIME and not options.dry_run:
            stack.enter_context(drive.alone(desk, "work"))
        if verb == "launch":
            return launch(desk, options, command)
        return VERBS[verb](desk, options)


VERBS = {
    "up": up,
    "sync": sync,
    "setup": setup,
    "status": status,
    "logs": logs,
    "stop": stop,
    "watch": watch,
    "down": down,
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
