"""What the training of an evaluated model cost: speed, share of the card, memory and energy, from its metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shodh.report.page import Table
from shodh.train.metrics import read_metrics

NOTE = (
    "Medians over the logged intervals but the first, which compiles and warms up; memory is the largest of a rank, "
    "power and energy are of all cards, by NVML. MFU: the work of the model over what a large matrix product of "
    "the same precision reaches on the card. What was not measured has no column; steps that a resumed run repeated "
    "count once."
)
MEDIANS = {
    "samples/s": "perf/samples_per_s",
    "ms a step": "perf/step_ms",
    "waiting for data": "perf/data_wait_frac",
    "tokens/s": "perf/tokens_per_s",
    "TFLOP/s a rank": "perf/tflops",
    "MFU": "perf/mfu",
    "power (W)": "perf/power_w",
}


def speed_table(runs: Mapping[str, Path]) -> Table:
    """A row of each stage of a training whose folder has metrics; columns that have a number."""
    header = ["stage", "steps", *MEDIANS, "J a sample", "energy (kWh)", "peak memory (GiB)"]
    rows = [row for stage, path in runs.items() if (row := _row(stage, read_metrics(path / "metrics.jsonl")))]
    kept = [i for i in range(len(header)) if any(row[i] is not None for row in rows)]
    return Table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _row(stage: str, lines: list[dict[str, float]]) -> list[Any] | None:
    timed = [line for line in lines if "perf/samples_per_s" in line]
    if not timed:
        return None

    def known(name: str, of: list[dict[str, float]]) -> list[float]:
        return [line[name] for line in of if math.isfinite(line.get(name, math.nan))]

    found = {name: known(name, timed[1:]) or known(name, timed) for name in MEDIANS.values()}
    medians = {name: statistics.median(values) if values else None for name, values in found.items()}
    power, rate = medians["perf/power_w"], medians["perf/samples_per_s"]
    each = power / rate if power is not None and rate else None
    energy, peak = known("perf/energy_j", timed), known("mem/peak_gib", timed)
    steps = int(max(line["step"] for line in lines)) + 1
    return [stage, steps, *medians.values(), each, sum(energy) / 3.6e6 if energy else None, max(peak, default=None)]
