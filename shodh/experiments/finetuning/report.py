"""The report of fine-tuning: errors by number of trajectories and method, as JSON, CSV, a figure and one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import scipy

from shodh.experiments.finetuning.runs import SCRATCH, ZERO_SHOT, methods
from shodh.experiments.finetuning.settings import TuningConfig
from shodh.experiments.harness.report import WORDS, claims_section, write_study
from shodh.experiments.harness.results import (
    ERROR,
    SEED,
    compare_by_seed,
    missing_runs,
    over_seeds,
    read_results,
    tidy,
    to_table,
)
from shodh.experiments.harness.run import Run
from shodh.report.figures import lines
from shodh.report.page import Headline, Section, Table, Tone, filled
from shodh.report.statistics import (
    RULE,
    Comparison,
    Interval,
    Verdict,
    bootstrap_by_seed,
    holm,
    what_seeds_can_show,
)

PERSISTENCE = "persistence"
#: Measures by column: where they stand in an evaluation.
MEASURES = {
    "L2RE": ("l2re_physical", "l2re"),
    "VRMSE": ("vrmse",),
    "L2RE rollout": ("rollout_l2re",),
    "VRMSE rollout": ("rollout",),
}
LAST = ", last weights"  # of runs that are judged by their best checkpoint
COMPARED = ("VRMSE", "VRMSE rollout")
PLACE = ["regime", "field", "count", "method"]

ERRORS = (
    "Held-out errors on the test split of regimes that the run was not trained on; mean and range over seeds, which "
    "draw the training trajectories, their order and what is freshly initialised. L2RE is in units for operators on "
    "fields, VRMSE of normalised fields; rollout is the mean over {steps} autoregressive steps. Every method has the "
    "same number of optimiser steps, and normalises by its own training trajectories alone, the "
    "untrained zero shot too. new_expert: {added} expert(s) added to every layer beside the frozen model, of a zero "
    "output at first; experts: the routed experts{router}; scratch: the same model, freshly drawn."
)


class Claim(NamedTuple):
    """One method's error against another's: by a measure, the geometric mean over fields."""

    regime: str
    trajectories: int
    method: str
    other: str
    measure: str


class Outcomes:
    """The finished runs of a study of fine-tuning; ``values`` are their results."""

    def __init__(self, tuning: TuningConfig, values: Sequence[Mapping[str, Any]]) -> None:
        self.tuning, self.values = tuning, values

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Columns regime, field, count, method, seed, measure, error; persistence is a method too."""
        return tidy(self._rows())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for values in self.values:
            run = values["run"]
            labels = {key: run[key] for key in ("regime", "count", SEED)}
            found = [("", values["evaluation"]["regimes"])]
            found += [(LAST, values["last"])] if values.get("last") else []
            for (which, regimes), (measure, keys) in product(found, MEASURES.items()):
                metrics = regimes[run["regime"]]
                fields: dict[str, Any] = next((metrics[key] for key in keys if key in metrics), {})
                for (field, kinds), kind in product(fields.items(), ("model", PERSISTENCE)):
                    error = kinds[kind]
                    if isinstance(error, list):  # by autoregressive step
                        error = None if None in error else fmean(error)
                    method = run["method"] if kind == "model" else PERSISTENCE
                    yield {**labels, "field": field, "method": method, "measure": measure + which, ERROR: error}

    @cached_property
    def means(self) -> pd.DataFrame:
        """The geometric mean over fields: columns regime, count, method, seed, measure, error."""
        known = self.frame.drop_duplicates([*PLACE, SEED, "measure"])  # every method has the same persistence
        keys = ["regime", "count", "method", SEED, "measure"]
        return known.groupby(keys, sort=False)[ERROR].agg(lambda e: float(scipy.stats.gmean(e))).reset_index()

    @cached_property
    def claims(self) -> dict[Claim, Comparison]:
        """Every method of fine-tuning against training from scratch and the run as it is, over the seeds of both.

        p is adjusted for all of them.
        """
        found: dict[Claim, Comparison] = {}
        regimes = [regime.name for regime in self.tuning.regimes]
        others = (SCRATCH, ZERO_SHOT)
        for claim in product(regimes, sorted(self.tuning.trajectories), self.tuning.train, others, COMPARED):
            regime, count, method, other, measure = claim
            sides = [self.errors(regime, count, name, measure) for name in (method, other)]
            if (paired := compare_by_seed(*sides)) is not None:
                found[Claim(*claim)] = paired
        return holm(found)

    def bootstrap(self, claim: Claim) -> Interval | None:
        """Interval of a claim's ratio over seeds and test trajectories; None where these are not known."""
        sides: dict[str, dict[int, list[list[float]]]] = {claim.method: {}, claim.other: {}}
        for values in self.values:
            run, place = values["run"], (values["run"]["regime"], values["run"]["count"])
            fields = values.get("by_trajectory", {}).get(MEASURES[claim.measure][0])
            if fields and place == (claim.regime, claim.trajectories) and run["method"] in sides:
                sides[run["method"]][run[SEED]] = [fields[name] for name in sorted(fields)]
        return bootstrap_by_seed(*sides.values())

    def errors(self, regime: str, count: int, method: str, measure: str) -> pd.Series:
        """By seed."""
        table = self.means
        chosen = (table["regime"] == regime) & (table["count"] == count) & (table["method"] == method)
        return table[chosen & (table["measure"] == measure)].set_index(SEED)[ERROR]


def error_table(outcomes: Outcomes) -> Table:
    """Every measure by regime, field, number of trajectories and method: mean, lowest, highest over seeds."""
    known = outcomes.frame.drop_duplicates([*PLACE, SEED, "measure"])
    found = over_seeds(known, [*PLACE, "measure"]).drop(columns="diverged")
    wide = found.unstack("measure")
    order = (*methods(outcomes.tuning), PERSISTENCE)
    regimes = [regime.name for regime in outcomes.tuning.regimes]
    rows = sorted(wide.index, key=lambda key: (regimes.index(key[0]), key[1], key[2], order.index(key[3])))
    trained = {v["run"]["method"]: v["parameters"]["trained"] / 1e6 for v in outcomes.values}
    table = wide.loc[rows].reset_index()[PLACE].droplevel(1, axis=1)
    table["seeds"] = wide.loc[rows, "seeds"].max(axis=1).astype(int).tolist()
    table["M trained"] = [trained.get(method, 0.0) for method in table["method"]]
    for measure in [*MEASURES, *(measure + LAST for measure in MEASURES)]:
        for column in ("mean", "lowest", "highest"):
            if (column, measure) in wide:
                name = measure if column == "mean" else f"{measure}, {column}"
                table[name] = wide.loc[rows, (column, measure)].tolist()
    return to_table(table, {"count": "trajectories"})


def write_tuning_report(tuning: TuningConfig, runs: Sequence[Run]) -> str:
    """Write ``<study>/report`` from the runs that are finished; returns its top as text."""
    outcomes = Outcomes(tuning, read_results(runs))
    missing = missing_runs(runs, tuning.folder)
    sections = _sections(outcomes) if outcomes.values else []
    headline = _headline(outcomes, len(runs))
    title = f"Fine-tuning of {tuning.run.name}"
    return write_study(tuning, title, headline, sections, missing, ("errors_in_brief",))


def _headline(outcomes: Outcomes, total: int) -> Headline:
    tuning = outcomes.tuning
    numbers = {"runs finished": f"{len(outcomes.values)} of {total}", "seeds": tuning.seeds}
    method = tuning.train[0]
    asked = {
        c: v for c, v in (outcomes.claims if outcomes.values else {}).items() if c[2:] == (method, SCRATCH, "VRMSE")
    }
    if not asked:
        text = "No run of the first method and of training from scratch is finished."
        return Headline("No result yet", text, "neutral", numbers, note=RULE)
    parts = [
        f"{regime} from {count}: {c.ratio:.2f} ({WORDS[c.verdict]}, lower in {c.wins} of {c.seeds} seeds)"
        for (regime, count, *_), c in asked.items()
    ]
    text = (
        f"One-step VRMSE of fine-tuning ({method}) over that of training the same model from scratch on the same "
        f"trajectories: {'; '.join(parts)}. {what_seeds_can_show(tuning.seeds)}"
    )
    said: dict[Verdict, tuple[str, Tone]] = {
        "lower": ("Starting from the trained run lowers the error", "good"),
        "higher": ("Starting from the trained run raises the error", "bad"),
        "equal": ("Starting from the trained run makes no difference", "fair"),
        "open": ("Whether starting from the trained run helps is open", "neutral"),
    }
    verdicts = [c.verdict for c in asked.values()]
    if len(set(verdicts)) == 1:
        return Headline(said[verdicts[0]][0], text, said[verdicts[0]][1], numbers, note=RULE)
    counted = (f"{WORDS[v]} in {verdicts.count(v)} of {len(verdicts)}" for v in dict.fromkeys(verdicts))
    verdict = f"Error against training from scratch: {', '.join(counted)}"
    return Headline(verdict, text, "fair", numbers, note=RULE)


def _sections(outcomes: Outcomes) -> list[Section | None]:
    tuning, errors = outcomes.tuning, error_table(outcomes)
    rollouts = [v["evaluation"]["regimes"][v["run"]["regime"]].get("rollout", {}) for v in outcomes.values]
    steps = max((len(kinds["model"]) for fields in rollouts for kinds in fields.values()), default=0)
    router = " and the router" if tuning.router else ""
    text = ERRORS.format(steps=steps, added=tuning.num_added, router=router)
    kept = [i for i, name in enumerate(errors.header) if not name.endswith((", lowest", ", highest"))]
    brief = Table([errors.header[i] for i in kept], [[row[i] for i in kept] for row in errors.rows])
    found = {"errors_in_brief": brief, "errors": errors, "results": to_table(outcomes.frame)}
    figure = lines(_curves(outcomes), "training trajectories", "error")
    return [
        filled("errors", "Errors", text, found, ("errors", "results"), error_by_trajectories=figure),
        claims_section(outcomes.claims, ("regime", "trajectories", "method", "against", "measure"), outcomes.bootstrap),
    ]


def _curves(outcomes: Outcomes) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Mean error over seeds by number of trajectories, a line a method, a panel a regime and measure."""
    known = outcomes.means[outcomes.means["measure"].isin(COMPARED)]
    means = over_seeds(known, ["measure", "regime", "method", "count"])["mean"].dropna()
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (measure, regime, method, count), error in means.items():
        panels.setdefault(f"{regime}: {measure}", {}).setdefault(method, []).append((count, error))
    return {title: {name: sorted(points) for name, points in curves.items()} for title, curves in panels.items()}
