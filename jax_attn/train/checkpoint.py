"""Save steps in the background, and restore the last one that is whole.

Orbax writes the arrays. What it leaves open is closed here: a step exists once its SHA-256 manifest
and its marker are written; a restore checks every byte, sets a damaged step aside and takes the one
before; a save that fails is reported and training goes on.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jax_attn.report import tell_stderr
from jax_attn.train import leaves, manifest

PyTree = Any
Tell = Callable[[str], None]

_NONE, _ALL_DAMAGED = -1, -2  # instead of a step
_READY, _THERE, _FAILED = 0, 1, 2  # of a step that is to be saved


_absl = logging.getLogger("absl")


def _without_traces(record: logging.LogRecord) -> bool:
    """Keep Orbax from printing pages about a save that failed: one line of it is told."""
    return not (record.exc_info and "orbax" in record.pathname)


UNSAVED = 74  # exit code: what was trained since the last save is lost


class NotSaved(SystemExit):
    """A run whose last state could not be saved, not at the second try either: exit code 74.

    Example:
      >>> NotSaved(UNSAVED).code
      74
    """


def on_disk(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a folder.

    Raises: ValueError if it is empty, or the address of a bucket.
    Example:
      >>> on_disk("runs/example").as_posix()
      'runs/example'
    """
    text = os.fspath(folder)
    if not text:
        raise ValueError("folder must name a folder, got ''")
    if "://" in text:
        raise ValueError(
            f"folder must be on a disk, got {text!r}; mount the bucket (gcsfuse) and give the path"
        )
    return pathlib.Path(text)


class Checkpoints:
    """Keep steps of a run in a folder: the last few, the best, and the last healthy one.

    Args:
      folder: where; all processes see the same one: a disk, or a bucket that each has mounted.
      keep_last: how many of the newest steps stay.
      best: a metric, such as "eval/loss"; the step where it was least stays as well.
      tell: what gets a line about each thing that went wrong; default: standard error.
    Raises: ValueError naming the argument.
    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = Checkpoints(folder)
      ...     checkpoints.save(3, {"w_D": jnp.ones(5)})
      ...     checkpoints.wait()
      ...     step, tree = checkpoints.restore({"w_D": jnp.zeros(5)})
      >>> step, tree["w_D"].tolist()
      (3, [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        best: str | None = None,
        tell: Tell = tell_stderr,
    ) -> None:
        if not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"keep_last must be an int >= 1, got {keep_last!r}")
        self.folder = on_disk(folder).absolute()
        self.keep_last, self.best, self._told = keep_last, best, tell
        self.failed: int | None = None
        self._orbax: Any = None
        self._thread: threading.Thread | None = None

    def tell(self, text: str) -> None:
        """Say what went wrong; a log on a full disk stops nothing."""
        with contextlib.suppress(OSError):
            self._told(text)

    def steps(self) -> list[int]:
        """Return the steps that were written to their end, rising."""
        return manifest.steps(self.folder)

    def at(self, step: int) -> pathlib.Path:
        """Return the folder of a step."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, tree: PyTree, *, said: Mapping[str, Any] | None = None) -> None:
        """Copy a tree from the devices, then write it in the background.

        Returns when the copy is made, so that the next step may donate the tree. Every process
        calls it with the same step. A failure is told, and `failed` is the step; older steps stay.

        Args:
          step: its number; one that is there already is left alone.
          tree: arrays, possibly over all processes' devices; keys of `jax.random` are allowed.
          said: what to keep in the manifest; "metrics" holds what `best` looks at.
        Raises: RuntimeError, with several processes, if this one failed where the others may wait
          for it; here or in the `wait` after it.
        """
        self.wait()
        said = {"step": step, "leaves": leaves.describe(tree), **(said or {})}
        _absl.addFilter(_without_traces)
        verdict = self._shared(self._prepare(step))
        self.failed = step if verdict == _FAILED else None
        if verdict != _READY:
            return
        saving = manifest.beside(self.at(step), "saving")
        try:
            self._checkpointer().save(saving / manifest.STATE, args=_save_args(tree))
        except Exception as error:
            self._failed(step, error)
            self._raise_if_alone()
            return
        self._thread = threading.Thread(
            target=self._finish, args=(step, said), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is complete or has failed.

        Orbax gives up after 20 minutes in which the other processes did not come.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        _absl.removeFilter(_without_traces)
        if thread is not None:
            self._raise_if_alone()

    def busy(self) -> bool:
        """Return whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def restore(self, like: PyTree, *, healthy: bool = False) -> tuple[int, PyTree] | None:
        """Read the newest step that is whole; a damaged one is set aside, and the one before taken.

        Args:
          like: arrays or ShapeDtypeStructs with a sharding: what comes back lies where these do,
            on whatever mesh, and has their dtypes.
          healthy: take only steps that `confirm` was called for.
        Returns: (step, tree), or None if there is no step.
        Raises: ValueError listing the leaves that differ, for a step of another architecture; or
          saying that there are damaged steps alone.
        """
        self.wait()
        step = self._shared(self._newest_whole(healthy) if jax.process_index() == 0 else _NONE)
        if step == _ALL_DAMAGED:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged; put a whole copy of one there, or "
                "name another folder to start anew"
            )
        if step == _NONE:
            return None
        saved = manifest.read(self.at(step))["leaves"]
        if wrong := leaves.unlike(saved, leaves.describe(like)):
            shown = wrong[:12] + ([f"... and {len(wrong) - 12} more"] if len(wrong) > 12 else [])
            raise ValueError(
                f"{self.at(step)} holds another architecture; leaves that differ:\n  "
                + "\n  ".join(shown)
            )
        return step, self._read(step, like)

    def confirm(self, step: int) -> None:
        """Mark a saved step as one that training went on well from, for rollbacks."""
        if jax.process_index() == 0 and self.at(step).exists():
            try:
                manifest.put(self.at(step) / manifest.HEALTHY, "")
            except OSError as error:
                self.tell(f"checkpoint {step} could not be marked as healthy: {_one_line(error)}")

    def said(self, step: int) -> dict[str, Any] | None:
        """Return what the manifest of a step says; None if it is damaged."""
        try:
            return manifest.read(self.at(step))
        except ValueError:
            return None

    def forget_above(self, step: int) -> None:
        """Remove the steps after a rollback's aim; each was written while updates were left out."""
        self.wait()
        if jax.process_index() == 0:
            for later in self.steps():
                if later > step:
                    manifest.remove(self.at(later))

    def clear_incomplete(self) -> None:
        """Remove what a killed process left of a save that it did not finish; nothing else."""
        if jax.process_index() == 0:
            manifest.clear(self.folder)

    def _prepare(self, step: int) -> int:
        """Make the folder to save into; return what process 0 found."""
        if jax.process_index() != 0:
            return _READY
        folder = self.at(step)
        try:
            if folder.exists() and self.said(step) is not None:
                return _THERE
            if folder.exists():
                self.tell(f"checkpoint {step} is damaged; now {manifest.set_aside(folder)}")
            saving = manifest.beside(folder, "saving")
            if saving.exists():
                shutil.rmtree(saving)
            saving.mkdir(parents=True)
        except Exception as error:
            self._failed(step, error)
            return _FAILED
        return _READY

    def _shared(self, number: int) -> int:
        """Return process 0's number, on every process."""
        if jax.process_count() == 1:
            return number
        from jax.experimental import multihost_utils

        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def _raise_if_alone(self) -> None:
        """End a process that failed where it cannot tell the others, which may wait for it."""
        if self.failed is not None and jax.process_count() > 1:
            raise RuntimeError(
                f"process {jax.process_index()} could not save checkpoint {self.failed}, and "
                "others may wait for it; start again, to go on from the checkpoint before"
            )

    def _newest_whole(self, healthy: bool) -> int:
        for step in reversed(self.steps()):
            folder = self.at(step)
            if wrong := manifest.damage(folder):
                aside = manifest.set_aside(folder)
                self.tell(f"checkpoint {step} is damaged ({'; '.join(wrong[:3])}); now {aside}")
            elif not healthy or (folder / manifest.HEALTHY).exists():
                return step
        if healthy or self.steps():
            return _NONE
        return _ALL_DAMAGED if any(self.folder.glob("*.damaged*")) else _NONE

    def _read(self, step: int, like: PyTree) -> PyTree:
        import orbax.checkpoint as ocp

        plain = jax.tree.map(leaves.without_key, like)
        args = ocp.args.PyTreeRestore(
            item=plain, restore_args=ocp.checkpoint_utils.construct_restore_args(plain)
        )
        read = self._checkpointer().restore(self.at(step) / manifest.STATE, args=args)
        return jax.tree.map(leaves.like, like, read)

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint as ocp  # takes seconds: only where something is saved

            self._orbax = ocp.AsyncCheckpointer(
                ocp.PyTreeCheckpointHandler(),
                # Made in the background, a folder that cannot be made leaves threads that wait for
                # it for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
        return self._orbax

    def _finish(self, step: int, said: Mapping[str, Any]) -> None:
        """Wait for Orbax, then make the step complete and remove those that need not stay."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(self.at(step), said)
        except Exception as error:
            self._failed(step, error)
            return
        if jax.process_index() == 0:
            try:
                self._prune()
            except Exception as error:
                self.tell(f"old checkpoints could not be removed: {_one_line(error)}")

    def _prune(self) -> None:
        steps = self.steps()
        # One that is damaged is left for `restore` to set aside.
        said = {step: said for step in steps if (said := self.said(step)) is not None}
        steps = list(said)
        keep = set(steps[-self.keep_last :])
        healthy = [step for step in steps if (self.at(step) / manifest.HEALTHY).exists()]
        keep |= set(healthy[-1:])
        if self.best is not None:
            scores = {step: said[step].get("metrics", {}).get(self.best) for step in steps}
            finite = {step: x for step, x in scores.items() if x is not None and np.isfinite(x)}
            keep |= {min(finite, key=lambda step: (finite[step], step))} if finite else set()
        for step in steps:
            if step not in keep:
                manifest.remove(self.at(step))

    def _failed(self, step: int, error: Exception) -> None:
        self.failed = step
        try:
            others = [other for other in self.steps() if other != step]
            kept = f"the last one is {others[-1]}" if others else "there is none yet"
        except OSError:
            kept = f"{self.folder} cannot be read"
        self.tell(f"checkpoint {step} was NOT saved, training goes on; {kept}: {_one_line(error)}")
        if jax.process_index() == 0:  # what cannot be removed is cleared by the next start
            shutil.rmtree(manifest.beside(self.at(step), "saving"), ignore_errors=True)


def _save_args(tree: PyTree) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeSave(jax.tree.map(leaves.without_key, tree))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
