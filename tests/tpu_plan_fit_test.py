"""Tests of tpu.plan: what would fit, kernels and their declared costs, and how plans are shown."""

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from rich.console import Console

from tests.tpu_plan_test import made
from tpu import _plan_report, flops, plan, schedule
from tpu._plan_fit import what_fits
from tpu.estimate import Transfer, estimate
from tpu.hlo import parse
from tpu.topology import find

V5E = find("v5e-16")

# What fits.


@pytest.mark.parametrize(
    ("takes", "options", "largest", "said"),
    [
        (["batch", "remat"], {}, 40, "fits with remat='full': 1.0 GiB"),
        (["batch", "remat"], {}, 13, "fits with remat='full' and batch 12, and not with 16"),
        (["batch"], {}, 13, "fits with batch 12, and not with 16"),
        (["batch", "remat"], {"remat": "full"}, 13, "fits with remat='full' and batch 12"),
        (["batch"], {}, 3, "not even a batch of 4 fits: take more devices"),
        (["remat"], {}, 0, "also not with remat='full'; give the step's function `batch` to be"),
        ([], {}, 0, "give the step's function `batch` and `remat` to be told what would fit"),
    ],
)
def test_what_fits_is_found(takes: list[str], options: Any, largest: int, said: str) -> None:
    tried: list[int] = []

    def attempt(other: dict[str, Any]) -> dict[str, Any]:
        assert set(other) <= set(takes)
        tried.append(other.get("batch", 40))
        return {"fits": tried[-1] <= largest, "used": 2**30}

    found = what_fits(attempt, {"takes": takes, "batch": 40}, 4, options)
    if options:
        said = "fits with batch 12, and not with 16"
    assert found.startswith(said)
    assert len(tried) == len(set(tried)) <= 6


def test_what_has_no_answer_is_not_taken_for_too_large() -> None:
    why = {"failed": "no answer within --limit_s=9 seconds"}
    facts: dict[str, Any] = {"takes": ["batch", "remat"], "batch": 40}
    said = what_fits(lambda other: why, facts, 4, {})
    assert said == f"whether it fits with remat='full' is not known: {why['failed']}"
    answers = [{"fits": False}, {"fits": True}, why]
    said = what_fits(lambda other: answers.pop(0), facts, 4, {})
    assert said.startswith("fits with remat='full' and batch 20; whether batch 28 fits is not")
    said = what_fits(lambda other: {"fits": False}, {**facts, "batch": None}, 4, {})
    assert said.startswith("the batch is not known: give --batch")


def test_of_a_search_the_nearest_to_fitting_is_told_what_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    facts = {"fits": False, "used": 9, "takes": ["remat"], "batch": 4}
    far = plan.Plan(V5E, {"data": 16}, {**facts, "used": 10})
    near, refused = plan.Plan(V5E, {"fsdp": 16}, facts), plan.Plan(V5E, {"model": 16}, {})
    monkeypatch.setattr(plan._plan_ask, "ask", lambda *_: {"fits": True, "used": 2**30})
    cfg = plan.Config(search=True)
    done = list(plan.advised(cfg, {}, [far, near, refused], told.append))
    assert [one.advice for one in done] == ["", "fits with remat='full': 1.0 GiB", ""]
    assert told == ["v5e-16 fsdp=16 does not fit: try remat=full"]
    fits = plan.Plan(V5E, {"data": 4}, {"fits": True, "used": 1})
    done = list(plan.advised(cfg, {}, [far, near, fits], told.append))
    assert not any(one.advice for one in done)


# Kernels.

KERNEL = """
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:S(1)} parameter(0)
  ROOT %made = bf16[8,128]{1,0:S(1)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TU==","COST"has_communication":false}}
}
"""  # noqa: E501


def test_a_kernel_counts_with_the_cost_that_it_declares() -> None:
    def cost(flops: int, moved: int) -> schedule.Cost:
        said = f'"cost_estimate":{{"flops":"{flops}","bytes_accessed":"{moved}"}},'
        return schedule.cost(parse(KERNEL.replace("COST", said)), V5E.generation)

    clock = V5E.generation.clock_hz
    assert cost(197 * 10**12, 5).cycles == pytest.approx(clock)
    assert cost(5, 819 * 10**9).cycles == pytest.approx(clock)
    assert (cost(5, 5).priced_kernels, cost(5, 5).unpriced_kernels) == (1, 0)
    for none in (cost(0, 0), schedule.cost(parse(KERNEL.replace("COST", "")), V5E.generation)):
        assert (none.cycles, none.priced_kernels, none.unpriced_kernels) == (0, 0, 1)


def test_with_a_kernel_of_unknown_cost_there_is_no_step(capsys: Any) -> None:
    facts = {**made().facts, "unpriced_kernels": 2}
    found = plan.conclude(facts, V5E, {"fsdp": 16}, {"v5e": 1.2})
    assert found.estimate is not None
    assert (found.estimate.step, found.estimate.mfu, found.estimate.tokens_per_s) == (None,) * 3
    assert found.estimate.least == 1.0
    _plan_report.show([found, made()], 1.0)
    said = capsys.readouterr().out
    assert "Pallas kernels that are not in compute time: 2;" in said
    assert "1.00 s–?" in said
    json.dumps(_plan_report.record(found), allow_nan=False)


def test_a_utilisation_that_cannot_be_is_not_shown(capsys: Any) -> None:
    facts = {**made().facts, "model_flops": 9.57 * 16 * 197e12, "priced_kernels": 8}
    assert estimate(facts, [], V5E).mfu is None
    _plan_report.show([plan.conclude(facts, V5E, {"fsdp": 16}, {})], 1.0)
    said = capsys.readouterr().out
    assert "Pallas kernels that count with their declared cost, at peak rates: 8" in said
    assert "MFU is left out: it would be above 100 %" in said


def test_a_step_that_does_nothing_has_no_rates(capsys: Any) -> None:
    facts = {**made().facts, "cycles": 0.0, "most_cycles": 0.0, "hbm_bytes": 0.0}
    one = plan.conclude(facts, V5E, {"fsdp": 16}, {"v5e": 1.2})
    assert one.estimate is not None
    assert (one.estimate.least, one.estimate.tokens_per_s) == (0, None)
    _plan_report.show([one], 1.0)
    assert "MFU is left out" not in capsys.readouterr().out


def test_all_choices_of_a_kernel_without_a_cost_are_counted() -> None:
    def kernel(x: Any, out: Any) -> None:
        @pl.when(x[0, 0] > 0)
        def _() -> None:
            out[...] = x[...] @ x[...]

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    called = pl.pallas_call(kernel, out_shape=shape, grid=(3,))
    found = flops.count(jax.make_jaxpr(called)(shape))
    assert found.flops == 3 * 2 * 8**3
    assert "which may be more than runs" in found.notes[0]


# What is shown.


def test_times_and_sizes_have_digits() -> None:
    times = [0.0, 4.17e-11, 4.17e-8, 4.17e-5, 2.19e-3, 0.294, 0.99996, 2.066]
    assert [_plan_report.seconds(t) for t in times] == [
        "0 s", "<1 ns", "41.7 ns", "41.7 us", "2.19 ms", "294 ms", "1000 ms", "2.07 s",
    ]  # fmt: skip
    assert [_plan_report.gib(n) for n in (0, 3e6, 2**30)] == ["0.00", "0.0028", "1.00"]


def test_nothing_is_cut_where_nobody_looks(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    wide = dataclasses.replace(made(), mesh={"data": 2, "fsdp": 2, "context": 2, "model": 2})
    long = dataclasses.replace(made(), findings=("all-gather " * 40,))
    facts = {**wide.facts, "tokens": 14_051_512_345}
    wide = dataclasses.replace(wide, estimate=estimate(facts, [], V5E, 1e9))
    _plan_report.show([wide, long], 1.0)
    said = capsys.readouterr().out
    assert "14,051,512,345" in said
    assert "…" not in said
    assert "all-gather " * 39 in said


@pytest.mark.parametrize("width", [40, 90, 200])
def test_every_terminal_shows_mfu(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    wide = dataclasses.replace(made(), mesh={"data": 2, "fsdp": 2, "model": 4})
    _plan_report._tabulate(console, [wide, made(False)])
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "31.7%" in said
    assert "…" not in said
    assert ("A terminal of" in said) == (width == 90)
    assert all(len(line) <= width for line in said.splitlines())


def test_traffic_is_shown_for_each_axis(capsys: Any) -> None:
    moved = [
        Transfer("all-gather", "fsdp", ("bf16[500000]",), 3, 0.003, 0.001, "x"),
        Transfer("all-reduce", "fsdp", ("bf16[500000]",), 1, 0.001, 0.001, "x"),
        Transfer("all-reduce", "data", ("bf16[5000000000]",), 3, 0.003, 0.001, "x"),
        Transfer("all-reduce", "model", ("bf16[500000]",), 1, 0.002, 0.0, "x"),
    ]
    one = dataclasses.replace(made(), transfers=tuple(moved))
    _plan_report.show([one], 1.0)
    said = capsys.readouterr().out
    assert "network over fsdp: 4 MB a step, 4.00 ms, of which 2.00 ms bare" in said
    assert "network over data: 30,000 MB a step" in said
    assert "network over model: 1 MB a step, 2.00 ms, of which 0 s bare" in said
    found = _plan_report.record(one)["network"]
    assert found["model"] == {"bytes": 1e6, "seconds": 0.002, "bare": 0.0}


def test_what_was_not_kept_is_told(capsys: Any) -> None:
    one = made()
    one.facts["not_kept"] = "[Errno 13] Permission denied: '/x'"
    _plan_report.show([one], 1.0)
    assert "not kept for another time: [Errno 13]" in capsys.readouterr().out


# Arguments.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"v5": 1.2}', "no TPU 'v5'; there are v4, v5e, v5p, v6e, 7x"),
        ('{"v5e": -3}', "v5e must cost more than 0, got -3.0"),
        ('{"v5e": 0}', "v5e must cost more than 0"),
        ('{"v5e": NaN}', "v5e must cost more than 0, got nan"),
    ],
)
def test_prices_that_mean_nothing_are_refused(tmp_path: pathlib.Path, text: str, said: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        plan.check(plan.Config(step="a:b", prices=str(path)))


def test_paths_are_checked_before_anything_is_compiled(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for options, said in (
        ({"picture": "x.xyz"}, r"--picture=x.xyz must end in one of .*\.eps, .*\.png"),
        ({"picture": "x"}, "must end in one of"),
        ({"json": str(tmp_path)}, "is a folder: name a file in it"),
        ({"json": f"{tmp_path}/file/x.json"}, "file takes no files"),
    ):
        with pytest.raises(ValueError, match=said):
            plan.check(dataclasses.replace(plan.Config(step="a:b"), **options))
    _plan_report.check_paths(f"{tmp_path}/new/x.json", f"{tmp_path}/new/x.svg")
    assert not (tmp_path / "new").exists()


def test_a_wrong_argument_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(plan, "check", lambda cfg: [V5E])
    for facts, status in (({"refused": "x", "wrong": True}, 2), ({"refused": "x"}, 1)):
        monkeypatch.setattr(plan._plan_ask, "ask", lambda *_, facts=facts: facts)
        assert plan.main(["--step=a:b"]) == status
