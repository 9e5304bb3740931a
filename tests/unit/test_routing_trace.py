"""The routing trace: what is written is what is read, whatever happened to the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shodh.core.errors import DataError
from shodh.moe import trace
from shodh.moe.routing import Routing, count_assignments
from shodh.moe.trace import RoutingRecord, TraceWriter, cut_traces_of_others, read_trace, thinning

REGIMES = ("open_channel", "porous_media", "absent")
TOKENS = 5


def decision(seed: int, experts: int = 4, top_k: int = 2) -> Routing:
    probs = torch.randn(3 * TOKENS, experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    selected = probs.topk(top_k).indices
    return Routing(probs, probs.log(), selected, count_assignments(selected, experts), probs[:, :0], probs)


def write(path: Path, steps: range, limit: int = 1000, resume_step: int = 0) -> None:
    writer = TraceWriter(path, 1, REGIMES, limit, resume_step)
    for step in steps:
        writer.add(step, "train", [decision(step), decision(100 + step)], torch.tensor([1, 0, 1]))
    writer.close()


def test_records_hold_the_decision(tmp_path: Path) -> None:
    path = tmp_path / "routing" / "rank1.jsonl"
    write(path, range(2))
    records = list(read_trace(path))
    assert [(r.step, r.layer) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    record, routing = records[3], decision(101)
    assert (record.split, record.rank, record.num_tokens, record.top_k, record.num_experts) == ("train", 1, 15, 2, 4)
    assert set(record.counts) == {"open_channel", "porous_media"}
    assert record.counts["open_channel"] == torch.bincount(routing.selected[5:10].flatten(), minlength=4).tolist()
    assert sum(map(sum, record.counts.values())) == 30
    assert record.mean_score == pytest.approx(routing.probs.mean(0).tolist(), abs=1e-6)
    assert record.confidence == pytest.approx(routing.probs.max(-1).values.mean().item(), abs=1e-6)


def test_lines_are_the_published_format(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(1))
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == [
        *("v", "step", "split", "layer", "rank", "num_tokens", "top_k", "num_experts"),
        *("counts", "mean_score", "confidence"),
    ]
    assert first["v"] == 2


def test_sample_records_survive_the_round_trip(tmp_path: Path) -> None:
    """Samples are written one by one: their grid, their counts, and which sample of which trajectory they are."""
    path, grid = tmp_path / "rank1.jsonl", (5, 1, 1)
    writer = TraceWriter(path, 1, REGIMES, 1000)
    layers, keys = [decision(1), decision(2)], torch.tensor([[1, 12, 5], [0, 3, 0], [1, 12, 6]])
    assert writer.add_samples(7, "valid", layers, keys, grid, 2) == 2
    writer.close()
    records = list(read_trace(path))
    assert [(r.layer, r.sample) for r in records] == [
        *((0, "porous_media/12:5"), (0, "open_channel/3:0"), (1, "porous_media/12:5"), (1, "open_channel/3:0"))
    ]
    second = records[3]
    assert (second.regime, second.trajectory, second.frame, second.num_tokens) == ("open_channel", 3, 0, 5)
    chosen = layers[1].selected[5:10]
    assert torch.equal(torch.tensor(second.top1), chosen[:, 0].view(grid))
    assert second.counts == {"open_channel": torch.bincount(chosen.flatten(), minlength=4).tolist()}
    assert second.mean_score == pytest.approx(layers[1].probs[5:10].mean(0).tolist(), abs=1e-6)
    assert [RoutingRecord(**{f: getattr(r, f) for f in r.__struct_fields__}) for r in records] == records


def test_samples_count_towards_the_limit(tmp_path: Path) -> None:
    path, keys = tmp_path / "rank1.jsonl", torch.tensor([[1, 12, 5], [0, 3, 0], [1, 12, 6]])
    writer = TraceWriter(path, 1, REGIMES, 5)
    layers = [decision(1), decision(2)]
    assert writer.add_samples(7, "valid", layers, keys, (5,), 9) == 2  # two layers each: a third would be half
    writer.add(8, "train", layers, keys[:, 0])
    assert writer.add_samples(9, "valid", layers, keys, (5,), 9) == 0
    writer.close()
    assert [r.step for r in read_trace(path)] == [7, 7, 7, 7, 8]


def test_pairs_count_tokens_that_chose_both(tmp_path: Path) -> None:
    path, routing = tmp_path / "rank1.jsonl", decision(3)
    writer = TraceWriter(path, 1, REGIMES, 10)
    writer.add(0, "valid", [routing], torch.tensor([1, 0, 1]), with_pairs=True)
    writer.add(1, "valid", [decision(3, top_k=1)], torch.tensor([1, 0, 1]), with_pairs=True)
    writer.close()
    record, single = read_trace(path)
    rows = [set(row) for row in routing.selected.tolist()]
    assert record.pairs == [[sum({i, j} <= row for row in rows) for j in range(4)] for i in range(4)]
    assert "pairs" not in single.to_json()


def test_version_1_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(2))
    whole = list(read_trace(path))
    path.write_text(path.read_text().replace('"v":2', '"v":1'))
    assert [r.counts for r in read_trace(path)] == [r.counts for r in whole]


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_blocks_cut_lines_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(4))
    whole = list(read_trace(path))
    monkeypatch.setattr(trace, "BLOCK_BYTES", size)
    assert list(read_trace(path)) == whole
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], "{", *lines[5:]]) + "\n")
    with pytest.raises(DataError, match="line 6:"):
        list(read_trace(path))


def test_long_runs_are_thinned_to_the_limit() -> None:
    assert [thinning(*case) for case in ((100, 100), (101, 100), (1000, 100), (5, 100), (0, 0))] == [1, 2, 10, 1, 1]


def test_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(3))
    whole = list(read_trace(path))
    text = path.read_text()
    for cut in (2, 5, 60):
        path.write_text(text[:-cut])
        assert list(read_trace(path)) == whole[:-1]
    path.write_text(text[:-1])  # only the line's end is missing: the record is whole
    assert list(read_trace(path)) == whole


@pytest.mark.parametrize("line", ["{", "[]", '{"v":1}', '{"step":0}', '{"v":1,"step":0,"unknown":1}', "3"])
def test_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(2))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"rank1.jsonl, line 2"):
        list(read_trace(path))


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(1))
    path.write_text(path.read_text().replace('"v":2', '"v":3'))
    with pytest.raises(DataError, match="version 3"):
        list(read_trace(path))


def test_resumed_run_writes_the_repeated_steps_once(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    write(whole, range(6))
    write(broken, range(5))
    broken.write_text(broken.read_text()[:-10])  # killed in the middle of a line
    write(broken, range(3, 6), resume_step=3)
    assert broken.read_text() == whole.read_text()


def test_a_damaged_line_costs_that_line_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(4))
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(lines)
    lines[1] = b"\x00\xff" + lines[1][:20] + b"\n"
    path.write_bytes(b"".join(lines))
    write(path, range(4, 6), resume_step=4)
    assert len(list(read_trace(path))) == whole - 1 + 4


def test_traces_of_ranks_that_are_gone_are_cut_and_no_other_file(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 3):
        write(tmp_path / f"rank{rank}.jsonl", range(3 if rank == 3 else 0, 6))
    for name in ("rank2.jsonl.bak", "rankings.jsonl", "rank9.txt"):
        (tmp_path / name).write_text("mine")
    cut_traces_of_others(tmp_path, 2, 3)
    last = {p.name: max(r.step for r in read_trace(p)) for p in tmp_path.glob("rank[0-9].jsonl")}
    assert last == {"rank0.jsonl": 5, "rank1.jsonl": 5, "rank2.jsonl": 2}, "of rank 3 nothing is left"
    cut_traces_of_others(tmp_path, 2, 0)
    assert {p.name for p in tmp_path.iterdir()} == {
        "rank0.jsonl",
        "rank1.jsonl",
        "rank2.jsonl.bak",
        "rankings.jsonl",
        "rank9.txt",
    }


def test_limit_counts_the_records_of_all_attempts(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(2), limit=7)
    write(path, range(2, 6), limit=7, resume_step=2)
    records = list(read_trace(path))
    assert [(r.step, r.layer) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


def test_new_run_replaces_an_old_trace(tmp_path: Path) -> None:
    path = tmp_path / "rank1.jsonl"
    write(path, range(4))
    write(path, range(1))
    assert {r.step for r in read_trace(path)} == {0}


def test_graph_is_not_kept_alive(tmp_path: Path) -> None:
    probs = torch.randn(15, 4, requires_grad=True).softmax(-1)
    selected = probs.argmax(-1, keepdim=True)
    routing = Routing(probs, probs, selected, count_assignments(selected, 4), probs[:, :0], probs)
    writer = TraceWriter(tmp_path / "r.jsonl", 0, REGIMES, 10)
    writer.add(0, "train", [routing], torch.tensor([0, 1, 0]))
    writer.add_samples(0, "valid", [routing], torch.zeros(3, 3, dtype=torch.int64), (5,), 3)
    assert len(writer._pending) == 2 and all(not p.scores.requires_grad for p in writer._pending)
    writer.close()
