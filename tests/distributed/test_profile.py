"""A run tells its work a second, and with ``--profile`` where its time goes."""

from __future__ import annotations

import json

import pytest
import rank_jobs
from helper import run_ranks
from laboratory import Laboratory

from shodh.core.cli import training_parser
from shodh.train.metrics import read_metrics

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("steps", "profiled"), [(2, 2), (50, 5)])
def test_profile_leaves_a_trace_and_a_table(laboratory: Laboratory, steps: int, profiled: int) -> None:
    overrides = laboratory.overrides(f"profile{steps}", 1, 1)
    run_ranks(1, rank_jobs.pretrain, laboratory.config, overrides, None, steps)
    folder = laboratory.load(overrides).run_dir
    events = json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum("aten::addmm" in event.get("name", "") or "aten::mm" in event.get("name", "") for event in events)
    table = (folder / "profile" / "kernels.txt").read_text()
    assert table.startswith(f"{profiled} steps up to step {5 + profiled}\n") and "aten::" in table
    lines = read_metrics(folder / "metrics.jsonl")
    logged = [line for line in lines if "perf/samples_per_s" in line]
    assert logged and all(line["perf/tflops"] > 0 and "perf/mfu" not in line for line in logged)
    assert logged[0]["perf/tokens_per_s"] == pytest.approx(8 * logged[0]["perf/samples_per_s"])


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_profile_wants_a_whole_number(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        training_parser("", "").parse_args(["--config", "c", "--profile", value])
    assert caught.value.code == 2 and "whole number" in capsys.readouterr().err
