"""Save steps in the background, and restore the last one that is whole.

Orbax writes the arrays. What it leaves open is closed here: a step exists once its SHA-256 manifest
and its marker are written; a restore checks every byte, sets a damaged step aside and takes the one
before; a save that fails is reported and training goes on.
"""

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from etils import epath

from jax_attn.train import manifest

PyTree = Any
Tell = Callable[[str], None]


def tell_stderr(text: str) -> None:
    """Print a line that must be seen."""
    rich.console.Console(stderr=True, soft_wrap=True).print(
        f"warning: {text}", style="bold yellow", markup=False, highlight=False
    )


_absl = logging.getLogger("absl")


def _without_traces(record: logging.LogRecord) -> bool:
    """Keep Orbax from printing pages about a save that failed: one line of it is told."""
    return not (record.exc_info and "orbax" in record.pathname)


class Checkpoints:
    """Keep steps of a run in a folder: the last few, the best, and the last healthy one.

    Args:
      folder: where; a path or a bucket's address ("gs://..."); all processes see the same one.
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
        text = os.fspath(folder)
        self.folder = epath.Path(text if "://" in text else os.path.abspath(text))
        self.keep_last, self.best, self._told = keep_last, best, tell
        self._orbax: Any = None
        self._thread: threading.Thread | None = None

    def tell(self, text: str) -> None:
        """Say what went wrong; a log on a full disk stops nothing."""
        with contextlib.suppress(OSError):
            self._told(text)

    def steps(self) -> list[int]:
        """Return the steps that were written to their end, rising."""
        if not self.folder.exists():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if manifest.complete(p))

    def at(self, step: int) -> epath.Path:
        """Return the folder of a step."""
        return self.folder / f"{step:08d}"

    def save(self, step: int, tree: PyTree, *, said: Mapping[str, Any] | None = None) -> None:
        """Copy a tree from the devices, then write it in the background.

        Returns when the copy is made, so that the next step may donate the tree. Every process
        calls it with the same step. A failure is told, never raised; older steps stay.

        Args:
          step: its number; one that is there already is left alone.
          tree: arrays, possibly over all processes' devices; keys of `jax.random` are allowed.
          said: what to keep in the manifest; "metrics" holds what `best` looks at.
        """
        self.wait()
        folder = self.at(step)
        said = {"step": step, "leaves": leaves(tree), **(said or {})}
        _absl.addFilter(_without_traces)
        try:
            if manifest.complete(folder):
                return
            self._clear(folder)
            if jax.process_index() == 0:
                folder.mkdir(parents=True)
                manifest.put(folder / manifest.SAVING, "")
            self._checkpointer().save(folder / manifest.STATE, args=_save_args(tree))
        except Exception as error:
            self._failed(step, error)
            return
        self._thread = threading.Thread(
            target=self._finish, args=(step, said), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save that is under way, if any, is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _absl.removeFilter(_without_traces)

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
        Raises: ValueError listing the leaves that differ, for a step of another architecture.
        """
        self.wait()
        step = -1
        if jax.process_index() == 0:
            step = self._newest_whole(healthy)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step < 0:
            return None
        saved = manifest.read(self.at(step))["leaves"]
        if wrong := _unlike(saved, leaves(like)):
            shown = wrong[:12] + ([f"... and {len(wrong) - 12} more"] if len(wrong) > 12 else [])
            raise ValueError(
                f"{self.at(step)} holds another architecture; leaves that differ:\n  "
                + "\n  ".join(shown)
            )
        return step, self._read(step, like)

    def confirm(self, step: int) -> None:
        """Mark a saved step as one that training went on well from, for rollbacks."""
        if jax.process_index() == 0 and manifest.complete(self.at(step)):
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
                    self._remove(self.at(later))

    def clear_incomplete(self) -> None:
        """Remove what a killed process left of a save that it did not finish; nothing else."""
        if jax.process_index() == 0 and self.folder.exists():
            for path in self.folder.iterdir():
                ours = path.name.isdigit() and (path / manifest.SAVING).exists()
                if ours and not manifest.complete(path):
                    self._clear(path)

    def _newest_whole(self, healthy: bool) -> int:
        for step in reversed(self.steps()):
            folder = self.at(step)
            if wrong := manifest.damage(folder):
                aside = self._set_aside(folder)
                self.tell(f"checkpoint {step} is damaged ({'; '.join(wrong[:3])}); now {aside}")
            elif not healthy or (folder / manifest.HEALTHY).exists():
                return step
        return -1

    def _set_aside(self, folder: epath.Path) -> epath.Path:
        aside = next(
            path
            for i in range(1, 1000)
            if not (path := folder.parent / f"{folder.name}.damaged{i if i > 1 else ''}").exists()
        )
        return folder.rename(aside)

    def _read(self, step: int, like: PyTree) -> PyTree:
        import orbax.checkpoint as ocp

        plain = jax.tree.map(_without_key, like)
        args = ocp.args.PyTreeRestore(
            item=plain, restore_args=ocp.checkpoint_utils.construct_restore_args(plain)
        )
        read = self._checkpointer().restore(self.at(step) / manifest.STATE, args=args)
        return jax.tree.map(_like, like, read)

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
                self._remove(self.at(step))

    def _remove(self, folder: epath.Path) -> None:
        # The marker first: a process that is killed meanwhile leaves no step that looks damaged.
        (folder / manifest.COMMIT).unlink()
        folder.rmtree()

    def _clear(self, folder: epath.Path) -> None:
        if jax.process_index() == 0 and folder.exists():
            if not (folder / manifest.SAVING).exists():
                raise FileExistsError(f"{folder} is in the way, and was not made here; move it")
            folder.rmtree()

    def _failed(self, step: int, error: Exception) -> None:
        last = self._steps_or_none()
        kept = f"the last one is {last[-1]}" if last else "there is none yet"
        self.tell(f"checkpoint {step} was NOT saved, training goes on; {kept}: {_one_line(error)}")
        with contextlib.suppress(OSError):  # for the same reason: the next start clears it
            self._clear(self.at(step))

    def _steps_or_none(self) -> list[int]:
        """Return the steps, or none where the folder cannot be read."""
        try:
            return self.steps()
        except OSError:
            return []


def leaves(tree: PyTree) -> dict[str, str]:
    """Describe every leaf by its path: its dtype and shape, "float32[3,5]"."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}[{','.join(map(str, np.shape(x)))}]"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def digest(tree: PyTree) -> str:
    """Hash all of a tree: paths, dtypes, shapes and bytes. Equal digests, equal states.

    Args:
      tree: arrays, possibly over the devices of all processes: then every process calls it.
    Returns: SHA-256 in hex.
    Example:
      >>> digest({"w": np.ones(3)}) == digest({"w": np.ones(3)}) != digest({"w": np.zeros(3)})
      True
    """
    from jax.experimental import multihost_utils

    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(_without_key, tree)):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        value = np.asarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}"
        sha.update(name.encode() + b"\0" + value.tobytes())
    return sha.hexdigest()


def _save_args(tree: PyTree) -> Any:
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeSave(jax.tree.map(_without_key, tree))


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_key(x: Any) -> Any:
    if not _is_key(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError("restore: give a real array, not a ShapeDtypeStruct, for a random key")
    return jax.random.key_data(x)


def _like(like: Any, read: Any) -> Any:
    """Make what was read the same kind of array: a key, or one that is on no device in particular.

    The latter matters: `jit` compiles again for an array that is bound to a device.
    """
    if isinstance(like, jax.Array) and not like.committed:
        read = jnp.asarray(np.asarray(read))
    return jax.random.wrap_key_data(read, impl=jax.random.key_impl(like)) if _is_key(like) else read


def _unlike(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    return [
        f"{name}: saved {saved.get(name, 'not at all')}, here {here.get(name, 'not at all')}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
