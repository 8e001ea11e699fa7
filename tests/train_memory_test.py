"""What a step frees stays with the process: counted in page faults, not in seconds."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from jax_attn.train.memory import keep_memory

told = keep_memory() if sys.argv[1] == "keep" else None
make = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=31)[1].sum())
x = jnp.ones((311, 1009))
found = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    make(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(told, *found)
"""
PAGES = 31 * 311 * 1009 * 4 // 4096  # of what the scan keeps


def faults(word, **environment):
    environment = {"JAX_PLATFORMS": "cpu", **environment}
    made = subprocess.run(
        [sys.executable, "-c", STEPS, word],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    told, *found = made.stdout.split()
    return told, sorted(map(int, found))


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_finds_its_memory_mapped():
    told, found = faults("keep")
    assert told == "True"
    assert found[len(found) // 2] < PAGES / 20, "each of XLA's threads maps its own, once"
    assert faults("leave")[1][0] > PAGES / 2, "glibc keeps it by itself: keep_memory can go"


def test_the_environment_decides(monkeypatch):
    from jax_attn.train.memory import keep_memory

    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert keep_memory() is False
