"""Tests of jax_attn.command_line beyond those of the experiments: configs that nest."""

import dataclasses
from typing import Any

import pytest

from jax_attn.command_line import check_positive, parse, parse_both


@dataclasses.dataclass(frozen=True)
class Sizes:
    D: int = 64
    rope: bool = True


@dataclasses.dataclass(frozen=True)
class Model:
    sizes: Sizes = Sizes(D=32)
    name: str = "plain"


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    out: str = "runs/x"
    allow_config_change: bool = False


PRESETS: dict[str, dict[str, Any]] = {"default": {}, "wide": {"model.sizes.D": 128, "rate": 0.2}}


def test_fields_of_fields_have_dots() -> None:
    assert parse(Config, PRESETS, "", []) == Config()
    got = parse(Config, PRESETS, "", ["--model.sizes.rope=false", "--model.name=x"])
    assert got == Config(Model(Sizes(32, False), "x"))
    got = parse(Config, PRESETS, "", ["--preset=wide", "--rate=3"])
    assert got == Config(Model(Sizes(128)), 3.0)


def test_options_beside_the_config() -> None:
    both = parse_both(Config, Options, PRESETS, "", ["--allow-config-change", "--rate=1e-3"])
    assert both == (Config(rate=1e-3), Options(allow_config_change=True))
    both = parse_both(Config, Options, PRESETS, "", ["--allow_config_change=false", "--out=y"])
    assert both == (Config(), Options(out="y"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.size.D=3", "unknown option --model.size.D, did you mean --model.sizes.D?"),
        ("--model=3", "unknown option --model"),
        ("--model.sizes.D=3.5", "--model.sizes.D must be int, got '3.5'"),
        ("--model.sizes.rope", "--model.sizes.rope needs a value"),
        ("--allow-config-chang", "did you mean --allow_config_change?"),
        ("--allow-config-change=maybe", "must be true or false, got 'maybe'"),
        ("--preset=big", "--preset must be one of default, wide, got 'big'"),
    ],
)
def test_wrong_arguments_are_one_line(argument: str, message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_both(Config, Options, PRESETS, "", [argument])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_help_shows_dotted_names(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_both(Config, Options, PRESETS, "What it does.", ["--help"])
    said = capsys.readouterr().out
    for line in ("What it does.", "--model.sizes.D=32", "--out=runs/x", "--preset=wide"):
        assert line in said


def test_sizes_within_a_config_are_checked_by_their_dotted_name():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        D: int = 0

    @dataclasses.dataclass(frozen=True)
    class Outer:
        steps: int = 1
        model: Inner = Inner()

    with pytest.raises(ValueError, match=r"--model\.D must be at least 1, got 0"):
        check_positive(Outer())
    check_positive(Outer(model=Inner(7)))


@pytest.mark.parametrize("rate", [-1.0, float("inf"), -float("inf")])
def test_a_rate_is_neither_negative_nor_endless(rate):
    @dataclasses.dataclass(frozen=True)
    class Outer:
        rate: float = 0.0

    check_positive(Outer())
    with pytest.raises(ValueError, match=r"--rate must be at least 0 and finite, got -?(1|inf)"):
        check_positive(Outer(rate))
