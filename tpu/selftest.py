"""The part of the doctor that uses JAX, in a process of its own, which may hang or crash.

Command, as the doctor runs it: python -m tpu.selftest SPEC, where SPEC is JSON with "parts" (names
in `PARTS`, run in that order), "limit_s" and sizes. Each part's result is a line of JSON.

On a host of a slice it first joins the processes of the others, which must run the same parts.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tpu import measure

UNIT = 2.0**-24  # largest relative error of rounding to float32


def devices(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Say what JAX sees.

    Args:
      spec: see the module.
    Returns: platform, kind, local, total, index, processes, coords, slices.
    Example:
      >>> devices({})["total"] >= 1
      True
    """
    import jax

    every = jax.devices()
    coords = [list(d.coords) for d in every if getattr(d, "coords", None) is not None]
    return {
        "platform": every[0].platform,
        "kind": every[0].device_kind,
        "local": jax.local_device_count(),
        "total": len(every),
        "index": jax.process_index(),
        "processes": jax.process_count(),
        "coords": coords,
        "slices": len({getattr(d, "slice_index", None) or 0 for d in every}),
    }


def matmul(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Multiply on every device of this host, in float32 and in bfloat16 that is added in float32.

    No order of adding K products in float32 errs more than K u / (1 - K u) Σ |a| |b|, u = 2^-24
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); products of bfloat16 are
    exact in float32.

    Args:
      spec: see the module.
    Returns: for `tpu.rates.numerics`.
    """
    import jax
    import jax.numpy as jnp

    M, K, N = 251, 257, 263
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    errors = []
    for name, precision in (("float32", "highest"), ("bfloat16", "default")):
        x, y = (np.asarray(z, jnp.dtype(name)) for z in (a, b))
        wide, high = x.astype(np.float64), y.astype(np.float64)
        exact, scale = wide @ high, np.abs(wide) @ np.abs(high)
        bound = K * UNIT / (1 - K * UNIT) * scale
        run = jax.jit(lambda p, q, precision=precision: jnp.matmul(
            p, q, precision=precision, preferred_element_type=jnp.float32
        ))  # fmt: skip
        for device in jax.local_devices():
            got = np.asarray(run(*jax.device_put((x, y), device)), np.float64)
            errors.append(_error(name, device, np.abs(got - exact) / bound))
    return {"bound": f"{K}·2^-24·Σ|a||b|", "errors": errors}


def attention(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Run `jax_attn.attention`, causal, forward and gradient, on the first device of this host.

    The bound, of each array, is 4 u times the largest number in it times the number of terms on the
    longest way through the sums, u = 2^-24: far below what products in bfloat16 would give.

    Args:
      spec: see the module.
    Returns: for `tpu.rates.numerics`.
    """
    import jax

    import jax_attn
    from tpu import oracle

    B, T, D, N, K, H, E = 2, 13, 23, 6, 3, 5, 7
    device = jax.local_devices()[0]
    rng = np.random.default_rng(0)
    sizes = {"wq_DNH": (D, N, H), "wk_DKH": (D, K, H), "wv_DKE": (D, K, E), "wo_NED": (N, E, D)}
    params = {n: rng.standard_normal(s, dtype=np.float32) / D**0.5 for n, s in sizes.items()}
    x, dy = rng.standard_normal((2, B, T, D), dtype=np.float32)
    with jax.default_device(device), jax.default_matmul_precision("highest"):

        def run(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jax_attn.attention(params, x, mask=jax_attn.causal())
            return (y * dy).sum(), y

        (_, y), (d_params, d_x) = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, x)
    out, grad = oracle.attend(params, x, dy)
    terms = D + H + T + N * E
    pairs = [("y", y, out["y"])]
    pairs += [(f"d {n.split('_')[0]}", d_params[n], grad[n]) for n in sorted(params)]
    pairs += [("d x", d_x, grad["x"])]
    errors = []
    for what, got, exact in pairs:
        bound = 4 * UNIT * terms * np.abs(exact).max()
        errors.append(_error(what, device, np.abs(np.asarray(got, np.float64) - exact) / bound))
    return {"bound": f"4·{terms}·2^-24·largest", "errors": errors}


def psum(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Add a vector of every device of all processes.

    Args:
      spec: see the module.
    Returns: for `tpu.rates.numerics`; the bound is that of any order of adding.
    """
    import jax

    def expect(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = len(parts) - 1
        bound = n * UNIT / (1 - n * UNIT) * np.abs(parts).sum(0)
        return np.broadcast_to(parts.sum(0), parts.shape), np.broadcast_to(bound, parts.shape)

    return _collective(lambda x, axis: jax.lax.psum(x, axis), expect, "(n-1)·2^-24·Σ|x|")


def ppermute(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Send a vector from every device to the next, in a ring through all processes.

    Args:
      spec: see the module.
    Returns: for `tpu.rates.numerics`; every number has to arrive as it is.
    """
    import jax

    n = jax.device_count()
    ring = [(i, (i + 1) % n) for i in range(n)]
    return _collective(
        lambda x, axis: jax.lax.ppermute(x, axis, ring),
        lambda parts: (np.roll(parts, 1, 0), np.zeros(parts.shape)),
        "exact",
    )


PARTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "devices": devices,
    "matmul": matmul,
    "attention": attention,
    "matmul rate": measure.matmul_rate,
    "memory bandwidth": measure.memory_bandwidth,
    # What needs the other devices comes last: if one of them is stuck, the rest is known.
    "psum": psum,
    "ppermute": ppermute,
    "all-reduce bandwidth": measure.all_reduce_bandwidth,
}


def _error(what: str, device: Any, share: np.ndarray) -> dict[str, Any]:
    # max() of an array with a NaN in it is NaN, which fits no bound.
    return {"what": what, "where": str(device), "share": float(share.max())}


def _collective(
    apply: Callable[[Any, str], Any],
    expect: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    bound: str,
) -> dict[str, Any]:
    """Apply a collective to a row of each device; compare the rows of this host's devices."""
    import jax

    n = jax.device_count()
    if n == 1:
        return {"skipped": "one device"}
    mesh, place = measure.line()
    parts = np.random.default_rng(0).standard_normal((n, 1031), dtype=np.float32)
    exact, bounds = expect(parts.astype(np.float64))
    x = jax.make_array_from_callback(parts.shape, place, lambda index: parts[index])
    run = jax.shard_map(
        lambda row: apply(row, "all"), mesh=mesh, in_specs=place.spec, out_specs=place.spec,
        check_vma=False,
    )  # fmt: skip
    errors = []
    for shard in jax.jit(run)(x).addressable_shards:
        wrong = np.abs(np.asarray(shard.data, np.float64) - exact[shard.index])
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(wrong == 0, 0.0, wrong / bounds[shard.index])
        errors.append(_error("row", shard.device, share))
    return {"bound": bound, "errors": errors}


def _run(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is being done, for the clock of whoever waits, and each part's result."""
    yield {"doing": "importing JAX"}
    import jax_attn

    yield {"doing": "joining the processes of the other hosts, if there are any"}
    jax_attn.bootstrap(timeout_s=max(0.8 * spec["limit_s"], 1.0))
    yield {"doing": "starting the devices"}
    devices(spec)
    for name in spec["parts"]:
        yield {"doing": name}
        try:
            yield {"part": name, "result": PARTS[name](spec)}
        except Exception as error:  # what breaks one part says nothing of the next
            yield {"part": name, "error": _said(error)}


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _leave_with_parent() -> None:
    """End when the doctor has ended, however it did: a child left behind would keep the TPU."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Run the parts; results go to what was standard output, what libraries print to errors."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for answer in _run(json.loads(sys.argv[1])):
            print(json.dumps(answer), file=answers)
    except Exception as error:  # before the first part
        print(json.dumps({"fatal": _said(error)}), file=answers)
        raise


if __name__ == "__main__":
    main()
