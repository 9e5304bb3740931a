"""Every configuration in the tree can be planned as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh.config import RunConfig, load_config
from shodh.experiments.finetuning.settings import load_tuning
from shodh.train.plan import make_plan
from shodh.train.plan_text import describe_plan

ROOT = Path(__file__).resolve().parents[2]
GRIDS = ("study_", "ccm_", "finetune_")  # of runs, not runs
CONFIGS = sorted(p for p in (ROOT / "launch" / "configs").glob("*.yaml") if not p.name.startswith(GRIDS))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configuration_is_planned_and_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    plan = make_plan(config)
    assert 0 < plan.active_parameters <= plan.stage.dense_parameters + plan.stage.expert_parameters
    assert (plan.stage.expert_parameters > 0) == (config.operator.experts.num_experts > 0)
    assert "does NOT fit" not in describe_plan(plan)


def test_dense_and_sparse_tiny_models_are_of_equal_active_size() -> None:
    sparse, dense = (make_plan(_in_tree(name), 1, 2).active_parameters for name in ("moe_pot_tiny", "dpot_tiny"))
    assert dense == pytest.approx(sparse, rel=0.01)


def test_fine_tuning_of_the_tree_is_readable() -> None:
    tuning = load_tuning(ROOT / "launch" / "configs" / "finetune_tiny.yaml")
    fields = load_config(ROOT / "launch" / "configs" / "moe_pot_tiny.yaml").data.fields
    assert all(set(regime.only or ()) <= {f.name for f in fields} for regime in tuning.regimes)


def _in_tree(name: str) -> RunConfig:
    config = load_config(ROOT / "launch" / "configs" / f"{name}.yaml")
    return config.model_copy(update={"deepspeed": ROOT / config.deepspeed})
