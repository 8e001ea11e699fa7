"""What do all experiments say, on one page?

Runs each experiment that ends by `_findings.run` (it defines `find`), one after the other, each in
a process of its own, and writes one page with every question, verdict, table and figure. The page
holds its figures, needs no script and asks the network for nothing; it is written anew after each
experiment. One that fails or is interrupted is on the page too, with the end of what it printed.

--only=recall,flow runs those alone. --reuse keeps a run that ended well if its preset, the sources
it imports, Python, jax and the environment that jax reads are as they were.

Command: python -m experiments.gallery
Minutes: 11 on 2 CPU cores; --preset=default hours; --preset=tpu has not been run yet
Expected: verdicts as the experiments say; exit status 0 if each ended well, whatever its verdicts,
  1 if one did not, 2 for a wrong argument, 130 after Ctrl-C
Writes: OUT/gallery.html; of each experiment OUT/NAME/: what it writes, output.txt, run.json
"""

import ast
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import rich.console

from experiments.__main__ import FOLDER, read
from experiments._gallery_page import Entry, counts, page, read_summary
from experiments._report import ROOT, revision
from jax_attn.command_line import parse_both
from jax_attn.report import training_progress

OUTPUT = "output.txt"
END = 25  # lines of output that the page shows of what failed
PATIENCE_S = (2.0, 10.0, 5.0)  # before an interrupted experiment is told, asked and made to end
ENVIRONMENT = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which experiments, by which of their presets, and where to."""

    only: str = ""
    each: str = "quick"
    out: str = "runs/gallery"


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change the page."""

    reuse: bool = False


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"each": "quick"},
    "default": {"each": "default"},
    "tpu": {"each": "tpu"},
}


class Plan(NamedTuple):
    """How to run one experiment, and what its numbers depend on."""

    name: str
    question: str
    command: tuple[str, ...]
    folder: pathlib.Path
    fingerprint: str


def participants(folder: pathlib.Path = FOLDER) -> list[str]:
    """List the experiments of a folder that define `find`, without importing them."""
    return [
        path.stem
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_")
        and any(isinstance(x, ast.FunctionDef) and x.name == "find" for x in _tree(path).body)
    ]


def sources(name: str, folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
    """List the files of a folder of experiments that one of them imports, itself included."""
    found, left = set(), [name]
    while left:
        path = folder / f"{left.pop()}.py"
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == folder.name:
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module.removeprefix(f"{folder.name}.")]
    return sorted(found)


def fingerprint(name: str, preset: str) -> str:
    """Hash what the numbers of an experiment depend on."""
    sha = hashlib.sha256()
    library = [p for p in (ROOT / "jax_attn").rglob("*") if p.suffix in (".py", ".cc", ".h")]
    for path in sorted(library) + sources(name):
        sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    versions = [f"{package} {importlib.metadata.version(package)}" for package in ("jax", "jaxlib")]
    given = [f"{key}={os.environ.get(key, '')}" for key in ENVIRONMENT]
    sha.update("\0".join([preset, platform.python_version(), *versions, *given]).encode())
    return sha.hexdigest()


def plans(cfg: Config, folder: pathlib.Path = FOLDER) -> list[Plan]:
    """Plan what --only asks for, or every experiment.

    Raises: ValueError: one that there is not, or no such preset; no folder, or one with a run that
      was not made here, which would be removed.
    """
    if cfg.each not in PRESETS:
        raise ValueError(f"--each must be one of {', '.join(PRESETS)}, got {cfg.each!r}")
    if not cfg.out:
        raise ValueError("--out must name a folder")
    known = participants(folder)
    asked = [name.strip() for name in cfg.only.split(",") if name.strip()] or known
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"--only: no experiment {unknown[0]!r}; there are {', '.join(known)}")
    made = []
    for name in dict.fromkeys(asked):
        out = pathlib.Path(cfg.out) / name
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: {out} is a file; name another folder")
        if (out / "summary.json").exists() and not (out / OUTPUT).exists():
            raise ValueError(
                f"--out: {out} has a run that is none of a gallery; name another folder"
            )
        command = ("python", "-m", f"experiments.{name}", f"--preset={cfg.each}", f"--out={out}")
        question = read(folder / f"{name}.py").question
        made.append(Plan(name, question, command, out, fingerprint(name, cfg.each)))
    return made


def kept(plan: Plan) -> Entry | None:
    """Read a run that is there, if it ended well and its numbers would be the same today."""
    try:
        record = json.loads((plan.folder / "run.json").read_text(encoding="utf-8"))
        if record["fingerprint"] != plan.fingerprint:
            return None
        return entry(
            plan, seconds=float(record["seconds"]), revision=str(record["revision"])
        )._replace(reused=True, summary=read_summary(plan.folder))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def entry(plan: Plan, *, trouble: str = "", seconds: float = 0.0, revision: str = "") -> Entry:
    """Start the entry of a plan on the page."""
    return Entry(
        plan.name, plan.question, shlex.join(plan.command), plan.folder, trouble,
        seconds=seconds, revision=revision,
    )  # fmt: skip


def run(plan: Plan, tell: Callable[[str], None]) -> tuple[Entry, bool]:
    """Run an experiment to its end, or to Ctrl-C.

    Args:
      plan: what to run.
      tell: called a few times a second with how far it is.
    Returns: the entry, and whether Ctrl-C ended it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    for old in (*plan.folder.glob("*.json"), *plan.folder.glob("*.png")):
        old.unlink()  # what it does not write this time must not look as if it had
    at, began, stopped = revision(), time.perf_counter(), False
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    output = plan.folder / OUTPUT
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *plan.command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "100"} | environment,
        )
        try:
            while process.poll() is None:
                tell(f"{time.perf_counter() - began:.0f} s  {_end(output, 1)}"[:60])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.25)
        except KeyboardInterrupt:
            stopped = True
            _stop(process)
        finally:
            process.kill()
            process.wait()
    seconds = round(time.perf_counter() - began, 3)
    made, status = entry(plan, seconds=seconds, revision=at), process.returncode
    if stopped or status in (130, -signal.SIGINT):
        return made._replace(trouble="interrupted", output=_end(output, END)), stopped
    if status:
        why = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return made._replace(trouble=f"failed: {why}", output=_end(output, END)), False
    try:
        made = made._replace(summary=read_summary(plan.folder))
    except ValueError as error:
        return made._replace(trouble=f"failed: {error}", output=_end(output, END)), False
    record = {"fingerprint": plan.fingerprint, "revision": at, "seconds": seconds}
    (plan.folder / "run.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return made, False


def write(entries: Sequence[Entry], cfg: Config) -> pathlib.Path:
    """Write the page in one step; one that stood there before stays until it is whole."""
    took = sum(one.seconds for one in entries if not one.reused)
    facts = {
        "": datetime.date.today().isoformat(),
        "preset": cfg.each,
        "revision": revision(),
        "minutes": f"{took / 60:.1f}",
    }
    out = pathlib.Path(cfg.out) / "gallery.html"
    partial = out.with_suffix(".partial")
    text = page(entries, title="What the experiments say", facts=facts)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return out


def outcome(entries: Sequence[Entry]) -> str:
    """Count verdicts, and experiments without any answer, in words."""
    said, troubled = counts(entries), [one.name for one in entries if one.trouble]
    words = f"{said[True]} hold, {said[False]} do not, {said[None]} undecided"
    return f"{words}; without an answer: {', '.join(troubled)}" if troubled else words


def make(cfg: Config, options: Options, todo: Sequence[Plan]) -> tuple[list[Entry], bool]:
    """Run or keep each experiment, writing the page every time; whether Ctrl-C ended it."""
    entries = [entry(plan, trouble="not run") for plan in todo]
    stopped = False
    with training_progress() as progress:
        task = progress.add_task("gallery", total=len(todo), status="")
        say = (
            rich.console.Console(stderr=True).print if progress.disable else progress.console.print
        )
        for i, plan in enumerate(todo):
            where = f"[{i + 1}/{len(todo)}] {plan.name}"
            found = kept(plan) if options.reuse else None
            if found is None:
                say(f"{where} ...", markup=False, highlight=False, soft_wrap=True)
                found, stopped = run(
                    plan, lambda line, n=plan.name: progress.update(task, status=f"{n} {line}")
                )
            entries[i] = found
            line = f"{where}: {found.trouble or outcome([found])}, {found.seconds / 60:.1f} minutes"
            line += ", kept" if found.reused else ""
            say(line, markup=False, highlight=False, soft_wrap=True)
            progress.update(task, completed=i + 1)
            write(entries, cfg)
            if stopped:
                break
    return entries, stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write, and say by the exit status whether each experiment ended well."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not any(word.startswith("--preset") for word in argv):
        argv.insert(0, "--preset=quick")
    cfg, options = parse_both(Config, Options, PRESETS, __doc__ or "", argv)
    try:
        todo = plans(cfg)
        pathlib.Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    entries, stopped = make(cfg, options, todo)
    print(f"wrote {write(entries, cfg)}: {outcome(entries)}")
    return 130 if stopped else int(any(one.trouble for one in entries))


def _tree(path: pathlib.Path) -> ast.Module:
    """Parse a file; one that is no Python defines nothing."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module(body=[], type_ignores=[])


def _end(path: pathlib.Path, lines: int) -> str:
    """Read the last lines of a file."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16_384))
        text = file.read().decode("utf-8", errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that a terminal's Ctrl-C has reached too; else tell it, then ask it."""
    for patience, ask in zip(PATIENCE_S, (signal.SIGINT, signal.SIGTERM, None), strict=True):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
            return
        if ask is not None:
            process.send_signal(ask)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the page is written
    raise SystemExit(main())
