"""Metrics have one owner: modules report tensors with a reduction, this file reduces and writes them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.strict_json import dumps

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
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat, op=operation)
            if kind == "mean":
                flat /= dist.get_world_size()
        out.update(zip(names, flat.tolist(), strict=True))
    return out


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
        """``{prefix/<name>/<regime>: mean}`` of regimes that had samples; collective, every rank the same names."""
        metrics: Metrics = {}
        for name, table in self._sums.items():
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(table)
            for regime, (total, count) in zip(self._names, table.tolist(), strict=True):
                if count:
                    metrics[f"{prefix}/{name}/{regime}"] = (total / count, "max")
        return metrics


class MetricWriter:
    """``metrics.jsonl`` and TensorBoard, on rank 0; a resumed run cuts off what lies after its step.

    Parameters
    ----------
    folder : Path
        Run folder.
    resume_step : int
        First step that will be written; later lines of an earlier attempt are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] < resume_step] if resume_step else []
        self._file: TextIO = self._path.open("w")
        for line in kept:
            self._file.write(dumps(line) + "\n")
        self._file.flush()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of JSON and one scalar a name."""
        self._file.write(dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Any) -> None:
        """An ``[H, W, 3]`` uint8 array for TensorBoard."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a ``metrics.jsonl``, NaN where a number was not finite; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append({name: math.nan if value is None else value for name, value in json.loads(text).items()})
        except json.JSONDecodeError:
            break
    return lines
