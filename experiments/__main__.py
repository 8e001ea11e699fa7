"""List the experiments: each file's question, how long it takes and the command that runs it.

Command: python -m experiments
Minutes: 0
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent


class Experiment(NamedTuple):
    """What the docstring of one experiment says; a field that it does not have is empty."""

    name: str
    question: str
    minutes: str
    command: str


def read(path: Path) -> Experiment:
    """Read an experiment's docstring, without importing the file."""
    try:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError) as error:
        return Experiment(path.stem, f"(cannot be read: {error})", "", "")
    lines = [line.strip() for line in (doc or "").splitlines()]

    def field(key: str) -> str:
        return next((line[len(key) :].strip() for line in lines if line.startswith(key)), "")

    question = lines[0] if lines else "(no docstring)"
    return Experiment(path.stem, question, field("Minutes:"), field("Command:"))


def find(folder: Path = FOLDER) -> list[Experiment]:
    """Read every experiment in a folder, in the order of their names."""
    return [read(path) for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]


def plain(rows: list[Experiment]) -> str:
    """Aligned lines for a pipe or a file: name, minutes, command, question."""
    cells = [("experiment", "minutes", "command", "question")]
    cells += [(r.name, r.minutes or "-", r.command or "-", r.question) for r in rows]
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
    out.add_column("experiment", style="bold", overflow="fold")
    out.add_column("question and command", overflow="fold", ratio=1)
    out.add_column("minutes", justify="right", overflow="fold")
    for row in rows:
        text = Text(row.question)
        if row.command:
            text.append(f"\n{row.command}", style="cyan")
        out.add_row(Text(row.name), text, Text(row.minutes))
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
