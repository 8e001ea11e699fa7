"""Estimate how fast a Pallas kernel is on TPUs that are not here, and find its best block sizes.

The TPU's own compiler says how many cycles a kernel takes and what its inner loop uses. No TPU is
needed, none was used to check the estimates: they rank, they are not timings.

  python -m tpu.cycles --kernel=matmul --target=v5e,v6e
  python -m tpu.cycles --kernel=flash_attention --target=v6e --sweep="block_q=512,1024 T=4096"
  python -m tpu.cycles --kernel=mine:scale --target=v5e --sweep="rows=256,512,1024"

--kernel is matmul, flash_attention, splash, attention (this library's, as it runs on a TPU), or
module:function of yours, a function from the options of a sweep to (function, abstract arguments):

  # mine.py
  import jax, jax.numpy as jnp
  from jax.experimental import pallas as pl

  def scale(rows=256):
      def body(x, out):
          out[...] = 2 * x[...]
      x = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)
      spec = pl.BlockSpec((rows, 1024), lambda i: (i, 0))
      return pl.pallas_call(body, grid=(8192 // rows,), in_specs=[spec], out_specs=spec,
                            out_shape=x), (x,)

A third value, runs, says how often the inner block runs in a call: needed for kernels with scalar
prefetch, whose grid the compiler cannot know. --sweep="a=1,2 b=3,4" tries all combinations, each in
a process of its own; a single value only sets an option. Ctrl-C prints what is known by then.

Columns: cycles of a call; us = max(cycles / clock, bytes / HBM bandwidth), for a device as JAX sees
it; bundles of the program; of its inner block the bundles, and the shares of slots of the matrix
units (MXU), the vector units (VPU), stores, and those stores that spill a register.
Exit status: 0 something was estimated, 1 nothing was, 2 wrong arguments, 130 Ctrl-C.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from rich import progress
from rich.console import Console

from jax_attn.command_line import parse
from tpu import _cycles_compile, _cycles_report, topology
from tpu._cycles_compile import Kernel, Unavailable

BUILT_IN = ("matmul", "flash_attention", "splash", "attention")
NO_LIBTPU = "libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'"


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the command."""

    kernel: str = ""
    target: str = "v5e,v6e"
    sweep: str = ""
    flags: str = ""
    """LIBTPU_INIT_ARGS to compile with; those of the environment are not used."""
    json: str = ""
    keep: str = ""
    """A folder for the compiler's files."""
    jobs: int = 1
    timeout: float = 600.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One kernel with one choice of options on one generation, and what came of it."""

    target: str
    options: dict[str, Any]
    kernels: tuple[Kernel, ...] = ()
    why: str = ""
    """Why the compiler could not say, if it could not."""

    @property
    def seconds(self) -> float | None:
        """Of all calls of all kernels; None where one of them is not known."""
        times = [k.seconds for k in self.kernels]
        if not times or None in times:
            return None
        return sum(k.calls * (k.seconds or 0.0) for k in self.kernels)


def targets(text: str) -> tuple[topology.Generation, ...]:
    """Read generations, or slices, whose generation counts.

    Args:
      text: names with commas between them.
    Returns: the generations, each once.
    Raises: ValueError naming the one that there is not.
    Example:
      >>> [g.name for g in targets("v5e,v6e-16")]
      ['v5e', 'v6e']
    """
    found: dict[str, topology.Generation] = {}
    for name in text.split(","):
        name = name.strip().lower()
        one = next(
            (g for g in topology.GENERATIONS if name in (g.name, g.prefix, g.compiler)), None
        )
        if one is None and not any(mark in name for mark in "-:"):
            there = ", ".join(g.name for g in topology.GENERATIONS)
            raise ValueError(f"--target: no such TPU {name!r}; there are {there}")
        one = one or topology.find(name).generation
        found[one.name] = one
    return tuple(found.values())


def combinations(text: str) -> tuple[dict[str, Any], ...]:
    """Read a sweep: names with values, all combinations of which are tried.

    Args:
      text: `name=value,value` with spaces or semicolons between; values are ints, floats, true,
        false or words.
    Returns: the options of each point, in order.
    Raises: ValueError naming the part that is wrong.
    Example:
      >>> combinations("a=1,2 b=x")
      ({'a': 1, 'b': 'x'}, {'a': 2, 'b': 'x'})
    """
    axes: dict[str, list[Any]] = {}
    for part in text.replace(";", " ").split():
        name, equals, values = part.partition("=")
        if not equals or not name.isidentifier() or not all(values.split(",")):
            raise ValueError(f'--sweep takes "name=value,value name=value", got {part!r}')
        if name in axes:
            raise ValueError(f"--sweep: {name} is given twice")
        axes[name] = [_value(name, value) for value in values.split(",")]
        if len(set(map(str, axes[name]))) < len(axes[name]):
            raise ValueError(f"--sweep: {part!r} has a value twice")
    return tuple(
        dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())
    )


def _value(name: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            made = kind(text)
        except ValueError:
            continue
        if not math.isfinite(made):
            raise ValueError(f"--sweep: {name} must be finite, got {text}")
        return made
    return text


def ranked(points: Sequence[Point]) -> list[Point]:
    """Sort the points of one generation: the fastest first, unknown ones last."""
    return sorted(points, key=lambda p: math.inf if p.seconds is None else p.seconds)


def sweep(cfg: Config) -> Iterator[Point]:
    """Compile every point, and yield each as it is done.

    Args:
      cfg: the command's options.
    Raises: ValueError: an argument is wrong. However it ends, every compile is ended first.
    """
    kernel = f"tpu._cycles_kernels:{cfg.kernel}" if cfg.kernel in BUILT_IN else cfg.kernel
    work = list(itertools.product(targets(cfg.target), combinations(cfg.sweep)))

    def one(generation: topology.Generation, options: dict[str, Any]) -> Point:
        label = "_".join([generation.name, *(f"{k}={v}" for k, v in options.items())])
        keep = pathlib.Path(cfg.keep) / label.replace("/", "-") if cfg.keep else None
        try:
            made = _cycles_compile.compile_kernels(
                kernel, options, generation, flags=cfg.flags, limit_s=cfg.timeout, keep=keep
            )
        except Unavailable as error:
            return Point(generation.name, options, why=str(error))
        return Point(generation.name, options, made)

    _cycles_compile.start()
    pool = ThreadPoolExecutor(cfg.jobs)
    waiting: set[Future[Point]] = set()
    try:
        waiting = {pool.submit(one, generation, options) for generation, options in work}
        while waiting:
            # In short steps, for a signal is seen between them.
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _cycles_compile.stop_all()
        pool.shutdown()


def check(cfg: Config) -> None:
    """Raise a ValueError that names the option that is wrong."""
    if not cfg.kernel:
        raise ValueError(f"--kernel is needed: {', '.join(BUILT_IN)}, or module:function of yours")
    if cfg.kernel not in BUILT_IN and not all(cfg.kernel.partition(":")):
        raise ValueError(
            f"--kernel must be {', '.join(BUILT_IN)} or module:function, got {cfg.kernel!r}"
        )
    if cfg.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {cfg.jobs}")
    if not 0 < cfg.timeout < math.inf:
        raise ValueError(f"--timeout must be > 0 seconds, got {cfg.timeout}")
    targets(cfg.target)
    combinations(cfg.sweep)
    for option, path in (("json", cfg.json), ("keep", cfg.keep)):
        parent = pathlib.Path(path).parent
        if path and not parent.is_dir():
            raise ValueError(f"--{option}={path}: there is no folder {parent}")
    if cfg.json and pathlib.Path(cfg.json).is_dir():
        raise ValueError(f"--json={cfg.json} is a folder; name a file")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(NO_LIBTPU)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      argv: its arguments; default `sys.argv[1:]`.
    Returns: its exit status.
    """
    cfg = parse(Config, {"default": {}}, __doc__ or "", argv)
    signal.signal(signal.SIGTERM, _interrupted)
    points: list[Point] = []
    began, status = time.monotonic(), 0
    try:
        check(cfg)
        with _bar(len(targets(cfg.target)) * len(combinations(cfg.sweep))) as advance:
            for point in sweep(cfg):
                points.append(point)
                advance(point)
    except ValueError as error:  # Wrong, from a compile, is one too
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is known by now:", file=sys.stderr)
        status = 130
    order = [
        p for g in targets(cfg.target) for p in ranked([p for p in points if p.target == g.name])
    ]
    if order:
        _cycles_report.show(cfg.kernel, order)
    if cfg.json:
        record = _cycles_report.record(cfg, order, time.monotonic() - began, bool(status))
        pathlib.Path(cfg.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return status or (0 if any(p.kernels for p in points) else 1)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[Point], None]]:
    """Say how far the compiles are: a bar on a terminal, a line for each elsewhere."""
    done = 0

    def line(point: Point) -> None:
        nonlocal done
        done += 1
        print(f"compiled {done} of {total}: {_cycles_report.label(point)}", file=sys.stderr)

    if not sys.stderr.isatty():
        yield line
        return
    columns = (
        progress.TextColumn("compiling"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda point: bar.update(task, advance=1, description=_cycles_report.label(point))


if __name__ == "__main__":
    raise SystemExit(main())
