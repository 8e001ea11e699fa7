"""Memory that a step on a CPU frees: kept for the next step."""

import ctypes
import os

_BYTES = 2**27
_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # of glibc's malloc.h


def keep_memory() -> bool:
    """Let glibc keep what a step frees, so that the next step finds it mapped.

    XLA takes a step's intermediate results from malloc in one piece. glibc hands a piece of that
    size back to the kernel when it is freed, and the kernel zeroes every page of it again at the
    next step: a quarter of the time of a small model's step. The settings are the process's: each
    of XLA's threads keeps up to 64 MiB of what it freed; a larger piece is given back still. Set
    MALLOC_TOP_PAD_ or MALLOC_MMAP_THRESHOLD_ in the environment to decide yourself; then nothing
    is changed here. `fit` calls this on CPUs.

    Returns: whether malloc has been told.
    Example:
      >>> keep_memory() in (True, False)
      True
    """
    if "MALLOC_TOP_PAD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(_M_TOP_PAD, _BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _BYTES))
