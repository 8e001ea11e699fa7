"""tpu.plan through the TPU's compiler: what it says of steps that fit, do not, and are wrong."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from tpu import plan, topology

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jax[tpu]'",
    ),
]
CHIPS = "v5e-4"
ROOT = pathlib.Path(__file__).resolve().parent.parent


def planned(tmp_path: pathlib.Path, status: int, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "plan.json"
    given = [f"--json={out}", f"--cache={tmp_path / 'cache'}", *arguments]
    assert plan.main(given) == status
    return json.loads(out.read_text())


def test_libtpu_knows_as_many_devices() -> None:
    """Devices, hosts and places of each generation's slices are those of the compiler."""
    names = ["v4-8", "v5e-1", "v5e-8", "v5e-16", "v5p-16", "v6e-8", "v6e-256", "tpu7x-8"]
    code = (
        "import json, sys\n"
        "from tpu._plan_child import describe_slice\n"
        "from tpu.topology import find\n"
        "for name in sys.argv[1:]:\n"
        "    devices = describe_slice(find(name)).devices\n"
        "    ends = [max(d.coords[i] for d in devices) + 1 for i in range(3)]\n"
        "    hosts = len({d.process_index for d in devices})\n"
        "    print(json.dumps([len(devices), hosts, ends]))\n"
    )
    asked = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=os.environ | asked, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        found = topology.find(name)
        shape = [*found.shape, 1, 1][:3]
        assert json.loads(line) == [found.devices, found.hosts, shape], name


def test_meshes_are_ranked(tmp_path: pathlib.Path) -> None:
    step = "--step=tests.planned_step:plan_step"
    made = planned(tmp_path, 0, step, f"--target={CHIPS}", "--search", "--axes=data,fsdp")
    assert {(row["mesh"]["data"], row["mesh"]["fsdp"]) for row in made} == {(1, 4), (2, 2), (4, 1)}
    times = [row["estimate"]["step"] for row in made]
    assert times == sorted(times)


def test_a_step_is_planned_and_kept(tmp_path: pathlib.Path, capsys: Any) -> None:
    arguments = ["--step=tests.planned_step:plan_step", f"--target={CHIPS}"]
    (first,) = planned(tmp_path, 0, *arguments, f"--picture={tmp_path / 'plan.png'}")
    assert first["fits"]
    assert not first["cached"]
    assert 0 < first["used"] < first["limit"]
    assert first["lint"] == []
    found = first["estimate"]
    assert 0 < found["least"] <= found["step"] <= found["most"]
    # 6 operations for each weight and token: the logits' weights are the embedding's.
    assert first["model_flops"] == 6 * (3 * 8 * 512**2 + 256 * 512) * 16 * 1024
    repeated = 2 * (3 * 4 * 512**2) * 16 * 1024  # remat: of each layer, the product it keeps not
    assert first["flops"] == first["model_flops"] + repeated
    assert 0 < found["mfu"] < 1
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    (again,) = planned(tmp_path, 0, *arguments)
    assert again["cached"]
    assert again["estimate"] == found
    capsys.readouterr()


def test_a_step_takes_longer_with_length_and_shorter_with_devices(tmp_path: pathlib.Path) -> None:
    step = "--step=tests.planned_step:plan_step"
    longer = "--step=tests.planned_step:longer"
    (base,) = planned(tmp_path, 0, step, f"--target={CHIPS}", "--mesh=data=4")
    (more,) = planned(tmp_path, 0, step, "--target=v5e-8", "--mesh=data=8")
    (longer,) = planned(tmp_path, 0, longer, f"--target={CHIPS}", "--mesh=data=4")
    assert more["estimate"]["step"] < base["estimate"]["step"]
    assert longer["estimate"]["step"] > 2 * base["estimate"]["step"]
    assert longer["model_flops"] == 4 * base["model_flops"]


def test_attention_is_counted_block_by_block(tmp_path: pathlib.Path) -> None:
    """Where a block of keys holds all of a text, nothing of the causal mask is left out."""
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:attends", f"--target={CHIPS}")
    products = 6 * (2 * 12 * 256**2 + 256 * 256) * 16 * 256
    scores = 2 * 16 * 2 * 256**2 * 128  # L · B · N · T² · H: a product of attention, halved
    assert row["model_flops"] >= products + 2 * 6 * scores
    assert row["model_flops"] <= products + 2 * 7 * scores
    assert row["fits"]
    assert row["lint"] == []


def test_what_does_not_fit_is_said_with_what_would(tmp_path: pathlib.Path, capsys: Any) -> None:
    step = ["--step=tests.planned_step:too_large", f"--target={CHIPS}"]
    (row,) = planned(tmp_path, 1, *step, "--batch=8")
    assert not row["fits"]
    assert row["used"] > row["limit"]
    assert row["advice"].startswith("fits with remat='full'")
    assert "does not fit" in capsys.readouterr().out
    (row,) = planned(tmp_path, 1, *step, "--batch=32")
    said = re.fullmatch(
        r"fits with remat='full' and batch (\d+), and not with (\d+)", row["advice"]
    )
    assert said is not None
    last, first = int(said[1]), int(said[2])
    assert first == last + 4
    (row,) = planned(tmp_path, 0, *step, "--remat=full", f"--batch={last}")
    assert row["cached"]
    assert row["used"] <= row["limit"]
    (row,) = planned(tmp_path, 1, *step, "--remat=full", f"--batch={first}", "--fit=false")
    assert row["cached"]
    assert row["used"] > row["limit"]


def test_an_activation_that_travels_is_found(tmp_path: pathlib.Path) -> None:
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:gathers", f"--target={CHIPS}")
    said = [text for text in row["lint"] if "is no parameter" in text]
    assert any("all-gather of 33.6 MB over fsdp" in text for text in said)
    assert any("float32 factors" in text for text in row["lint"])


def test_sizes_that_are_powers_of_two_hide_nothing(tmp_path: pathlib.Path, capsys: Any) -> None:
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:whole_rows", f"--target={CHIPS}")
    said = [text for text in row["lint"] if "is no parameter" in text]
    assert any(text.startswith("all-gather of 8.4 MB over fsdp") for text in said)
    assert "network over fsdp: " in capsys.readouterr().out
    for target in ("v5e-4", "v4-8"):
        (row,) = planned(tmp_path, 0, "--step=tests.planned_step:matrices", f"--target={target}")
        assert row["lint"] == []


def test_kernels_take_time(tmp_path: pathlib.Path, capsys: Any) -> None:
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:kernels", "--target=v5e-1")
    ideal = 8 * 2 * 2048**3 / 197e12
    assert row["priced_kernels"] == 1
    assert ideal < row["estimate"]["compute"] < 3 * ideal
    assert 0.3 < row["estimate"]["mfu"] < 1
    (row,) = planned(tmp_path, 0, "--step=tests.planned_step:undeclared", "--target=v5e-1")
    assert row["unpriced_kernels"] == 1
    assert row["estimate"]["step"] is row["estimate"]["mfu"] is None
    assert "Pallas kernels that are not in compute time: 1;" in capsys.readouterr().out


def test_what_cannot_be_planned_says_why(tmp_path: pathlib.Path) -> None:
    step = "--step=tests.planned_step:plan_step"
    (row,) = planned(tmp_path, 1, step, f"--target={CHIPS}", "--batch=7")
    assert "7" in row["refused"]
    (row,) = planned(tmp_path, 2, "--step=tests.planned_step:nothing", f"--target={CHIPS}")
    assert row["refused"].endswith("has no function nothing")
    (row,) = planned(tmp_path, 2, step, f"--target={CHIPS}", "--preset=x")
    assert "takes no preset" in row["refused"]
