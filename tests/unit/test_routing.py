"""Statistics of routing: tables, and what they say about regimes."""

from __future__ import annotations

import math

import pytest
import torch

from shodh.moe.routing import count_assignments, count_by_regime, regime_information
from shodh.train.callbacks.experts import routing_metrics


def test_counts_by_regime_are_those_of_a_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    samples, tokens, top_k, experts = 5, 7, 2, 4
    selected = torch.randint(experts, (samples * tokens, top_k), generator=draw)
    regime = torch.tensor([2, 0, 2, 2, 0])
    expected = torch.zeros(3, experts, dtype=torch.long)
    for token in range(samples * tokens):
        for expert in selected[token].tolist():
            expected[regime[token // tokens], expert] += 1
    table = count_by_regime(selected, regime, 3, experts)
    assert torch.equal(table, expected) and table[1].sum() == 0
    assert torch.equal(table.sum(0), count_assignments(selected, experts).long())


@pytest.mark.parametrize(
    ("table", "u", "nmi"),
    [
        ([[10, 10, 0, 0], [0, 0, 10, 10]], 1.0, math.sqrt(0.5)),  # two experts a regime
        ([[20, 0], [0, 5]], 1.0, 1.0),  # one expert a regime, whatever its size
        ([[3, 6, 9], [1, 2, 3]], 0.0, 0.0),  # independent
        ([[7, 0], [9, 0]], 0.0, 0.0),  # one expert takes all
        ([[7, 2], [0, 0]], 0.0, 0.0),  # one regime
        ([[0, 0], [0, 0]], 0.0, 0.0),
    ],
)
def test_regime_information_of_constructed_tables(table: list[list[int]], u: float, nmi: float) -> None:
    assert regime_information(torch.tensor(table)) == pytest.approx((u, nmi), abs=1e-12)


def test_regime_information_agrees_with_an_independent_formula() -> None:
    table = torch.tensor([[30, 5, 0, 11], [2, 40, 8, 9], [1, 1, 25, 0]])
    p = table.double() / table.sum()
    rows, columns = p.sum(1, keepdim=True), p.sum(0, keepdim=True)
    information = torch.where(p > 0, p * (p / (rows * columns)).log(), 0).sum()
    h_rows, h_columns = (-(q * q.log()).sum() for q in (rows, columns))
    expected = (float(information / h_rows), float(information / (h_rows * h_columns).sqrt()))
    assert regime_information(table) == pytest.approx(expected)
    u, nmi = expected
    assert 0.3 < u < 1 and 0.3 < nmi < 1


def test_metrics_of_a_table_show_collapse_beside_separation() -> None:
    split = [[8, 0, 0, 0], [0, 8, 0, 0]]
    even = [[2, 2, 2, 2], [2, 2, 2, 2]]
    values = {name: value for name, (value, _) in routing_metrics(torch.tensor([split, even])).items()}
    assert values["moe/regime_information"] == pytest.approx(0.5)
    assert values["moe/dead_experts"] == pytest.approx(1.0)  # two of layer 0, none of layer 1
    assert values["moe/load_max_over_mean"] == pytest.approx((2.0 + 1.0) / 2)
    assert values["moe/entropy"] == pytest.approx((0.5 + 1.0) / 2)
