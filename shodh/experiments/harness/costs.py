"""What the runs of a study will cost, before they are started: sizes and floating-point work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shodh.config import to_dict
from shodh.core.strict_json import dumps
from shodh.experiments.harness.flops import step_flops
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.settings import StudySettings
from shodh.experiments.harness.sizes import model_size
from shodh.report.page import Table, text_table
from shodh.train.cluster import achieved_rate


def describe_costs(
    study: StudySettings, base: object, runs: Sequence[Run], columns: Callable[[Run], Mapping[str, Any]]
) -> str:
    """One line a run, and the sum; builds every kind of model once, on the meta device.

    Parameters
    ----------
    base : object
        The run or file that all are changes of.
    columns : callable
        What a study shows of a run beside steps, sizes and work.
    """
    known: dict[str, tuple[dict[str, int], int]] = {}
    rows: list[list[Any]] = []
    header: list[str] = []
    work = seconds = 0.0
    for run in runs:
        key = _model_key(run)
        if key not in known:
            known[key] = model_size(run.config), step_flops(run.config)
        size, flops = known[key]
        total = flops * run.steps
        work += total
        seconds += total / achieved_rate(run.config, run.config.operator.train)
        sizes = {"M parameters": size["total_parameters"] / 1e6, "M active": size["active_parameters"] / 1e6}
        state = {"TFLOP": total / 1e12, "state": "finished" if run.finished else "to do"}
        row = {"run": run.name, **columns(run), "steps": run.steps, **sizes, **state}
        header = list(row)
        rows.append(list(row.values()))
    return (
        f"study {study.name}: {study.question}\n{study.folder}: {len(runs)} runs, {study.seeds} seeds, base {base}\n\n"
        f"{text_table(Table(header, rows))}\n\n"
        f"{work / 1e15:.3g} PFLOP of training in all: {seconds / 3600:.3g} hours of one H100, at the "
        "rates of shodh plan\n"
    )


def _model_key(run: Run) -> str:
    """What the size and the work of a step depend on."""
    operator = to_dict(run.config.operator)
    operator["train"] = operator["train"]["global_batch"]
    return dumps([operator, to_dict(run.config.data)["grid"], len(run.config.data.fields)])
