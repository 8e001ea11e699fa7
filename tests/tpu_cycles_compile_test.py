"""Tests of tpu.cycles with the compiler of TPUs. References are of libtpu 0.0.42; 0.0.50 agrees
with their cycles within 3 %. No TPU was used for either."""

import importlib.util
import json
import os
import pathlib
from typing import Any

import pytest

from tpu import _cycles_compile, cycles

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)
pytestmark = [pytest.mark.tpu, needs_compiler]


def estimate(kernel: str, target: str, **options: Any) -> _cycles_compile.Kernel:
    generation = cycles.targets(target)[0]
    name = f"tpu._cycles_kernels:{kernel}"
    (found,) = _cycles_compile.compile_kernels(name, options, generation)
    return found


@pytest.mark.parametrize(
    ("target", "expected", "mxu"), [("v5e", 158_496, 0.83), ("v5p", 81_101, None),
                                    ("v6e", 71_680, 0.57)],
)  # fmt: skip
def test_matmul_takes_the_known_cycles(target: str, expected: int, mxu: float | None) -> None:
    before = dict(os.environ)
    found = estimate("matmul", target)
    assert found.cycles == pytest.approx(expected, rel=0.1), found.source
    if mxu is not None:
        assert found.mxu == pytest.approx(mxu, rel=0.1)
    assert dict(os.environ) == before


def test_v4_has_bundles_but_no_cycles() -> None:
    found = estimate("matmul", "v4")
    assert found.cycles is None
    assert found.source.startswith("unavailable: ")
    assert "only supported on" in found.source
    assert found.mxu > 0.5


def test_splash_is_estimated_from_its_blocks() -> None:
    """1,350 bundles on v5e, MXU 76 %; its profile, which takes data for 0, is not shown."""
    found = estimate("splash", "v5e")
    assert found.inner.end - found.inner.start == pytest.approx(1_350, rel=0.1)
    assert found.mxu == pytest.approx(0.76, rel=0.1)
    assert found.source == "bundles"
    assert found.cycles == (found.inner.end - found.inner.start) * 4 * (8 * 9 // 2)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("v5e", {512: 285_986, 1024: 253_126}), ("v6e", {512: 216_485, 1024: 166_388})],
)
def test_flash_attention_is_ranked(
    target: str, expected: dict[int, int], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "out.json"
    arguments = ["--kernel=flash_attention", f"--target={target}", "--sweep=block_q=512,1024"]
    assert cycles.main([*arguments, f"--json={file}"]) == 0
    made = json.loads(file.read_text())["points"]
    assert [p["options"]["block_q"] for p in made] == [1024, 512]
    assert made[0]["seconds"] < made[1]["seconds"]
    for p in made:
        reference = expected[p["options"]["block_q"]]
        assert p["kernels"][0]["cycles"] == pytest.approx(reference, rel=0.1)


def test_what_does_not_fit_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A user's own kernel; the sweep goes on after a point that fails."""
    (tmp_path / "mine.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "from jax.experimental import pallas as pl\n"
        "def scale(rows):\n"
        "    def body(x, out):\n"
        "        out[...] = 2 * x[...]\n"
        "    x = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)\n"
        "    spec = pl.BlockSpec((rows, 1024), lambda i: (i, 0))\n"
        "    return pl.pallas_call(body, grid=(8192 // rows,), in_specs=[spec],\n"
        "                          out_specs=spec, out_shape=x), (x,)\n"
        "def crash():\n"
        "    import os\n"
        "    os.abort()\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    assert cycles.main(["--kernel=mine:scale", "--target=v5e", "--sweep=rows=4096,256"]) == 0
    out = capsys.readouterr().out
    assert "v5e rows=4096: unavailable: out of VMEM: needs " in out
    assert cycles.main(["--kernel=mine:crash", "--target=v5e"]) == 1
    assert "unavailable: the compiler crashed" in capsys.readouterr().out
    assert cycles.main(["--kernel=mine:scale", "--target=v5e"]) == 2
    assert "needs rows" in capsys.readouterr().err
    assert cycles.main(["--kernel=mine:scale", "--target=v5e", "--sweep=row=1"]) == 2
    assert "has no option 'row'" in capsys.readouterr().err
