"""Command line of an experiment: one frozen dataclass, every field an option `--name=value`."""

import dataclasses
import difflib
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")


class UsageError(ValueError):
    """A wrong argument; `parse` turns it into one line and exit code 2."""


def parse(
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    doc: str,
    argv: Sequence[str] | None = None,
) -> Config:
    """Make a config from the command line, or exit with a one-line error.

    `--preset=NAME` replaces defaults, other options then replace the preset's values, in any
    order. `--help` prints the docstring and every option with its value.

    Args:
      config: a frozen dataclass with a default for every field; fields are int, float, bool or str.
      presets: name to the fields it replaces; must have "default".
      doc: the experiment's docstring, for `--help`.
      argv: arguments; default `sys.argv[1:]`.
    Returns: an instance of `config`.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _parse(config, presets, doc, argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_positive(cfg: Any) -> None:
    """Raise a ValueError that names a field that is an int below 1."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if type(value) is int and value < 1:  # a bool is no size
            raise ValueError(f"--{field.name} must be at least 1, got {value}")


def _parse(
    config: type[Config], presets: Mapping[str, Mapping[str, Any]], doc: str, argv: Sequence[str]
) -> Config:
    types = typing.get_type_hints(config)
    preset, given = "default", {}
    for argument in argv:
        if argument in ("-h", "--help"):
            print(_help(config, presets, doc))
            raise SystemExit(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UsageError(f"options look like --name=value, got {argument!r}; see --help")
        if name not in types and name != "preset":
            near = difflib.get_close_matches(name, [*types, "preset"], n=1)
            hint = f", did you mean --{near[0]}?" if near else "; see --help"
            raise UsageError(f"unknown option --{name}{hint}")
        if not equals:
            raise UsageError(f"--{name} needs a value: --{name}=...")
        if name == "preset":
            preset = value
        else:
            given[name] = _convert(name, value, types[name])
    if preset not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}, got {preset!r}")
    return config(**{**presets[preset], **given})


def _convert(name: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise UsageError(f"--{name} must be true or false, got {value!r}")
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"--{name} must be {kind.__name__}, got {value!r}") from None


def _help(config: Any, presets: Mapping[str, Mapping[str, Any]], doc: str) -> str:
    lines = [textwrap.dedent(doc).strip(), "", "Options (default values):"]
    lines += [f"  --{f.name}={f.default}" for f in dataclasses.fields(config)]
    lines += ["", "Presets:"]
    for name, fields in presets.items():
        changes = " ".join(f"{key}={value}" for key, value in fields.items())
        lines.append(f"  --preset={name}  {changes or 'the default values'}")
    return "\n".join(lines)
