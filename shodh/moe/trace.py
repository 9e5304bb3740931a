"""The routing trace: one JSON line per (step, layer) and rank, written and read here and nowhere else.

``{"v":1,"step":0,"split":"train","layer":3,"rank":0,"num_tokens":512,"top_k":1,"num_experts":4,
"counts":{"open_channel":[..E],"porous_media":[..E]},"mean_score":[..E],"confidence":0.93}``

``counts`` are assignments (tokens times top_k) by the regime of the sample, a label the router never saw;
``mean_score`` is the mean probability of each expert, ``confidence`` the mean of the best one. A record may also carry
one sample: ``"sample"`` (an id), ``"regime"`` and ``"top1"``, the first choice of each token on the token grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from shodh.errors import DataError
from shodh.moe.routing import Routing, count_by_regime

VERSION = 1


@dataclass(frozen=True)
class RoutingRecord:
    """One line of the trace; see the module's docstring."""

    step: int
    split: str
    layer: int
    rank: int
    num_tokens: int
    top_k: int
    num_experts: int
    counts: dict[str, list[int]]
    mean_score: list[float]
    confidence: float
    sample: str | None = None
    regime: str | None = None
    top1: list[Any] | None = None

    def to_json(self) -> str:
        values = {"v": VERSION, **{k: v for k, v in asdict(self).items() if v is not None}}
        return json.dumps(values, separators=(",", ":"))


@dataclass
class _Pending:
    step: int
    split: str
    layer: int
    num_tokens: int
    top_k: int
    counts: Tensor
    scores: Tensor


class TraceWriter:
    """Collects routing on the device and writes it at `flush`, so that a step never waits for a transfer.

    Parameters
    ----------
    path : Path
        ``RUN/routing/rank<r>.jsonl``; created with its folder.
    regimes : sequence of str
        Names in the order of the labels.
    limit : int
        Records this file may hold; later ones are dropped, and the last line says so.
    resume_step : int
        Records of this step and later, from an attempt that is being repeated, are cut off.
    """

    def __init__(self, path: Path, rank: int, regimes: Sequence[str], limit: int, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_trace(path) if r.step < resume_step] if resume_step and path.exists() else []
        self._file: TextIO = path.open("w")
        for record in kept:
            self._file.write(record.to_json() + "\n")
        self._file.flush()
        self._rank = rank
        self._regimes = tuple(regimes)
        self._left = limit - len(kept)
        self._pending: list[_Pending] = []

    def add(self, step: int, split: str, routings: Sequence[Routing], regime: Tensor) -> None:
        """Remember one forward pass over samples with these regime labels ``[B]``."""
        for layer, routing in enumerate(routings):
            if self._left <= 0:
                return
            self._left -= 1
            table = count_by_regime(routing.selected, regime, len(self._regimes), routing.num_experts)
            probs = routing.probs.detach()
            scores = torch.cat((probs.mean(0), probs.max(-1).values.mean().view(1)))
            tokens, top_k = routing.selected.shape
            self._pending.append(_Pending(step, split, layer, tokens, top_k, table, scores))

    def flush(self) -> None:
        """Write what was collected."""
        for p in self._pending:
            counts = {name: row for name, row in zip(self._regimes, p.counts.tolist(), strict=True) if sum(row)}
            *mean_score, confidence = (round(v, 6) for v in p.scores.tolist())
            record = RoutingRecord(
                step=p.step,
                split=p.split,
                layer=p.layer,
                rank=self._rank,
                num_tokens=p.num_tokens,
                top_k=p.top_k,
                num_experts=len(mean_score),
                counts=counts,
                mean_score=mean_score,
                confidence=confidence,
            )
            self._file.write(record.to_json() + "\n")
        self._pending.clear()
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_trace(path: Path) -> Iterator[RoutingRecord]:
    """Records of one file, streaming; a last line that a crash cut off is left out.

    Raises
    ------
    DataError
        A line in the middle is damaged, or of another version; the message names file and line.
    """
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                version = values.pop("v")
                record = RoutingRecord(**values)
            except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
                if not line.endswith("\n"):
                    return
                raise DataError(f"{path}, line {number}: not a routing record") from error
            if version != VERSION:
                raise DataError(f"{path}, line {number}: routing trace version {version}, and {VERSION} is read here")
            yield record
