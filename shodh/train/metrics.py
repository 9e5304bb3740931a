"""Metrics have one owner: modules report tensors with a reduction, this file reduces and writes them."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.core.distributed import connected, sum_over_ranks
from shodh.core.files import UNREADABLE, LineFile, cut_lines
from shodh.core.reading import read_lines
from shodh.core.strict_json import dumps
from shodh.train.trackers import TensorBoard, Tracker

log = logging.getLogger("shodh")

Reduction = Literal["mean", "sum", "max"]
Metrics = dict[str, tuple[Tensor | float, Reduction]]


def reduce_metrics(metrics: Mapping[str, tuple[Tensor | float, Reduction]], device: torch.device) -> dict[str, float]:
    """Reduce scalars over all ranks, one collective a kind of reduction; every rank must report the same names."""
    out: dict[str, float] = {}
    for kind, operation in (("mean", dist.ReduceOp.SUM), ("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        names = sorted(name for name, (_, reduction) in metrics.items() if reduction == kind)
        if not names:
            continue
        values = [torch.as_tensor(metrics[name][0], dtype=torch.float64, device=device).detach() for name in names]
        flat = torch.stack(values)
        sum_over_ranks(flat, operation)
        if kind == "mean":
            flat /= connected()
        out.update(zip(names, flat.tolist(), strict=True))
    return out


def mean_over_ranks(value: Tensor | float, device: torch.device) -> Tensor:
    """Mean of a scalar over all ranks, in float64, on the device: nothing waits for it."""
    mean = torch.as_tensor(value, dtype=torch.float64, device=device).detach().clone()
    return sum_over_ranks(mean) / connected()


class RegimeMeans:
    """Means of per-sample values by regime, over all batches and ranks.

    Parameters
    ----------
    names : sequence of str
        Regimes in the order of their labels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, regime: Tensor) -> None:
        """Add ``values [B]`` of samples with labels ``regime [B]``."""
        table = self._sums.setdefault(name, torch.zeros(len(self._names), 2, dtype=torch.float64, device=values.device))
        rows = torch.stack((values.detach().double(), torch.ones_like(values, dtype=torch.float64)), 1)
        table.index_add_(0, regime, rows)

    def reduce(self, prefix: str) -> Metrics:
        """``{prefix/<name>/<regime>: mean}`` of regimes that had samples, and ``{prefix/<name>: their mean}``.

        Collective; every rank has the same names.
        """
        metrics: Metrics = {}
        for name, table in self._sums.items():
            rows = zip(self._names, sum_over_ranks(table).tolist(), strict=True)
            found = {regime: total / count for regime, (total, count) in rows if count}
            metrics |= {f"{prefix}/{name}/{regime}": (value, "max") for regime, value in found.items()}
            if found:
                metrics[f"{prefix}/{name}"] = (sum(found.values()) / len(found), "max")
        return metrics


def nonfinite_regimes(errors: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[str]:
    """Names of regimes with an error that is not finite, of pairs (labels ``[B]``, errors ``[B]``)."""
    labels = {label for regime, error in errors for label in regime[~error.isfinite()].tolist()}
    return [name for label, name in enumerate(names) if label in labels]


class StepRecord:
    """Loss, gradient norm, learning rate and skip of every step, kept on the device until they are written.

    The values are those of all ranks already, so that rank 0 can write them alone, also when another has failed.
    """

    LIMIT = 1000  # steps that wait at most

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, dict[str, Tensor | float]]] = []

    def add(self, step: int, values: dict[str, Tensor | float]) -> None:
        """Keep the values of a step; nothing is read from a device."""
        self._rows.append((step, time.time(), values))

    @property
    def full(self) -> bool:
        return len(self._rows) >= self.LIMIT

    def take(self) -> list[tuple[int, float, dict[str, float]]]:
        """(step, time, values) of the steps since the last call; one transfer from the device."""
        rows, self._rows = self._rows, []
        tensors = [v for _, _, values in rows for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else [])
        return [
            (step, when, {n: next(numbers) if isinstance(v, Tensor) else float(v) for n, v in values.items()})
            for step, when, values in rows
        ]


class MetricWriter:
    """``metrics.jsonl`` and the trackers of a run, on rank 0; a resumed run cuts off what lies after its step.

    A value that is not finite is ``null`` in the file: JSON has no other way to write it. A tracker that fails is
    switched off with one line in the log; the file is what a run needs, and its errors are raised.

    Parameters
    ----------
    folder : Path
        Run folder.
    resume_step : int
        First step that will be written; later lines of an earlier attempt are dropped.
    trackers : mapping, optional
        By name, what opens a tracker (`shodh.train.trackers`); TensorBoard where nothing is said.
    lenient : bool
        See `LineFile`.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        trackers: Mapping[str, Callable[[], Tracker]] | None = None,
        lenient: bool = False,
    ) -> None:
        if trackers is None:
            trackers = {TensorBoard.name: lambda: TensorBoard(folder / "tensorboard", resume_step)}
        threading.excepthook = _leave_to_writer
        path = folder / "metrics.jsonl"
        cut_lines(path, lambda line: int(json.loads(line)["step"]), resume_step)
        self._file = LineFile(path, lenient)
        self._trackers: list[Tracker] = []
        for name, opener in trackers.items():
            with self._guarded(name):
                self._trackers.append(opener())

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Switch a tracker off where it raises."""
        try:
            yield
        except Exception as error:
            self._trackers = [tracker for tracker in self._trackers if tracker.name != name]
            what = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("%s is switched off, and the run goes on without it: %s", name, what)

    def _track(self, method: str, *arguments: Any) -> None:
        for tracker in self._trackers:
            with self._guarded(tracker.name):
                getattr(tracker, method)(*arguments)

    def write(self, step: int, values: Mapping[str, float], when: float | None = None) -> None:
        """One line of JSON, and the values for the trackers; ``when`` it was, in seconds of the epoch, if not now."""
        when = time.time() if when is None else when
        self._file.add(dumps({"step": step, "time": when, **values}))
        self._track("write", step, values, when)

    def flush(self) -> None:
        """Give what was written to the operating system, and to the trackers."""
        self._file.flush()
        self._track("flush")

    def image(self, step: int, name: str, picture: Any) -> None:
        """An ``[H, W, 3]`` uint8 array for the trackers."""
        self._track("image", step, name, picture)

    def close(self) -> None:
        self._file.close()
        self._track("close")


def _leave_to_writer(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread shows a traceback of a full disk, and gives the error to whoever writes next, too."""
    if not isinstance(error.exc_value, OSError) or type(error.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(error)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a ``metrics.jsonl``, ``null`` as NaN; one that is damaged, or was cut off by a crash, is left out."""
    found = []
    for values in read_lines(path):
        with suppress(*UNREADABLE):
            int(values["step"])
            found.append({name: math.nan if v is None else v for name, v in values.items()})
    return found
