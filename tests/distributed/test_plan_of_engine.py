"""A plan against what it plans: bytes that an engine holds and sends in ZeRO 1, 2 and 3, and the ranks there are."""

from __future__ import annotations

from typing import Any

import pytest
from helper import ROOT, run_ranks
from laboratory import Laboratory
from plan_jobs import DIM, engines, rows_sent

from shodh.commands import pretrain
from shodh.config import TrainConfig
from shodh.core.topology import Topology
from shodh.train.cluster import Layout, plan_step
from shodh.train.plan import _memory, stage_of

pytestmark = pytest.mark.distributed

WORLD = 2
CASES = [(1, "fp32", 1), (1, "bf16", 2), (2, "fp32", 2), (2, "bf16", 2), (3, "fp32", 1), (3, "bf16", 2)]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, str, int], dict[str, Any]]:
    cases = [(ROOT / "ds_configs" / f"zero{stage}.json", *rest) for stage, *rest in CASES]
    return dict(zip(CASES, run_ranks(WORLD, engines, cases)[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_of_an_engine(case: tuple[int, str, int], counted: Any) -> None:
    """But for one layer's weights, which DeepSpeed keeps twice, or gathers too early or late, and activations."""
    found, (_, precision, accumulation) = counted[case], case
    train = TrainConfig(steps=1, precision=precision)
    topology = Topology(WORLD, 1, 5, accumulation)
    planned = _memory(found["zero"], topology, found["size"], 0, train, 0)
    assert planned.optimizer == 12 * found["size"] / WORLD, "masters are apart in float32, too"
    passing = 4 * 150_000 if precision == "bf16" and case[0] == 2 else 0  # a bucket's copy lives within a call
    slack = 2 * DIM * DIM * 4
    assert planned.total - passing - slack <= found["held"] <= planned.total + slack


@pytest.mark.parametrize("case", CASES, ids=str)
def test_traffic_of_an_engine(case: tuple[int, str, int], counted: Any) -> None:
    found, (_, precision, accumulation) = counted[case], case
    width = 2 if precision == "bf16" else 4
    layout = Layout(1.0, 1.0, found["size"], 0, 0.0, 0, False, 0.0, 0.0, width, 12)
    planned = plan_step(layout, found["zero"], Topology(WORLD, 1, 5, accumulation), 8)
    share, sent = (WORLD - 1) / WORLD, found["sent"]
    reduced = share * (2 * sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0))
    assert planned.reduced == pytest.approx(reduced, rel=0.01)
    assert planned.gathered == pytest.approx(share * sent["all_gather_into_tensor"], rel=0.01)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_reduced_while_the_backward_pass_runs(case: tuple[int, str, int], counted: Any) -> None:
    """All but the last bucket, which holds two layers: of the last micro-batch, and in ZeRO 2 and 3 of each."""
    name = "reduce_scatter_tensor" if case[0] == 3 else "all_reduce"
    late = counted[case]["sent"][name] - counted[case]["early"][name]
    assert 0 < late <= 2 * DIM * DIM * 4


@pytest.mark.parametrize("again", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_rows_that_experts_exchange(again: bool, laboratory: Laboratory) -> None:
    name = f"rows-{again}".lower()
    more = ("operator.train.steps=1", f"operator.activation_checkpointing={again}", "operator.train.ema=0")
    changes = laboratory.overrides(name, 2, 1, *more)
    config = laboratory.load(changes)
    stage = stage_of(config, WORLD)
    step, layout = stage.step(8), stage._layout
    training = 2 * (step.inside + step.outside)  # half of the rows stay where they are
    validation = 2 * config.operator.train.valid_batches * layout.row_bytes / stage.topology.accumulation
    sent = run_ranks(WORLD, rows_sent, laboratory.config, changes)
    assert sum(sent) / WORLD == pytest.approx(training + validation)


def test_a_dry_run_plans_the_ranks_of_the_launcher(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in {**launcher, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    given = ["--config", str(laboratory.config), "--dry-run"]
    assert pretrain.main(given) == 0
    assert "2 x 2 = 4 ranks" in capsys.readouterr().out
    assert pretrain.main([*given, "--nodes", "1", "--gpus-per-node", "1"]) == 0
    assert "1 x 1 = 1 ranks" in capsys.readouterr().out
