"""The same training step compiles for TPU slices that are not here, by the TPU's own compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_compile import overlapped

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 900  # on a busy machine

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "v6e:2x4"])
def test_a_step_compiles_for_a_slice(topology: str) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.tpu_compile", topology]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    # k with v, forward and backward, and their gradients; the layers are a loop, so once.
    assert made["overlapped"].count(True) == 3, made
    # When all is done, gradients travel home.
    assert made["overlapped"].count(False) == 1, made
    assert made["synchronous"] == 0
    # The state is split over fsdp and model: 8 ways on 16 devices, 4 on 8.
    assert made["arguments"] < 0.3 * made["state"]


def test_a_permute_that_waits_is_seen() -> None:
    body = """
%body (p: f32[8]) -> f32[8] {
  %collective-permute-start.1 = (f32[8], f32[8]) collective-permute-start(%p), channel_id=1
  %while.2 = f32[8] while(%q), condition=%c, body=%b
  %collective-permute-done.1 = f32[8] collective-permute-done(%collective-permute-start.1)
  %collective-permute-start.2 = (f32[8], f32[8]) collective-permute-start(%p), channel_id=1
  %collective-permute-done.2 = f32[8] collective-permute-done(%collective-permute-start.2)
}
"""
    assert overlapped(body) == [True, False]
    assert overlapped(body.replace("%body", "ENTRY %body")) == []
