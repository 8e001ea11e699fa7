"""Tests of tpu.doctor's checks: faults planted in facts, in a tree of files, in measurements."""

import dataclasses
import fcntl
import os
import pathlib
import socket
import sys
import threading
import tomllib
from typing import Any

import numpy as np
import pytest

from tpu import checks, facts, rates, topology, versions
from tpu.checks import FAILED, OK, SKIPPED, WARNING, Row
from tpu.facts import Facts, Holder

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEEDS = (
    "jaxlib<=0.12.0.1,>=0.11.2",
    'jaxlib==9.9; extra == "ci"',
    'libtpu==0.0.50.*; extra == "tpu"',
)
FIT = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "libtpu": "0.0.50.1"}
GOOD = Facts(packages=FIT, jax_needs=NEEDS)
TPU = dataclasses.replace(GOOD, chips=("v5e",) * 4)
BUSY = Holder(4242, "python train.py", ("/dev/vfio/0", "/tmp/libtpu_lockfile"))


def having(here: Facts, package: str, version: str | None) -> Facts:
    merged = {**here.packages, package: version}
    return dataclasses.replace(here, packages={n: v for n, v in merged.items() if v})


# Versions.


@pytest.mark.parametrize("here", [GOOD, TPU, having(GOOD, "libtpu", None)])
def test_versions_that_fit_are_ok(here: Facts) -> None:
    assert versions.versions(here).verdict == OK


@pytest.mark.parametrize(
    ("here", "verdict", "seen", "do"),
    [
        (having(TPU, "libtpu", "0.0.43"), FAILED, "DMA", "jax[tpu]"),
        (having(GOOD, "libtpu", "0.0.45.1"), FAILED, "39744", "jax[tpu]"),
        (having(GOOD, "libtpu", "0.0.46"), WARNING, "0.0.50.*", "'jax[tpu]==0.12.0.1'"),
        (having(TPU, "libtpu", None), FAILED, "libtpu is not", "'jax[tpu]==0.12.0.1'"),
        (having(GOOD, "libtpu-nightly", "0.1"), FAILED, "both", "uninstall"),
        (having(GOOD, "jaxlib", "0.12.1"), FAILED, "jaxlib 0.12.1", "jax==0.12.0.1"),
        (having(GOOD, "jaxlib", "0.11.1"), FAILED, ">=0.11.2", "jax==0.12.0.1"),
        (having(GOOD, "jaxlib", None), FAILED, "jaxlib is not installed", "pip install"),
        (having(GOOD, "jax", None), FAILED, "jax is not installed", "pip install"),
        (having(GOOD, "jax", "0.9.9"), FAILED, "older than 0.10.2", "jax>=0.10.2"),
        (dataclasses.replace(GOOD, python="3.10.12"), FAILED, "Python 3.11", "Python 3.11"),
    ],
)
def test_versions_that_do_not_fit(here: Facts, verdict: str, seen: str, do: str) -> None:
    row = versions.versions(here)
    assert row.verdict == verdict
    assert seen in f"{row.seen} {row.do}"
    assert do in row.do


def test_the_installed_jax_says_what_it_needs() -> None:
    needs = facts.gather().jax_needs
    assert versions._asked("jaxlib", needs)
    assert versions._asked("libtpu", needs, extra="tpu")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={versions.LEAST['python']}"
    assert f"jax>={versions.LEAST['jax']}" in project["dependencies"]


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("0.10.2", ">=0.9", True),  # numbers, not text
        ("1.2", "==1.2.0", True),
        ("1.20", "==1.2.*", False),
        ("1.2.7", "==1.2.*", True),
        ("1.2.7", "!=1.2.7", False),
        ("1.2.7", "<1.2.7", False),
        ("1.2.7", ">1.2,<2", True),
    ],
)
def test_bounds(version: str, wanted: str, fits: bool) -> None:
    assert versions._fits(version, wanted) == fits


# The environment.


@pytest.mark.parametrize(
    ("here", "name", "value", "verdict"),
    [
        (TPU, "TPU_SKIP_MDS_QUERY", "1", FAILED),
        (TPU, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1", FAILED),
        (TPU, "JAX_PLATFORMS", "cpu", FAILED),
        (TPU, "TPU_PROCESS_BOUNDS", "1,1,1", FAILED),
        (TPU, "TPU_VISIBLE_CHIPS", "0", FAILED),
        (TPU, "TPU_LIBRARY_PATH", "/x.so", WARNING),
        (TPU, "LIBTPU_INIT_ARGS", "--xla_jf_dump_to=/x", WARNING),
        (GOOD, "JAX_PLATFORMS", "tpu,cpu", WARNING),
        (GOOD, "XLA_FLAGS", "--a --xla_dump_to=/x", WARNING),
        (GOOD, "JAX_DISABLE_JIT", "1", WARNING),
        # Right where they are:
        (TPU, "JAX_PLATFORMS", "tpu,cpu", OK),
        (TPU, "JAX_PLATFORMS", "", OK),
        (TPU, "JAX_DISABLE_JIT", "0", OK),
        (GOOD, "JAX_PLATFORMS", "cpu", OK),
        (GOOD, "TPU_SKIP_MDS_QUERY", "1", OK),
        (GOOD, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1", OK),
        (GOOD, "XLA_FLAGS", "--xla_force_host_platform_device_count=8", OK),
    ],
)
def test_variables(here: Facts, name: str, value: str, verdict: str) -> None:
    row = checks.environment(dataclasses.replace(here, environ={name: value, "PATH": "/x"}))
    assert row.verdict == verdict
    assert (verdict == OK) == (name not in row.seen) == (row.do != f"unset {name}")


def test_what_a_launcher_sets_is_right_there() -> None:
    left_over = {"TPU_SKIP_MDS_QUERY": "true", "TPU_HOST_BOUNDS": "1,1,1"}
    launched = left_over | {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}
    assert checks.environment(dataclasses.replace(TPU, environ=left_over)).verdict == FAILED
    assert checks.environment(dataclasses.replace(TPU, environ=launched)).verdict == OK


def test_hugepages_matter_on_a_tpu_alone() -> None:
    assert checks.environment(dataclasses.replace(TPU, hugepages="madvise")).verdict == WARNING
    assert checks.environment(dataclasses.replace(TPU, hugepages="always")).verdict == OK
    assert checks.environment(dataclasses.replace(GOOD, hugepages="madvise")).verdict == OK


# Who has the chips.


def plant(root: pathlib.Path, pid: int, *targets: str, command: str = "") -> None:
    opened = root / "proc" / str(pid) / "fd"
    opened.mkdir(parents=True)
    for number, target in enumerate(targets):
        (opened / str(number)).symlink_to(target)
    (opened.parent / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (opened.parent / "comm").write_text("kworker\n")


def test_a_tree_with_a_busy_tpu(tmp_path: pathlib.Path) -> None:
    for slot, (vendor, device) in enumerate(
        [("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x8086", "0x0063")]
    ):
        folder = tmp_path / f"sys/bus/pci/devices/0000:00:0{slot}.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{device}\n")
    (tmp_path / "sys/kernel/mm/transparent_hugepage").mkdir(parents=True)
    (tmp_path / "sys/kernel/mm/transparent_hugepage/enabled").write_text("always [madvise] never\n")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp/libtpu_lockfile").touch()
    plant(tmp_path, 4242, "/dev/null", "/dev/vfio/1", command="python train.py\nx")
    plant(tmp_path, 17, "/tmp/libtpu_lockfile (deleted)")
    plant(tmp_path, 18, "/dev/vfio1", "/tmp/libtpu_lockfile2", "socket:[1]", command="sh")
    here = facts.gather(tmp_path)
    assert here.chips == ("v5e", "v5e")
    assert (here.lock, here.hugepages) == ("mine", "madvise")
    assert here.holders == (
        Holder(17, "kworker", ("/tmp/libtpu_lockfile (deleted)",)),
        Holder(4242, "python train.py?x", ("/dev/vfio/1",)),
    )
    row = checks.in_use(here)
    assert row.verdict == FAILED
    assert "process 4242 (python train.py?x) has /dev/vfio/1" in row.seen
    assert "kill 17 4242" in row.do
    assert (tmp_path / "tmp/libtpu_lockfile").exists()


def test_processes_that_cannot_be_looked_into_are_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, 5, "/dev/accel0")
    plant(tmp_path, 6, "/dev/accel0")
    real = pathlib.Path.iterdir

    def refuse(path: pathlib.Path) -> Any:
        if path.parent.name == "5":
            raise PermissionError(13, "no")
        return real(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    found, hidden = facts.holders(tmp_path)
    assert [holder.pid for holder in found] == [6]
    assert hidden == 1
    seen = checks.in_use(dataclasses.replace(TPU, hidden=1)).seen
    assert "1 processes of other users could not be looked into" in seen


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of locks")
def test_a_lock_names_its_process_without_a_look_at_its_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/locks").symlink_to("/proc/locks")
    with open(tmp_path / "tmp/libtpu_lockfile", "w") as file:
        assert facts.holders(tmp_path) == ((), 0)
        fcntl.lockf(file, fcntl.LOCK_EX)
        found, _ = facts.holders(tmp_path)
    assert [(holder.pid, holder.paths) for holder in found] == [
        (os.getpid(), ("/tmp/libtpu_lockfile",))
    ]


@pytest.mark.parametrize(
    ("here", "verdict", "do"),
    [
        (GOOD, SKIPPED, ""),
        (TPU, OK, ""),
        (dataclasses.replace(TPU, holders=(BUSY,)), FAILED, "kill 4242"),
        (dataclasses.replace(GOOD, holders=(BUSY,)), OK, ""),
        (dataclasses.replace(TPU, lock="mine"), WARNING, "rm /tmp/libtpu_lockfile"),
        (dataclasses.replace(TPU, lock="foreign"), FAILED, "sudo rm /tmp/libtpu_lockfile"),
        (dataclasses.replace(GOOD, lock="foreign"), WARNING, "sudo lsof"),
        (dataclasses.replace(GOOD, lock="mine"), SKIPPED, ""),
    ],
)
def test_locks(here: Facts, verdict: str, do: str) -> None:
    row = checks.in_use(here)
    assert row.verdict == verdict
    assert do in row.do
    assert bool(do) == bool(row.do)


# The coordinator.


def test_reach_tells_listening_refused_and_silent_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert checks.reach(f"127.0.0.1:{port}", 20) == "connected"
    assert checks.reach(f"127.0.0.1:{port}", 20) == "refused"
    # A look-up that hangs, as one does where the name server is gone.
    done = threading.Event()

    def hang(*_: Any, timeout: float) -> None:
        done.wait(60)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", hang)
    assert checks.reach("host:1", 0.1) == "silent"
    done.set()


@pytest.mark.parametrize(
    ("outcome", "verdict", "seen"),
    [
        ("connected", OK, "listens there"),
        ("refused", FAILED, "nothing listens"),
        ("silent", FAILED, "no answer within 5 s"),
        ("unknown name", FAILED, "no such host"),
        ("No route to host", FAILED, "No route to host"),
    ],
)
def test_the_coordinator(outcome: str, verdict: str, seen: str) -> None:
    row = checks.coordinator("t-0:8476", outcome, 5.0)
    assert (row.verdict, seen in row.seen, bool(row.do)) == (verdict, True, verdict == FAILED)
    assert checks.coordinator("", "", 5.0).verdict == SKIPPED


# Devices.

V5E = {"platform": "tpu", "kind": "TPU v5 lite", "local": 4, "total": 16, "index": 1}
V5E |= {"processes": 4}
CPU = {"platform": "cpu", "kind": "cpu", "local": 1, "total": 1, "index": 0, "processes": 1}


@pytest.mark.parametrize(
    ("seen", "here", "expect", "verdict", "says"),
    [
        (V5E, TPU, "v5e-16", OK, "all of v5e-16"),
        (V5E, TPU, "", OK, "nothing was expected"),
        (V5E | {"total": 4, "processes": 1}, TPU, "v5e-16", FAILED, "all 4 hosts"),
        (V5E, TPU, "v6e-16", FAILED, "TPU v6 lite"),
        (
            V5E | {"local": 3},
            TPU,
            "",
            FAILED,
            "JAX sees 3 devices here, the machine's chips have 4",
        ),
        (CPU, TPU, "", FAILED, "runs on cpu, but the machine has 4 TPU chips"),
        (CPU, GOOD, "v5e-1", FAILED, "--expect says v5e-1"),
        (CPU, GOOD, "", OK, "1 × cpu"),
    ],
)
def test_devices(seen: dict[str, Any], here: Facts, expect: str, verdict: str, says: str) -> None:
    row = checks.devices(seen, here, *checks.expected(expect, {}))
    assert row.verdict == verdict
    assert says in f"{row.seen} {row.do}"


def test_what_is_expected_where_nothing_is_said() -> None:
    slices = {"TPU_ACCELERATOR_TYPE": "v5p-16", "MEGASCALE_NUM_SLICES": "2"}
    found, _ = checks.expected("", slices)
    assert found == topology.find("2*v5p-16")
    assert checks.expected("v6e-8", slices)[0] == topology.find("v6e-8")
    found, why = checks.expected("", {"TPU_ACCELERATOR_TYPE": "v2-8"})
    assert found is None
    assert "no such TPU" in why


# Judging what was measured.


@pytest.mark.parametrize(("share", "verdict"), [(0.0, OK), (1.0, OK), (1.01, FAILED)])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_errors_against_bounds(share: float, verdict: str, bad: float | None) -> None:
    shares = [0.5, share] if bad is None else [0.5, share, bad]
    errors = [{"what": "y", "where": f"TPU_{i}", "share": s} for i, s in enumerate(shares)]
    row = rates.numerics("matmul", {"bound": "b", "errors": errors})
    assert row.verdict == (verdict if bad is None else FAILED)
    if row.verdict == FAILED:
        assert f"TPU_{len(shares) - 1}" in row.seen
    assert rates.numerics("matmul", {"bound": "b", "errors": []}).verdict == FAILED
    assert rates.numerics("psum", {"skipped": "one device"}) == Row("psum", SKIPPED, "one device")


def timed(*devices: list[float]) -> dict[str, Any]:
    seconds = {f"TPU_{i}": samples for i, samples in enumerate(devices)}
    return {"what": "w", "unit": "GB/s", "scale": 1e9, "work": 1e9, "seconds": seconds}


@pytest.mark.parametrize(
    ("samples", "peak", "verdict", "says"),
    [
        ([[1.0, 2.0, 1.25]], 1e9, OK, "0.8 GB/s (0.5 to 1 in 3), 80 % of 1 (v5e)"),
        ([[1.0, 2.0, 1.25]], None, OK, "0.8 GB/s (0.5 to 1 in 3), v5e"),
        ([[2.1]], 1e9, FAILED, "48 % of 1"),
        ([[0.5]], 1e9, WARNING, "more than there can be"),
        ([[1.0], [1.5]], 1e9, WARNING, "TPU_1, the slowest of 2; fastest 1"),
        ([[1.0], [1.1]], 1e9, OK, "TPU_1, the slowest of 2"),
        ([[1.0], [3.0]], 1e9, FAILED, "TPU_1 lags"),
    ],
)
def test_rates(samples: list[list[float]], peak: float | None, verdict: str, says: str) -> None:
    row = rates.rate("r", timed(*samples), peak, "v5e", 0.5)
    assert row.verdict == verdict
    assert says in row.seen


def box(*shape: int) -> list[tuple[int, ...]]:
    return list(np.ndindex(*shape))


@pytest.mark.parametrize(
    ("kind", "coords", "slices", "says"),
    [
        ("TPU v5 lite", box(4, 4, 1), 1, (2 * 45e9, "2 links of v5e")),
        ("TPU v5 lite", box(16, 16, 1), 1, (4 * 45e9, "4 links of v5e")),
        ("TPU v5", box(2, 2, 1), 1, (2 * 90e9, "2 links of v5p")),
        ("TPU v5", box(4, 4, 8), 1, (6 * 90e9, "6 links of v5p")),
        ("TPU7x", 2 * box(2, 2, 1), 1, (2 * 100e9, "2 links of 7x")),
        ("TPU v5 lite", box(1, 1, 1), 1, (None, "one chip has no links to compare with")),
        ("TPU v5 lite", box(4, 4, 1), 2, (None, "the network between slices is not in the table")),
        ("TPU v5 lite", box(2, 2, 1)[:3], 1, (None, "the devices fill no box of 2x2x1 chips")),
        ("cpu", [], 1, (None, "no table for this device")),
    ],
)
def test_links(kind: str, coords: Any, slices: int, says: tuple[float | None, str]) -> None:
    assert rates.links({"kind": kind, "coords": coords, "slices": slices}) == says
