"""Reading traces: every count once, whatever the order, the format, the damage, or the length."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routing_traces import GRID, line, sample, write

from shodh.core.errors import DataError
from shodh.routing import find_traces, read_traces
from shodh.routing import tables as tables_module
from shodh.routing.samples import SampleStore
from shodh.routing.tables import CountTables

A, B = {"channel": [3, 1]}, {"porous": [0, 4], "channel": [1, 1]}


def test_counts_of_all_ranks_are_added(tmp_path: Path) -> None:
    write(tmp_path, [line(0, A), line(1, B)], [line(0, B), line(1, A), line(1, A, layer=1)])
    trace = read_traces(find_traces(tmp_path))
    series = trace.tables.series("train", 0)
    assert trace.tables.regimes == ["channel", "porous"] and series.steps.tolist() == [0, 1]
    assert series.counts.tolist() == [[[4, 2], [0, 4]], [[4, 2], [0, 4]]]
    assert trace.tables.series("train", 1).counts.tolist() == [[[3, 1], [0, 0]]]


def test_layers_may_have_different_numbers_of_experts(tmp_path: Path) -> None:
    write(tmp_path, [line(0, {"a": [1, 2]}), line(0, {"a": [1, 2, 3, 4]}, layer=1), line(1, {"b": [5, 5]})])
    tables = read_traces(find_traces(tmp_path)).tables
    assert tables.series("train", 0).counts.tolist() == [[[1, 2], [0, 0]], [[0, 0], [5, 5]]]
    assert tables.series("train", 1).counts.tolist() == [[[1, 2, 3, 4], [0, 0, 0, 0]]]


@pytest.mark.parametrize("names", [("naca12", "naca3"), ("a,b", "c[d]"), ('say "hi"', "é"), ("1", "2")])
def test_any_name_of_a_regime_is_read(tmp_path: Path, names: tuple[str, str]) -> None:
    first, second = names
    write(tmp_path, [line(s, {first: [s, 2], second: [30, 4]}) for s in range(3)])
    tables = read_traces(find_traces(tmp_path)).tables
    assert tables.regimes == list(names)
    assert tables.series("train", 0).counts[:, 0, 0].tolist() == [0, 1, 2]
    assert tables.series("train", 0).counts[:, 1].tolist() == [[30, 4]] * 3


def test_mixed_blocks_equal_plain_sums(tmp_path: Path) -> None:
    """The fast path against json and a dictionary, on records of all kinds in random order."""
    rng = np.random.default_rng(0)
    lines, expected = [], {}
    for _ in range(3000):
        regimes = list(rng.permutation(["a", "b", "c2"])[: rng.integers(1, 4)])
        layer, step = int(rng.integers(0, 3)), int(rng.integers(0, 40))
        counts = {str(r): rng.integers(0, 10 ** int(rng.integers(1, 9)), 2 + 2 * layer).tolist() for r in regimes}
        split = str(rng.choice(["train", "valid"]))
        text = line(step, counts, layer, split)
        lines.append(text if rng.random() < 0.9 else text.replace(",", ", "))  # as json writes by default
        for regime, row in counts.items():
            key = (split, layer, step, regime)
            expected[key] = expected.get(key, 0) + np.array(row)
    write(tmp_path, lines[:1700], lines[1700:])
    tables = read_traces(find_traces(tmp_path)).tables
    found = {}
    for split in tables.splits:
        for layer in tables.layers(split):
            series = tables.series(split, layer)
            for step, table in zip(series.steps.tolist(), series.counts, strict=True):
                found |= {(split, layer, step, r): row for r, row in zip(tables.regimes, table, strict=True)}
    assert tables.records == 3000
    assert all((found[key] == row).all() for key, row in expected.items())
    assert all(not row.any() for key, row in found.items() if key not in expected)


def test_cut_off_last_line_is_left_out(tmp_path: Path) -> None:
    lines = [line(s, A) for s in range(4)]
    write(tmp_path, [*lines, lines[0][:50]])
    assert read_traces(find_traces(tmp_path)).tables.records == 4


def test_file_with_nothing_but_part_of_a_line_is_told(tmp_path: Path) -> None:
    write(tmp_path, [line(0, A)], ['{"v":2,"st'], [])
    trace = read_traces(find_traces(tmp_path))
    assert trace.tables.records == 1
    assert trace.notes == ["rank1.jsonl has no record.", "rank2.jsonl has no record."]


def test_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record; is the model dense"):
        read_traces(find_traces(write(tmp_path, [], [])))


@pytest.mark.parametrize("damage", [
    "{", "\x00\x00\x00", '{"v":2}',
    line(0, A).replace('"step":0', '"step":-1'),
    line(0, A).replace("[3,1]", "[3]"),
    line(0, A).replace("[3,1]", "[3,-1]"),
    line(0, A).replace("[3,1]", "[3,1.5]"),
    line(0, A).replace("[3,1]", "7"),
    sample(0, "a", 0, 0, np.zeros(GRID, dtype=int), 2).replace("[0,0]]", "[0]]"),
    line(0, A, pairs=[[1, 2], [3]]),
])  # fmt: skip
def test_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path, [line(0, A), line(1, A), damage.rstrip("\n") + "\n", line(2, A)])
    with pytest.raises(DataError, match=r"rank0.jsonl, line 3:") as error:
        read_traces(find_traces(tmp_path))
    assert "\n" not in str(error.value)


def test_ranks_that_end_at_different_steps_are_told(tmp_path: Path) -> None:
    write(tmp_path, [line(s, A) for s in range(6)], [line(s, A) for s in range(4)])
    trace = read_traces(find_traces(tmp_path))
    assert "rank1.jsonl at 3, others at up to 5" in trace.notes[0]
    assert trace.tables.series("train", 0).counts[:, 0, 0].tolist() == [6, 6, 6, 6, 3, 3]


def test_samples_are_kept_and_not_counted_twice(tmp_path: Path) -> None:
    top1 = np.arange(32).reshape(GRID) % 2
    record = sample(5, "a", 3, 1, top1, 2)
    write(tmp_path, [record, record, line(5, {"a": [16, 16]}, split="valid")])
    trace = read_traces(find_traces(tmp_path))
    assert trace.tables.records == 1
    (name, kept), *rest = trace.samples.newest("valid").items()
    assert not rest and name == "a/3:1" and (kept.regime, kept.trajectory) == ("a", 3)
    assert (kept.top1[0] == top1).all() and kept.counts[0].tolist() == [16, 16]


def test_pairs_of_the_newest_step_are_added_over_ranks(tmp_path: Path) -> None:
    old, new = [[9, 9], [9, 9]], [[2, 1], [1, 3]]
    ranks = [[line(0, A, pairs=old), line(4, A, pairs=new)], [line(0, A, pairs=old), line(4, A, pairs=new)]]
    trace = read_traces(find_traces(write(tmp_path, *ranks)))
    step, pairs = trace.pairs["train", 0]
    assert step == 4 and pairs.tolist() == [[4, 2], [2, 6]]


def test_looks_are_thinned_to_the_memory_and_keep_the_ends() -> None:
    store = SampleStore(max_bytes=5000)
    grid, counts = np.zeros(100, dtype=np.int16), np.zeros(4, dtype=np.int64)
    for _rank in range(2):
        for step in range(0, 1000, 10):
            store.add("valid", step, 0, f"a/0:{_rank}", "a", 0, grid, counts)
    steps = store.steps("valid")
    assert store.thinned and steps[0] == 0 and steps[-1] == 990 and 4 < len(steps) < 30


def test_stretches_widen_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "MAX_BUCKETS", 8)
    tables = CountTables()
    steps = np.arange(100)
    tables.add(("train", 0), ["a"], steps, np.ones((100, 1, 2), dtype=np.int64))
    tables.add(("valid", 1), ["b"], steps[::-10], np.ones((10, 1, 3), dtype=np.int64))
    assert tables.width == 16
    assert tables.series("train", 0).steps.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert tables.series("train", 0).counts[:, 0, 0].tolist() == [16] * 6 + [4]
    assert tables.series("valid", 1).counts.sum((0, 2)).tolist() == [0, 30]


def test_memory_does_not_grow_with_records(tmp_path: Path) -> None:
    """Eight times the records: the same memory."""
    peaks = []
    for number in (10_000, 80_000):
        block = "".join(line(s, {"a": [1, 2, 3, 4], "b": [4, 3, 2, 1]}) for s in range(1000))
        path = tmp_path / f"{number}.jsonl"
        with path.open("w") as file:
            for _ in range(number // 1000):
                file.write(block)
        tracemalloc.start()
        assert read_traces([path]).tables.records == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def megatron(step: int, layer: int, indices: list[list[int]], rank: int = 0, **more: Any) -> str:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    record |= {"num_tokens": len(indices), "topk": len(indices[0]), "top_indices": indices}
    return json.dumps({**record, **more}) + "\n"


def megatron_lines() -> Iterator[str]:
    for step in range(3):
        for layer in (3, 4):
            yield megatron(step, layer, [[0, 1], [2, 1], [0, step + 1]])


def test_megatron_traces_are_recognised(tmp_path: Path) -> None:
    mtp = megatron(2, 3, [[7, 7]], block="mtp", mtp_idx=0)
    (tmp_path / "router_trace_rank0.jsonl").write_text("".join(megatron_lines()) + mtp)
    trace = read_traces(find_traces(tmp_path))
    assert not trace.labelled and not trace.comparable
    assert trace.tables.layers("train") == [3, 4]
    assert trace.tables.series("train", 3).counts[:, 0].tolist() == [[2, 3, 1, 0], [2, 2, 2, 0], [2, 2, 1, 1]]
    assert trace.pairs["train", 3][1].tolist() == [[2, 1, 0, 1], [1, 2, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    assert trace.samples.steps("train") == [2]
    assert any("1 records of multi-token" in note for note in trace.notes)


@pytest.mark.parametrize("indices", [[[0, 1], [2]], [[0, -1], [1, 2]]])
def test_damaged_megatron_line_is_named(tmp_path: Path, indices: list[list[int]]) -> None:
    (tmp_path / "router_trace_rank0.jsonl").write_text(megatron(0, 0, [[0, 1]]) + megatron(1, 0, indices))
    with pytest.raises(DataError, match=r"rank0.jsonl, line 2: top_indices"):
        read_traces(find_traces(tmp_path))


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, megatron_lines(), [line(0, A)])
    with pytest.raises(DataError, match="rank1.jsonl: not a Megatron"):
        read_traces(find_traces(tmp_path))


def test_traces_are_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        find_traces(tmp_path / "absent")
    with pytest.raises(DataError, match="found no"):
        find_traces(tmp_path)
    run = tmp_path / "run"
    write(run / "routing", *[[line(0, A)]] * 11)
    (run / "metrics.jsonl").write_text("{}\n")
    assert [p.name for p in find_traces(run)] == [f"rank{r}.jsonl" for r in range(11)]
    assert find_traces(run / "routing" / "rank3.jsonl") == [run / "routing" / "rank3.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(1, A, pairs=[1, 2]), "pairs are \\[2\\], expected 2 x 2"),
        (line(1, A, pairs=[[1, 2]]), "pairs are \\[1, 2\\], expected 2 x 2"),
        (sample(1, "a", 0, 0, np.ones(GRID, int), 2).replace('"top1":[[[1', '"top1":[[[2'), "not of its 2 experts"),
        (line(1, A, layer=2**62), "`int` <= 32767"),
        (line(2**64, A), "step"),
    ],
)
def test_numbers_that_no_run_has_are_named(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, [line(0, A), text, line(2, A)])
    with pytest.raises(DataError, match=f"rank0.jsonl, line 2: .*{message}"):
        read_traces(find_traces(tmp_path))


def test_records_without_counts_are_no_records(tmp_path: Path) -> None:
    write(tmp_path, [line(0, {"a": [0, 0], "b": [0, 0]})])
    with pytest.raises(DataError, match="have no record"):
        read_traces(find_traces(tmp_path))
