"""The report of fine-tuning: errors by number of trajectories and way, as JSON, CSV, a figure and one page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from shodh.experiments.finetuning.cells import SCRATCH, ZERO_SHOT, TuningCell, ways
from shodh.experiments.finetuning.settings import TuningConfig
from shodh.experiments.transfer import plots
from shodh.experiments.transfer.measure import read_result
from shodh.experiments.transfer.results import geometric_mean
from shodh.experiments.transfer.tables import spread
from shodh.report.comparison import Comparison, compare, what_seeds_can_show
from shodh.report.page import Headline, Section, Table, text_table, write_page
from shodh.train.run_folder import describe_environment
from shodh.train.workers import read_failures

PERSISTENCE = "persistence"
ALL_ROWS = 10**6  # the table is the result: shown whole
#: Measures by column: where they stand in an evaluation.
ONE_STEP = {"L2RE": ("l2re_physical", "l2re"), "VRMSE": ("vrmse",)}
ROLLOUT = {"L2RE rollout": ("rollout_l2re",), "VRMSE rollout": ("rollout",)}
MEASURES = (*ONE_STEP, *ROLLOUT)
COMPARED = ("VRMSE", "VRMSE rollout")

ERRORS = (
    "Held-out errors on the test split of regimes that the run was not trained on; mean and range over seeds, which "
    "draw the training trajectories, their order and what is freshly initialised. L2RE is in units for operators on "
    "fields, VRMSE of normalised fields; rollout is the mean over {steps} autoregressive steps. Every way has the same "
    "number of optimiser steps, and normalises by its own training trajectories alone, the "
    "untrained zero shot too. new_expert: {added} expert(s) added to every layer beside the frozen model, of a zero "
    "output at first; experts: the routed experts{router}; scratch: the same model, freshly drawn."
)
AGAINST = (
    "Ratio of errors, geometric mean over fields, paired by seed: below 1 the way is better. The 95 % interval is of a "
    "paired t test on logarithms."
)


class Outcome:
    """The error of one finished cell, by field."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.cell: dict[str, Any] = values["cell"]
        self.metrics: dict[str, Any] = values["evaluation"]["regimes"][self.cell["regime"]]

    @property
    def fields(self) -> list[str]:
        return list(self.metrics["vrmse"])

    def error(self, measure: str, field: str, kind: str = "model") -> float | None:
        """One of `MEASURES` of the model or of persistence; None if it is not there or not finite."""
        keys = ONE_STEP.get(measure, ROLLOUT.get(measure, ()))
        found = next((self.metrics[key][field][kind] for key in keys if field in self.metrics.get(key, {})), None)
        if isinstance(found, list):
            known = [v for v in found if v is not None]
            return sum(known) / len(known) if known and len(known) == len(found) else None
        return None if found is None else float(found)

    def mean(self, measure: str, kind: str = "model") -> float | None:
        """Geometric mean over the fields."""
        errors = [self.error(measure, field, kind) for field in self.fields]
        known = [e for e in errors if e]
        return geometric_mean(known) if known and len(known) == len(errors) else None


def read_outcomes(cells: Sequence[TuningCell]) -> list[Outcome]:
    """Of the cells that are finished."""
    found = (read_result(cell.config.run_dir) for cell in cells)
    return [Outcome(values) for values in found if values is not None]


def of(outcomes: Sequence[Outcome], regime: str, count: int, way: str) -> list[Outcome]:
    """One way with one number of trajectories, in the order of the seeds."""
    chosen = [o for o in outcomes if (o.cell["regime"], o.cell["count"], o.cell["way"]) == (regime, count, way)]
    return sorted(chosen, key=lambda o: int(o.cell["seed"]))


def _groups(tuning: TuningConfig, outcomes: Sequence[Outcome]) -> Iterator[tuple[str, int, str, list[Outcome]]]:
    """(regime, trajectories, way, outcomes over seeds) that are not empty."""
    for regime in tuning.regimes:
        for count in sorted(tuning.trajectories):
            for way in ways(tuning):
                if chosen := of(outcomes, regime.name, count, way):
                    yield regime.name, count, way, chosen


def error_table(tuning: TuningConfig, outcomes: Sequence[Outcome]) -> Table:
    """Every measure by regime, field, number of trajectories and way: mean, lowest, highest over seeds."""
    header = ["regime", "field", "trajectories", "way", "seeds", "M trained"]
    header += [name for measure in MEASURES for name in (measure, "lowest", "highest")]
    rows: dict[tuple[str, str], list[list[Any]]] = {}
    last: dict[tuple[str, str, int], list[Outcome]] = {}
    for regime, count, way, chosen in _groups(tuning, outcomes):
        trained = chosen[0].values["parameters"]["trained"] / 1e6
        for field in chosen[0].fields:
            errors = [v for m in MEASURES for v in spread(o.error(m, field) for o in chosen)]
            key = (regime, field)
            rows.setdefault(key, []).append([regime, field, count, way, len(chosen), trained, *errors])
            last[(regime, field, count)] = chosen
    for (regime, field, count), chosen in last.items():
        errors = [v for m in MEASURES for v in spread([chosen[0].error(m, field, PERSISTENCE)])]
        mine = rows[(regime, field)]
        place = max(i for i, row in enumerate(mine) if row[2] == count)
        mine.insert(place + 1, [regime, field, count, PERSISTENCE, len(chosen), 0.0, *errors])
    return Table(header, [row for group in rows.values() for row in group])


def comparison_table(tuning: TuningConfig, outcomes: Sequence[Outcome]) -> Table:
    """Every way of fine-tuning against training from scratch and against the run as it is, paired by seed."""
    header = ["regime", "trajectories", "way", "against", "measure", "seeds", "ratio", "95 % low", "95 % high"]
    rows: list[list[Any]] = []
    places = product(tuning.regimes, sorted(tuning.trajectories), tuning.train, (SCRATCH, ZERO_SHOT), COMPARED)
    for regime, count, way, other, measure in places:
        c = paired(outcomes, regime.name, count, way, other, measure)
        if c is not None:
            interval = [c.low, c.high] if c.seeds > 1 else [None, None]
            rows.append([regime.name, count, way, other, measure, c.seeds, c.ratio, *interval, c.wins, c.verdict])
    return Table([*header, "lower in", "verdict"], rows)


def paired(
    outcomes: Sequence[Outcome], regime: str, count: int, way: str, other: str, measure: str
) -> Comparison | None:
    """Comparison over the seeds that both have; None without any."""
    theirs = {o.cell["seed"]: o.mean(measure) for o in of(outcomes, regime, count, other)}
    ours = {o.cell["seed"]: o.mean(measure) for o in of(outcomes, regime, count, way)}
    pairs = [(e, theirs[s]) for s, e in ours.items() if e is not None and theirs.get(s) is not None]
    return compare(*zip(*pairs, strict=True)) if pairs else None  # type: ignore[arg-type]


def write_tuning_report(tuning: TuningConfig, cells: Sequence[TuningCell]) -> str:
    """Write ``<out>/report`` from the cells that are finished; returns its top as text."""
    outcomes = read_outcomes(cells)
    failures = read_failures(tuning.out)
    have = {o.cell["name"] for o in outcomes}
    missing = {c.name: failures.get(c.name, "not run yet") for c in cells if c.name not in have}
    headline = _headline(tuning, outcomes, len(cells))
    sections = _sections(tuning, outcomes, missing)
    tables = {stem: table for section in sections for stem, table in section.tables.items()}
    data = {
        **{stem: {"header": table.header, "rows": table.rows} for stem, table in tables.items()},
        "settings": tuning.model_dump(mode="json"),
        "verdict": headline.verdict,
        "answer": headline.text,
        "missing": missing,
        "cells": [{k: v for k, v in o.values.items() if k != "env"} for o in outcomes],
        "env": describe_environment(),
    }
    write_page(tuning.out / "report", f"Fine-tuning of {tuning.run.name}", headline, sections, data=data)
    table = f"\n{text_table(brief_table(error_table(tuning, outcomes)))}\n" if outcomes else ""
    return f"{headline.verdict}. {headline.text}\n{table}"


def brief_table(table: Table) -> Table:
    """The error table without ranges, for a terminal."""
    kept = [i for i, name in enumerate(table.header) if name not in ("lowest", "highest")]
    return Table([table.header[i] for i in kept], [[row[i] for i in kept] for row in table.rows])


def _headline(tuning: TuningConfig, outcomes: Sequence[Outcome], total: int) -> Headline:
    numbers = {"cells finished": f"{len(outcomes)} of {total}", "seeds": tuning.seeds}
    way = tuning.train[0]
    told, verdicts = [], []
    for regime, count in product(tuning.regimes, sorted(tuning.trajectories)):
        c = paired(outcomes, regime.name, count, way, SCRATCH, "VRMSE")
        if c is not None:
            verdicts.append(c.verdict)
            told.append(
                f"{regime.name} from {count}: {c.ratio:.2f} ({c.verdict}, lower in {c.wins} of {c.seeds} seeds)"
            )
    if not told:
        return Headline("No result yet", "No cell of the first way and of training from scratch is finished.")
    text = (
        f"One-step VRMSE of fine-tuning ({way}) over that of training the same model from scratch on the same "
        f"trajectories: {'; '.join(told)}. {what_seeds_can_show(tuning.seeds)}"
    )
    said = {
        "lower": ("Starting from the trained run lowers the error", "good"),
        "higher": ("Starting from the trained run raises the error", "bad"),
        "equal": ("Starting from the trained run makes no difference", "fair"),
        "open": ("Whether starting from the trained run helps is open", "neutral"),
    }
    if len(set(verdicts)) == 1:
        verdict, tone = said[verdicts[0]]
    else:
        counted = (f"{v} in {verdicts.count(v)} of {len(verdicts)}" for v in dict.fromkeys(verdicts))
        verdict, tone = f"Error against training from scratch: {', '.join(counted)}", "fair"
    return Headline(verdict, text, tone, numbers, note=AGAINST)  # type: ignore[arg-type]


def _sections(tuning: TuningConfig, outcomes: Sequence[Outcome], missing: dict[str, str]) -> list[Section]:
    sections = []
    if outcomes:
        steps = max(
            len(kinds["model"]) for o in outcomes for kinds in o.metrics.get("rollout", {"": {"model": []}}).values()
        )
        router = " and the router" if tuning.router else ""
        text = ERRORS.format(steps=steps, added=tuning.num_added, router=router)
        found = {"errors": error_table(tuning, outcomes)}
        curves = {"error_by_trajectories": curve_figure(tuning, outcomes)}
        sections.append(Section("errors", "Errors", text, tables=found, figures=curves, rows_shown=ALL_ROWS))
        compared = {"comparisons": comparison_table(tuning, outcomes)}
        sections.append(Section("comparisons", "Paired comparisons", AGAINST, tables=compared, rows_shown=ALL_ROWS))
    if missing:
        rows = [[name, reason] for name, reason in missing.items()]
        table = {"cells_missing": Table(["cell", "why"], rows)}
        sections.append(
            Section("missing", "Cells without a result", "The same command goes on with them.", tables=table)
        )
    return sections


def curve_figure(tuning: TuningConfig, outcomes: Sequence[Outcome]) -> Figure:
    """Mean error over seeds by number of trajectories, a line a way, a panel a regime and measure."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for measure in COMPARED:
        for regime, count, way, chosen in _groups(tuning, outcomes):
            panel = panels.setdefault(f"{regime}: {measure}", {})
            for name, kind in ((way, "model"), (PERSISTENCE, PERSISTENCE)):
                error = spread(o.mean(measure, kind) for o in chosen)[0]
                points = panel.setdefault(name, [])
                if error is not None and (count, error) not in points:
                    points.append((count, error))
    known = {title: {name: points for name, points in lines.items() if points} for title, lines in panels.items()}
    return plots.lines({t: lines for t, lines in known.items() if lines}, "training trajectories", "error", False)
