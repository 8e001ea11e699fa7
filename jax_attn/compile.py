"""Compile the CPU kernel on the machine that is to run it: python -m jax_attn.compile

Needs g++ (or clang++, or what CXX names) and about half a minute. The library goes to the user's
cache folder ($XDG_CACHE_HOME or ~/.cache), under a name made of its sources, JAX's version and the
processor, so that one that does not fit is never loaded. Once it is there, attention on a CPU picks
it wherever it takes the call's options; `jax_attn.explain` says where.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from jax_attn.kernels.native import FLAGS, SOURCES, library


def build() -> Path:
    """Compile the library, unless it is there.

    Returns: its path.
    Raises: RuntimeError with the compiler's words.
    """
    path = library()
    if path.exists():
        return path
    compiler = shlex.split(os.environ.get("CXX", ""))
    compiler = compiler or [x for x in map(shutil.which, ("g++", "clang++")) if x][:1]
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++, or name one: CXX=/path/to/g++")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Compiled aside and moved into place: a compiler that is stopped leaves nothing to load.
    part = path.with_suffix(f".{os.getpid()}.part")
    sources = [str(source) for source in sorted(SOURCES.glob("*.cc"))]
    command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *sources, "-o", str(part)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{made.stderr}")
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m jax_attn.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    if library().exists():
        print(f"{library()} is there already")
        return
    print(f"compiling for JAX {jax.__version__}, about half a minute", file=sys.stderr)
    try:
        print(build())
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
