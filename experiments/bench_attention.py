"""How fast, and in how much memory, is this library's attention beside what else there is?

One run, side by side: each implementation of this library that runs here, jax.nn's
dot_product_attention (on a GPU by "xla", and as jax.nn.cudnn by cuDNN), Flax Linen's, Flax NNX's
(which calls jax.nn's unless it drops out) and, where PyTorch is installed (the extra `bench`), its
scaled_dot_product_attention. All get the same numbers, each in its own layout and by its own best
call. Every round times every contestant once, in an order that rotates; ratios are taken within a
round. Each call is waited for. Peak memory is measured in a process of its own for every case and
counts the outputs, and a mask that had to be written out.

Command: python -m experiments.bench_attention
Minutes: less than 1 with --preset=quick on 2 CPU cores, 7 for the float32 half of the default
  with --rounds=5 and without "dense"; --preset=full has not been run whole
Expected: float32, causal, S = 4096 on 2 CPU cores: native about 15 times as fast as jax.nn and
  1.3 to 1.9 times as PyTorch, blockwise 5 to 7 times and 0.6 to 0.7 times; memory of both linear
Writes: runs/bench_attention/PRESET/results.json and one picture a mask, causal.png
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

import rich.console

from experiments import _bench_measure as measure
from experiments import _bench_peers as peers
from experiments import _bench_report, _report
from experiments._bench_peers import Case
from jax_attn.command_line import parse
from jax_attn.report import training_progress


@dataclasses.dataclass(frozen=True)
class Config:
    """Lists are separated by commas; sizes by their letters, T = S; `window` counts keys seen.

    `rounds` are timed; `limit_s` bounds the seconds of one call; `matmul` is the size of the
    product that GFLOP/s are compared with; `memory=false` skips the processes that measure it.
    """

    sizes: str = "256,1024,4096"
    dtypes: str = "float32,bfloat16"
    masks: str = "causal"
    what: str = "forward,forward+backward"
    peers: str = "all"
    B: int = 1
    N: int = 12
    H: int = 64
    window: int = 512
    rounds: int = 7
    limit_s: float = 20.0
    matmul: int = 2048
    memory: bool = True
    out: str = "runs/bench_attention/default"


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        **{"sizes": "256,512", "dtypes": "float32", "rounds": 5, "memory": False},
        "out": "runs/bench_attention/quick",
    },
    "full": {
        **{"sizes": "256,512,1024,2048,4096,8192,16384", "masks": "causal,window,segments"},
        "out": "runs/bench_attention/full",
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config whose lists are read and checked."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    masks: tuple[str, ...]
    what: tuple[str, ...]
    peers: tuple[str, ...]


def check(cfg: Config) -> Plan:
    """Read the lists and refuse what means nothing, before anything is compiled."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if type(value) is int and value < 1:
            raise ValueError(f"--{field.name} must be at least 1, got {value}")
    if not cfg.limit_s > 0:
        raise ValueError(f"--limit_s must be > 0, got {cfg.limit_s}")
    if not cfg.out:
        raise ValueError("--out must name a folder")
    sizes = []
    for item in _items("sizes", cfg.sizes):
        if not item.isdecimal() or int(item) < 1:
            raise ValueError(f"--sizes must be integers >= 1, got {item!r}")
        sizes.append(int(item))
    plan = Plan(
        sizes=tuple(sorted(sizes)),
        dtypes=_among("dtypes", cfg.dtypes, peers.DTYPES),
        masks=_among("masks", cfg.masks, peers.MASKS),
        what=_among("what", cfg.what, peers.WHATS),
        peers=peers.PEERS if cfg.peers == "all" else _among("peers", cfg.peers, peers.PEERS),
    )
    cases = [_case(cfg, *key) for key in _keys(plan)]
    for peer in plan.peers if cfg.peers != "all" else ():
        # What was named runs, or is an error.
        said = {peers.refusal(peer, case) for case in cases}
        if None not in said:
            raise ValueError(f"--peers: {peer} {said.pop()}")
    return plan


def _items(name: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"--{name} must be a comma-separated list, got {text!r}")
    if len(set(items)) < len(items):
        raise ValueError(f"--{name} names something twice: {text!r}")
    return items


def _among(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    items = _items(name, text)
    for item in items:
        if item not in known:
            raise ValueError(f"--{name} must be among {', '.join(known)}, got {item!r}")
    return tuple(item for item in known if item in items)


def _case(cfg: Config, mask: str, dtype: str, what: str, S: int) -> Case:
    return Case(mask, dtype, what, S, cfg.B, cfg.N, cfg.H, cfg.window)


def _keys(plan: Plan) -> list[tuple[str, str, str, int]]:
    return [
        (mask, dtype, what, S)
        for mask in plan.masks
        for dtype in plan.dtypes
        for what in plan.what
        for S in plan.sizes
    ]


class Bench:
    """What was measured so far, and what the next case needs to know of it."""

    def __init__(self, cfg: Config, plan: Plan, progress: Any) -> None:
        self.cfg, self.plan, self.progress = cfg, plan, progress
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.matmul: dict[str, dict[str, float]] = {}
        self.picked: dict[str, str] = {}
        self._before: dict[tuple[str, ...], tuple[int, float]] = {}
        self._total = len(_keys(plan))
        self._task = progress.add_task("bench_attention", total=self._total, status="")

    def run(self) -> None:
        """Measure everything; whatever stops it, the rows made so far stay."""
        busy = measure.busy()
        if busy is not None:
            self._note(busy)
        for dtype in self.plan.dtypes:
            self._status(f"{dtype} matmul")
            self.matmul[dtype] = measure.matmul_rates(self.cfg.matmul, dtype, self.cfg.limit_s)
        for number, key in enumerate(_keys(self.plan), 1):
            made = self._measure(_case(self.cfg, *key))
            self.progress.update(self._task, completed=number)
            times = "  ".join(f"{r['peer']} {r['ms']:.3g} ms" for r in made if "ms" in r)
            self._line(f"{number}/{self._total}  {self._name(key)}  {times}")

    def _name(self, key: tuple[Any, ...]) -> str:
        return f"{key[0]} {key[1]} {key[2]} S={key[3]}"

    def _status(self, text: str) -> None:
        self.progress.update(self._task, status=text)

    def _line(self, text: str) -> None:
        if self.progress.disable:
            print(text, file=sys.stderr, flush=True)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.progress.console.print(text, markup=False, highlight=False)

    def _measure(self, case: Case) -> list[dict[str, Any]]:
        """Measure all contestants at one size: times first, then memory."""
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Any] = {}
        chosen = peers.picked(case)
        if case.mask == "causal" and chosen:
            self.picked[f"{case.dtype} {case.what} {case.S}"] = chosen
        try:
            for peer in self.plan.peers:
                said = peers.refusal(peer, case)
                if said is not None:
                    self._note(f"not {peer}: {said}")
                    continue
                self._status(f"{self._name(case)}  {peer}: compiling")
                row = {"mask": case.mask, "dtype": case.dtype, "what": case.what, "S": case.S}
                rows[peer] = {**row, "peer": peer}
                timed = self._prepare(peer, case, rows[peer])
                if timed is not None:
                    ready[peer] = timed
            self._status(f"{self._name(case)}  {len(ready)} contestants: timing")
            seconds = measure.interleave(ready, self.cfg.rounds)
            for peer, mine in seconds.items():
                rows[peer].update(measure.summarise(mine))
                rows[peer]["samples_ms"] = [1e3 * s for s in mine]
                rows[peer]["over"] = {
                    other: measure.ratio(seconds[other], mine)
                    for other in ("jax.nn", "torch")
                    if other in seconds and other != peer
                }
                rate = peers.flops(case) * 1e3 / rows[peer]["ms"]
                rows[peer]["gflops"] = rate / 1e9
                rows[peer]["share"] = rate / max(self.matmul[case.dtype].values())
            ready.clear()
            for peer in seconds if self.cfg.memory else ():
                self._status(f"{self._name(case)}  {peer}: memory")
                self._weigh(peer, case, rows[peer])
        finally:
            # Only what has a time, or a reason for having none, is a row.
            self.rows += [row for row in rows.values() if "ms" in row or "left_out" in row]
        return list(rows.values())

    def _prepare(self, peer: str, case: Case, row: dict[str, Any]) -> Any:
        """Compile and warm a contestant up, or write down why not."""
        line = (peer, case.mask, case.dtype, case.what)
        reason = measure.too_long(self._before.get(line), case.S, self.cfg.limit_s)
        if reason is None:
            try:
                made = peers.prepare(peer, case)
                row["compile_s"] = made.compile_s
                need = made.temporary + made.mask_bytes
                reason = measure.too_large(need, measure.machine_memory())
                if reason is None:
                    took, repeat = measure.warm_up(made.run, self.cfg.limit_s)
                    self._before[line] = (case.S, took)
                    if made.kernel:
                        row["kernel"] = made.kernel
                        self._note(f"{peer} ran its {made.kernel} kernel ({case.mask})")
                    if took <= self.cfg.limit_s:
                        return made.run, repeat
                    reason = f"one call took {took:.3g} s, --limit_s={self.cfg.limit_s:g}"
            except Exception as error:  # a contestant's own: a row without it, not the end
                first = (str(error).strip().splitlines() or [""])[0]
                reason = f"{type(error).__name__}: {first[:200]}"
        row["left_out"] = reason
        return None

    def _weigh(self, peer: str, case: Case, row: dict[str, Any]) -> None:
        made = measure.weigh(peer, case, timeout_s=120 + 10 * self.cfg.limit_s)
        if "failed" in made:
            row["memory_failed"] = made["failed"]
            return
        row["memory_bytes"], row["memory_how"] = made["bytes"], made["how"]
        if made["how"].startswith("ru_maxrss"):
            self._note(f"memory here is measured by {made['how']}: too little, if anything")


def summarise(bench: Bench, began: float, complete: bool) -> dict[str, Any]:
    """Put together what results.json holds."""
    th = peers.torch()
    made = _report.environment()
    cpu = f"{measure.processor()}, {peers.cores()} cores"
    threads = f", {th.get_num_threads()} threads" if th else ""
    return {
        "config": dataclasses.asdict(bench.cfg),
        **made,
        "torch": f"{th.__version__}{threads}" if th else "not installed",
        "processor": measure.processor(),
        "hardware": f"{made['device'] if peers.on_gpu() else cpu}, {made['date']}",
        "complete": complete,
        "seconds": round(time.perf_counter() - began, 1),
        "matmul": bench.matmul,
        "notes": bench.notes,
        "verdicts": _bench_report.verdicts(bench.rows, bench.picked, bench.plan.dtypes),
        "fits": _bench_report.fits(bench.rows),
        "rows": bench.rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, draw; the exit code is 0 whatever the verdicts are, 130 after Ctrl-C."""
    began = time.perf_counter()
    cfg = parse(Config, PRESETS, __doc__ or "", argv)
    out = pathlib.Path(cfg.out)
    try:
        plan = check(cfg)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    complete = False
    with training_progress() as progress:
        bench = Bench(cfg, plan, progress)
        try:
            bench.run()
            complete = True
        except KeyboardInterrupt:
            pass
    summary = summarise(bench, began, complete)
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    if not complete:
        print(f"stopped; what was measured is in {out / 'results.json'}", file=sys.stderr)
        return 130
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    _bench_report.show(console, summary)
    pictures = _bench_report.draw(summary, out)
    names = ", ".join(path.name for path in pictures)
    print(f"wrote {out / 'results.json'} {names} in {summary['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    # On a GPU, PyTorch and the processes that measure memory need room beside this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    raise SystemExit(main())
