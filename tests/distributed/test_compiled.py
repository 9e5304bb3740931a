"""A run with ``compile: on`` is the run without it."""

from __future__ import annotations

import pytest
import rank_jobs
from helper import run_ranks
from laboratory import Laboratory

from shodh.train.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]


@pytest.mark.parametrize("stage", (1, 2))
def test_compiling_changes_no_number(laboratory: Laboratory, stage: int) -> None:
    expected = laboratory.run(1, 1, stage).training("train/loss")
    overrides = laboratory.overrides(f"compiled{stage}", 1, stage)
    (rank,) = run_ranks(1, rank_jobs.pretrain_compiled, laboratory.config, overrides)
    assert rank["finished"]
    lines = read_metrics(laboratory.load(overrides).run_dir / "metrics.jsonl")
    assert [line["train/loss"] for line in lines if "train/loss" in line] == pytest.approx(expected, abs=1e-6)
    (breaks,) = {line["perf/graph_breaks"] for line in lines if "perf/graph_breaks" in line}
    assert breaks == 0 and max(line.get("perf/compiled_graphs", 0) for line in lines) >= 4
