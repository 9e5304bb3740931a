"""What the finished runs of a study left behind, as one tidy table: a row a run and error.

How seeds that diverged count is said in `shodh.report.statistics`: as infinitely high, so that no mean has one in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shodh.experiments.harness.run import Run
from shodh.experiments.harness.workers import read_failures
from shodh.report.page import Table
from shodh.report.statistics import Comparison, compare

RESULT = "result.json"
ERROR, SEED = "error", "seed"


def read_results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of the runs that are finished, in their order. Errors as `Run.read`."""
    return [run.read() for run in runs if run.finished]


def missing_runs(runs: Sequence[Run], folder: Path) -> dict[str, str]:
    """The others by name, and why they have no result."""
    failures = read_failures(folder)
    return {run.name: failures.get(run.name, "not run yet") for run in runs if not run.finished}


def tidy(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table: labels, ``seed`` and ``error`` by column; an error that is not finite, or None, is infinite."""
    frame = pd.DataFrame(list(rows))
    if ERROR in frame:
        frame[ERROR] = frame[ERROR].astype(float)
        frame.loc[~np.isfinite(frame[ERROR]), ERROR] = math.inf
    return frame


def compare_by_seed(errors: pd.Series, others: pd.Series) -> Comparison | None:
    """Compare two series by seed, over the seeds that both have; None without one."""
    both = pd.concat([errors, others], axis=1, join="inner")
    return None if both.empty else compare(both.iloc[:, 0].tolist(), both.iloc[:, 1].tolist())


def over_seeds(frame: pd.DataFrame, by: Sequence[str], column: str = ERROR) -> pd.DataFrame:
    """A column by group, in the order in which groups appear; a mean with a diverged seed is NaN."""
    groups = frame.groupby(list(by), sort=False, dropna=False)[column]
    found = groups.agg(
        seeds="size",
        mean=lambda x: x.mean(skipna=False),
        lowest="min",
        highest="max",
        diverged=lambda x: int((~np.isfinite(x)).sum()),
    )
    return found.replace(math.inf, math.nan)


def spread(values: Iterable[float | None]) -> list[float | None]:
    """Mean, lowest and highest over seeds; the mean, and the highest, are None where one has diverged."""
    every = [math.inf if v is None or not math.isfinite(v) else float(v) for v in values]
    if not every:
        return [None, None, None]
    return [None if math.isinf(v) else v for v in (sum(every) / len(every), min(every), max(every))]


def mean(values: Iterable[float | None]) -> float | None:
    """The first of `spread`."""
    return spread(values)[0]


def to_table(frame: pd.DataFrame, names: Mapping[str, str] | None = None) -> Table:
    """A table of a page, with other names of columns; NaN becomes None."""
    shown = frame.rename(columns=dict(names or {}))
    return Table(list(shown.columns), shown.astype(object).where(shown.notna(), None).values.tolist())
