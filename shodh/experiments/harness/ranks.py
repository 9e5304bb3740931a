"""The ranks that a launcher started a study on; each starts its own process of every job, and these form a world."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from shodh.core.devices import local_world_size
from shodh.core.strict_json import dumps

WAIT = timedelta(days=30)  # a job may take as long as it takes
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun itself listens on the port, and its ranks must not


class Ranks:
    """Agreement between the launcher's ranks, through a store on rank 0; without a launcher, one rank and no store."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.world_here = local_world_size() or self.world
        self._store: TCPStore | None = None
        if self.world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            hosts = self.rank == 0 and os.environ.get(AGENT_STORE) != "True"
            self._store = TCPStore(address, port, self.world, hosts, timeout=WAIT)

    def agree(self, key: str, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(key, dumps(value))
        return json.loads(self._store.get(key))

    def environment(self, job: str) -> dict[str, str]:
        """What the processes of a job need to find each other: a port of their own, where their first rank listens."""
        return {"MASTER_PORT": str(self.agree(f"{job}/port", _free_port())), AGENT_STORE: "False"}

    def failed(self, job: str) -> bool:
        """Whether a job has failed on some rank."""
        return self._store is not None and self._store.check([f"{job}/failed"])

    def finish(self, job: str, line: str | None) -> str | None:
        """Wait for all ranks; the first rank's error line that came, or None."""
        if self._store is None:
            return line
        if line is not None and not self.failed(job):
            self._store.set(f"{job}/failed", line)
        if self._store.add(f"{job}/ended", 1) == self.world:
            self._store.set(f"{job}/all", "")
        self._store.wait([f"{job}/all"])
        return self._store.get(f"{job}/failed").decode() if self.failed(job) else None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
