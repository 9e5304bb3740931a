"""Norms and cosines of updates against plain formulas, and where they are counted."""

from __future__ import annotations

import pytest
import torch
from expert_weights import EXPERTS, State

from shodh.core.errors import CheckpointError
from shodh.merge import diagnose, from_memory, lazy
from shodh.merge.diagnostics import table

SHARED = "operator.blocks.0.feed_forward.shared_experts.w1.weight"
ATTENTION = "operator.blocks.1.attention.qkv.weight"


@pytest.fixture
def states() -> list[State]:
    draw = torch.Generator().manual_seed(0)
    shapes = {EXPERTS: (3, 4, 5), SHARED: (6, 5), ATTENTION: (9, 3), "tokenizer.w": (4,)}
    anchor = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    low, high = (
        {n: t if n == "tokenizer.w" else t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in anchor.items()}
        for _ in range(2)
    )
    high[EXPERTS][1] = low[EXPERTS][1]
    return [anchor, low, high]


def test_figures_are_those_of_the_dense_vectors(states: list[State], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "BLOCK", 7)
    done: list[int] = []
    report = diagnose(*(from_memory(s) for s in states), progress=done.append)
    anchor, low, high = (torch.cat([s[name].double().flatten() for name in s]) for s in states)
    d_low, d_high = low - anchor, high - anchor
    direction, shared = (d_high - d_low) / 2, (d_high + d_low) / 2
    total = report["total"]
    expected = {
        "parameters": anchor.numel(),
        "anchor_norm": anchor.norm(),
        "low_norm": d_low.norm(),
        "high_norm": d_high.norm(),
        "cosine": d_low @ d_high / d_low.norm() / d_high.norm(),
        "shared_norm": shared.norm(),
        "direction_norm": direction.norm(),
        "relative_direction": direction.norm() / anchor.norm(),
        "share_of_shared": 1.0,
        "share_of_direction": 1.0,
    }
    assert total == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-12)
    assert sum(done) == 3 * 4 * anchor.numel()


def test_shares_of_components_layers_and_experts_add_up(states: list[State]) -> None:
    report = diagnose(*(from_memory(s) for s in states))
    for kind in ("components", "layers"):
        for share in ("share_of_direction", "share_of_shared"):
            assert sum(entry[share] for entry in report[kind].values()) == pytest.approx(1.0)
    routed = report["components"]["routed experts"]["share_of_direction"]
    assert sum(e["share_of_direction"] for e in report["experts"]) == pytest.approx(routed)
    assert list(report["components"]) == ["tokenizer", "routed experts", "shared experts", "attention or mixing"]
    assert set(report["layers"]) == {"operator.blocks.0", "operator.blocks.1", "tokenizer"}


def test_an_expert_that_both_changed_alike_has_no_direction(states: list[State]) -> None:
    report = diagnose(*(from_memory(s) for s in states))
    first, alike, last = report["experts"]
    assert alike["expert"] == 1 and alike["direction_norm"] == 0.0 and alike["cosine"] == pytest.approx(1.0)
    assert abs(first["cosine"]) < 0.6 and first["direction_norm"] > 0 and last["direction_norm"] > 0


def test_what_nobody_changed_has_no_cosine(states: list[State]) -> None:
    report = diagnose(*(from_memory(s) for s in states))
    entry = report["components"]["tokenizer"]
    assert entry["cosine"] is None and entry["direction_norm"] == 0.0 and entry["anchor_norm"] > 0
    same = diagnose(*(from_memory(states[0]) for _ in range(3)))
    assert same["total"]["share_of_direction"] is None


def test_tables_have_a_row_for_each_entry(states: list[State]) -> None:
    report = diagnose(*(from_memory(s) for s in states))
    for kind, count in (("components", 4), ("layers", 3), ("experts", 3)):
        header, rows = table(report, kind)
        assert len(rows) == count and all(len(row) == len(header) for row in rows)
    assert rows[1][0] == "operator.blocks.0 expert 1"


def test_other_architectures_are_refused(states: list[State]) -> None:
    del states[1][SHARED]
    with pytest.raises(CheckpointError, match="differ in architecture"):
        diagnose(*(from_memory(s) for s in states))
