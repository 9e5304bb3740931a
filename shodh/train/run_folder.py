"""The run folder: configuration, environment, and where everything else of a run lies."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from shodh.checkpoint.description import is_converted
from shodh.checkpoint.folder import LOCK, is_checkpoint, latest_checkpoint
from shodh.checkpoint.run_files import START
from shodh.config import RunConfig, dump_config, load_kept_config
from shodh.core.environment import describe_environment
from shodh.core.errors import ConfigError
from shodh.core.files import lock_file, write_atomically
from shodh.core.strict_json import dumps, write_json


class RunFolder:
    """Paths of one run; `create` writes what explains it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.routing = path / "routing"
        self.report = path / "report"
        self._lock: IO[str] | None = None

    def create(self, config: RunConfig, deepspeed: dict[str, Any]) -> None:
        """Make the folder, lock it (`own`) and write ``config.yaml``, ``ds_config.json`` and ``env.json`` (rank 0)."""
        self.own()
        write_atomically(self.path / "config.yaml", dump_config(config))
        write_json(self.path / "ds_config.json", deepspeed, indent=2)
        write_json(self.path / "env.json", describe_environment(), indent=2)

    def record_start(self, checksum: str | None) -> None:
        """Keep the checksum of the weights that a new run starts from (`source_checksum`); None: freshly drawn."""
        path = self.path / START
        if checksum is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, dumps({"init_from": checksum}) + "\n")

    def config(self) -> RunConfig:
        """The resolved configuration of the run; raises `ConfigError` if this is no run folder."""
        path = self.path / "config.yaml"
        if not path.exists():
            if is_checkpoint(self.path):
                raise ConfigError(
                    f"{self.path} is a checkpoint; give its run, with --checkpoint {self.path.name} where the command "
                    "has it"
                )
            if is_converted(self.path):
                raise ConfigError(
                    f"{self.path} is a converted folder; give the run that it was made of, which knows its data "
                    "(shodh.from_pretrained loads the folder)"
                )
            raise ConfigError(f"{self.path} is not a run folder: it has no config.yaml")
        return load_kept_config(path)

    def latest(self) -> str | None:
        """Tag of the newest complete checkpoint (`shodh.checkpoint.folder.latest_checkpoint`), or None."""
        path = latest_checkpoint(self.path)
        return None if path is None else path.name

    def own(self) -> None:
        """Lock the folder for as long as this object lives; raises `ConfigError` if another job has it."""
        if self._lock is None:
            self._lock = lock_file(self.path / LOCK)
