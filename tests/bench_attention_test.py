"""The benchmark's arithmetic, its refusals, and that all contestants compute the same thing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import _bench_measure as measure
from experiments import _bench_peers as peers
from experiments import _bench_report as report
from experiments import bench_attention as bench
from experiments._bench_peers import Case

TINY = ["--sizes=13", "--N=2", "--H=7", "--rounds=2", "--matmul=16"]
CASES = [(mask, S, window) for mask in peers.MASKS for S, window in ((1, 1), (13, 5), (23, 40))]


def case(mask: str, S: int, window: int = 5, what: str = "forward", dtype: str = "float32") -> Case:
    return Case(mask, dtype, what, S, 2, 3, 7, window)


@pytest.mark.parametrize(("mask", "S", "window"), CASES)
def test_pairs_and_written_mask_are_what_the_library_allows(mask: str, S: int, window: int) -> None:
    made = case(mask, S, window)
    ours = peers.our_mask(made, peers.document_ids(S)).materialize(S, S)
    brute = [
        [
            s <= t
            and (mask != "window" or t - s < window)
            and (mask != "segments" or 4 * s // S == 4 * t // S)
            for s in range(S)
        ]
        for t in range(S)
    ]
    np.testing.assert_array_equal(peers.allowed(made)[0, 0], brute)
    np.testing.assert_array_equal(np.asarray(ours)[0, 0], brute)
    assert peers.pairs(made) == np.sum(brute)


def test_flops_count_both_products_and_gradients() -> None:
    forward, both = (peers.flops(case("causal", 11, what=what)) for what in peers.WHATS)
    assert forward == 4 * 2 * 3 * 7 * (11 * 12 // 2)
    assert both == 3.5 * forward


@pytest.mark.parametrize(
    ("mask", "what"),
    [("causal", "forward+backward"), ("window", "forward"), ("segments", "forward")],
)
def test_contestants_compute_the_same(mask: str, what: str) -> None:
    made = case(mask, 13, what=what)
    q_BTNH, k_BSNH, v_BSNH, _ = (x.astype(np.float64) for x in peers._numbers(2, 13, 3, 7))
    s_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(7)
    e_BNTS = np.where(peers.allowed(made), np.exp(s_BNTS), 0)
    p_BNTS = e_BNTS / e_BNTS.sum(-1, keepdims=True)
    out_BTNH = np.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH)
    ran: dict[str, list[np.ndarray]] = {}
    for peer in peers.PEERS:
        if peers.refusal(peer, made) is None:
            prepared = peers.prepare(peer, made)
            ran[peer] = prepared.values(prepared.run())
    assert {"dense", "blockwise", "jax.nn", "flax.linen", "flax.nnx"} <= set(ran)
    for peer, values in ran.items():
        assert len(values) == (4 if what == "forward+backward" else 1)
        np.testing.assert_allclose(values[0], out_BTNH, atol=1e-5, err_msg=peer)
        for this, other in zip(values, ran["dense"], strict=True):
            np.testing.assert_allclose(this, other, atol=2e-5, err_msg=peer)


def test_exponent_of_made_up_times() -> None:
    sizes = [256, 1024, 2048, 4096]
    # What lies below 1,024 must not count.
    values = [1e9, *(3e-6 * s**1.75 for s in sizes[1:])]
    fitted = report.exponent(sizes, values)
    assert fitted is not None
    assert fitted == pytest.approx(1.75, abs=1e-9)
    assert report.exponent(sizes[:3], values[:3]) is None


def test_ratios_are_taken_within_a_round() -> None:
    assert measure.ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == [3.0, 2.0, 4.0]
    assert measure.summarise([0.001, 0.002, 0.003]) == pytest.approx(
        {"ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5}
    )


def test_every_round_times_all_and_the_order_rotates() -> None:
    order: list[str] = []
    ready = {name: ((lambda name=name: order.append(name)), 1) for name in "abc"}
    seconds = measure.interleave(ready, 4)
    assert "".join(order) == "abcbcacababc"
    assert [len(mine) for mine in seconds.values()] == [4, 4, 4]


def test_budget_names_its_reason() -> None:
    assert measure.too_long(None, 4096, 1.0) is None
    assert measure.too_long((1024, 0.05), 4096, 1.0) is None
    said = measure.too_long((1024, 0.1), 4096, 1.0)
    assert said == "about 1.6 s a call predicted from S=1024, --limit_s=1"
    assert measure.too_large(5, 10) is None
    assert measure.too_large(7_000_000_000, 12_000_000_000) is not None
    assert measure.too_large(7_000_000_000, 0) is None


def row(S: int, what: str, over: dict[str, list[float]]) -> dict[str, Any]:
    made = {"mask": "causal", "dtype": "float32", "what": what, "S": S, "peer": "native"}
    return {**made, "ms": 1.0, "over": over}


def test_verdicts_come_out_either_way() -> None:
    picked = {f"float32 {what} {S}": "native" for what in peers.WHATS for S in report.DOUBLINGS}
    rows = [row(S, "forward", {"torch": [1.2, 1.0, 1.3]}) for S in report.DOUBLINGS]
    rows[2]["over"]["jax.nn"] = [3.9, 3.5, 4.5]
    rows.append(row(2048, "forward+backward", {"torch": [1.1, 0.9, 1.3]}))
    said = report.verdicts(rows, picked, ("float32",))
    verdicts = [each["verdict"] for each in said]
    assert verdicts == ["missed", "met", "not measured", "met where measured"]
    assert said[0]["measured"] == "native is 3.90 [3.50, 4.50] times as fast as jax.nn at S=4096"
    assert said[3]["measured"].endswith("not measured at S=1024, 4096, 8192")
    rows[-1]["over"]["torch"][0] = 0.99
    assert report.verdicts(rows, picked, ("float32",))[3]["verdict"] == "missed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes=256,x"], "--sizes must be integers >= 1, got 'x'"),
        (["--sizes=0"], "--sizes must be integers >= 1, got '0'"),
        (["--sizes=7,"], "--sizes must be a comma-separated list, got '7,'"),
        (["--dtypes=float16"], "--dtypes must be among float32, bfloat16, got 'float16'"),
        (["--masks=causal,causal"], "--masks names something twice: 'causal,causal'"),
        (["--what=backward"], "--what must be among forward, forward+backward, got 'backward'"),
        (["--peers=keras"], "--peers must be among native, "),
        (["--peers=splash"], "--peers: splash needs a TPU"),
        (["--rounds=0"], "--rounds must be at least 1, got 0"),
        (["--limit_s=0"], "--limit_s must be > 0, got 0.0"),
        (["--limit_s=nan"], "--limit_s must be a number, got 'nan'"),
        (["--out="], "--out must name a folder"),
        (["--round=3"], "unknown option --round, did you mean --rounds?"),
    ],
)
def test_wrong_option_is_one_line_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        out = [] if arguments == ["--out="] else [f"--out={tmp_path}"]
        code: Any = bench.main([*out, *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_whole_run_prints_tables_and_writes_json_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", ("dense", "splash", "jax.nn", "torch"))
    options = [*TINY, "--dtypes=float32", "--what=forward", "--masks=window", "--window=3"]
    assert bench.main([*options, f"--out={tmp_path}", "--memory=false"]) == 0
    shown = capsys.readouterr().out
    assert "window, float32, forward" in shown
    assert "NOT MEASURED  causal forward, float32: >= 4 x jax.nn at S=4096" in shown
    assert "not splash: needs a TPU" in shown
    made = json.loads((tmp_path / "results.json").read_text())
    assert made["complete"]
    ran = {row["peer"] for row in made["rows"]}
    assert ran - {"torch"} == {"dense", "jax.nn"}
    assert ("torch" in ran) == (peers.torch() is not None)
    for each in made["rows"]:
        assert len(each["samples_ms"]) == 2
        assert 0 < each["q1_ms"] <= each["ms"] <= each["q3_ms"]
        assert ("jax.nn" in each["over"]) == (each["peer"] != "jax.nn")
    assert (tmp_path / "window.png").read_bytes().startswith(b"\x89PNG")


def test_over_budget_is_left_out_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--peers=dense", "--dtypes=float32", "--what=forward", "--memory=false"]
    assert bench.main([*options, f"--out={tmp_path}", "--limit_s=1e-9"]) == 0
    (left,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert left["left_out"].endswith("--limit_s=1e-09")
    assert "--limit_s=1e-09" in capsys.readouterr().out


def test_stopped_run_leaves_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peers.prepare

    def prepare(peer: str, case: Case) -> peers.Prepared:
        if case.what == "forward+backward":
            raise KeyboardInterrupt
        return real(peer, case)

    monkeypatch.setattr(peers, "prepare", prepare)
    options = [*TINY, "--peers=dense", "--dtypes=float32", "--memory=false"]
    assert bench.main([*options, f"--out={tmp_path}"]) == 130
    made = json.loads((tmp_path / "results.json").read_text())
    assert not made["complete"]
    assert [row["what"] for row in made["rows"]] == ["forward"]
    assert "stopped" in capsys.readouterr().err


def test_memory_is_weighed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Case("causal", "float32", "forward", 512, 1, 4, 8, 5)
    weighed = measure.weigh("dense", made, timeout_s=60)
    assert "failed" not in weighed
    # At least one copy of the logits, and not many.
    if weighed["how"] == "VmHWM":
        logits = 4 * 4 * 512**2
        assert logits <= weighed["bytes"] <= 8 * logits
    monkeypatch.setattr(measure.sys, "executable", "false")
    assert measure.weigh("dense", made, 60) == {"failed": "memory: exit status 1"}
