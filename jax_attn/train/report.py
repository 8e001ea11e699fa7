"""Draw how one or several runs went: a picture for a paper and a page of one file.

    python -m jax_attn.train.report RUN [RUN ...] [--out=FOLDER]

A RUN is a run's folder, or a JSONL file of `fit`. Writes FOLDER/curves.png and curves.html; FOLDER
is the first run's by default. The page has the curves, where the time went, what happened, and in
what the runs' configs differ. It can be made while a run trains; it asks the network for nothing.
"""

import argparse
import base64
import html
import io
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_attn.train.watch import host_share
from jax_attn.view.curves import curve, plot_curves

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.7rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
div { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #d9dee3 }
th:first-child, td:first-child, .text td { text-align: left } img { max-width: 100% }
.bar { display: flex; height: 1.1rem; min-width: 20rem } .bar span { display: block }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem 0 1rem }
"""
# In the order of a step; the last colour is for what has none.
_PARTS = {
    "data": "#E69F00", "compute": "#0072B2", "compile": "#56B4E9", "eval": "#009E73",
    "save": "#D55E00", "restore": "#CC79A7", "write": "#8c959f", "loop": "#d0d7de",
}  # fmt: skip


def read_rows(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows that `fit` wrote; half a line, where a run was killed or writes, is left out.

    Args:
      run: a run's folder or a JSONL file.
    Returns: the rows, non-finite numbers as floats again.
    Raises: ValueError naming the file that is missing or no text, or the line that is not JSON.
    Example:
      >>> import tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "metrics.jsonl").write_text('{"step": 0, "loss": "nan"}\\n{"st')
      >>> read_rows(folder)
      [{'step': 0, 'loss': nan}]
    """
    path = pathlib.Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if line.startswith("{") and not line.endswith("}"):
                continue
            raise ValueError(f"{path}, line {number}: not JSON: {line[:60]}") from None
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}, line {number}: no row of metrics: {line[:60]}")
        found.append({name: _number(value) for name, value in row.items()})
    if not found:
        raise ValueError(f"{path} has no rows")
    return found


def read_config(run: str | os.PathLike[str]) -> Any:
    """Read the config of a run's folder; None where there is none.

    Raises: ValueError naming the file and what is wrong with it.
    Example:
      >>> read_config("nowhere") is None
      True
    """
    path = pathlib.Path(run) / "run.json"
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(said, dict) or not isinstance(said.get("config"), dict):
        raise ValueError(f"{path} has no 'config', a mapping; it was not written by a Run")
    return said["config"]


def page(runs: Mapping[str, Sequence[Mapping[str, Any]]], configs: Mapping[str, Any]) -> str:
    """Make the page of one file.

    Args:
      runs: name to rows.
      configs: name to config, of the runs that have one.
    Returns: HTML.
    Example:
      >>> page({"first": [{"step": 0, "loss": 5.0}]}, {}).startswith("<!doctype html>")
      True
    """
    picture = io.BytesIO()
    plot_curves(runs).savefig(picture, dpi=200, format="png")
    image = base64.b64encode(picture.getvalue()).decode()
    body = [f'<img alt="metrics over steps" src="data:image/png;base64,{image}">', _table(runs)]
    spent = {name: _seconds(rows) for name, rows in runs.items()}
    if any(spent.values()):
        body.append("<h2>Where the time went</h2>" + _bars(spent))
    events = [
        f"<tr><td>{html.escape(name)}<td>{row['step']}<td>{html.escape(row['event'])}"
        for name, rows in runs.items()
        for row in rows
        if "event" in row
    ]
    if events:
        body.append(
            "<h2>What happened</h2><div><table class=text><tr><th>run<th>step<th>event"
            + "".join(events)
            + "</table></div>"
        )
    if configs:
        body.append(_configs(configs))
    title = html.escape(", ".join(runs))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{''.join(body)}"
    )


def _table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Make one line a run: how far, the last and the best losses, steps left out."""
    lines = []
    for name, rows in runs.items():
        steps, loss = curve(rows, "loss")
        held, skipped = curve(rows, "eval/loss")[1], curve(rows, "skipped")[1]
        rate, mfu = curve(rows, "tokens_per_s")[1], curve(rows, "mfu")[1]
        tail = loss[-max(1, len(loss) // 50) :]
        cells = [
            f"{int(steps[-1]) + 1:,}" if len(steps) else "",
            f"{np.mean(tail):.4f}" if len(tail) else "",
            f"{held[-1]:.4f}" if len(held) else "",
            f"{np.nanmin(held):.4f}" if np.isfinite(held).any() else "",
            f"{skipped[-1]:.0f}" if len(skipped) else "",
            f"{np.median(rate):,.0f}" if len(rate) else "",
            f"{np.median(mfu):.1%}" if len(mfu) else "",
        ]
        lines.append(f"<tr><td>{html.escape(name)}" + "".join(f"<td>{cell}" for cell in cells))
    return (
        "<div><table><tr><th>run<th>steps<th>loss, last 2 %<th>held out, last<th>held out, best"
        "<th>updates left out<th>tokens/s<th>MFU" + "".join(lines) + "</table></div>"
    )


def _seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Add up the ledgers of all starts of a run."""
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/"):
                part = name.removeprefix("seconds/")
                total[part] = total.get(part, 0.0) + value
    return total


def _bars(spent: Mapping[str, Mapping[str, float]]) -> str:
    """Draw a bar a run, and the key."""
    key = "".join(f'<span style="background:{c}"></span>{name}' for name, c in _PARTS.items())
    lines = []
    for name, seconds in spent.items():
        total = sum(seconds.values())
        parts = "".join(
            f'<span style="width:{100 * seconds[part] / total:.2f}%;background:{color}" '
            f'title="{part} {seconds[part]:.1f} s"></span>'
            for part, color in _PARTS.items()
            if seconds.get(part) and total
        )
        shares = ", ".join(
            f"{part} {seconds[part] / total:.1%}"
            for part in _PARTS
            if total and seconds.get(part, 0) / total >= 0.001
        )
        lines.append(
            f"<p>{html.escape(name)}: {total:,.1f} s: {shares}. Of the steps, the device waited "
            f"for Python at most {host_share(seconds):.1%}.<div class=bar>{parts}</div>"
            if seconds
            else f"<p>{html.escape(name)}: not known before the run ends"
        )
    return f"<p class=key>{key}</p>" + "".join(lines)


def _configs(configs: Mapping[str, Any]) -> str:
    """Make a table of the configs, those fields first in which they differ."""
    names = sorted({field for config in configs.values() for field in config})
    differ = [n for n in names if len({json.dumps(c.get(n)) for c in configs.values()}) > 1]
    lines = "".join(
        f"<tr><td>{'<b>' if field in differ else ''}{html.escape(field)}"
        + "".join(f"<td>{html.escape(str(config.get(field, '')))}" for config in configs.values())
        for field in differ + [name for name in names if name not in differ]
    )
    head = "".join(f"<th>{html.escape(name)}" for name in configs)
    return f"<h2>Configs</h2><div><table><tr><th>{head}{lines}</table></div>"


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_attn.train.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", default="", metavar="FOLDER")
    options = parser.parse_args()
    paths = [pathlib.Path(run) for run in options.runs]
    folder = pathlib.Path(options.out) if options.out else paths[0]
    folder = folder.parent if folder.is_file() else folder
    try:
        # Names as short as they can be while they differ.
        short = [path.name or str(path) for path in paths]
        names = short if len(set(short)) == len(paths) else [str(path) for path in paths]
        runs = {name: read_rows(path) for name, path in zip(names, paths, strict=True)}
        found = {name: read_config(path) for name, path in zip(names, paths, strict=True)}
        configs = {name: config for name, config in found.items() if config is not None}
        folder.mkdir(parents=True, exist_ok=True)
        plot_curves(runs, folder / "curves.png")
        (folder / "curves.html").write_text(page(runs, configs), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(folder / "curves.png", folder / "curves.html", sep="\n")


if __name__ == "__main__":
    main()
