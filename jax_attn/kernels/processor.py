"""What the processor of this machine can do."""

import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """Return the processor's features as the system lists them: what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
