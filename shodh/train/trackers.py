"""Where metrics go beside ``metrics.jsonl``: TensorBoard, and as extras Weights & Biases and MLflow."""

from __future__ import annotations

import os
import re
import struct
import sys
import uuid
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from shodh.config import RunConfig, dump_config, to_dict
from shodh.config.trackers import MlflowConfig, WandbConfig
from shodh.core.errors import ConfigError
from shodh.core.files import atomic_path
from shodh.core.reading import read_object
from shodh.core.strict_json import write_json

JOINED = "events.out.tfevents.0000000000.joined"
IDENTITIES = "trackers.json"  # under which a resumed run goes on in its trackers


class Tracker(Protocol):
    """What `shodh.train.metrics.MetricWriter` writes to; any error of it switches it off."""

    name: str

    def write(self, step: int, values: Mapping[str, float], when: float) -> None:
        """Values of a step, and when it was, in seconds of the epoch."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """An ``[H, W, 3]`` uint8 array."""

    def flush(self) -> None:
        """Let readers see what was written."""

    def close(self) -> None:
        """In the end; while an error is on its way, the run is marked as failed."""


class TensorBoard:
    """Event files, one event a step with all its values: smaller than its line of ``metrics.jsonl``."""

    name = "TensorBoard"

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        cut_events(folder, resume_step)
        self._board, self._summary = SummaryWriter(str(folder), purge_step=resume_step), Summary

    def write(self, step: int, values: Mapping[str, float], when: float) -> None:
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._board._get_file_writer().add_summary(self._summary(value=found), step, when)  # type: ignore[no-untyped-call]

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._board.add_image(name, picture, step, dataformats="HWC")  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        self._board.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._board.close()  # type: ignore[no-untyped-call]


def _records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Records of an event file, whole and without their frame (length, checksum; checksum); stops at a torn one."""
    while len(head := file.read(12)) == 12:
        size = struct.unpack("<Q", head[:8])[0]
        rest = file.read(min(size, 2**31) + 4)
        if len(rest) != size + 4:
            return
        yield head + rest, rest[:-4]


def cut_events(folder: Path, stop: int) -> None:
    """Join event files into one with what lies before a step, as `cut_lines` does for ``metrics.jsonl``.

    So a run that is resumed many times keeps no step twice, and two files at most. TensorBoard reads files in the order
    of their names, which begin with the time of a node's clock: what is joined gets the first name of all.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    # By the numbers of their names: seconds, process, and how many it opened, of which the tenth follows the ninth.
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: list(map(int, re.findall(r"\d+", path.name))))
    if files and stop > 0:
        joined = folder / JOINED
        with atomic_path(joined) as aside, aside.open("wb") as target:
            for path in files:
                with path.open("rb") as source:
                    for whole, content in _records(source):
                        try:
                            event = Event.FromString(content)
                        except DecodeError:
                            break
                        version = event.HasField("file_version") and not target.tell()
                        if version or (event.step < stop and event.HasField("summary")):
                            target.write(whole)
        files = [path for path in files if path != joined]
    for path in files:
        path.unlink()


class Wandb:
    """Weights & Biases; the steps of a resumed run that it knows already, it leaves as they are."""

    name = "Weights & Biases"

    def __init__(self, config: RunConfig, settings: WandbConfig, folder: Path) -> None:
        import wandb

        self._image = wandb.Image
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            name=folder.name,
            id=_identity(folder, "wandb") or _keep(folder, "wandb", uuid.uuid4().hex[:12]),
            resume="allow" if settings.mode == "online" else None,  # Offline it cannot ask; 'wandb sync' joins them.
            dir=str(folder),
            config=to_dict(config),
            settings=quiet,
        )

    def write(self, step: int, values: Mapping[str, float], when: float) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({name: self._image(picture)}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish(exit_code=int(_failing()))


class Mlflow:
    """MLflow, in batches: one request a flush."""

    name = "MLflow"
    MOST = 1000  # metrics of a request

    def __init__(self, config: RunConfig, settings: MlflowConfig, folder: Path) -> None:
        # A server that does not answer must not hold the run for the half hour that MLflow would try.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(folder / 'mlflow').absolute()}"
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        self._waiting: list[Any] = []
        if (known := _identity(folder, "mlflow")) is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(settings.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(settings.experiment)
        self._run = _keep(folder, "mlflow", self._client.create_run(number, run_name=folder.name).info.run_id)
        self._client.log_text(self._run, dump_config(config), "config.yaml")

    def write(self, step: int, values: Mapping[str, float], when: float) -> None:
        self._waiting += [self._metric(name, value, round(1000 * when), step) for name, value in values.items()]

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        pass  # Artifacts need PIL or a server that takes files; TensorBoard has the picture.

    def flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self.MOST], self._waiting[self.MOST :]
            self._client.log_batch(self._run, metrics=batch)

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run, "FAILED" if _failing() else "FINISHED")


def _failing() -> bool:
    return sys.exc_info()[0] is not None


def _identity(folder: Path, tracker: str) -> str | None:
    path = folder / IDENTITIES
    found = read_object(path).get(tracker) if path.exists() else None
    return None if found is None else str(found)


def _keep(folder: Path, tracker: str, identity: str) -> str:
    path = folder / IDENTITIES
    write_json(path, {**(read_object(path) if path.exists() else {}), tracker: identity})
    return identity


def check_trackers(config: RunConfig) -> None:
    """Raises `ConfigError` where a tracker that a run asks for is not installed."""
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(config.trackers, name) is not None and find_spec(package) is None:
            raise ConfigError(
                f"trackers.{name}: the package {package} is not installed; pip install 'shodh[{name}]', or take "
                f"trackers.{name} out of the configuration"
            )


def openers(config: RunConfig, folder: Path, resume_step: int) -> dict[str, Any]:
    """By name, what opens each tracker of a run."""
    found: dict[str, Any] = {}
    wanted = config.trackers
    if wanted.tensorboard:
        found[TensorBoard.name] = lambda: TensorBoard(folder / "tensorboard", resume_step)
    if wanted.wandb is not None:
        settings = wanted.wandb
        found[Wandb.name] = lambda: Wandb(config, settings, folder)
    if wanted.mlflow is not None:
        of_mlflow = wanted.mlflow
        found[Mlflow.name] = lambda: Mlflow(config, of_mlflow, folder)
    return found
