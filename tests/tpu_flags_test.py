"""Tests of tpu.flags: presets, and the check of flags by the TPU's compiler itself."""

import importlib.util
import os

import pytest

from tpu import flags, topology

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)
SLICES = ("v4-8", "v5e-16", "v5p-16", "v6e-16", "7x-16", "2*v5e-16")


@pytest.mark.parametrize("flag", flags.FLAGS, ids=lambda flag: flag.name)
def test_a_flag_has_a_reason_and_a_source(flag: flags.Flag) -> None:
    assert len(flag.why) > 20
    assert flag.source.startswith("https://")
    assert set(flag.generations) <= set(flags.ALL)
    if flag.name == "xla_tpu_scoped_vmem_limit_kib":
        for g in topology.GENERATIONS:
            if g.name in flag.generations:
                assert int(flag.value) * 1024 <= g.vmem_bytes_per_core - 2**20


def test_a_preset_is_of_its_slice() -> None:
    names = {s: {f.name for f in flags.preset(topology.find(s))} for s in SLICES}
    assert "xla_tpu_enable_data_parallel_all_reduce_opt" in names["2*v5e-16"] - names["v5e-16"]
    assert "xla_tpu_megacore_fusion_allow_ags" in names["v5p-16"] - names["v5e-16"]
    assert "xla_tpu_enable_latency_hiding_scheduler" in set.intersection(*names.values())


def test_the_preset_is_a_line_for_a_shell(capsys: pytest.CaptureFixture) -> None:
    assert flags.main(["--target=v6e-16", "--use=memory"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    set_to = "--xla_latency_hiding_scheduler_rerun=5 --xla_tpu_rwb_fusion=false"
    assert first == f"export LIBTPU_INIT_ARGS='{set_to}'"
    assert rest
    assert all(line.startswith("#") for line in rest)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("--a=1 -b=2 --noc", []),
        ("", []),
        ("a=1", [("a=1", "has no --")]),
        ("--a 1", [("1", "stands apart from --a; write --a=1")]),
        ("-- --a=1", [("--", "ends the flags")]),
        ("--undefok=b --a", [("--undefok=b", "sets nothing")]),
        ("--helpfull", [("--helpfull", "sets nothing")]),
        ("--a-b=1", [("--a-b=1", "is no flag")]),
        ("--a=1 --a=2", [("--a", "twice")]),
    ],
)
def test_what_libtpu_leaves_out_in_silence_is_found(
    text: str, problems: list[tuple[str, str]]
) -> None:
    found = flags.misspelt(text)
    assert len(found) == len(problems)
    for problem, (flag, what) in zip(found, problems, strict=True):
        assert problem.flag == flag
        assert what in problem.what


def test_what_libtpu_writes_is_read() -> None:
    """Recorded with libtpu 0.0.50."""
    said = (
        "WARNING: Logging before InitGoogle() is written to STDERR\n"
        "ERROR: Missing the value for the flag 'xla_a'\n"
        "ERROR: Illegal value '' specified for flag 'xla_a'\n"
        "ERROR: Illegal value 'maybe' specified for flag 'xla_b'\n"
        "ERROR: Unknown command line flag 'xla_c'\n"
    )
    assert flags.read_errors(said) == (
        flags.Problem("--xla_c", "is not known to this libtpu"),
        flags.Problem("--xla_a", "needs a value"),
        flags.Problem("--xla_b", "does not take the value 'maybe'"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --target=v5e-16, or --check="),
        (["--check=   "], "--check has no flag in it"),
        (["--target=v5e-16", "--check=--a"], "give --target=v5e-16, or --check="),
        (["--target=v5e-3"], "v5e is let with"),
        (["--target=v5e-16", "--use=speed"], "--use must be overlap, memory, kernels"),
    ],
)
def test_wrong_arguments_say_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert flags.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_start_that_fails_otherwise_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(flags, "_start", lambda words: (1, "no space left on device"))
    with pytest.raises(ValueError, match=r"did not start with --a=1; it said: no space left"):
        flags.check("--a=1")


def test_without_libtpu_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert flags.main(["--check=--a=1"]) == 2
    assert capsys.readouterr().err == f"error: {flags.NO_LIBTPU}\n"


@pytest.mark.tpu
@needs_compiler
@pytest.mark.parametrize("use", flags.USES)
def test_libtpu_knows_every_preset(use: str) -> None:
    before = dict(os.environ)
    chosen = {f.name: f.text for s in SLICES for f in flags.preset(topology.find(s), use)}
    assert chosen
    assert flags.check(" ".join(chosen.values())) == ()
    assert dict(os.environ) == before


def test_every_flag_is_in_a_preset() -> None:
    chosen = {f for s in SLICES for use in flags.USES for f in flags.preset(topology.find(s), use)}
    assert chosen == set(flags.FLAGS)


@pytest.mark.tpu
@needs_compiler
def test_unknown_flags_and_bad_values_are_named(capsys: pytest.CaptureFixture) -> None:
    text = "--xla_tpu_scoped_vmem_limit_kb=65536 --xla_tpu_rwb_fusion=perhaps xla_a=1"
    assert flags.main(["--check", text]) == 1
    said = capsys.readouterr().err
    assert "xla_tpu_scoped_vmem_limit_kb is not known to this libtpu" in said
    assert "did you mean --xla_tpu_scoped_vmem_limit_kib?" in said
    assert "--xla_tpu_rwb_fusion does not take the value 'perhaps'" in said
    assert "xla_a=1 has no --" in said
