"""How fast this machine multiplies, reads memory and adds over devices: samples of seconds.

JAX is imported where it is used: the process that runs this says when it does, and is timed.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

WARM, ROUNDS, SAMPLE_S = 2, 7, 0.05
CHAIN = 4  # products in one call, so that starting it is a small share


def matmul_rate(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time products of large square matrices of bfloat16 on devices of this host.

    Args:
      spec: "matmul_size", or 0 to choose by device.
    Returns: for `tpu.rates.rate`.
    Example:
      >>> matmul_rate({"matmul_size": 64})["unit"]
      'TFLOP/s'
    """
    import jax
    import jax.numpy as jnp

    size = spec["matmul_size"] or (512 if _on_cpu() else 8192)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, size), dtype=np.float32).astype(jnp.bfloat16)
    y = (rng.standard_normal((size, size), dtype=np.float32) / size**0.5).astype(jnp.bfloat16)

    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = x @ y
        return x

    run, seconds = jax.jit(chain), {}
    for device in _timed_devices():
        a, b = jax.device_put((x, y), device)
        seconds[str(device)] = _sample(lambda last, a=a, b=b: run(a, b), None)
    work = 2 * CHAIN * size**3
    what = f"bfloat16 {size}³"
    return {"what": what, "unit": "TFLOP/s", "scale": 1e12, "work": work, "seconds": seconds}


def memory_bandwidth(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time adding 1 to an array that fits no cache: it is read once and written once.

    Args:
      spec: "stream_mib", or 0 to choose by device.
    Returns: for `tpu.rates.rate`.
    Example:
      >>> memory_bandwidth({"stream_mib": 1})["work"]
      2097152
    """
    import jax
    import jax.numpy as jnp

    mib = spec["stream_mib"] or (128 if _on_cpu() else 1024)
    run, seconds = jax.jit(lambda x: x + 1, donate_argnums=0), {}
    for device in _timed_devices():
        x = jnp.zeros(mib * 2**18, jnp.float32, device=device)
        seconds[str(device)] = _sample(run, x)
    work, what = 2 * mib * 2**20, f"read and write {mib} MiB"
    return {"what": what, "unit": "GB/s", "scale": 1e9, "work": work, "seconds": seconds}


def all_reduce_bandwidth(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time adding an array over all devices of all processes.

    Each of c chips has to send 2 (c - 1) / c of the array's bytes; that is the work. All processes
    make the same number of calls: they take the longest's time of one.

    Args:
      spec: "reduce_mib" for each device, or 0 to choose by device.
    Returns: for `tpu.rates.rate`.
    Example:
      >>> got = all_reduce_bandwidth({"reduce_mib": 1})
      >>> got.get("unit", "GB/s")
      'GB/s'
    """
    import jax
    import jax.numpy as jnp

    n = jax.device_count()
    if n == 1:
        return {"skipped": "one device"}
    mib = spec["reduce_mib"] or (4 if _on_cpu() else 256)
    mesh, place = line()
    axes = {"mesh": mesh, "in_specs": place.spec, "out_specs": place.spec, "check_vma": False}

    def reduce(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "all")

    def longest(x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, "all")

    run, agree = (jax.jit(jax.shard_map(f, **axes)) for f in (reduce, longest))
    x = jax.jit(lambda: jnp.zeros((n, mib * 2**18), jnp.float32), out_shardings=place)()

    def together(seconds: float) -> float:
        mine = np.full((1, 1), seconds, np.float32)
        every = jax.make_array_from_callback((n, 1), place, lambda _: mine)
        return float(np.asarray(agree(every).addressable_shards[0].data)[0, 0])

    seconds = {"all devices": _sample(run, x, together)}
    # Two devices of one chip share its links.
    where = {(getattr(d, "slice_index", 0), *(getattr(d, "coords", None) or (d.id,)))
             for d in jax.devices()}  # fmt: skip
    chips = max(len(where), 2)
    work, what = (
        2 * (chips - 1) / chips * mib * 2**20,
        f"sum of {mib} MiB over {n} devices, sent by each chip",
    )
    return {"what": what, "unit": "GB/s", "scale": 1e9, "work": work, "seconds": seconds}


def line() -> tuple[Any, Any]:
    """Put all devices of all processes in a line.

    Returns: the mesh, with one axis "all", and the place of an array whose rows its devices hold.
    Example:
      >>> line()[0].axis_names
      ('all',)
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    return mesh, NamedSharding(mesh, PartitionSpec("all"))


def _on_cpu() -> bool:
    import jax

    return jax.devices()[0].platform == "cpu"


def _timed_devices() -> list[Any]:
    """Return this host's devices; on CPU they share their cores, so the first stands for all."""
    import jax

    return jax.local_devices()[:1] if _on_cpu() else jax.local_devices()


def _sample(
    call: Callable[[Any], Any],
    carry: Any,
    agree: Callable[[float], float] = lambda seconds: seconds,
) -> list[float]:
    """Time a call, in seconds a call: samples of so many calls in a row that a clock can tell."""
    import jax

    took = 0.0
    for _ in range(WARM):
        began = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        took = time.perf_counter() - began
    repeat = min(max(1, math.ceil(SAMPLE_S / max(agree(took), 1e-6))), 1000)
    samples = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(repeat):
            carry = call(carry)
        jax.block_until_ready(carry)
        samples.append((time.perf_counter() - began) / repeat)
    return samples
