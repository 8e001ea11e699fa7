"""One compile in a process and an environment of its own, and what it left behind."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tpu import bundles
from tpu.bundles import Block
from tpu.topology import Generation

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As a regular expression of libtpu's: the program after register allocation, and its units.
PASSES = ".*(packed-bundles-post-ra|pre-delay).*"
# What a user has set for runs must not decide what is measured, nor skip the compile.
UNSET = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "TPU_LIBRARY_ARGS")
NO_SCALARS = (
    "the kernel's grid depends on data that the compiler takes for 0; return how often its inner "
    "block runs, as a third value, for an estimate"
)

_live: set[subprocess.Popen] = set()
_lock = threading.Lock()
_stopping = threading.Event()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel; of a call, where it is called several times."""

    name: str
    calls: int
    cycles: float | None
    source: str
    """"profile", "bundles" (of the inner block, times its runs) or "unavailable: why"."""
    bundles: int
    inner: Block
    mxu: float
    vpu: float
    store: float
    spill: float
    """Shares of the inner block's slots, from 0 to 1; spill is of stores, and part of them."""
    spills: int
    fills: int
    """Registers that the inner block stores for want of others, and loads again."""
    bytes: int
    bytes_exact: bool
    """False: the bytes are a lower bound."""
    compute_s: float | None
    memory_s: float

    @property
    def seconds(self) -> float | None:
        """The longer of the two, which overlap."""
        return None if self.compute_s is None else max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        """What decides."""
        if self.compute_s is None:
            return ""
        return "compute" if self.compute_s >= self.memory_s else "HBM"


class Wrong(ValueError):
    """The request is wrong, whatever the sizes: the command ends."""


class Unavailable(Exception):
    """The compiler cannot say; the text is why."""


def start() -> None:
    """Let compiles start, after `stop_all` has ended those of another sweep."""
    _stopping.clear()


def stop_all() -> None:
    """End every compile that runs, with whatever it started, and let no other start."""
    with _lock:
        _stopping.set()
        for process in _live:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def environment(folder: pathlib.Path, flags: str, *, profile: bool) -> dict[str, str]:
    """Make the environment of a compile; the one of this process stays as it is.

    Args:
      folder: where the compiler writes; must be there.
      flags: LIBTPU_INIT_ARGS of the user's own.
      profile: ask for the estimate of cycles too, which some generations do not have.
    Returns: all variables.
    """
    made = {name: value for name, value in os.environ.items() if name not in UNSET}
    asked = [f"--xla_jf_dump_to={folder}", f"--xla_jf_dump_llo_pass_label_regex={PASSES}"]
    if profile:
        asked.append(f"--xla_jf_dump_static_llo_profile_to={folder}")
    paths = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    return made | {
        "LIBTPU_INIT_ARGS": " ".join([flags, *asked]).strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def compile_kernels(
    kernel: str,
    options: Mapping[str, Any],
    generation: Generation,
    *,
    flags: str = "",
    limit_s: float = 600.0,
    keep: pathlib.Path | None = None,
) -> tuple[Kernel, ...]:
    """Compile a kernel for one generation and read what the compiler says of it.

    Args:
      kernel: `module:function`.
      options: keyword arguments of the function.
      generation: what to compile for.
      flags: LIBTPU_INIT_ARGS to compile with.
      limit_s: how long one compile may take.
      keep: a folder to copy the compiler's files to, if they are wanted.
    Returns: a `Kernel` for each Pallas kernel in the program.
    Raises: Wrong: the request is; Unavailable: the compiler cannot say, or not in time.
    """
    with _folder(keep) as folder:
        answer, log = _run(folder, kernel, options, generation, flags, limit_s, profile=True)
        why = ""
        if "kernels" not in answer and "error" not in answer:
            # The profile ends the process where it has no model; the bundles do not need it.
            why = crash(log)
            answer, log = _run(folder, kernel, options, generation, flags, limit_s, profile=False)
        if "error" in answer:
            raise Unavailable(shorter(answer["error"]))
        if "kernels" not in answer:
            raise Unavailable(f"the compiler crashed: {crash(log)}")
        return tuple(_read(folder, name, answer, generation, why) for name in answer["kernels"])


@contextlib.contextmanager
def _folder(keep: pathlib.Path | None) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="tpu-cycles-") as made:
        try:
            yield pathlib.Path(made)
        finally:
            if keep is not None:
                shutil.copytree(made, keep, dirs_exist_ok=True)


def _run(
    folder: pathlib.Path,
    kernel: str,
    options: Mapping[str, Any],
    generation: Generation,
    flags: str,
    limit_s: float,
    *,
    profile: bool,
) -> tuple[dict[str, Any], str]:
    """Return the child's answer, and what it wrote to its standard error."""
    request, answer, log = (folder / n for n in ("request.json", "answer.json", "log.txt"))
    for file in folder.glob("[0-9]*-*"):
        file.unlink()
    answer.unlink(missing_ok=True)
    cube = "2x2x1" if generation.torus_dims == 3 else "2x2"
    asked = {
        "kernel": kernel,
        "options": dict(options),
        "topology": f"{generation.compiler}:{cube}",
        "described": {"chip_config_name": "megacore"} if generation.name == "v4" else {},
        "answer": str(answer),
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    with log.open("wb") as out:
        process = _popen(
            [sys.executable, "-m", "tpu._cycles_child", str(request)],
            environment(folder, flags, profile=profile),
            out,
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the compile took more than --timeout={limit_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with _lock:
                _live.discard(process)
    said = log.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if "usage" in found:
        raise Wrong(found["usage"])
    wrong = re.findall(r"^ERROR: (.*command line flag.*|Illegal value.*)$", said, re.M)
    if wrong:
        raise Wrong(f"--flags: {wrong[0]}; see python -m tpu.flags --check")
    return found, said


def _popen(command: list[str], env: dict[str, str], out: Any) -> subprocess.Popen:
    """Start a process in a session of its own, or none if all were told to stop meanwhile."""
    with _lock:
        if _stopping.is_set():
            raise Unavailable("interrupted")
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        _live.add(process)
    return process


def _read(
    folder: pathlib.Path, name: str, answer: Mapping[str, Any], generation: Generation, why: str
) -> Kernel:
    """Read the files that the compiler wrote for one kernel."""
    try:
        blocks = bundles.read_blocks(_only(folder, name, "packed-bundles-post-ra"))
        units = bundles.read_units(_only(folder, name, "per-bundle-utilization"))
        inner = bundles.inner(units, blocks)
    except (OSError, ValueError) as error:
        raise Unavailable(f"the compiler's files on {name}: {error}") from error
    profiles = [bundles.read_profile(p.read_text()) for p in folder.glob("*_profile.textproto")]
    profile = next((p for p in profiles if p.kernel == name), None)
    calls = [call for call in answer["calls"] if call["name"].replace("<lambda>", "") in name]
    longest = max((len(call["name"]) for call in calls), default=0)
    calls = [call for call in calls if len(call["name"]) == longest] or list(answer["calls"])
    # Several calls under one name: which is which is not known, so the least of them is the bound.
    moved = min(call["bytes"] for call in calls)
    exact = all(call["bytes_exact"] and call["bytes"] == moved for call in calls)
    cycles, source = None, f"unavailable: {why or 'libtpu wrote no estimate'}"
    if any(call["reads_scalars"] for call in calls):
        cycles, source = None, f"unavailable: {NO_SCALARS}"
        if answer.get("runs") and len(answer["kernels"]) == 1:
            cycles, source = (inner.end - inner.start) * answer["runs"], "bundles"
    elif profile is not None:
        cycles, source = profile.cycles, "profile"
    start, end = inner.start, inner.end
    return Kernel(
        name=name,
        calls=profile.calls if profile else 1,
        cycles=cycles,
        source=source,
        bundles=len(units.used),
        inner=inner,
        mxu=units.share(bundles.MXU, start, end),
        vpu=units.share(bundles.VPU, start, end),
        store=units.share(bundles.STORE, start, end),
        spill=units.share(bundles.SPILL, start, end),
        spills=units.count(bundles.SPILL, start, end),
        fills=units.count(bundles.FILL, start, end),
        bytes=moved,
        bytes_exact=exact,
        compute_s=None if cycles is None else cycles / generation.clock_hz,
        memory_s=moved / generation.device_hbm_bytes_per_s,
    )


def _only(folder: pathlib.Path, name: str, what: str) -> str:
    found = [
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-(?!schedule).*{what}\.txt", path.name)
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files {what} instead of one")
    return found[0].read_text(encoding="utf-8", errors="replace")


def crash(log: str) -> str:
    """Say in one line why the compiler ended its process, from what it wrote."""
    fatal = re.findall(r"^F\d{4} [^\]]*\] (.*)$", log, re.M)
    if fatal:
        return shorter(re.sub(r"^.* failed: (?=[A-Z_]+: )", "", fatal[0]))
    lines = [line for line in log.splitlines() if line.strip()]
    return shorter(lines[-1]) if lines else "it said nothing"


def shorter(text: str) -> str:
    """Make one line of a compiler's message: its sizes and names, without its dumps."""
    used = re.search(r"[Ss]coped allocation with size ([\d.]+\w) and limit ([\d.]+\w)", text)
    if used:
        return (
            f"out of VMEM: needs {used[1]}, the limit is {used[2]} (raise vmem_limit_bytes of the "
            f"kernel's CompilerParams, or --flags=--xla_tpu_scoped_vmem_limit_kib=...)"
        )
    whole = re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", text)
    if whole:
        needs, there = (int(n) / 2**20 for n in whole.groups())
        return f"out of memory: one allocation of {needs:.1f} MiB, there are {there:.1f} MiB"
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return line if len(line) <= 240 else line[:237] + "..."
