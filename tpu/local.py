"""Machines that are folders: N workers on this computer, as real processes, without a cloud.

The same commands reach the same `worker.sh`, so that what is tried here is what runs there.
"""

import dataclasses
import os
import socket
from collections.abc import Sequence

from tpu.verbs import Command, Place, Reply, numbered
from tpu.watch import Cloud


@dataclasses.dataclass(frozen=True)
class Local:
    """Folders below `folder`/workers, one a worker."""

    place: Place
    folder: str

    @property
    def workers(self) -> str:
        return os.path.join(self.folder, "workers")

    def _each(self) -> list[str]:
        return [os.path.join(self.workers, str(i)) for i in range(self.place.workers)]

    def create(self) -> list[Command]:
        return [Command(("mkdir", "-p", *self._each()), "make a folder for each worker")]

    def look(self) -> list[Command]:
        return [Command(("ls", "-1", self.workers), "see the folders")]

    def seen(self, replies: Sequence[Reply]) -> Cloud:
        (reply,) = replies
        if reply.code:
            return Cloud("absent")
        found = set(reply.out.split())
        missing = [str(i) for i in range(self.place.workers) if str(i) not in found]
        if missing:
            return Cloud("failed", why=f"the folder of worker {missing[0]} is gone")
        return Cloud("active", addresses=("127.0.0.1",) * self.place.workers)

    def send(self, cloud: Cloud, files: Sequence[str]) -> list[Command]:
        return [
            Command(("cp", *files, folder), f"copy to worker {i}")
            for i, folder in enumerate(self._each())
        ]

    def everywhere(self, cloud: Cloud, words: Sequence[str], why: str) -> list[Command]:
        return [
            Command(numbered(words, f"--index={i}"), f"{why}, on worker {i}", folder)
            for i, folder in enumerate(self._each())
        ]

    def delete(self) -> list[Command]:
        return [Command(("rm", "-rf", self.workers), "remove the folders")]

    def remains(self) -> list[Command]:
        return self.look()

    def left(self, replies: Sequence[Reply]) -> list[str]:
        (reply,) = replies
        return [] if reply.code else [f"the folder of worker {i}" for i in reply.out.split()]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
