"""Read every byte of a run's checkpoints and compare it with what was written.

    python -m jax_attn.train.verify RUN

The exit code is 1 if a step is damaged, 2 if there is none. Nothing is changed.
"""

import argparse
import pathlib
import sys

from jax_attn.train import manifest
from jax_attn.train.checkpoint import Checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_attn.train.verify",
        description=__doc__,
    )
    parser.add_argument("run", help="the run's folder, or its folder of checkpoints")
    options = parser.parse_args()
    folder = pathlib.Path(options.run)
    folder = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps() if folder.is_dir() else []
    if not steps:
        print(f"error: no checkpoint in {folder}", file=sys.stderr)
        sys.exit(2)
    damaged = 0
    for step in steps:
        print(f"step {step}", end="", flush=True)
        wrong = manifest.damage(checkpoints.at(step))
        damaged += bool(wrong)
        if wrong:
            print(f"  DAMAGED: {'; '.join(wrong)}")
            continue
        size = sum(file["bytes"] for file in manifest.read(checkpoints.at(step))["files"].values())
        healthy = (checkpoints.at(step) / manifest.HEALTHY).exists()
        print(f"  {size / 1e6:,.1f} MB  verified{'  healthy' if healthy else ''}")
    sys.exit(1 if damaged else 0)


if __name__ == "__main__":
    main()
