"""The report of a study: the answer in plain words, then tables and figures, as JSON, CSV, PNG and one page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from shodh.experiments.transfer import plots, tables
from shodh.experiments.transfer.cells import Cell
from shodh.experiments.transfer.measure import read_result
from shodh.experiments.transfer.results import READINGS, Reading, Result, Results
from shodh.experiments.transfer.settings import StudyConfig
from shodh.experiments.transfer.verdict import (
    RULE,
    Answer,
    does_routing_help,
    separation_and_error,
    what_lowers_the_error,
)
from shodh.report.comparison import what_seeds_can_show
from shodh.report.page import Headline, Section, Table, records, text_table, write_page
from shodh.train.run_folder import describe_environment
from shodh.train.workers import read_failures

SHOWN_ROWS = 60
UNITS = {"steps": "optimiser steps", "flops": "training work, TFLOP", "seconds": "seconds of training steps"}


def read_results(cells: Sequence[Cell]) -> Results:
    """The finished ones of these cells."""
    found = [read_result(cell.config.run_dir) for cell in cells]
    return Results([Result(values) for values in found if values is not None])


def write_study_report(study: StudyConfig, cells: Sequence[Cell], results: Results | None = None) -> str:
    """Write ``<study>/report`` from ``results``, by default of the cells that are finished; returns its top as text."""
    results = read_results(cells) if results is None else results
    failures = read_failures(study.folder)
    have = {r.cell["name"] for r in results.all}
    missing = {c.name: failures.get(c.name, "not run yet") for c in cells if c.name not in have}
    headline = _headline(study, results, missing)
    sections = [s for s in _sections(results, missing) if s is not None]
    summary = {section.key: section.summary or records(section) for section in sections}
    data = {
        "study": study.name,
        "question": study.question,
        **headline.record(),
        "missing": missing,
        "env": describe_environment(),
        **summary,
    }
    write_page(study.folder / "report", f"Study of negative transfer: {study.name}", headline, sections, data=data)
    shown = [s for s in sections if s.key in ("errors", "transfer")]
    text = "\n\n".join(f"{s.title}\n{text_table(t)}" for s in shown for t in s.tables.values())
    return f"{headline.verdict}.\n{headline.text}\n\n{text}\n"


def _headline(study: StudyConfig, results: Results, missing: dict[str, str]) -> Headline:
    total = len(results.all) + len(missing)
    numbers = {"cells finished": f"{len(results.all)} of {total}", "seeds": study.seeds}
    if not results.mixed:
        return Headline("No result yet", study.question, "neutral", numbers, note=RULE)
    answers = [does_routing_help(results, mix) for mix in results.mixes]
    asked = [a for a in answers if a.verdict != "Not asked"] or answers
    told = [a.text for a in asked] if len(asked) == 1 else ["The reasons, mix by mix, stand below."]
    seeds = min(a.seeds for a in asked)
    shown = [what_seeds_can_show(seeds)] if seeds else []
    text = "\n".join([study.question, *told, *_causes(results), *shown, *_left_out(results, missing)])
    verdict, tone = _joint(asked)
    return Headline(verdict, text, tone, numbers, note=RULE)


def _left_out(results: Results, missing: dict[str, str]) -> list[str]:
    """What no comparison counts, in a sentence each: that favours the models which have it."""
    told = []
    if missing:
        told.append(f"Cells without a result, named below: {len(missing)} of {len(results.all) + len(missing)}.")
    lost = [r.cell["name"] for r in results.all if any(r.test_error(regime) is None for regime in r.regimes)]
    if lost:
        told.append(f"Left out of all comparisons, since their error is not finite: {', '.join(lost)}.")
    return told


def _joint(answers: Sequence[Answer]) -> tuple[str, Any]:
    """One verdict for all mixes, or how many say what."""
    verdicts = [a.verdict for a in answers]
    if len(set(verdicts)) == 1:
        return verdicts[0], answers[0].tone
    return "; ".join(f"{v} in {verdicts.count(v)} of {len(verdicts)} mixes" for v in dict.fromkeys(verdicts)), "fair"


def _causes(results: Results) -> list[str]:
    """Answers to what lowers the error, of the mixes that have the controls."""
    said = {
        "separation": "Separation of the regimes is what lowers the error",
        "separation, not learned": "Separation of the regimes lowers the error, but the learned router does not get it",
        "finer specialisation": "Specialisation finer than the regimes is what lowers the error",
        "sharing between regimes": "Sharing experts between regimes lowers the error beyond separating them",
        "capacity": "More weights lower the error, and which token meets which of them does not matter",
        "neither": "Neither separation nor finer specialisation lowers the error: routing does not help here",
        "undecided": "Whether separation or finer specialisation lowers the error is undecided",
    }
    found = [what_lowers_the_error(results, mix) for mix in results.mixes]
    return [f"{said[cause]} ({reason})." for cause, reason in found if cause != "not asked"]


def _sections(results: Results, missing: dict[str, str]) -> list[Section | None]:
    if not results.all:
        return [_cells(results, missing)]
    return [
        _answers(results),
        _transfer(results),
        _section("errors", "Errors", ERRORS, {"errors": tables.error_table(results)}),
        _section("comparisons", "Paired comparisons", COMPARISONS, {"comparisons": tables.comparison_table(results)}),
        *[_curves(results, reading) for reading in READINGS],
        _numbers(results),
        _routers(results),
        _rollouts(results),
        _section("invariants", "Divergence", DIVERGENCE, {"divergence": tables.divergence_table(results)}),
        _cosines(results),
        _plasticity(results),
        _cells(results, missing),
    ]


ERRORS = (
    "One-step error on held-out trajectories, in the space the operator works in, over that of persistence on the same "
    "windows; roots of MSEs, so that twice the error is twice the number. Mean and range over seeds. At equal cost: "
    "the validation error when what the cheapest model of the mix spent was spent, interpolated between checkpoints. "
    "The learning rate of a dearer model has not come down by then, which counts against it. All models have the base "
    "run's learning rate, tuned for none of them, and the same tokenizer, trained on all regimes of the study."
)
TRANSFER = (
    "Error of the mixed model over that of a dense specialist of equal active size with the same seed: above 1, mixing "
    "has done harm. The specialist has as many steps in all as the mixed model, and so sees its regime more often; "
    "'same steps a regime' is against one that sees it as often, if the mix draws its regimes equally. Of a sparse "
    "model the index is mixing and additional weights together. p holds for all regimes of a mix at once."
)
COMPARISONS = (
    "Geometric mean over regimes of the error, model over other, paired by seed; of rollouts, the mean VRMSE over "
    "persistence's. Seconds are of steps alone, the median over seeds, on a machine with whatever ran beside. The "
    "verdict goes by p after Holm, which holds for all pairs of a mix and reading at once; few seeds then show little."
)
DIVERGENCE = (
    "Largest divergence of the decoded velocity over the root mean square of its gradient, over all seeds: stored in "
    "float32, in float64, exact, and the net flux out of a cell in the exact mode. The same decoder serves all models."
)
COSINES = (
    "Cosine between the gradients of two regimes' training errors on fixed windows, by kind of weights; below 0 the "
    "regimes pull against each other. 'Same regime' is between two halves of one regime's windows: where it is low "
    "too, a low cosine is the noise of few windows. Experts that regimes do not share have none in common: exactly 0."
)
PLASTICITY = (
    "Training error over persistence while a fresh regime is learned, by a trained model and one with fresh weights, "
    "same batches and rate. Area ratio: sum of the first curve over that of the second; above 1, training has cost "
    "plasticity. Below 1 it may be a head start alone: see the last errors. The tokenizer has seen the fresh regime."
)


def _section(key: str, title: str, text: str, found: dict[str, Table], **figures: Any) -> Section | None:
    """A section, or None if its tables have no rows."""
    if not any(table.rows for table in found.values()):
        return None
    drawn = {stem: figure for stem, figure in figures.items() if figure is not None}
    return Section(key, title, text, tables=found, figures=drawn, rows_shown=SHOWN_ROWS)


def _answers(results: Results) -> Section | None:
    """Both questions, mix by mix; of a study with one mix the headline says it all."""
    if len(results.mixes) < 2:
        return None
    rows: list[list[Any]] = []
    for mix in results.mixes:
        answer, (cause, reason) = does_routing_help(results, mix), what_lowers_the_error(results, mix)
        rows.append([mix, answer.verdict, answer.text.replace("\n", " "), cause, reason])
    table = Table(["mix", "does routing help", "why", "what lowers the error", "why so"], rows)
    brief = Table(["mix", "does routing help", "what lowers the error"], [[r[0], r[1], r[3]] for r in rows])
    section = Section("answers", "Answers by mix", RULE, tables={"answers": brief, "answers_with_reasons": table})
    section.files_only = ("answers_with_reasons",)
    return section


def _transfer(results: Results) -> Section | None:
    table = tables.transfer_table(results)
    known = Table(table.header, [row for row in table.rows if row[5] is not None])
    figure = plots.index_bars(known)
    return _section("transfer", "Transfer index", TRANSFER, {"transfer": known}, transfer_index=figure)


def _numbers(results: Results) -> Section | None:
    table = tables.number_table(results)
    known = Table(table.header, [row for row in table.rows if row[4] is not None])
    if len(results.mixes) < 2:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for _, count, model, _, index, *_ in sorted(known.rows, key=lambda row: row[1]):
        curves.setdefault(model, []).append((count, index))
    figure = plots.lines({"": curves}, "regimes in the mix", "transfer index", False) if curves else None
    text = "Geometric mean of the transfer index over the regimes of each mix, by number of regimes."
    return _section("mixes", "Number of regimes and mixes", text, {"mixes": known}, mixes_by_number=figure)


def _curves(results: Results, reading: Reading) -> Section | None:
    """Mean validation error over seeds by cost, every mixed model and the specialist of the regime."""
    panels: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for mix, label, seeds in tables.models_of(results):
        for regime in seeds[0].regimes:
            panel = panels.setdefault((mix, regime), {})
            panel[label] = mean_curve(seeds, regime, reading)
            alone = [s for s in (results.specialist(regime, r.seed) for r in seeds) if s is not None]
            if alone:
                panel["specialist"] = mean_curve(alone, regime, reading)
    known = {key: {m: c for m, c in models.items() if c} for key, models in panels.items()}
    known = {key: models for key, models in known.items() if models}
    if not known:
        return None
    rows = [
        [*key, model, *point] for key, models in known.items() for model, curve in models.items() for point in curve
    ]
    table = Table(["mix", "regime", "model", UNITS[reading], "error"], rows)
    section = Section(
        f"curves_{reading}",
        f"Validation error by {UNITS[reading]}",
        "Mean over seeds, at each checkpoint; the dotted line is persistence.",
        tables={f"curves_{reading}": table},
        figures={f"curves_by_{reading}": plots.error_curves(known, UNITS[reading])},
        files_only=(f"curves_{reading}",),
    )
    return section


def mean_curve(seeds: Sequence[Result], regime: str, reading: Reading) -> list[tuple[float, float]]:
    """(cost, error) at each checkpoint after the first step, the mean over seeds."""
    curves = [curve[1:] for curve in (r.curve(regime, reading) for r in seeds) if curve]
    scale = 1e-12 if reading == "flops" else 1.0
    return [
        (scale * sum(c for c, _ in points) / len(points), sum(e for _, e in points) / len(points))
        for points in zip(*curves, strict=False)
    ]


def _routers(results: Results) -> Section | None:
    table = tables.separation_table(results)
    summary: dict[str, Any] = {}
    text = "U = I(regime; expert) / H(regime) on the test split: 1 when the expert names the regime. "
    known = _means_by_model(results)
    if len(known) >= 6 and len({u for u, _ in known}) > 2 and len(results.mixes) == 1:
        found = spearmanr(*zip(*known, strict=True))
        text += (
            f"Over the {len(known)} sparse models, each the mean over its seeds, U and error have a rank correlation "
            f"of {found.statistic:.2f} (negative: more separation goes with a lower error; the models differ in more "
            "than U)."
        )
        summary["spearman_u_error"] = float(found.statistic)
    routers = tables.router_table(results)
    section = _section(
        "routers",
        "Routers, balance, experts and groups",
        text,
        {"routers": routers, "separation": table},
        u_and_error=plots.scatter(table),
    )
    if section is not None:
        section.files_only = ("separation",)
        section.summary = {**records(section), **summary}
    return section


def _means_by_model(results: Results) -> list[tuple[float, float]]:
    """(U, error) of every sparse model, each the mean over its seeds: cells of one model are no separate evidence."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r, u, error in separation_and_error(results):
        found.setdefault((r.cell["mix"], r.label), []).append((u, error))
    return [(mean(u for u, _ in seeds), mean(e for _, e in seeds)) for seeds in found.values()]


def _rollouts(results: Results) -> Section | None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (mix, label, regime, field), seeds in tables.rollout_curves(results).items():
        steps = [tables.spread(s[i] for s in seeds)[0] for i in range(min(map(len, seeds)))]
        points = [(i + 1.0, v) for i, v in enumerate(steps) if v is not None]
        if points:
            panels.setdefault(f"{mix}: {regime}, {field}", {})[label] = points
    figure = plots.lines(panels, "autoregressive step", "VRMSE", False) if panels else None
    text = (
        "VRMSE of autoregressive rollouts from the first frames of the test trajectories, mean over seeds; beside it, "
        "the mean over all steps, over that of persistence, which keeps the first frame."
    )
    by_step = [
        [key, model, *point] for key, models in panels.items() for model, curve in models.items() for point in curve
    ]
    found = {
        "rollouts": tables.rollout_table(results),
        "rollouts_by_step": Table(["mix: regime, field", "model", "step", "VRMSE"], by_step),
    }
    section = _section("rollouts", "Rollouts", text, found, rollout_by_step=figure)
    if section is not None:
        section.files_only = ("rollouts_by_step",)
    return section


def _cosines(results: Results) -> Section | None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (mix, label, group), steps in tables.cosine_curves(results).items():
        points = [(float(step), sum(v) / len(v)) for step, v in sorted(steps.items()) if v]
        panels.setdefault(f"{mix}: {group.replace('_', ' ')}", {})[label] = points
    figure = plots.lines(panels, "step", "cosine", True) if panels else None
    table = tables.cosine_table(results)
    return _section("gradients", "Gradients of the regimes", COSINES, {"cosines": table}, gradient_cosines=figure)


def _plasticity(results: Results) -> Section | None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in results.all:
        found = r.values["plasticity"]
        if found is not None and r.seed == 0:
            curves = {k: [(i + 1.0, v) for i, v in enumerate(found[k]) if v is not None] for k in ("trained", "fresh")}
            panels[f"{r.cell['mix']}: {r.label}"] = curves
    figure = plots.lines(panels, "step", "error / persistence", False) if panels else None
    table = tables.plasticity_table(results)
    return _section("plasticity", "Plasticity", PLASTICITY, {"plasticity": table}, learning_curves=figure)


def _cells(results: Results, missing: dict[str, str]) -> Section | None:
    text = (
        "Each is a run folder of its own under cells/, with a report of its own. dense_active and dense_total lack the "
        "router's weights, and nothing else; dense_router is wider by as many, and its steps cost more where a "
        "gate decides once a sample."
    )
    return _section("cells", "Cells", text, {"cells": tables.cell_table(results, missing)})
