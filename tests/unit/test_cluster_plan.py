"""Step times of a cluster: numbers by hand, and what must hold whatever the rates are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shodh.commands import plan as command
from shodh.core.topology import Topology
from shodh.train.cluster import COPY_RATE, INFINIBAND, NVLINK, Layout, StepPlan, peers_outside, plan_step, scaled

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
LAYOUT = Layout(
    flops=8e12,
    rate=2e12,
    dense=10**8,
    experts=16 * 10**8,
    row_bytes=8e8,
    layers=10,
    again=False,
    shared=1e12,
    routed=5e11,
    width=2,
    kept=12,
)
ZERO1 = {"stage": 1, "reduce_bucket_size": 5 * 10**7}


def test_one_card_sends_nothing() -> None:
    for stage in (1, 2, 3):
        step = plan_step(LAYOUT, ZERO1 | {"stage": stage}, Topology(1, 1, 4, 2), 8)
        assert step.compute == 4.0 and step.update == pytest.approx(17e8 * (24 + 4 + 2) / COPY_RATE)
        assert step.inside + step.outside + step.reduced + step.gathered == 0.0
        assert step.seconds == pytest.approx(step.compute + step.update)


def test_a_node_and_two_of_them_by_hand() -> None:
    one = plan_step(LAYOUT, ZERO1, Topology(8, 8, 4, 2), 8)
    assert (one.inside, one.outside) == (4 * 8e8 * 7 / 8, 0.0)
    assert one.exchange == pytest.approx(one.inside / NVLINK.rate + 70 * NVLINK.latency), "seven calls a layer"
    assert one.reduced == 2 * 4 * 1e8 * 7 / 8, "each expert is on one rank"
    assert one.gathered == 2 * 1e8 * 7 / 8
    two = plan_step(LAYOUT, ZERO1, Topology(16, 8, 4, 2), 8)
    assert two.reduced == pytest.approx(8 * 1e8 * 15 / 16 + 8 * 2e8 / 2)
    # Dense weights leave a node by eight cards at once, experts by the one that has them.
    seconds = 8 * 1e8 * 15 / 16 / min(NVLINK.rate, 8 * INFINIBAND.rate) + 8e8 / INFINIBAND.rate
    assert two.reduction == pytest.approx(seconds + (2 * 4 + 4 * 1) * INFINIBAND.latency)


@pytest.mark.parametrize(
    ("world", "ep", "cards", "outside"), [(8, 8, 8, 0), (16, 16, 8, 8), (8, 4, 4, 0), (12, 4, 6, 2), (4, 2, 1, 1)]
)
def test_ranks_of_an_expert_group_on_other_nodes(world: int, ep: int, cards: int, outside: int) -> None:
    assert peers_outside(Topology(world, ep, 1, 1), cards) == outside


def test_what_is_hidden_is_at_most_the_backward_pass_and_never_the_last_bucket() -> None:
    topology = Topology(16, 8, 4, 2)
    shown, hidden = (plan_step(LAYOUT, ZERO1 | {"overlap_comm": on}, topology, 8) for on in (False, True))
    assert shown.hidden == 0.0 < hidden.hidden < hidden.reduction
    assert hidden.seconds == pytest.approx(shown.seconds - hidden.hidden)
    quick = plan_step(replace(LAYOUT, rate=1e15), ZERO1 | {"overlap_comm": True}, topology, 8)
    left = 2 / 3 * quick.compute - (2 * LAYOUT.shared + LAYOUT.routed) / 1e15
    assert quick.hidden == pytest.approx(left / 2), "of ZeRO 1, behind the last micro-batch alone"


def test_rows_travel_behind_experts_but_for_those_on_their_way_out() -> None:
    def plan(**changes: float) -> StepPlan:
        return plan_step(replace(LAYOUT, **changes), ZERO1, Topology(8, 8, 4, 2), 8)

    step, again = plan(), plan(again=True)
    rows = 8e8 * 7 / 8 / NVLINK.rate + 10 * NVLINK.latency
    assert step.covered == pytest.approx(3 * rows) and again.covered == pytest.approx(4 * rows)
    assert step.seconds == pytest.approx(
        step.compute + step.exchange + step.reduction + step.gathering + step.update - 3 * rows
    )
    assert plan(shared=0.0).covered == pytest.approx(rows), "behind the gradients of the experts' weights"
    assert plan(rate=1e16).covered == pytest.approx((3 * LAYOUT.shared + LAYOUT.routed) / 1e16), (
        "no longer than they take"
    )
    assert plan_step(LAYOUT, ZERO1, Topology(8, 1, 4, 2), 8).covered == 0.0


def test_recomputed_blocks_exchange_once_more_and_zero_2_sums_each_micro_batch() -> None:
    topology = Topology(8, 4, 4, 3)
    first, second = (plan_step(replace(LAYOUT, again=again), ZERO1, topology, 8) for again in (False, True))
    assert second.inside == 1.5 * first.inside and second.reduced == first.reduced
    assert plan_step(LAYOUT, ZERO1 | {"stage": 2}, topology, 8).reduced == pytest.approx(3 * first.reduced)


def test_the_batch_is_kept_where_it_can_be() -> None:
    alone = Topology(1, 1, 6, 8)  # 48 samples
    found = {world: scaled(alone, world, 8, 4) for world in (1, 2, 16, 32, 64)}
    assert [(t.global_batch, t.micro_batch, t.accumulation) for t in found.values()] == [
        (48, 6, 8), (48, 6, 4), (48, 3, 1), (64, 2, 1), (64, 1, 1)
    ]  # fmt: skip
    assert [t.ep_size for t in found.values()] == [1, 2, 4, 4, 4]


def test_the_command_plans_each_number_of_cards(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["operator.depth=2", "operator.dim=64", "operator.activation_checkpointing=auto"]
    assert command.main(["--config", str(CONFIGS / "demo.yaml"), "--cards", "5", "--set", *changes]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert sum(line.startswith("- ") for line in lines) >= 3, "what it rests on is stated"
