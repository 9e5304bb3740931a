"""The ranks that a launcher started a study on; each starts its own process of every job, and these form a world."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from shodh.core.distributed import rank, world_size
from shodh.core.launcher import read_launch
from shodh.core.strict_json import dumps
from shodh.train.runtime import AGENT_STORE, meet

WAIT = timedelta(days=30)  # a job may take as long as it takes


class Ranks:
    """Agreement between the launcher's ranks, through a store on rank 0; without a launcher, one rank and no store."""

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()
        self._store = meet(WAIT) if self.world > 1 else None
        self._store_of_job: TCPStore | None = None

    def agree(self, key: str, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(key, dumps(value))
        return json.loads(self._store.get(key))

    def environment(self, job: str) -> dict[str, str]:
        """What the processes of a job need to find each other: a port of their own, on which this process listens.

        A port that is only looked up here and taken by the job could be another's by then.
        """
        if self._store is None:
            return {}
        if self.rank == 0:
            address = read_launch().address or "127.0.0.1"
            self._store_of_job = TCPStore(address, 0, None, is_master=True, timeout=WAIT, wait_for_workers=False)
        port = self.agree(f"{job}/port", self._store_of_job and self._store_of_job.port)
        return {"MASTER_PORT": str(port), AGENT_STORE: "True"}

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
