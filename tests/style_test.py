"""The house rules that a machine can check. tests/einsum_test.py has the one about letters."""

import ast
import doctest
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import jax_attn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jax_attn", "experiments", "tests", "tpu")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "jax_attn")]
MAX_LINES = 400
VAGUE = {"utils", "util", "common", "base", "registry", "configs", "config", "helpers", "misc"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def doubled_keywords(source: str) -> list[str]:
    """The functions that take `**anything`: a typo in an option would pass through them."""
    return [
        f"{node.lineno}: {getattr(node, 'name', 'lambda')}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and node.args.kwarg
    ]


def imports(source: str) -> set[str]:
    """The top-level packages that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def foreign_text(text: str) -> list[str]:
    """Addresses of package indexes and paths into somebody's home folder."""
    hosts = r"\b(?:[\w-]+\.)*(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|yarnpkg\.com)\b"
    homes = r"(?<![\w.~}])/(?:root|home/[\w.-]+|Users/[\w.-]+)/[\w.-]*"
    return re.findall(f"{hosts}|{homes}", text)


def repository_files() -> list[Path]:
    """What is, or with the next commit would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        paths = [ROOT / path for path in listed.stdout.split("\0") if path]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
        skip = re.compile(r"\.venv|__pycache__$|\.git$|\.\w+_cache$|\.hypothesis$|runs$|dist$")
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(skip.match(part) for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in paths if path.is_file()]


def run_doctests(source: str, variables: dict[str, Any], where: str) -> tuple[int, str]:
    """Run the examples in every docstring of a source, also where a decorator hides the function.

    Returns: how many examples ran, and the report of those that failed.
    """
    report: list[str] = []
    runner = doctest.DocTestRunner(
        verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            test = doctest.DocTestParser().get_doctest(
                ast.get_docstring(node) or "",
                dict(variables),
                getattr(node, "name", "module"),
                where,
                getattr(node, "lineno", 1) - 1,
            )
            runner.run(test, out=report.append)
    return runner.tries, "".join(report)


def undocumented(module: Any) -> Iterator[str]:
    """Public functions and classes, of public modules too, whose docstring has no example that
    runs."""
    for public in module.__all__:
        value = getattr(module, public)
        if hasattr(value, "__all__"):
            yield from (f"{public}.{inner}" for inner in undocumented(value))
        doc = value.__doc__ if callable(value) else None
        if callable(value) and not re.search(r"^\s*Examples?:[^\0]*>>> ", doc or "", re.MULTILINE):
            yield public


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_is_short_and_named_for_what_it_is(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines; split it by meaning"
    assert path.stem not in VAGUE, f"{name(path)}: say what it holds"


def test_every_test_is_collected() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if re.search(r"^ *(?:def|class) [tT]est", path.read_text(encoding="utf-8"), re.MULTILINE):
            # A contract is collected where a class of a test file inherits it.
            found = path.name.endswith(("_test.py", "_contract.py"))
            assert found, f"pytest does not look into {name(path)}"


def test_no_function_passes_unknown_keywords_through() -> None:
    faults = [
        f"{name(path)}:{fault}"
        for path in LIBRARY
        if path.name != "shapes.py"  # dims(q_BTNH=q): there the keyword is the point
        for fault in doubled_keywords(path.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_flax_is_imported_in_modules_alone() -> None:
    users = {name(path) for path in LIBRARY if "flax" in imports(path.read_text(encoding="utf-8"))}
    assert users <= {"jax_attn/modules.py"}


def test_every_public_name_has_an_example() -> None:
    assert len(set(jax_attn.__all__)) == len(jax_attn.__all__)
    missing = list(undocumented(jax_attn))
    assert not missing, f"no `Example:` with `>>> ` in the docstring of {', '.join(missing)}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_examples_run(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    with jax.numpy_rank_promotion("allow"):  # an example runs as it does for a user
        _, report = run_doctests(path.read_text(encoding="utf-8"), vars(module), name(path))
    assert not report, report


def test_repository_names_no_package_index_and_no_home_folder() -> None:
    faults = []
    for path in repository_files():
        try:
            found = foreign_text(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # a picture
            continue
        faults += [f"{name(path)}: {text}" for text in found if path != Path(__file__).resolve()]
    assert not faults, "\n".join(faults)


# The tests of the tests: each of the checks above fails where it should.


def test_catches_double_star() -> None:
    assert doubled_keywords("def f(x, **kwargs): ...") == ["1: f"]
    assert doubled_keywords("g = lambda **kw: 0") == ["1: lambda"]
    assert doubled_keywords("class A:\n  async def f(self, **kw): ...") == ["2: f"]
    assert doubled_keywords("def f(x, *, y): return g(**y)") == []


def test_catches_imports() -> None:
    assert imports("import flax.linen as nn") == {"flax"}
    assert imports("def f():\n  from flax import nnx") == {"flax"}
    assert imports("from . import flax\nimport jax") == {"jax"}


def test_catches_foreign_text() -> None:
    for text in (
        "see https://pypi.org/project/x",
        "index-url = files.pythonhosted.org",
        "registry.npmjs.org",
        "cd /root/x",
        "cd /home/ada/x",
        '"/Users/ada/x"',
    ):
        assert foreign_text(text), text
    for text in ("pypi organises", "tree/root/x", "https://arxiv.org/home/x", "~/root/x", "/home"):
        assert not foreign_text(text), text


def test_catches_a_failing_example() -> None:
    source = '@odd\ndef f():\n  """One.\n\n  Example:\n    >>> 1 + x\n    {}\n  """\n'
    assert run_doctests(source.format(3), {"x": 2}, "good") == (1, "")
    count, report = run_doctests(source.format(4), {"x": 2}, "bad")
    assert count == 1
    assert "Expected:\n    4\nGot:\n    3" in report


def test_catches_a_missing_example() -> None:
    class Inner:
        __all__ = ("k",)

        @staticmethod
        def k() -> None: ...

    class Module:
        __all__ = ("f", "g", "h", "table", "inner")
        inner = Inner()

        @staticmethod
        def f() -> None:
            """Do. Example:
            nothing that runs
            """

        @staticmethod
        def g() -> None:
            """Do.

            Example:
              >>> 1
              1
            """

        @staticmethod
        def h() -> None: ...

        table = {"B": "batch"}  # noqa: RUF012

    assert list(undocumented(Module)) == ["f", "h", "inner.k"]


def test_the_checks_see_files() -> None:
    listed = {name(path) for path in repository_files()}
    assert {"pyproject.toml", "tests/style_test.py", "jax_attn/shapes.py"} <= listed
    assert not any(path.startswith(".venv") for path in listed)
    assert "jax_attn/shapes.py" in {name(path) for path in LIBRARY}
