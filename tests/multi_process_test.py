"""Processes of one job: two real ones compute what one does; one that never comes is named."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_attn.bootstrap import Processes, _cloud_tpu, _slurm, bootstrap
from tests import sharded_model as small

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240  # of a test, on a busy machine
CHILD = """
import json, sys
from functools import partial
import jax
import jax_attn as a
{before}
processes = a.bootstrap(timeout_s={timeout_s})
from tests import sharded_model as small
mesh = a.make_mesh(data=2, fsdp=2, model=2)
asked = []
def make(step, rows):
    asked.append(list(rows))
    return small.rows(step, rows)
batch = lambda step: a.global_batch(partial(make, step), mesh, B=small.B)
state = a.shard_init(small.init_state, jax.random.key(0), mesh)
losses, state = small.run(a.shard_step(small.make_step(), mesh), state, batch)
print(json.dumps([list(processes), jax.device_count(), losses, sorted(sum(asked, []))]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    index: int, count: int, port: int, *, timeout_s: float = 120, before: str = ""
) -> subprocess.Popen[str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONPATH": str(ROOT),
    }
    code = CHILD.format(timeout_s=timeout_s, before=before)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )


def finish(*children: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Wait for all, and leave none behind."""
    try:
        said = [child.communicate(timeout=LIMIT_S) for child in children]
        return [(c.returncode, *texts) for c, texts in zip(children, said, strict=True)]
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.long
def test_two_processes_compute_what_one_does() -> None:
    port = free_port()
    ended = finish(start(0, 2, port), start(1, 2, port))
    for index, (code, out, errors) in enumerate(ended):
        assert code == 0, errors[-3000:]
        processes, devices, losses, rows = json.loads(out.splitlines()[-1])
        assert processes == [index, 2, "environment"]
        assert devices == 8
        small.assert_close(losses, small.on_one_device()[0])
        # Each made its own half of the rows, once a step.
        half = range(index * small.B // 2, (index + 1) * small.B // 2)
        assert rows == sorted(list(half) * small.STEPS)


def test_a_process_that_never_comes_is_named_on_those_that_do() -> None:
    port = free_port()
    ended = finish(*(start(index, 4, port, timeout_s=8) for index in (0, 2)))
    for code, _, errors in ended:
        assert code == 1
        assert "TimeoutError: bootstrap: of 4 processes 1, 3 did not come within 8 s" in errors


def test_without_process_0_the_others_say_where_they_looked() -> None:
    port = free_port()
    ((code, _, errors),) = finish(start(1, 2, port, timeout_s=2))
    assert code == 1
    assert f"process 0 did not answer at 127.0.0.1:{port} within 2 s" in errors


def test_a_wrong_count_is_an_error_on_both() -> None:
    port = free_port()
    for code, _, errors in finish(start(0, 2, port), start(1, 3, port)):
        assert code == 1
        assert "ValueError: bootstrap: process 1 says count=3, process 0 2" in errors


def test_bootstrap_after_jax_was_used_is_refused() -> None:
    ((code, _, errors),) = finish(start(0, 2, free_port(), before="jax.devices()"))
    assert code == 1
    assert "RuntimeError: bootstrap: JAX has been used already" in errors


def test_one_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "TPU_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS")):
            monkeypatch.delenv(name)
    assert bootstrap() == Processes(0, 1, "none")
    assert bootstrap("here:1", 1, 0) == Processes(0, 1, "arguments")
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("n7,other1", "n7"),
        ("n[007-015,020],other1", "n007"),
        ("rack-2-n[3,9]", "rack-2-n3"),
        ("n[1-2].cluster", "n1.cluster"),
    ],
)
def test_slurm_variables_say_who_is_process_0(nodes: str, first: str) -> None:
    job = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "3", "SLURM_PROCID": "2"}
    found = _slurm(job | {"SLURM_STEP_NODELIST": nodes})
    assert found == {"coordinator": f"{first}:61441", "count": "3", "index": "2"}


def test_cloud_tpu_variables_say_who_is_process_0() -> None:
    slice_ = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}
    assert _cloud_tpu(slice_) == {"coordinator": "t-0:8476", "count": 2, "index": 1}
    slices = slice_ | {
        "MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }
    assert _cloud_tpu(slices) == {"coordinator": "s-0:8476", "count": 6, "index": 5}
    assert _cloud_tpu({"TPU_SKIP_MDS_QUERY": "1"}) is None
