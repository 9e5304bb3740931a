"""The report of a study: the answer in plain words, then tables and figures, as JSON, CSV, PNG and one page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import scipy

from shodh.experiments.harness.report import Answer, claims_section, write_study
from shodh.experiments.harness.results import missing_runs, read_results, to_table
from shodh.experiments.harness.run import Run
from shodh.experiments.transfer import plots, tables
from shodh.experiments.transfer.results import READINGS, Reading, Result, Results, rank_pairs
from shodh.experiments.transfer.settings import StudyConfig
from shodh.experiments.transfer.verdict import does_routing_help, what_lowers_the_error
from shodh.report.figures import lines
from shodh.report.page import Headline, Section, Table, filled
from shodh.report.statistics import RULE, what_seeds_can_show

UNITS = {"steps": "optimiser steps", "flops": "training work, TFLOP", "seconds": "seconds of training steps"}


def write_study_report(study: StudyConfig, runs: Sequence[Run], results: Results | None = None) -> str:
    """Write ``<study>/report`` from ``results``, by default of the runs that are finished; returns its top as text."""
    results = Results([Result(values) for values in read_results(runs)]) if results is None else results
    missing = missing_runs(runs, study.folder)
    headline, sections = _headline(study, results, missing), _sections(results, missing)
    title = f"Study of negative transfer: {study.name}"
    return write_study(study, title, headline, sections, missing, ("errors", "transfer"))


def _headline(study: StudyConfig, results: Results, missing: dict[str, str]) -> Headline:
    total = len(results.all) + len(missing)
    numbers = {"runs finished": f"{len(results.all)} of {total}", "seeds": study.seeds, "claims": len(results.claims)}
    if not results.mixed:
        return Headline("No result yet", study.question, "neutral", numbers, note=RULE)
    answers = [does_routing_help(results, mix) for mix in results.mixes]
    asked = [a for a in answers if a.verdict != "Not asked"] or answers
    reasons = [a.text for a in asked] if len(asked) == 1 else ["The reasons, mix by mix, stand below."]
    seeds = min(a.seeds for a in asked)
    shown = [what_seeds_can_show(seeds)] if seeds else []
    text = "\n".join([study.question, *reasons, *_causes(results), *shown, *_lost(results, missing)])
    verdict, tone = _joint(asked)
    return Headline(verdict, text, tone, numbers, note=RULE)


def _lost(results: Results, missing: dict[str, str]) -> list[str]:
    """Which runs have no result, and which diverged, in a sentence each."""
    sentences = []
    if missing:
        sentences.append(f"Runs without a result, named below: {len(missing)} of {len(results.all) + len(missing)}.")
    lost = [r.run["name"] for r in results.all if any(r.error(g, "test") == float("inf") for g in r.regimes)]
    if lost:
        sentences.append(f"Diverged, so that their error counts as infinite: {', '.join(lost)}.")
    return sentences


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
    runs = filled("runs", "Runs", RUNS, {"runs": tables.run_table(results, missing)})
    if not results.mixed:
        return [runs]
    transfer = tables.transfer_table(results)
    errors = {"errors": tables.error_table(results), "results": to_table(results.frame)}
    cosines = lines(_mean_curves(tables.cosine_curves(results)), "step", "cosine", 0)
    return [
        _answers(results),
        claims_section(results.claims, ("mix", "model", "against", "reading", "regime"), results.bootstrap),
        filled(
            "transfer", "Transfer index", TRANSFER, {"transfer": transfer}, transfer_index=plots.index_bars(transfer)
        ),
        filled("errors", "Errors", ERRORS, errors, ("results",)),
        filled("comparisons", "Paired comparisons", COMPARISONS, {"comparisons": tables.comparison_table(results)}),
        *[_curves(results, reading) for reading in READINGS],
        _numbers(results),
        _routers(results),
        _rollouts(results),
        filled("invariants", "Divergence", DIVERGENCE, {"divergence": tables.divergence_table(results)}),
        filled(
            "gradients",
            "Gradients of the regimes",
            COSINES,
            {"cosines": tables.cosine_table(results)},
            gradient_cosines=cosines,
        ),
        _plasticity(results),
        runs,
    ]


ERRORS = (
    "One-step error on held-out trajectories, in the space the operator works in, over that of persistence on the same "
    "windows; roots of MSEs, so that twice the error is twice the number. Mean and range over seeds. Of the best "
    "checkpoint where the base run keeps one (operator.train.best), beside it of the last one. At equal cost: "
    "the validation error when what the cheapest model of the mix spent was spent, interpolated between checkpoints. "
    "The learning rate of a dearer model has not come down by then, which counts against it. All models have the base "
    "run's learning rate, tuned for none of them, and the same tokenizer, trained on all regimes of the study."
)
TRANSFER = (
    "Error of the mixed model over that of a dense specialist of equal active size with the same seed: above 1, mixing "
    "has done harm. The specialist has as many steps in all as the mixed model, and so sees its regime more often; "
    "'same steps a regime' is against one that sees it as often, if the mix draws its regimes equally; 'same samples' "
    "against one with all steps, each of as many samples as the mix has of the regime: the index of a study without "
    "other specialists. Of a sparse model the index is mixing and additional weights together. What is concluded from "
    "it stands among the claims."
)
COMPARISONS = (
    "Geometric mean over regimes of the error, model over other, paired by seed; of rollouts, the mean VRMSE over "
    "persistence's. Seconds are of steps alone, the median over seeds, on a machine with whatever ran beside. The "
    "p is of each pair alone: these are estimates; only those with a verdict are claims of this page."
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
RUNS = (
    "Each is a run folder of its own under runs/, with a report of its own. dense_active and dense_total lack the "
    "router's weights, and nothing else; dense_router is wider by as many, and its steps cost more where a "
    "gate decides once a sample."
)
NUMBERS = "Geometric mean of the transfer index over the regimes of each mix, by number of regimes."
CURVES = "Mean over seeds, at each checkpoint; the dotted line is persistence."
ROUTERS = "U = I(regime; expert) / H(regime) on the test split: 1 when the expert names the regime. "
ROLLOUTS = (
    "VRMSE of autoregressive rollouts from the first frames of the test trajectories, mean over seeds; beside it, "
    "the mean over all steps, over that of persistence, which keeps the first frame."
)


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
    found = {"answers": brief, "answers_with_reasons": table}
    return filled("answers", "Answers by mix", RULE, found, ("answers_with_reasons",))


def _numbers(results: Results) -> Section | None:
    if len(results.mixes) < 2:
        return None
    table = tables.number_table(results)
    curves: dict[str, list[tuple[float, float]]] = {}
    for _, count, model, _, index, *_ in sorted(table.rows, key=lambda row: row[1]):
        if index is not None:
            curves.setdefault(model, []).append((count, index))
    figure = lines({"": curves}, "regimes in the mix", "transfer index", 1)
    return filled("mixes", "Number of regimes and mixes", NUMBERS, {"mixes": table}, mixes_by_number=figure)


def _curves(results: Results, reading: Reading) -> Section | None:
    """Mean validation error over seeds by cost, every mixed model and the specialist of the regime."""
    panels: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for mix in results.mixes:
        models = {label: results.of(mix, label) for label in results.labels(mix)}
        for regime in results.regimes(mix):
            alone = [r for r in results.whole_specialists(mix) if r.regimes == [regime]]
            every = {**models, **{r.label: [s for s in alone if s.label == r.label] for r in alone}}
            panels[mix, regime] = {label: mean_curve(seeds, regime, reading) for label, seeds in every.items()}
    rows = [
        [*key, model, *point] for key, models in panels.items() for model, curve in models.items() for point in curve
    ]
    figure = lines(
        {f"{r} in {m}": curves for (m, r), curves in panels.items()}, UNITS[reading], "error / persistence", 1, True
    )
    stem = f"curves_{reading}"
    table = Table(["mix", "regime", "model", UNITS[reading], "error"], rows)
    title = f"Validation error by {UNITS[reading]}"
    return filled(stem, title, CURVES, {stem: table}, (stem,), **{f"curves_by_{reading}": figure})


def mean_curve(seeds: Sequence[Result], regime: str, reading: Reading) -> list[tuple[float, float]]:
    """(cost, error) at each checkpoint after the first step, the mean over seeds; none where a seed has diverged."""
    curves = [curve[1:] for curve in (r.curve(regime, reading) for r in seeds) if curve]
    scale = 1e-12 if reading == "flops" else 1.0
    points = [(scale * mean(c for c, _ in at), mean(e for _, e in at)) for at in zip(*curves, strict=False)]
    return [(cost, error) for cost, error in points if error < float("inf")]


def _routers(results: Results) -> Section | None:
    table = tables.separation_table(results)
    summary: dict[str, Any] = {}
    text = ROUTERS
    known = _means_by_model(results)
    if len(known) >= 6 and len({u for u, _ in known}) > 2 and len(results.mixes) == 1:
        found = scipy.stats.spearmanr(*zip(*known, strict=True))
        text += (
            f"Over the {len(known)} sparse models, each the mean over its seeds, U and error have a rank correlation "
            f"of {found.statistic:.2f} (negative: more separation goes with a lower error; the models differ in more "
            "than U)."
        )
        summary["spearman_u_error"] = float(found.statistic)
    every = {"routers": tables.router_table(results), "separation": table}
    title = "Routers, balance, experts and groups"
    section = filled("routers", title, text, every, ("separation",), u_and_error=plots.scatter(table))
    if section is not None:
        section.summary = summary
    return section


def _means_by_model(results: Results) -> list[tuple[float, float]]:
    """(U, error) of every sparse model, each the mean over its seeds: runs of one model are no separate evidence."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r, u, error in rank_pairs(results.mixed, results):
        found.setdefault((r.run["mix"], r.label), []).append((u, error))
    return [(mean(u for u, _ in seeds), mean(e for _, e in seeds)) for seeds in found.values()]


Panels = dict[str, dict[str, list[tuple[float, float]]]]


def _rollouts(results: Results) -> Section | None:
    panels: Panels = {}
    for (mix, label, regime, field), seeds in tables.rollout_curves(results).items():
        steps = [tables.mean(s[i] for s in seeds) for i in range(min(map(len, seeds)))]
        points = [(i + 1.0, v) for i, v in enumerate(steps) if v is not None]
        panels.setdefault(f"{mix}: {regime}, {field}", {})[label] = points
    by_step = [
        [key, model, *point] for key, models in panels.items() for model, curve in models.items() for point in curve
    ]
    found = {
        "rollouts": tables.rollout_table(results),
        "rollouts_by_step": Table(["mix: regime, field", "model", "step", "VRMSE"], by_step),
    }
    figure = lines(panels, "autoregressive step", "VRMSE")
    return filled("rollouts", "Rollouts", ROLLOUTS, found, ("rollouts_by_step",), rollout_by_step=figure)


def _mean_curves(curves: dict[tuple[str, str, str], dict[int, list[float]]]) -> Panels:
    panels: Panels = {}
    for (mix, label, group), steps in curves.items():
        points = [(float(step), mean(v)) for step, v in sorted(steps.items()) if v]
        panels.setdefault(f"{mix}: {group.replace('_', ' ')}", {})[label] = points
    return panels


def _plasticity(results: Results) -> Section | None:
    panels: Panels = {}
    for r in results.all:
        found = r.values["plasticity"]
        if found is not None and r.seed == 0:
            curves = {k: [(i + 1.0, v) for i, v in enumerate(found[k]) if v is not None] for k in ("trained", "fresh")}
            panels[f"{r.run['mix']}: {r.label}"] = curves
    figure = lines(panels, "step", "error / persistence")
    table = tables.plasticity_table(results)
    return filled("plasticity", "Plasticity", PLASTICITY, {"plasticity": table}, learning_curves=figure)
