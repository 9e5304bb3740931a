"""What a study will cost, before it is started: runs, sizes and floating-point work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shodh.config import to_dict
from shodh.core.strict_json import dumps
from shodh.experiments.harness.command import state
from shodh.experiments.harness.run import Run
from shodh.experiments.transfer.flops import step_flops
from shodh.experiments.transfer.settings import StudyConfig
from shodh.experiments.transfer.sizes import model_size
from shodh.report.page import Table, text_table
from shodh.train.plan import ASSUMED_UTILISATION, PEAK_FLOPS


def describe_costs(study: StudyConfig, runs: Sequence[Run]) -> str:
    """One line a run, and the sum; builds every kind of model once, on the meta device."""
    known: dict[str, tuple[dict[str, int], int]] = {}
    rows: list[list[Any]] = []
    work = seconds = 0.0
    for run in runs:
        key = _model_key(run)
        if key not in known:
            known[key] = model_size(run.config), step_flops(run.config)
        size, flops = known[key]
        train = run.config.operator.train
        total = flops * train.steps
        work += total
        seconds += total / (PEAK_FLOPS[train.precision] * ASSUMED_UTILISATION)
        sizes = [size["total_parameters"] / 1e6, size["active_parameters"] / 1e6]
        rows.append([run.name, "+".join(run.labels["regimes"]), train.steps, *sizes, total / 1e12, state(run)])
    header = ["run", "regimes", "steps", "M parameters", "M active", "TFLOP", "state"]
    return (
        f"study {study.name}: {study.question}\n{study.folder}: {len(runs)} runs, base {study.base}\n\n"
        f"{text_table(Table(header, rows))}\n\n"
        f"{work / 1e15:.3g} PFLOP of training in all: {seconds / 3600:.3g} H100 hours at {ASSUMED_UTILISATION:.0%} of "
        "the peak (assumed, not measured)\n"
    )


def _model_key(run: Run) -> str:
    """What the size and the work of a step depend on."""
    operator = to_dict(run.config.operator)
    operator["train"] = operator["train"]["global_batch"]
    return dumps([operator, to_dict(run.config.data)["grid"], len(run.config.data.fields)])
