"""List the experiments: each file's question, how long it takes, its command and its last verdicts.

Verdicts are those of the runs in this folder: runs/NAME of the default preset, runs/NAME/quick and
runs/NAME/tpu of the others, and runs/gallery/NAME. "published" are those that experiments/README.md
speaks of, experiments/results/NAME.json.

Command: python -m experiments
Minutes: 0
"""

import ast
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
RUNS = Path("runs")


class Experiment(NamedTuple):
    """What the docstring of one experiment says; a field that it does not have is empty."""

    name: str
    question: str
    minutes: str
    command: str
    last: str


def verdicts(path: Path) -> str:
    """Count the verdicts in a summary.json: "5 hold, 1 do not, 2026-11-22"; "" without any."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        found = [one["holds"] for one in summary.get("verdicts") or summary.get("claims") or ()]
        date = str(summary.get("date", ""))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"({path} cannot be read)"
    words = [
        f"{found.count(value)} {word}"
        for value, word in ((True, "hold"), (False, "do not"), (None, "undecided"))
        if found.count(value)
    ]
    return ", ".join([*words, date]) if words else ""


def read(path: Path, runs: Path = RUNS) -> Experiment:
    """Read an experiment's docstring, without importing the file, and its last verdicts."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError) as error:
        return Experiment(path.stem, f"(cannot be read: {error})", "", "", "")
    lines = (doc or "").splitlines()

    def field(key: str) -> str:
        """Read what stands behind a key, with the indented lines that follow."""
        for i, line in enumerate(lines):
            if line.startswith(key):
                rest = itertools.takewhile(lambda one: one.startswith("  "), lines[i + 1 :])
                return " ".join([line[len(key) :], *map(str.strip, rest)]).strip()
        return ""

    question = lines[0] if lines else "(no docstring)"
    said = {
        "published": verdicts(path.parent / "results" / f"{path.stem}.json"),
        "default": verdicts(runs / path.stem / "summary.json"),
        "quick": verdicts(runs / path.stem / "quick" / "summary.json"),
        "tpu": verdicts(runs / path.stem / "tpu" / "summary.json"),
        "gallery": verdicts(runs / "gallery" / path.stem / "summary.json"),
    }
    last = "; ".join(f"{preset}: {words}" for preset, words in said.items() if words)
    return Experiment(path.stem, question, field("Minutes:"), field("Command:"), last)


def find(folder: Path = FOLDER, runs: Path = RUNS) -> list[Experiment]:
    """Read every experiment in a folder, in the order of their names, benchmarks last."""
    paths = sorted(folder.glob("*.py"), key=lambda path: (path.stem.startswith("bench_"), path))
    return [read(path, runs) for path in paths if not path.name.startswith("_")]


def plain(rows: list[Experiment]) -> str:
    """Align lines for a pipe or a file: name, default's minutes, command, verdicts, question."""
    cells = [("experiment", "minutes", "command", "last verdicts", "question")]
    cells += [
        (r.name, r.minutes.partition(";")[0] or "-", r.command or "-", r.last or "-", r.question)
        for r in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    )


def table(rows: list[Experiment]) -> None:
    """The same as a table that fits the terminal; long cells wrap."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(title="Each experiment answers one question", title_justify="left")
    out.add_column("question, minutes, command and last verdicts", overflow="fold")
    for row in rows:
        text = Text(row.name, style="bold")
        text.append(f"\n{row.question}", style="not bold")
        for line, style in (
            (row.minutes and f"Minutes: {row.minutes}", "not bold dim"),
            (row.command, "not bold cyan"),
            (row.last, "not bold green"),
        ):
            if line:
                text.append(f"\n{line}", style=style)
        out.add_row(text)
        out.add_section()
    Console().print(out)


def main(arguments: list[str]) -> int:
    """Print the list; the exit status is 2 where there is anything to complain about."""
    usage = "usage: python -m experiments (lists them), python -m experiments.NAME (runs one)"
    if arguments in (["-h"], ["--help"]):
        print(usage)
        return 0
    if arguments:
        print(f"error: unknown argument {arguments[0]!r}; {usage}", file=sys.stderr)
        return 2
    rows = find()
    if sys.stdout.isatty():
        table(rows)
    else:
        print(plain(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
