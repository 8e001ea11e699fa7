"""The wheel holds the library and nothing else, and runs the README's example where it lands."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 12


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as in a new shell: without this process's import path and JAX settings."""
    drop = {"PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def readme_example() -> str:
    """The first Python block of the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found, "README.md has no ```python block"
    return found[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (built,) = out.glob("*.whl")
    return built


def test_readme_example_is_short() -> None:
    lines = [line for line in readme_example().splitlines() if line.strip()]
    assert 1 <= len(lines) <= MAX_LINES


def test_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = "jax_attn-{}.dist-info".format(wheel.name.split("-")[1])
    assert {path.split("/")[0] for path in names} == {"jax_attn", info}
    assert {"jax_attn/py.typed", f"{info}/licenses/LICENSE", f"{info}/METADATA"} <= names
    sources = {
        path.relative_to(ROOT).as_posix()
        for kind in ("*.py", "*.cc", "*.h", "*.html", "*.css", "*.js")
        for path in (ROOT / "jax_attn").rglob(kind)
    }
    assert {path for path in names if path.startswith("jax_attn/")} == {
        *sources,
        "jax_attn/py.typed",
    }


@pytest.mark.long
def test_readme_example_runs_where_only_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    home, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")
    run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=empty)
    installed = run(python, "-c", "import jax_attn; print(jax_attn.__file__)", cwd=empty)
    assert Path(installed.splitlines()[-1]).is_relative_to(home)
    example = tmp_path / "example.py"
    example.write_text(readme_example(), encoding="utf-8")
    run(python, example, cwd=empty)
