"""Command line of an experiment: frozen dataclasses, every field an option `--name=value`."""

import dataclasses
import difflib
import math
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Config = TypeVar("Config")
Options = TypeVar("Options")


class UsageError(ValueError):
    """A wrong argument; `parse` turns it into one line and exit code 2."""


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No options beside the config."""


def parse(
    config: type[Config],
    presets: Mapping[str, Mapping[str, Any]],
    doc: str,
    argv: Sequence[str] | None = None,
) -> Config:
    """Make a config from the command line, or exit with a one-line error.

    `--preset=NAME` replaces defaults, other options then replace the preset's values, in any
    order. `--help` prints the docstring and every option with its value. A field that is itself a
    dataclass has its fields behind a dot: `--model.D=64`. Dashes count as underscores.

    Args:
      config: a frozen dataclass with a default for every field; fields are int, float, bool, str or
        another such dataclass.
      presets: name to the fields it replaces, nested ones with their dot; must have "default".
      doc: the experiment's docstring, for `--help`.
      argv: arguments; default `sys.argv[1:]`.
    Returns: an instance of `config`.
    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Sizes:
      ...     D: int = 64
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     model: Sizes = Sizes()
      ...     learning_rate: float = 1e-3
      >>> parse(Config, {"default": {}}, "", ["--model.D=32"])
      Config(model=Sizes(D=32), learning_rate=0.001)
    """
    return parse_both(config, Nothing, presets, doc, argv)[0]


def parse_both(
    config: type[Config],
    options: type[Options],
    presets: Mapping[str, Mapping[str, Any]],
    doc: str,
    argv: Sequence[str] | None = None,
) -> tuple[Config, Options]:
    """Make a config, and options that are no part of it: what may differ when a run goes on.

    Args:
      config, presets, doc, argv: as for `parse`.
      options: a second dataclass, of the folder to write to, for example. A bool of it may be given
        without a value: `--strict`.
    Returns: an instance of each.
    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     D: int = 64
      >>> @dataclasses.dataclass(frozen=True)
      ... class Options:
      ...     strict: bool = False
      >>> parse_both(Config, Options, {"default": {}}, "", ["--strict", "--D=32"])
      (Config(D=32), Options(strict=True))
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _parse(config, options, presets, doc, argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_positive(cfg: Any, within: str = "") -> None:
    """Raise a ValueError that names a field that is an int below 1, or a float below 0 or infinite.

    Args:
      cfg: a dataclass; those in its fields are checked too.
      within: what the names of its fields begin with, such as "model.".
    Example:
      >>> check_positive(Nothing())
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            check_positive(value, f"{within}{field.name}.")
        elif type(value) is int and value < 1:  # a bool is no size
            raise ValueError(f"--{within}{field.name} must be at least 1, got {value}")
        elif isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"--{within}{field.name} must be at least 0 and finite, got {value}")


def _parse(
    config: type[Config],
    options: type[Options],
    presets: Mapping[str, Mapping[str, Any]],
    doc: str,
    argv: Sequence[str],
) -> tuple[Config, Options]:
    fields, beside = _fields(config), _fields(options)
    preset, given, seen = "default", {}, set()
    for argument in argv:
        if argument in ("-h", "--help"):
            print(_help(fields | beside, presets, doc))
            raise SystemExit(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UsageError(f"options look like --name=value, got {argument!r}; see --help")
        name = name.replace("-", "_")
        known = {**fields, **beside, "preset": (str, "default")}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean --{near[0]}?" if near else "; see --help"
            raise UsageError(f"unknown option --{name}{hint}")
        if not equals and name in beside and beside[name][0] is bool:
            value = "true"
        elif not equals:
            raise UsageError(f"--{name} needs a value: --{name}=...")
        if name in seen:
            raise UsageError(f"--{name} is given twice")
        seen.add(name)
        if name == "preset":
            preset = value
        else:
            given[name] = _convert(name, value, known[name][0])
    if preset not in presets:
        raise UsageError(f"--preset must be one of {', '.join(presets)}, got {preset!r}")
    values = {**presets[preset], **{name: x for name, x in given.items() if name in fields}}
    return _build(config, values), _build(options, {n: given[n] for n in given if n in beside})


def _fields(config: Any, before: str = "") -> dict[str, tuple[Any, Any]]:
    """Return type and default of every field by its dotted name."""
    types, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        kind, default = types[field.name], field.default
        if default is dataclasses.MISSING:
            raise TypeError(f"{config.__name__}.{field.name} needs a default, no default_factory")
        if dataclasses.is_dataclass(kind):
            below = _fields(kind, f"{before}{field.name}.")
            # The outer default may differ from the inner class's own.
            for name, (inner, _) in below.items():
                value = default
                for part in name.removeprefix(f"{before}{field.name}.").split("."):
                    value = getattr(value, part)
                found[name] = (inner, value)
        elif kind not in (int, float, bool, str):
            raise TypeError(
                f"{config.__name__}.{field.name} is {kind}, but an option is an int, a float, a "
                f"bool or a str; write a list as text, and read it where it is used"
            )
        else:
            found[before + field.name] = (kind, default)
    return found


def _build(config: Any, values: Mapping[str, Any]) -> Any:
    """Make an instance from values by dotted name; every field has a default."""
    return _replace(config(), values)


def _replace(instance: Any, values: Mapping[str, Any]) -> Any:
    """Replace fields of an instance by dotted name."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
        else:
            own[first] = value
    own |= {name: _replace(getattr(instance, name), below) for name, below in nested.items()}
    return dataclasses.replace(instance, **own)


def _convert(name: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise UsageError(f"--{name} must be true or false, got {value!r}")
        return value == "true"
    try:
        made = kind(value)
    except ValueError:
        raise UsageError(f"--{name} must be {kind.__name__}, got {value!r}") from None
    if made != made:
        raise UsageError(f"--{name} must be a number, got {value!r}")
    return made


def _help(
    fields: Mapping[str, tuple[Any, Any]], presets: Mapping[str, Mapping[str, Any]], doc: str
) -> str:
    lines = [textwrap.dedent(doc).strip(), "", "Options (default values):"]
    lines += [f"  --{name}={default}" for name, (_, default) in fields.items()]
    lines += ["", "Presets:"]
    for name, changed in presets.items():
        changes = " ".join(f"{key}={value}" for key, value in changed.items())
        lines.append(f"  --preset={name}  {changes or 'the default values'}")
    return "\n".join(lines)
