"""From trace files, ours or Megatron's, to counts and samples: streaming, in memory that does not grow with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from msgspec import UNSET

from shodh.core.errors import DataError
from shodh.moe.trace import MOST, Layer, RawRecord, Whole, read_blocks
from shodh.routing.samples import SampleStore
from shodh.routing.tables import CountTables, RecordCounter, decode_counts

UNLABELLED = "all tokens"
TRAIN = "train"
MEGATRON_NOTE = (
    "Megatron's trace names no regimes: U and NMI are not available. Nor does it name the number of experts: those "
    "above the last one used are unknown."
)
ORDER_NOTE = (
    "The experts of every token stand sorted by their number, as they do if the trace was made from a map of which "
    "experts were chosen: which of them came first is unknown. Loads and co-activation are of all chosen experts; what "
    "needs the first choice is left out."
)
GRID = msgspec.json.Decoder(list)
Progress = Callable[[int], object]


class MegatronRecord(msgspec.Struct, frozen=True, gc=False):
    """What is used of a line of Megatron's router trace (``megatron/core/transformer/moe/router_trace.py``).

    ``top_indices [num_tokens, topk]``, by score, or sorted where they were made from a map ``[num_tokens, experts]`` of
    choices; the file says neither which, nor regimes, nor the number of experts.
    """

    step: Whole
    layer: Layer
    rank: int
    num_tokens: int
    topk: int
    top_indices: list[list[int]]
    block: str = "decoder"


@dataclass
class Trace:
    """Everything the analysis needs of a run's trace.

    Attributes
    ----------
    pairs : dict
        By (split, layer): the newest step with pairs, and tokens that chose both experts ``[E, E]``.
    labelled : bool
        Whether regimes are known; Megatron's trace has none.
    comparable : bool
        Whether looks at different steps are of the same samples.
    ordered : bool
        Whether the first of a token's experts is its first choice; not in a trace with a file that sorts them all.
    notes : list of str
        What a reader of the results must know about the reading.
    """

    files: list[Path]
    tables: CountTables = field(default_factory=CountTables)
    samples: SampleStore = field(default_factory=SampleStore)
    pairs: dict[tuple[str, int], tuple[int, np.ndarray]] = field(default_factory=dict)
    labelled: bool = True
    comparable: bool = True
    ordered: bool = True
    notes: list[str] = field(default_factory=list)

    def add_pairs(self, split: str, layer: int, step: int, pairs: np.ndarray) -> None:
        newest, old = self.pairs.get((split, layer), (-1, pairs))
        if step > newest:
            self.pairs[split, layer] = (step, pairs)
        elif step == newest:
            size = max(len(old), len(pairs))
            self.pairs[split, layer] = (step, _padded(old, size) + _padded(pairs, size))


def find_traces(path: Path) -> list[Path]:
    """Trace files of a run folder, of a folder of ``.jsonl`` files, or the one file.

    Raises
    ------
    DataError
        There is nothing to read; says what was looked for.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder or trace file")
    folder = path / "routing" if (path / "routing").is_dir() else path
    names = {p.name for p in folder.glob("*.jsonl")} - {"metrics.jsonl"}
    if not names:
        raise DataError(f"{path}: found no routing/*.jsonl and no *.jsonl; give a run folder or a folder of traces")
    return sorted((folder / name for name in names), key=lambda p: (len(p.name), p.name))


def read_traces(files: Sequence[Path], progress: Progress | None = None) -> Trace:
    """Read the traces of all ranks.

    Raises
    ------
    DataError
        A line is damaged (names file and line), formats are mixed, or no file has a record.
    """
    trace = Trace(list(files))
    foreign = [_is_megatron(path) for path in files]
    if any(foreign) and False in foreign:
        mixed = files[foreign.index(False)]
        raise DataError(f"{mixed}: not a Megatron router trace, as the other files are; analyse them one by one")
    trace.labelled = trace.comparable = not any(foreign)
    ends = {}
    for path, kind in zip(files, foreign, strict=True):
        if kind is None:
            trace.notes.append(f"{path.name} has no record.")
            continue
        ends[path.name] = (_read_megatron if kind else _read_own)(path, trace, progress)
    if not trace.tables.splits:
        raise DataError(
            f"{files[0].parent}: the traces have no record; is the model dense, or was it trained with routing_trace=0?"
        )
    if len(set(ends.values())) > 1:
        short = min(ends, key=lambda name: ends[name])
        trace.notes.append(
            f"Ranks end at different steps: {short} at {ends[short]}, others at up to {max(ends.values())}; after that "
            "step the counts are of fewer ranks."
        )
    if trace.samples.thinned:
        trace.notes.append("There are more sample records than fit in memory; some validations were passed over.")
    return trace


def _is_megatron(path: Path) -> bool | None:
    """Which format a file has, by its first line; None if there is none, or only a part of one."""
    with path.open("rb") as file:
        first = file.readline()
    if not first.strip():
        return None
    try:
        values = msgspec.json.decode(first)
    except msgspec.MsgspecError:
        return None if not first.endswith(b"\n") else False
    return isinstance(values, dict) and "top_indices" in values


def _read_own(path: Path, trace: Trace, progress: Progress | None) -> int:
    """Read one rank's file; returns its last step."""
    last = -1
    counter = RecordCounter(trace.tables)
    for before, records in read_blocks(path, RawRecord, progress):
        try:
            _add_own(records, counter, trace)
        except DataError:
            # Only now look for the line: a check of every record by itself would cost half of the speed.
            for number, record in enumerate(records, before + 1):
                try:
                    _add_own([record], RecordCounter(CountTables()), Trace([]))
                except DataError as error:
                    raise DataError(f"{path}, line {number}: {error}") from None
            raise
        last = max(last, records[-1].step)
    return last


def _add_own(records: Sequence[RawRecord], counter: RecordCounter, trace: Trace) -> None:
    special = [r for r in records if r.sample is not UNSET or r.pairs is not UNSET]
    counter.add([r for r in records if r.sample is UNSET] if special else records)
    for record in special:
        if record.pairs is not UNSET and record.sample is UNSET:
            pairs = _integers(record.pairs, "pairs")
            if pairs.shape != (record.num_experts,) * 2:
                raise DataError(f"pairs are {list(pairs.shape)}, expected {record.num_experts} x {record.num_experts}")
            trace.add_pairs(record.split, record.layer, record.step, pairs)
        if isinstance(record.sample, str) and record.top1 is not UNSET:
            counts = decode_counts(record.counts, record.num_experts)
            top1 = _integers(record.top1, "top1")
            if not top1.size or top1.max() >= record.num_experts or not counts:
                raise DataError(f"top1 and counts of a sample are not of its {record.num_experts} experts")
            trace.samples.add(
                record.split,
                record.step,
                record.layer,
                record.sample,
                record.regime or next(iter(counts), UNLABELLED),
                record.trajectory,
                top1.astype(np.int16),
                np.array(list(counts.values())).sum(0),
            )


def _integers(raw: msgspec.Raw, name: str) -> np.ndarray:
    try:
        values = np.array(GRID.decode(raw))
    except ValueError as error:  # msgspec's own errors are ValueErrors
        raise DataError(f"{name} is not a regular grid of numbers ({error})") from None
    if values.dtype.kind != "i" or (values < 0).any():
        raise DataError(f"{name} is not a grid of whole numbers, none below 0")
    return values


def _read_megatron(path: Path, trace: Trace, progress: Progress | None) -> int:
    """Read one rank's file of Megatron's trace; returns its last step."""
    last, left_out, rising, falling = -1, 0, True, True
    seen: Counter[tuple[int, int]] = Counter()
    for before, records in read_blocks(path, MegatronRecord, progress):
        for number, record in enumerate(records, before + 1):
            if record.block != "decoder":
                left_out += 1
                continue
            if record.step > last:
                last = record.step
                seen.clear()
                trace.samples.forget_before(TRAIN, last)
            try:
                chosen = np.array(record.top_indices, dtype=np.int64).reshape(record.num_tokens, record.topk)
            except (ValueError, OverflowError):
                chosen = np.full((1, 1), -1)
            if chosen.size and not 0 <= chosen.min() <= chosen.max() < MOST:
                raise DataError(
                    f"{path}, line {number}: top_indices are not num_tokens={record.num_tokens} x topk={record.topk} "
                    "experts"
                )
            if chosen.size:
                steps = np.diff(chosen)
                rising, falling = rising and bool((steps >= 0).all()), falling and bool((steps <= 0).all())
                seen[record.step, record.layer] += 1
                _add_megatron(record, chosen, seen[record.step, record.layer], trace)
    # By chance, so many tokens are never all sorted: of k experts in any order one token in k! is.
    if rising != falling:
        trace.ordered = False
    if not trace.ordered and ORDER_NOTE not in trace.notes:
        trace.notes.append(ORDER_NOTE)
    if MEGATRON_NOTE not in trace.notes:
        trace.notes.append(MEGATRON_NOTE)
    if left_out:
        trace.notes.append(f"{path.name}: {left_out} records of multi-token-prediction layers were left out.")
    return last


def _add_megatron(record: MegatronRecord, chosen: np.ndarray, occurrence: int, trace: Trace) -> None:
    experts = int(chosen.max()) + 1
    counts = np.bincount(chosen.ravel(), minlength=experts)
    when = np.array([record.step])
    trace.tables.add((TRAIN, record.layer), [UNLABELLED], when, counts.reshape(1, 1, -1))
    if record.topk > 1:
        member = np.zeros((len(chosen), experts))
        np.put_along_axis(member, chosen, 1.0, axis=1)
        trace.add_pairs(TRAIN, record.layer, record.step, (member.T @ member).astype(np.int64))
    # Tokens come in the same order in every layer of a pass, so that transitions between layers can be counted.
    name = f"rank {record.rank}, pass {occurrence}"
    first = chosen[:, 0].astype(np.int16)
    trace.samples.add(TRAIN, record.step, record.layer, name, UNLABELLED, -1, first, counts)


def _padded(table: np.ndarray, size: int) -> np.ndarray:
    return np.pad(table, (0, size - len(table)))
