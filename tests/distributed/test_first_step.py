"""After the first step every parameter has moved, or the run says which one did not."""

from __future__ import annotations

import pytest
import rank_jobs
from helper import RankError, run_ranks
from laboratory import Laboratory

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", (1, 3))
def test_experts_frozen_on_one_rank_stop_the_run_by_name(laboratory: Laboratory, stage: int) -> None:
    overrides = laboratory.overrides(f"frozen{stage}", 2, stage, "operator.experts.router.kind=token")
    with pytest.raises(RankError) as caught:
        run_ranks(2, rank_jobs.pretrain_with_frozen_experts, laboratory.config, overrides)
    message = "SharedError: parameters that did not move in the first step: blocks.0.feed_forward.experts.w1"
    assert str(caught.value).count(f"{message} of expert rank 1") == 2
    assert "expert rank 0" not in str(caught.value) and "attention" not in str(caught.value)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (3, "bf16")])
def test_experts_without_a_token_may_stand_still(laboratory: Laboratory, stage: int, precision: str) -> None:
    more = ["operator.train.weight_decay=0", f"operator.train.precision={precision}", "operator.train.steps=2"]
    overrides = laboratory.overrides(f"idle{stage}", 2, stage, *more)
    ranks = run_ranks(2, rank_jobs.pretrain_with_idle_experts, laboratory.config, overrides)
    for rank in ranks:
        assert rank["finished"] and all(int(selected.max()) < 2 for selected in rank["selected"])
