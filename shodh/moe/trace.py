"""The routing trace: one JSON line per (step, layer) and rank, written and read here and nowhere else.

``{"v":2,"step":0,"split":"train","layer":3,"rank":0,"num_tokens":512,"top_k":1,"num_experts":4,
"counts":{"open_channel":[..E],"porous_media":[..E]},"mean_score":[..E],"confidence":0.93}``

``counts`` are assignments (tokens times top_k) by the regime of the sample, a label the router never saw;
``mean_score`` is the mean probability of each expert, ``confidence`` the mean of the best one. Validation adds, where
a token goes to more than one expert, ``"pairs":[[..E]..E]``: tokens that chose both experts, on the diagonal tokens
that chose the one.

Sample records follow: the same keys for one validation sample, and
``"sample":"porous_media/12:5","regime":"porous_media","trajectory":12,"frame":5,"top1":[[[..z]..y]..x]``, the first
choice of each token on the token grid. Samples are counted in the record of their batch already: who adds up counts
leaves sample records out. The same samples come back at every validation.

Version 1, which is still read, knew neither pairs nor trajectories and wrote no sample records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from msgspec import UNSET, UnsetType
from torch import Tensor

from shodh.core.errors import DataError
from shodh.core.files import LineFile, cut_lines
from shodh.moe.routing import Routing, count_by_regime

VERSION = 2
BLOCK_BYTES = 1 << 20

Version = Annotated[int, msgspec.Meta(ge=1, le=VERSION)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
MOST = 2**15 - 1  # layers, and experts of one
Layer = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Experts = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
T = TypeVar("T")


class RoutingRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the trace; see the module's docstring."""

    v: Version
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
    pairs: list[list[int]] | UnsetType = UNSET
    sample: str | UnsetType = UNSET
    regime: str | UnsetType = UNSET
    trajectory: int | UnsetType = UNSET
    frame: int | UnsetType = UNSET
    top1: list[Any] | UnsetType = UNSET

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


class RawRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What statistics need of a line, arrays still as text: twice as fast to read as a `RoutingRecord`."""

    v: Version
    step: Whole
    split: str
    layer: Layer
    num_experts: Experts
    counts: msgspec.Raw
    pairs: msgspec.Raw | UnsetType = UNSET
    sample: str | UnsetType = UNSET
    regime: str = ""
    trajectory: int = -1
    top1: msgspec.Raw | UnsetType = UNSET


@dataclass
class _Pending:
    step: int
    split: str
    layer: int
    num_tokens: int
    top_k: int
    counts: Tensor
    scores: Tensor
    pairs: Tensor | None


@dataclass
class _PendingSamples:
    step: int
    split: str
    layer: int
    top_k: int
    counts: Tensor  # [B, E]
    scores: Tensor  # [B, E + 1]
    top1: Tensor  # [B, *grid]
    keys: Tensor  # [B, 3]: regime, trajectory, frame


class TraceWriter:
    """Collects routing on the device and writes it at `flush`, so that a step never waits for a transfer.

    Parameters
    ----------
    path : Path
        ``RUN/routing/rank<r>.jsonl``; created with its folder.
    regimes : sequence of str
        Names in the order of the labels.
    limit : int
        Records this file may hold; later ones are dropped. See `thinning` for how to make a long run fit.
    resume_step : int
        Records of this step and later, from an attempt that is being repeated, are cut off.
    lenient : bool
        See `LineFile`.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        regimes: Sequence[str],
        limit: int,
        resume_step: int = 0,
        lenient: bool = False,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = cut_trace(path, resume_step)
        self._file = LineFile(path, lenient)
        self._rank = rank
        self._regimes = tuple(regimes)
        self._left = limit - kept
        self._pending: list[_Pending | _PendingSamples] = []

    def add(
        self, step: int, split: str, routings: Sequence[Routing], regime: Tensor, *, with_pairs: bool = False
    ) -> None:
        """Remember one forward pass over samples with these regime labels ``[B]``."""
        for layer, routing in enumerate(routings):
            if self._left <= 0:
                return
            self._left -= 1
            table = count_by_regime(routing.selected, regime, len(self._regimes), routing.num_experts)
            tokens, top_k = routing.selected.shape
            pairs = count_pairs(routing.selected, routing.num_experts) if with_pairs and top_k > 1 else None
            scores = _scores(routing.probs.detach().unsqueeze(0))[0]
            self._pending.append(_Pending(step, split, layer, tokens, top_k, table, scores, pairs))

    def add_samples(
        self, step: int, split: str, routings: Sequence[Routing], keys: Tensor, grid: Sequence[int], limit: int
    ) -> int:
        """Remember the first ``limit`` samples of a forward pass one by one; returns how many there were.

        Parameters
        ----------
        keys : Tensor [B, 3]
            Regime label, trajectory and frame of each sample.
        grid : sequence of int
            Token grid of a sample.
        """
        number = min(limit, len(keys), max(0, self._left) // max(1, len(routings)))
        if number <= 0:
            return 0
        for layer, routing in enumerate(routings):
            tokens, top_k = routing.selected.shape
            per_sample = tokens // len(keys)
            selected = routing.selected.view(len(keys), per_sample, top_k)[:number]
            counts = torch.zeros(number, routing.num_experts, dtype=torch.int64, device=selected.device)
            flat = selected.reshape(number, -1)
            counts.scatter_add_(1, flat, torch.ones_like(flat))
            scores = _scores(routing.probs.detach().view(len(keys), per_sample, -1)[:number])
            top1 = selected[..., 0].reshape(number, *grid)
            self._pending.append(_PendingSamples(step, split, layer, top_k, counts, scores, top1, keys[:number]))
        self._left -= number * len(routings)
        return number

    def flush(self) -> None:
        """Write what was collected."""
        for pending in self._pending:
            records = [self._record(pending)] if isinstance(pending, _Pending) else self._sample_records(pending)
            for record in records:
                self._file.add(record.to_json())
        self._pending.clear()
        self._file.flush()

    def _record(self, p: _Pending) -> RoutingRecord:
        counts = {name: row for name, row in zip(self._regimes, p.counts.tolist(), strict=True) if sum(row)}
        return RoutingRecord(
            v=VERSION,
            step=p.step,
            split=p.split,
            layer=p.layer,
            rank=self._rank,
            num_tokens=p.num_tokens,
            top_k=p.top_k,
            num_experts=p.counts.shape[1],
            counts=counts,
            **_rounded(p.scores),
            pairs=UNSET if p.pairs is None else p.pairs.tolist(),
        )

    def _sample_records(self, p: _PendingSamples) -> Iterator[RoutingRecord]:
        keys, counts, top1 = p.keys.tolist(), p.counts.tolist(), p.top1.tolist()
        for row, (label, trajectory, frame) in enumerate(keys):
            regime = self._regimes[label]
            yield RoutingRecord(
                v=VERSION,
                step=p.step,
                split=p.split,
                layer=p.layer,
                rank=self._rank,
                num_tokens=p.top1[row].numel(),
                top_k=p.top_k,
                num_experts=p.counts.shape[1],
                counts={regime: counts[row]},
                **_rounded(p.scores[row]),
                sample=f"{regime}/{trajectory}:{frame}",
                regime=regime,
                trajectory=trajectory,
                frame=frame,
                top1=top1[row],
            )

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def cut_trace(path: Path, step: int) -> int:
    """Drop the records of a step and later ones, and damaged lines; returns how many records are left."""
    decoder = msgspec.json.Decoder(RoutingRecord)

    def number_of(line: bytes) -> int:
        try:
            return decoder.decode(line).step
        except msgspec.MsgspecError as error:
            raise ValueError from error

    return cut_lines(path, number_of, step)


def cut_traces_of_others(folder: Path, world: int, step: int) -> None:
    """`cut_trace` for ranks that this run no longer has; what is left of an attempt that saved nothing is removed."""
    for path in folder.glob("rank*.jsonl"):
        number = path.stem.removeprefix("rank")
        if number.isdecimal() and int(number) >= world and not cut_trace(path, step):
            path.unlink()


def thinning(expected: int, limit: int) -> int:
    """``n`` such that every n-th of the expected records fits the limit, so that a long run is traced to its end."""
    return max(1, math.ceil(expected / max(1, limit)))


def count_pairs(selected: Tensor, num_experts: int) -> Tensor:
    """Tokens that chose both experts, ``[E, E]`` int64; on the diagonal, tokens that chose the one."""
    chosen = torch.zeros(selected.shape[0], num_experts, dtype=torch.float64, device=selected.device)
    chosen.scatter_(1, selected, 1.0)
    return (chosen.T @ chosen).to(torch.int64)


def _scores(probs: Tensor) -> Tensor:
    """Mean probability of each expert and mean of the best one: ``[B, S, E] -> [B, E + 1]``."""
    return torch.cat((probs.mean(1), probs.max(-1).values.mean(1, keepdim=True)), -1)


def _rounded(scores: Tensor) -> dict[str, Any]:
    *mean_score, confidence = (round(v, 6) for v in scores.tolist())
    return {"mean_score": mean_score, "confidence": confidence}


def read_trace(path: Path) -> Iterator[RoutingRecord]:
    """Records of one file, streaming; a last line that a crash cut off is left out.

    Raises
    ------
    DataError
        A line in the middle is damaged, or of another version; the message names file and line.
    """
    for _, block in read_blocks(path, RoutingRecord):
        yield from block


def read_blocks(
    path: Path, kind: type[T], progress: Callable[[int], object] | None = None
) -> Iterator[tuple[int, list[T]]]:
    """As `read_trace`, some thousand records of any msgspec type at once, with the number of lines before them.

    Parameters
    ----------
    progress : callable, optional
        Called with the number of bytes that were read.
    """
    decoder = msgspec.json.Decoder(kind)
    rest, number = b"", 0
    with path.open("rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            if progress is not None:
                progress(len(chunk))
            text = rest + chunk
            end = text.rfind(b"\n") + 1
            rest = text[end:]
            if not end:
                continue
            try:
                records = decoder.decode_lines(memoryview(text)[:end])
            except msgspec.MsgspecError:
                raise _damage(path, number, text[: end - 1], decoder) from None
            if records:
                yield number, records
            number += len(records)
    if rest:
        try:
            last = decoder.decode(rest)
        except msgspec.MsgspecError:
            return
        yield number, [last]


def _damage(path: Path, before: int, lines: bytes, decoder: msgspec.json.Decoder[Any]) -> DataError:
    """The error that names the first bad one of these lines, which follow ``before`` others."""
    for number, line in enumerate(lines.split(b"\n"), before + 1):
        try:
            if line.strip():
                decoder.decode(line)
        except msgspec.MsgspecError as error:
            where = f"{path}, line {number}"
            version = _version(line)
            if version is not None and not 1 <= version <= VERSION:
                return DataError(f"{where}: routing trace version {version}, and up to {VERSION} is read here")
            return DataError(f"{where}: not a routing record ({error}); remove the line, or the file")
    raise AssertionError("a block cannot be decoded although its lines can")


def _version(line: bytes) -> int | None:
    try:
        values = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        return None
    version = values.get("v") if isinstance(values, Mapping) else None
    return version if isinstance(version, int) else None
