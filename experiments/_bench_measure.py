"""The clock and the scales of `bench_attention`; run as a module it weighs one case.

Command: python -m experiments._bench_measure PEER CASE_AS_JSON
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _bench_peers as peers
from experiments._bench_peers import Case, Prepared

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The other framework's threads spin for some milliseconds after their last call.
SETTLE_S = 0.02
SAMPLE_S = 0.02


def sample(run: Callable[[], Any], repeat: int) -> float:
    """Time one call in seconds, as the mean of `repeat` calls in a row, each waited for."""
    time.sleep(SETTLE_S)
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - began) / repeat


def warm_up(run: Callable[[], Any], limit_s: float) -> tuple[float, int]:
    """Call until warm; return the seconds of a warm call, and how many calls make a sample."""
    took = sample(run, 1)
    if took <= limit_s:
        took = min(took, sample(run, 1))
    return took, max(1, math.ceil(SAMPLE_S / max(took, 1e-6)))


def interleave(
    ready: Mapping[str, tuple[Callable[[], Any], int]], rounds: int
) -> dict[str, list[float]]:
    """Time every contestant once a round, in an order that rotates; seconds by name."""
    names = list(ready)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for r in range(rounds):
        first = r % max(len(names), 1)
        for name in names[first:] + names[:first]:
            seconds[name].append(sample(*ready[name]))
    return seconds


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.percentile(np.asarray(seconds) * 1e3, (25, 50, 75)).tolist()
    return {"ms": middle, "q1_ms": low, "q3_ms": high}


def ratio(other: Sequence[float], this: Sequence[float]) -> list[float]:
    """How many times as fast `this` is, round by round: median, least, largest."""
    each = np.asarray(other) / np.asarray(this)
    return [float(np.median(each)), float(each.min()), float(each.max())]


def matmul_rates(size: int, dtype: str, limit_s: float) -> dict[str, float]:
    """Measure what a product of two square matrices reaches, FLOP/s by framework, best of 5."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    product = jax.jit(jnp.matmul)
    a, b = jnp.asarray(x).astype(dtype), jnp.asarray(y).astype(dtype)
    runs: dict[str, Callable[[], Any]] = {"jax": lambda: jax.block_until_ready(product(a, b))}
    th = peers.torch()
    if th is not None and (th.cuda.is_available() or not peers.on_gpu()):
        device = "cuda" if peers.on_gpu() else "cpu"
        c, d = (th.from_numpy(z).to(device, getattr(th, dtype)) for z in (x, y))

        def multiply() -> None:
            th.matmul(c, d)
            if device == "cuda":
                th.cuda.synchronize()

        runs["torch"] = multiply
    ready = {name: (run, warm_up(run, limit_s)[1]) for name, run in runs.items()}
    return {name: 2 * size**3 / min(s) for name, s in interleave(ready, 5).items()}


def machine_memory() -> int:
    """Bytes of memory that the machine, or the GPU that JAX runs on, has; 0 if it does not say."""
    if peers.on_gpu():
        return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def busy() -> str | None:
    """Say so where other processes take cores: PyTorch, whose threads wait in loops, loses most."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 0.5 * peers.cores():
        return None
    return (
        f"the machine was busy before the run, load {load:.1f} on {peers.cores()} cores: "
        "no ratio here is fair, that to torch least"
    )


def processor() -> str:
    """Name the CPU; Linux says more than its architecture."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return re.sub(r"\((R|TM)\)", "", line.split(":", 1)[1]).strip()
    return platform.machine()


def too_long(before: tuple[int, float] | None, S: int, limit_s: float) -> str | None:
    """Say why a case would take too long, from (size, seconds) of the same at another size."""
    if before is None:
        return None
    predicted = before[1] * (S / before[0]) ** 2
    if predicted <= limit_s:
        return None
    return f"about {predicted:.3g} s a call predicted from S={before[0]}, --limit_s={limit_s:g}"


def too_large(need: int, memory: int) -> str | None:
    """Say why a case would take too much memory."""
    if not memory or need <= memory / 2:
        return None
    return f"needs {need / 1e9:.1f} GB, more than half of {memory / 1e9:.1f} GB"


def weigh(peer: str, case: Case, timeout_s: float) -> dict[str, Any]:
    """Measure a case's peak memory in a process of its own: {"bytes", "how"} or {"failed"}."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # A GPU's memory is not all taken at the start: the process that times holds some too.
    environment = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "experiments._bench_measure", peer, json.dumps(case)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"memory: no answer within {timeout_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return {"failed": f"memory: exit status {done.returncode} {lines[-1][:160]}".strip()}
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak(peer: str, case: Case) -> dict[str, Any]:
    """Measure, in this process, the peak above what is resident once the case is compiled.

    A written-out mask is an input, but only for those who need one: it counts as the peer's. The
    outputs count too. A tiny case first brings code and threads into memory.
    """
    peers.prepare(peer, case._replace(S=min(case.S, 64))).run()
    prepared = peers.prepare(peer, case)
    gc.collect()
    used, how = _gpu_peak(peer, prepared) if peers.on_gpu() else _cpu_peak(prepared)
    return {"bytes": max(used, 0) + prepared.mask_bytes, "how": how}


def _cpu_peak(prepared: Prepared) -> tuple[int, str]:
    with contextlib.suppress(OSError, AttributeError):
        # What malloc keeps of the compiler's memory would hide as much of the call's.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        # 5 resets the peak; a kernel without it has no file or refuses to write.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepared.run()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (after - before) * unit, "ru_maxrss, which compiling may have raised before"
    result = prepared.run()
    used = _status("VmHWM") - before
    del result
    return used, "VmHWM"


def _status(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[key].split()[0]) * 1024


def _gpu_peak(peer: str, prepared: Prepared) -> tuple[int, str]:
    if peer == "torch":
        cuda = peers.torch().cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        prepared.run()
        return cuda.max_memory_allocated() - before, "max_memory_allocated"
    device = jax.devices()[0]
    before = (device.memory_stats() or {})["bytes_in_use"]
    prepared.run()
    return (device.memory_stats() or {})["peak_bytes_in_use"] - before, "peak_bytes_in_use"


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], Case(*json.loads(sys.argv[2])))))
