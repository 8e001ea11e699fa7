"""Plan a training step for TPU slices that nobody has rented: does it fit, what does it take?

The TPU's own compiler compiles the real step for the real slice, and this reads off its memory, its
schedule and its traffic. No TPU is needed, and none was used to check the times: they rank.

  python -m tpu.plan --experiment=experiments.character_lm --preset=tpu --target=v5e-16,v5p-16
  python -m tpu.plan --step=mine:plan_step --target=v6e-16 --mesh=data=4,model=4
  python -m tpu.plan --step=mine:plan_step --target=v5e-16 --search

--step names a function of yours, from a mesh to (jitted step, its abstract arguments, tokens a
step); the first argument is the state. With `batch` and `remat` among its parameters a plan that
does not fit also says what would. --experiment=M means --step=M:plan_step. The file may lie in any
folder: give the command there, after `pip install -e 'CHECKOUT[tpu]'` of this repository.

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

Pallas kernels count with the cost that they declare, as the least that they can take; where one
declares none (`cost_estimate` of pallas_call), the step has a least time and no more.
Columns: HBM used of what there is, on the fullest device; compute, HBM and network seconds of a
step, and the part of the network that no work hides (bare); the step, from perfect overlap to none;
MFU; tokens a second; dollars for a billion tokens.
Exit status: 0 all fit, 1 something does not or cannot be planned, 2 wrong arguments, 130 Ctrl-C or
SIGTERM.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from jax_attn.command_line import Nothing, parse_both
from tpu import _plan_ask, _plan_report
from tpu._plan_fit import what_fits
from tpu.estimate import Estimate, Transfer, estimate, transfer
from tpu.lint import lint
from tpu.topology import GENERATIONS, Slice, find
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
                tuple(one["shapes"]),
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
    read_prices(cfg.prices)
    _plan_report.check_paths(cfg.json, cfg.picture)
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
        prices = {str(name): float(price) for name, price in made.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'--prices={path} must be JSON such as {{"v5e": 1.2}}: {error}') from None
    there = [generation.name for generation in GENERATIONS]
    for name, price in prices.items():
        if name not in there:
            raise ValueError(f"--prices={path}: no TPU {name!r}; there are {', '.join(there)}")
        if not (math.isfinite(price) and price > 0):
            raise ValueError(f"--prices={path}: {name} must cost more than 0, got {price}")
    return prices


def plans(cfg: Config, options: dict[str, Any], targets: Sequence[Slice]) -> Iterator[Plan]:
    """Plan for every target and mesh, --jobs at a time, and yield them in their order."""
    prices = read_prices(cfg.prices)

    def one(asked: tuple[Slice, dict[str, int]]) -> Plan:
        return conclude(_plan_ask.ask(cfg, options, *asked), *asked, prices)

    yield from _each(cfg, one, [(s, mesh) for s in targets for mesh in meshes(cfg, s)])


def advised(
    cfg: Config, options: dict[str, Any], made: Sequence[Plan], tell: Callable[[str], None]
) -> Iterator[Plan]:
    """Yield the plans, each that does not fit with what would.

    Args:
      cfg, options: as for `ask`.
      made: all plans. Of a target's meshes, under --search, only the nearest to fitting is asked
        about, and only if none fits.
      tell: is told what is tried.
    Returns: an iterator.
    """

    def wanted(one: Plan) -> bool:
        if one.facts.get("fits") is not False or not cfg.fit:
            return False
        same = [x for x in made if x.slice == one.slice and "fits" in x.facts]
        nearest = min(same, key=lambda x: (not x.facts["fits"], x.facts["used"]))
        return one is nearest if cfg.search else True

    def one(plan: Plan) -> Plan:
        def attempt(other: dict[str, Any]) -> dict[str, Any]:
            words = " ".join(f"{name}={value}" for name, value in other.items())
            tell(f"{plan.slice.name} {_plan_report.mesh_text(plan.mesh)} does not fit: try {words}")
            return _plan_ask.ask(cfg, {**options, **other}, plan.slice, plan.mesh)

        if not wanted(plan):
            return plan
        rows = plan.mesh.get("data", 1) * plan.mesh.get("fsdp", 1)
        advice = what_fits(attempt, plan.facts, rows, options)
        return dataclasses.replace(plan, advice=advice)

    yield from _each(cfg, one, made)


def _each(cfg: Config, one: Callable[[Any], Plan], every: Sequence[Any]) -> Iterator[Plan]:
    _plan_ask.stopping.clear()
    with concurrent.futures.ThreadPoolExecutor(cfg.jobs) as pool:
        try:
            yield from pool.map(one, every)
        finally:  # all are done, or nobody waits for the others
            _plan_ask.stop()
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
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    preset = chosen[0] if chosen else None
    options = {"preset": preset or None, "batch": cfg.batch or None, "remat": cfg.remat or None}
    began, made, status = time.monotonic(), [], 0
    talks = Console(stderr=True)
    total = sum(len(meshes(cfg, one)) for one in targets)
    try:
        with _ended_by_sigterm(), talks.status(f"compiling 1 of {total}") as shown:

            def tell(text: str) -> None:
                shown.update(text)
                if not talks.is_terminal:
                    print(text, file=sys.stderr)

            for one in plans(cfg, options, targets):
                made.append(one)
                tell(f"{len(made)} of {total}: {one.slice.name} "
                     f"{_plan_report.mesh_text(one.mesh)}")  # fmt: skip
            made = list(advised(cfg, options, made, tell))
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
    if any(one.facts.get("wrong") for one in made):
        status = status or 2
    return status or (0 if made and all(one.facts.get("fits") for one in made) else 1)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do as Ctrl-C: what is being compiled ends too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
