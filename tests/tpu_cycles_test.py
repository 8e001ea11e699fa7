"""Tests of tpu.cycles. What the compiler wrote is in tests/golden: of the kernel `matmul`, 256³ in
blocks of 128, for v6e, by libtpu 0.0.50; lines of the listing are cut after 60 characters."""

import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from tpu import (
    _cycles_child,
    _cycles_compile,
    _cycles_kernels,
    _cycles_report,
    bundles,
    cycles,
    topology,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
NESTED = """
     0   :  { %1 = sld }
   0x1 LB: > { %2 = vadd }
   0x2   :  {}
   0x3 LB: > > { %3 = vmatmul }
   0x4   :  {}
   0x5   : > { %4 = vmatmul }
   0x6 PF: > { %5 = vst }
trailing comment of the bundle above */ }
   0x7   :  { %6 = halt }
"""


def golden(what: str) -> str:
    return (GOLDEN / f"tpu_matmul_{what}.txt").read_text(encoding="utf-8")


def test_recorded_files_are_read() -> None:
    assert bundles.read_profile(golden("profile")) == bundles.Profile("matmul.1", 4731, 1)
    units, blocks = bundles.read_units(golden("units")), bundles.read_blocks(golden("bundles"))
    assert blocks[-1].end == len(units.used) == 436
    assert all(a.end == b.start for a, b in itertools.pairwise(blocks))
    inner = bundles.inner(units, blocks)
    assert (inner.label, inner.end - inner.start, inner.loops) == ("PF", 253, 1)
    # 128³ on two units of 256 x 256, each of whose cells multiplies twice a cycle, half of it idle.
    assert units.count(bundles.MXU, inner.start, inner.end) == units.count(bundles.MXU, 0, 436)
    assert 0.05 < units.share(bundles.MXU, inner.start, inner.end) < 0.07


def test_blocks_end_where_loops_do() -> None:
    found = [(b.label, b.start, b.end, b.loops) for b in bundles.read_blocks(NESTED)]
    assert found == [
        ("", 0, 1, 0), ("LB", 1, 3, 1), ("LB", 3, 5, 2), ("", 5, 6, 1), ("PF", 6, 7, 1),
        ("", 7, 8, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("mxu", "start"), [((0, 0, 0, 1, 0, 9, 0, 0), 3), ((0,) * 8, 6)])
def test_the_inner_block_is_where_the_work_is(mxu: tuple[int, ...], start: int) -> None:
    """The most nested one with a matrix unit; else by the vector units."""
    valu = (0, 1, 0, 0, 0, 0, 3, 9)
    units = bundles.Units({"MXU": 9, "VALU": 9}, tuple(zip(mxu, valu, strict=True)))
    assert bundles.inner(units, bundles.read_blocks(NESTED)).start == start


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (bundles.read_profile, "", "no static profile"),
        (bundles.read_units, "MXU\n1", "no table"),
        (bundles.read_units, "== CAPA\nMXU\n1\n== UTILIZATION:\n1 2", "several lengths"),
        (bundles.read_blocks, "nothing", "no listing"),
        (bundles.read_blocks, "     0   :  { a }\n   0x2   :  { b }", "from bundle 0 to 0x2"),
    ],
)
def test_files_that_look_otherwise_are_no_numbers(read: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


def test_files_of_two_programs_are_no_numbers() -> None:
    units = bundles.Units({"MXU": 1, "VALU": 1}, ((0, 0),))
    with pytest.raises(ValueError, match="8 bundles, the table of units 1"):
        bundles.inner(units, bundles.read_blocks(NESTED))


def described(fn: Any, *arguments: Any) -> dict[str, Any]:
    (call,) = _cycles_child.pallas_calls(jax.make_jaxpr(fn)(*arguments).jaxpr)
    return _cycles_child.describe(call)


def test_bytes_are_those_of_the_blocks_that_are_moved() -> None:
    fn, arguments = _cycles_kernels.matmul(256, 384, 512, 128, 128, 256)
    found = described(jax.jit(fn), *arguments)
    # By hand: m/128 * n/128 * k/256 steps = 2 * 3 * 2, each with new blocks of x and y.
    assert found["bytes"] == 2 * (12 * 128 * 256 + 12 * 256 * 128 + 6 * 128 * 128)
    assert found["bytes_exact"]
    assert not found["reads_scalars"]


def test_a_block_that_stays_is_moved_once() -> None:
    x = jax.ShapeDtypeStruct((8 * 7, 128), jnp.float32)
    call = pl.pallas_call(
        lambda x, y, out: None,
        grid=(7,),
        in_specs=[
            pl.BlockSpec((8, 128), lambda i: (i, 0)), pl.BlockSpec((8, 128), lambda i: (i // 4, 0))
        ],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    )  # fmt: skip
    assert described(call, x, x)["bytes"] == (7 + 2 + 1) * 8 * 128 * 4


def test_a_grid_that_depends_on_data_is_seen() -> None:
    fn, arguments, runs = _cycles_kernels.splash(T=1024, N=3, block_q=128, block_kv=256)
    found = described(fn, *arguments)
    assert found["reads_scalars"]
    assert not found["bytes_exact"]
    # Of 8 x 4 blocks, causal: 1, 1, 2, 2, 3, 3, 4, 4 in each of 3 heads.
    assert runs == 3 * 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F1122 18:38:01.5 1 llo_dumper.cc:1697] Static LLO profiling of a.1 failed: INVALID: No.",
         "INVALID: No."),
        ("one\ntwo\n\n", "two"), ("", "it said nothing"),
        ("x\nScoped allocation with size 20.00M and limit 16.00M exceeded scoped vmem limit",
         "x"),
    ],
)  # fmt: skip
def test_a_crash_is_told_in_one_line(text: str, message: str) -> None:
    last = _cycles_compile.crash(text)
    assert last == message or last.startswith("out of VMEM: needs 20.00M, the limit is 16.00M")
    assert "\n" not in last


def test_a_compile_has_an_environment_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--of_the_user")
    before = dict(os.environ)
    made = _cycles_compile.environment(tmp_path, "--mine=1", profile=True)
    assert "--mine=1" in made["LIBTPU_INIT_ARGS"]
    assert "of_the_user" not in made["LIBTPU_INIT_ARGS"]
    assert "static_llo_profile" in made["LIBTPU_INIT_ARGS"]
    assert dict(os.environ) == before


@pytest.fixture(autouse=True)
def compiles_may_start():
    _cycles_compile.start()


@pytest.fixture
def sleeper(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Instead of Python, a program that starts another and waits; the file has that one's id."""
    script, ids = tmp_path / "python", tmp_path / "ids"
    script.write_text(f"#!/bin/sh\nsleep 100 &\necho $! >> {ids}\nwait\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return ids


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            # A process that has ended but that nobody has waited for is still there, as Z.
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_compile_that_hangs_is_ended(sleeper: pathlib.Path) -> None:
    with pytest.raises(_cycles_compile.Unavailable, match=r"more than --timeout=1 s"):
        _cycles_compile.compile_kernels("a:b", {}, topology.GENERATIONS[1], limit_s=1)
    assert gone(int(sleeper.read_text()))


def test_stop_all_ends_what_compiles(sleeper: pathlib.Path) -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            _cycles_compile.compile_kernels("a:b", {}, topology.GENERATIONS[1], limit_s=100)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not (sleeper.exists() and sleeper.read_text().endswith("\n")):
        time.sleep(0.02)
    first = int(sleeper.read_text())
    # Ended without an answer, it would be tried again without the profile: not now.
    _cycles_compile.stop_all()
    thread.join(60)
    assert not thread.is_alive()
    assert gone(first)
    assert isinstance(errors[0], _cycles_compile.Unavailable)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--kernel is needed: matmul, flash_attention"),
        (["--kernel=matmull"], "or module:function, got 'matmull'"),
        (["--kernel=matmul", "--target=v9"], "no such TPU 'v9'; there are v4"),
        (["--kernel=matmul", "--target=v5e-3"], "v5e is let with"),
        (["--kernel=matmul", "--sweep=block_m"], "got 'block_m'"),
        (["--kernel=matmul", "--sweep=block_m=1,,2"], "got 'block_m=1,,2'"),
        (["--kernel=matmul", "--sweep=a=1 a=2"], "a is given twice"),
        (["--kernel=matmul", "--sweep=a=1,1"], "has a value twice"),
        (["--kernel=matmul", "--sweep=a=nan"], "must be finite"),
        (["--kernel=matmul", "--jobs=0"], "--jobs must be at least 1"),
        (["--kernel=matmul", "--timeout=0"], "--timeout must be > 0"),
        (["--kernel=matmul", "--json=/nowhere/at/all"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert cycles.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cycles.main(["--kernel=matmul"]) == 2
    assert capsys.readouterr().err == f"error: {cycles.NO_LIBTPU}\n"


def point(cycles_: float | None, moved: int, **options: Any) -> cycles.Point:
    generation = topology.GENERATIONS[1]
    kernel = _cycles_compile.Kernel(
        "k.1", 1, cycles_, "profile" if cycles_ else "unavailable: because", 7,
        bundles.Block("LB", 2, 5, 1), 0.5, 0.25, 0.0, 0.0, 0, 0, moved, True,
        cycles_ and cycles_ / generation.clock_hz, moved / generation.device_hbm_bytes_per_s,
    )  # fmt: skip
    return cycles.Point("v5e", options, (kernel,))


def test_ranking_takes_the_longer_of_compute_and_memory(capsys: pytest.CaptureFixture) -> None:
    slow_memory = point(1_500, 819_000_000, b=1)  # 1 us of compute, 1 ms of memory
    compute = point(15_000, 819, b=2)
    unknown, failed = point(None, 1, b=3), cycles.Point("v5e", {"b": 4}, why="no VMEM")
    order = cycles.ranked([unknown, failed, slow_memory, compute])
    assert [p.options["b"] for p in order] == [2, 1, 3, 4]
    assert slow_memory.seconds == pytest.approx(1e-3)
    assert (slow_memory.kernels[0].bound, compute.kernels[0].bound) == ("HBM", "compute")
    _cycles_report.show("k", order)
    out = capsys.readouterr().out
    assert "cycles unavailable: because" in out
    assert "v5e b=4: unavailable: no VMEM" in out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["1", "2", "-", "-"]


def test_ctrl_c_ends_the_compiles_and_writes_what_is_known(tmp_path: pathlib.Path) -> None:
    """The kernel's function sleeps, so libtpu is not asked: an empty package stands for it."""
    (tmp_path / "libtpu.py").write_text("", encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, time\n"
        "def slow():\n"
        "    pathlib.Path('id').write_text(str(os.getpid()))\n"
        "    pathlib.Path('id').rename('pid')\n"
        "    time.sleep(100)\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tpu.cycles", "--kernel=mine:slow", "--json=out.json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert gone(int((tmp_path / "pid").read_text()))
    assert json.loads((tmp_path / "out.json").read_text())["interrupted"]
