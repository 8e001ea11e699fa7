"""What programs are compiled for, and what the processor of this machine can do."""

import platform
from functools import cache
from pathlib import Path

import jax


def backend() -> str:
    """Return "cpu", "gpu" or "tpu": what a mesh that is in force consists of, which for a program
    that is compiled ahead of time need not be here, or else what JAX runs on."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind = getattr(device, "device_kind", "").lower()
    known = {"cpu": "cpu", "tpu": "tpu"}
    if kind:
        return known.get(kind[:3], "gpu")
    return jax.default_backend()


@cache
def processor() -> str:
    """Return the processor's features as the system lists them: what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
