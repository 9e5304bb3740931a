"""What a study will cost, before it is started: cells, sizes and floating-point work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shodh.config import to_dict
from shodh.core.strict_json import dumps
from shodh.experiments.transfer.cells import Cell
from shodh.experiments.transfer.flops import step_flops
from shodh.experiments.transfer.measure import RESULT
from shodh.experiments.transfer.settings import StudyConfig
from shodh.experiments.transfer.sizes import model_size
from shodh.report.page import Table, text_table
from shodh.train.plan import ASSUMED_UTILISATION, PEAK_FLOPS


def describe_costs(study: StudyConfig, cells: Sequence[Cell]) -> str:
    """One line a cell, and the sum; builds every kind of model once, on the meta device."""
    known: dict[str, tuple[dict[str, int], int]] = {}
    rows: list[list[Any]] = []
    work = seconds = 0.0
    for cell in cells:
        key = _model_key(cell)
        if key not in known:
            known[key] = model_size(cell.config), step_flops(cell.config)
        size, flops = known[key]
        train = cell.config.operator.train
        total = flops * train.steps
        work += total
        seconds += total / (PEAK_FLOPS[train.precision] * ASSUMED_UTILISATION)
        done = "finished" if (cell.config.run_dir / RESULT).exists() else "to do"
        sizes = [size["total_parameters"] / 1e6, size["active_parameters"] / 1e6]
        rows.append([cell.name, "+".join(cell.regimes), train.steps, *sizes, total / 1e12, done])
    header = ["cell", "regimes", "steps", "M parameters", "M active", "TFLOP", "state"]
    return (
        f"study {study.name}: {study.question}\n{study.folder}: {len(cells)} cells, base {study.base}\n\n"
        f"{text_table(Table(header, rows))}\n\n"
        f"{work / 1e15:.3g} PFLOP of training in all: {seconds / 3600:.3g} H100 hours at {ASSUMED_UTILISATION:.0%} of "
        "the peak (assumed, not measured)\n"
    )


def _model_key(cell: Cell) -> str:
    """What the size and the work of a step depend on."""
    operator = to_dict(cell.config.operator)
    operator["train"] = operator["train"]["global_batch"]
    return dumps([operator, to_dict(cell.config.data)["grid"], len(cell.config.data.fields)])
