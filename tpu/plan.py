"""Plan a training step for TPU slices that nobody has rented: does it fit, what does it take?

The TPU's own compiler compiles the real step for the real slice, and this reads off its memory, its
schedule and its traffic. No TPU is needed, and none was used to check the times: they rank.

  python -m tpu.plan --experiment=experiments.character_lm --preset=tpu --target=v5e-16,v5p-16
  python -m tpu.plan --step=mine:plan_step --target=v6e-16 --mesh=data=4,model=4
  python -m tpu.plan --step=mine:plan_step --target=v5e-16 --search

--step names a function of yours, from a mesh to (jitted step, its abstract arguments, tokens a
step); the first argument is the state. With `batch` and `remat` among its parameters a plan that
does not fit also says what would. --experiment=M means --step=M:plan_step.

  # mine.py
  import jax, jax_attn as ja
  from functools import partial
  from experiments import character_lm as lm

  def plan_step(mesh, batch=64, remat="full"):
      cfg = lm.Config(D=1024, N=8, L=12, T=2048, B=batch, dtype="bfloat16", remat=remat)
      place = lambda tree, spec: jax.tree.map(
          lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, spec)
      state = jax.eval_shape(partial(lm.start, cfg), jax.random.key(0))
      rows = jax.ShapeDtypeStruct((cfg.B, cfg.T), "int32")
      batch = {"tokens_BT": rows, "targets_BT": rows}
      key = jax.eval_shape(jax.random.key, 0)
      arguments = (place(state, ja.specs(state, mesh)),
                   place(batch, ja.specs(batch, mesh, ja.ACTIVATIONS)), key)
      return ja.shard_step(lm.make_step(cfg), mesh), arguments, cfg.B * cfg.T

--mesh is data=..,fsdp=..,context=..,model=..; without it fsdp takes all devices. --search tries
every way to spread the devices over --axes and ranks them. --prices=FILE is JSON of dollars per
chip and hour, {"v5e": 1.2}. Compiles are kept in --cache by the program, libtpu and flags. --jobs
are compiled at a time, each in 1 to 3 GB.

Columns: HBM used of what there is, on the fullest device; compute, HBM and network seconds of a
step, and the part of the network that no work hides (bare); the step, from perfect overlap to none;
MFU; tokens a second; dollars for a billion tokens.
Exit status: 0 all fit, 1 something does not, 2 wrong arguments, 130 Ctrl-C.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from jax_attn.command_line import Nothing, parse_both
from tpu import _plan_report
from tpu.estimate import Estimate, Transfer, estimate, transfer
from tpu.lint import lint
from tpu.topology import Slice, find
from tpu.traffic import Collective

AXES = ("data", "fsdp", "context", "model")
NO_LIBTPU = "libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to plan, for what, and what to write."""

    experiment: str = ""
    step: str = ""
    target: str = "v5e-16"
    mesh: str = ""
    search: bool = False
    axes: str = "data,fsdp,model"
    batch: int = 0
    remat: str = ""
    fit: bool = True
    prices: str = ""
    json: str = ""
    picture: str = ""
    cache: str = ".cache/tpu-plan"
    limit_s: float = 900.0
    jobs: int = 2


_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


@dataclasses.dataclass(frozen=True)
class Plan:
    """One target, one mesh: what the compiler said, and what follows."""

    slice: Slice
    mesh: dict[str, int]
    facts: dict[str, Any]
    transfers: tuple[Transfer, ...] = ()
    estimate: Estimate | None = None
    findings: tuple[str, ...] = ()
    advice: str = ""

    @property
    def why_not(self) -> str:
        """Why there is no plan, if there is none."""
        return self.facts.get("refused") or self.facts.get("failed") or ""


def meshes(cfg: Config, slice_: Slice) -> list[dict[str, int]]:
    """List the meshes to plan for.

    Args:
      cfg: its `mesh`, or `search` and `axes`.
      slice_: the target.
    Returns: sizes by axis.
    Raises: ValueError: an axis that there is not, or sizes that are not the number of devices.
    Example:
      >>> from tpu.topology import find
      >>> meshes(Config(search=True, axes="data,model"), find("v5e-4"))
      [{'data': 1, 'model': 4}, {'data': 2, 'model': 2}, {'data': 4, 'model': 1}]
    """
    n = slice_.devices
    if cfg.search:
        names = cfg.axes.split(",")
        if unknown := [name for name in names if name not in AXES]:
            raise ValueError(f"--axes: no axis {unknown[0]!r}; there are {', '.join(AXES)}")
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        every = itertools.product(divisors, repeat=len(names))
        return [dict(zip(names, c, strict=True)) for c in every if math.prod(c) == n]
    if not cfg.mesh:
        return [{"fsdp": n}]
    sizes: dict[str, int] = {}
    for part in cfg.mesh.split(","):
        name, equals, size = part.partition("=")
        if name not in AXES or not equals or not size.isdigit() or not int(size) or name in sizes:
            raise ValueError(f"--mesh looks like data=4,model=4 of {', '.join(AXES)}; got {part!r}")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != n:
        raise ValueError(
            f"--mesh={cfg.mesh} is {math.prod(sizes.values())} devices, {slice_.name} has {n}"
        )
    return [sizes]


def ask(
    cfg: Config, options: dict[str, Any], slice_: Slice, mesh: dict[str, int]
) -> dict[str, Any]:
    """Compile in a process of its own, whose environment alone is made for it.

    Args:
      cfg, options: the step, and what its function is called with.
      slice_, mesh: for what.
    Returns: the facts, or {"refused": why} or {"failed": why}.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    request = {"step": cfg.step or f"{cfg.experiment}:plan_step", "target": slice_.name,
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
    if _stopping.is_set():
        raise KeyboardInterrupt
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    _running.add(process)
    try:
        if _stopping.is_set():
            raise KeyboardInterrupt
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        _running.discard(process)


def conclude(
    facts: dict[str, Any], slice_: Slice, mesh: dict[str, int], prices: dict[str, float]
) -> Plan:
    """Work out times and findings from what the compiler said.

    Args:
      facts: from `ask`.
      slice_, mesh: for what.
      prices: dollars per chip and hour, by generation.
    Returns: the plan.
    """
    if not facts.get("fits"):
        return Plan(slice_, mesh, facts)
    transfers = tuple(
        transfer(
            Collective(
                one["kind"],
                tuple(one["parts"]),
                one["times"],
                tuple(tuple(m) if isinstance(m, list) else m for m in one["group"]),  # type: ignore[arg-type]
                one["covered_cycles"],
                one["source"],
            ),
            facts["places"],
            facts["mesh"],
            slice_,
        )
        for one in facts["collectives"]
    )
    price = prices.get(slice_.generation.name)
    return Plan(
        slice_,
        mesh,
        facts,
        transfers,
        estimate(facts, transfers, slice_, price),
        tuple(lint(facts, transfers)),
    )


def what_fits(
    cfg: Config, options: dict[str, Any], slice_: Slice, mesh: dict[str, int], facts: dict[str, Any]
) -> str:
    """Find what would fit: full rematerialisation, or else the largest batch, by bisection.

    Args:
      cfg, options, slice_, mesh: as for `ask`.
      facts: of the plan that does not fit.
    Returns: a line of advice.
    """
    first = ask(cfg, {**options, "remat": "full"}, slice_, mesh)
    if first.get("fits"):
        return f"fits with remat='full': {first['used'] / 2**30:.1f} GiB"
    if "refused" in first and "takes no" in first["refused"]:
        return "give the step's function `batch` and `remat` to be told what would fit"
    rows = mesh.get("data", 1) * mesh.get("fsdp", 1)
    batch = facts.get("batch") or options.get("batch")
    if not batch:
        return "also not with remat='full'; give --batch to search for the largest that fits"
    low, high = 0, batch // rows  # in rows of each device
    while high - low > 1:
        middle = (low + high) // 2
        tried = ask(cfg, {**options, "remat": "full", "batch": middle * rows}, slice_, mesh)
        low, high = (middle, high) if tried.get("fits") else (low, middle)
    if not low:
        return f"not even a batch of {rows} fits, with remat='full': take more devices"
    return f"fits with remat='full' and batch {low * rows}, and not with {(low + 1) * rows}"


def check(cfg: Config) -> list[Slice]:
    """Refuse what means nothing, before anything is compiled; return the targets."""
    if bool(cfg.experiment) == bool(cfg.step):
        raise ValueError("give --experiment=experiments.character_lm or --step=module:function")
    if cfg.step and not all(cfg.step.partition(":")):
        raise ValueError(f"--step looks like module:function, got {cfg.step!r}")
    if cfg.search and cfg.mesh:
        raise ValueError("--mesh names one mesh, --search tries all: give one of them")
    if cfg.batch < 0 or cfg.limit_s <= 0 or cfg.jobs < 1:
        raise ValueError("--batch must be at least 0, --limit_s above 0, --jobs at least 1")
    found = [find(name) for name in cfg.target.split(",")]
    if several := [one.name for one in found if one.slices > 1]:
        raise ValueError(f"--target={several[0]}: one slice at a time; plan it as {several[0][2:]}")
    for one in found:
        meshes(cfg, one)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(NO_LIBTPU)
    return found


def read_prices(path: str) -> dict[str, float]:
    """Read dollars per chip and hour, by generation."""
    if not path:
        return {}
    try:
        made = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        return {str(name): float(price) for name, price in made.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'--prices={path} must be JSON such as {{"v5e": 1.2}}: {error}') from None


def plans(cfg: Config, preset: str, targets: Sequence[Slice]) -> Iterator[Plan]:
    """Plan for every target and mesh, --jobs at a time, and yield them in their order."""
    prices = read_prices(cfg.prices)
    options = {"preset": preset or None, "batch": cfg.batch or None, "remat": cfg.remat or None}

    def one(asked: tuple[Slice, dict[str, int]]) -> Plan:
        slice_, mesh = asked
        facts = ask(cfg, options, slice_, mesh)
        made = conclude(facts, slice_, mesh, prices)
        if facts.get("fits") is False and cfg.fit and not cfg.search:
            advice = what_fits(cfg, options, slice_, mesh, facts)
            made = dataclasses.replace(made, advice=advice)
        return made

    every = [(slice_, mesh) for slice_ in targets for mesh in meshes(cfg, slice_)]
    _stopping.clear()
    with concurrent.futures.ThreadPoolExecutor(cfg.jobs) as pool:
        try:
            yield from pool.map(one, every)
        finally:  # all are done, or nobody waits for the others
            _stopping.set()
            for process in list(_running):
                process.kill()
            pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, print, write."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = [word.partition("=")[2] for word in words if word.startswith("--preset=")]
    words = [word for word in words if not word.startswith("--preset=")]
    _, cfg = parse_both(Nothing, Config, {"default": {}}, __doc__ or "", words)
    try:
        if len(chosen) > 1:
            raise ValueError("--preset is given twice")
        targets = check(cfg)
        read_prices(cfg.prices)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began, made, status = time.monotonic(), [], 0
    talks = Console(stderr=True)
    total = sum(len(meshes(cfg, one)) for one in targets)
    try:
        with talks.status(f"compiling 1 of {total}") as shown:
            for one in plans(cfg, chosen[0] if chosen else "", targets):
                made.append(one)
                shown.update(f"compiling {min(len(made) + 1, total)} of {total}")
                if not talks.is_terminal:
                    print(f"{len(made)} of {total}: {one.slice.name} "
                          f"{_plan_report.mesh_text(one.mesh)}", file=sys.stderr)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    _plan_report.show(made, time.monotonic() - began)
    try:
        if cfg.json:
            _plan_report.write_json(pathlib.Path(cfg.json), made)
        if cfg.picture and made:
            _plan_report.draw(pathlib.Path(cfg.picture), made)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status or (0 if made and all(one.facts.get("fits") for one in made) else 1)


if __name__ == "__main__":
    sys.exit(main())
