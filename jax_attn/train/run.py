"""A run is a folder: metrics, checkpoints, and what made them; starting it again goes on."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jax_attn.lock import hold
from jax_attn.train import manifest
from jax_attn.train.checkpoint import Checkpoints, Tell, on_disk, tell_stderr
from jax_attn.train.provenance import agree, describe, differences, plain

PyTree = Any

_MINUTES_EVERY = 32  # steps between two questions of process 0's clock, with several processes


class Run:
    """Name the folder of a run, and when it saves.

        FOLDER/metrics.jsonl   every row, as it comes
        FOLDER/run.json        config, versions, code, git revision, devices of the last start
        FOLDER/checkpoints/    steps, each with its manifest, see `Checkpoints`
        FOLDER/profile/        what `fit(profile=...)` writes

    Given to `fit`, a run saves at its last step, when it is asked to stop (SIGTERM, Ctrl-C: exit
    code 75), and as said here; started again with the same folder it goes on where it saved, to the
    bit. All processes give the same folder, on a disk that they share or in a bucket that each of
    them has mounted.

    Args:
      folder: made if it is not there.
      save_every: steps between saves; 0: none by count.
      save_minutes: minutes between saves; 0: none by the clock.
      keep_last: how many of the newest steps stay.
      best: a metric of `evaluate`, such as "eval/loss"; a step where it is less than ever before is
        saved, and the best one stays.
      config: a dataclass or mapping; kept in run.json and in every checkpoint. Going on with
        another one is an error.
      allow_config_change: go on all the same, after a line for each difference.
      tell: what gets a line about each thing that went wrong; default: standard error.
    Raises: ValueError naming the argument.
    Example:
      >>> Run("runs/example", save_every=1000, config={"D": 64}).metrics_path.as_posix()
      'runs/example/metrics.jsonl'
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        save_every: int = 0,
        save_minutes: float = 10.0,
        keep_last: int = 3,
        best: str | None = None,
        config: Any = None,
        allow_config_change: bool = False,
        tell: Tell = tell_stderr,
    ) -> None:
        if not isinstance(save_every, int) or save_every < 0:
            raise ValueError(f"save_every must be an int >= 0, got {save_every!r}")
        if not save_minutes >= 0:
            raise ValueError(f"save_minutes must be at least 0, got {save_minutes!r}")
        self.folder = on_disk(folder)
        self.metrics_path = self.folder / "metrics.jsonl"
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep_last=keep_last, best=best, tell=tell
        )
        self.save_every, self.save_minutes = save_every, save_minutes
        self.tell = tell
        self.config, self.allow_config_change = plain(config), allow_config_change
        self._said: dict[str, Any] = {}
        self._saved_at, self._least = time.monotonic(), np.inf

    @contextlib.contextmanager
    def opened(self, asked: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Hold the folder for one training at a time; compare processes, and config with before.

        Args:
          asked: what else all processes must have been asked for, because it decides which of them
            meet when: the number of steps, for example.
        Raises: ValueError naming a process that differs, what changed in the config, or a folder
          that cannot be made; RuntimeError if another process trains here.
        """
        self._said = describe(self.config)
        agree(
            {name: self._said[name] for name in ("config", "versions", "code")}
            | {"save_every": self.save_every, "save_minutes": self.save_minutes}
            | {"best": self.checkpoints.best, **(asked or {})}
        )
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    what = f"another process is training in {self.folder}; name another"
                    stack.enter_context(hold(self.folder / ".lock", RuntimeError(what)))
                except OSError as error:
                    raise ValueError(f"folder {self.folder} cannot be used: {error}") from None
                self.checkpoints.clear_incomplete()
            self._compare()
            self._saved_at = time.monotonic()
            try:
                yield
            finally:
                self.checkpoints.wait()

    def started(self) -> None:
        """Write down what trains here, once it is sure that it may."""
        if jax.process_index() == 0:
            manifest.put(self.folder / "run.json", json.dumps(self._said, indent=1) + "\n")

    def due(self, made: int) -> bool:
        """Return whether to save after this many steps; every process asks about every step."""
        if self.save_every and made % self.save_every == 0:
            return True
        if not self.save_minutes:
            return False
        late = time.monotonic() - self._saved_at > 60 * self.save_minutes
        if jax.process_count() == 1:
            return late
        if made % _MINUTES_EVERY:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(np.int32(late)))

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether an evaluation is the best so far, by the metric that `best` names."""
        name = self.checkpoints.best
        value = float(np.mean(metrics[name])) if name is not None and name in metrics else np.nan
        better = value < self._least
        self._least = value if better else self._least
        return bool(better)

    def save(self, step: int, state: PyTree, *, metrics: Mapping[str, Any]) -> None:
        """Save in the background; see `Checkpoints.save`."""
        self._saved_at = time.monotonic()
        said = {**self._said, "metrics": {name: float(np.mean(v)) for name, v in metrics.items()}}
        self.checkpoints.save(step, state, said=said)

    def _compare(self) -> None:
        found = (self.checkpoints.said(step) for step in self.checkpoints.steps())
        told = [said for said in found if said is not None]  # the restore tells of the others
        for said in told:
            metrics = said.get("metrics", {})
            self.improves({name: np.nan if v is None else v for name, v in metrics.items()})
        before = told[-1] if told else self._started_before()
        if before is None:
            return
        changed = differences(self._said["config"], before.get("config", {}))
        if changed and not self.allow_config_change:
            raise ValueError(
                f"{self.folder} was made with another config:\n  "
                + "\n  ".join(changed)
                + "\ngo on with the new one: allow_config_change=True (--allow-config-change); "
                "or name another folder"
            )
        for what in ("versions", "code", "git", "devices", "processes"):
            changed += differences(self._said[what], before.get(what), what)
        since = f"step {before['step']}" if "step" in before else "its start"
        for line in changed if jax.process_index() == 0 else ():
            self.tell(f"{self.folder}: changed since {since}: {line}")

    def _started_before(self) -> dict[str, Any] | None:
        """Return what was written down at the last start, if that one made steps."""
        path = self.folder / "run.json"
        if not path.exists() or not self.metrics_path.exists():
            return None
        return json.loads(path.read_text()) if self.metrics_path.stat().st_size else None
