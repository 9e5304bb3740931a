"""The report of a composition study: answers in plain words, tables and figures, as JSON, CSV, PNG and one page."""

from __future__ import annotations

from typing import Any

from shodh.experiments.composition import plots, tables
from shodh.experiments.composition.methods import DRAWS, WIDE_BANK
from shodh.experiments.composition.results import Results, read_results
from shodh.experiments.composition.runs import expand
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.composition.verdict import (
    does_composition_help,
    does_it_beat_the_rivals,
    reasons,
    which_readout_is_enough,
)
from shodh.experiments.harness.report import claims_section, write_study
from shodh.experiments.harness.results import mean, missing_runs, to_table
from shodh.merge.coordinates import LIMIT
from shodh.report.page import Headline, Section, filled
from shodh.report.statistics import RULE, what_seeds_can_show

ERRORS_ARE = (
    "Errors are relative L2 over the steps after the prefix, on test trajectories, the mean over the values of a role. "
)
PAGE = "Composition study {}"


def write_ccm_report(study: CCMConfig) -> str:
    """Write ``<study>/report`` from the seeds that are evaluated; returns its top as text.

    Needs the results alone, neither models nor data.

    Raises
    ------
    ConfigError
        A result was measured with other settings.
    """
    results = read_results(study)
    headline, sections = _headline(study, results), _sections(study, results) if len(results) else []
    measured = {seed.seed for seed in results.seeds}
    missing = [run for run in expand(study) if run.labels["seed"] not in measured]
    return write_study(
        study,
        PAGE.format(study.name),
        headline,
        sections,
        missing_runs(missing, study.folder),
        ("summary",),
        reasons=reasons(results) if len(results) else [],
        published_improvement=study.published_improvement,
        seeds=[seed.seed for seed in results.seeds],
    )


def _headline(study: CCMConfig, results: Results) -> Headline:
    numbers: dict[str, Any] = {"seeds finished": f"{len(results)} of {study.seeds}", "backbone": study.backbone}
    if not len(results):
        return Headline("No result yet", study.question, "neutral", numbers, note=ERRORS_ARE + RULE)
    answer = does_composition_help(results, study.published_improvement)
    method, role = results.asked, results.far_role
    if method is not None:
        for name in ("anchor", method):
            numbers[f"error of {name}, {role}"] = mean(results.role_errors(name, role))
        numbers["improvement, %"] = mean(results.improvements(method, role))
    if study.published_improvement is not None:
        numbers["published, %"] = study.published_improvement
    said = (study.question, answer.text, does_it_beat_the_rivals(results), which_readout_is_enough(results))
    text = "\n".join([*filter(None, said), what_seeds_can_show(len(results))])
    return Headline(answer.verdict, text, answer.tone, numbers, note=ERRORS_ARE + RULE)


def _protocol(study: CCMConfig, results: Results) -> str:
    history = results.seeds[0].values["history"]
    counts = {v["trajectories"] for v in results.seeds[0].values["values"]}
    return (
        f"Every method is given {history} + {study.prefix} observed frames of {min(counts)} test trajectories a value, "
        f"rolls out from the last {history} of them, and is counted on the {study.rollout} steps that follow. Those "
        "that look at the prefix see the trajectories of a value together, and find one coordinate (prefix_each: one a "
        "trajectory)."
    )


METHODS_TEXT = (
    "uses: what a method looks at beside the weights. coord: the parameter, linear as published; coord_log: its "
    "logarithm; scale: factor and map chosen on validation trajectories of seen values; prefix: the published "
    f"bank; scale_wide and prefix_wide: coordinates to {max(WIDE_BANK):g} in place of {LIMIT:g}. oracle and "
    "best_endpoint are chosen by the counted errors themselves. wrong_sign, random_direction ("
    f"{DRAWS} draws) and the ensemble, which runs both experts at every step, use scale's coordinate. prefix passes: "
    "rollouts over the prefix, forward and backward; prefix_finetune tunes all of the anchor's weights with as many as "
    "gradient takes."
)
VALUES = "Mean and standard deviation over seeds at every value of the parameter."
COMPARISONS = "Ratio of errors, its 95 % interval, and tests paired over seeds: estimates; p is of each pair alone."
ALPHAS = (
    "The coordinate that each read-out finds, and how far it follows the parameter; outside: the distance of a value "
    "from the experts' range over its length, on the map that validation chose. Correlations are over all values and "
    "seeds, with the parameter on each map."
)
LINE = "Error after the prefix at every coordinate of the bank: where its minimum lies, and how sharp it is."
STEPS = "Error by step after the prefix, outside the support."
UPDATES = (
    "Where the fine-tuning went, mean over seeds: the share of the squared norm of the direction (half the difference "
    "between the experts) and of the shared part (the mean of their updates), and the cosine between both updates."
)
ROUTING = (
    "Whether routing changes along the direction, on the windows from which rollouts start: Jensen-Shannon divergence "
    "of expert usage against the middle of the line, and the share of a token's experts that are others there."
)
CHOSEN = "What was chosen once a seed, on the validation trajectories of the validation values."


def _sections(study: CCMConfig, results: Results) -> list[Section | None]:
    components, layers, experts = (tables.update_table(results, k) for k in ("components", "layers", "experts"))
    routing = tables.routing_table(results)
    errors = {
        "summary": tables.summary_table(results, study.published_improvement),
        "results": to_table(results.frame),
    }
    alphas = {"alphas": tables.alpha_table(results), "correlations": tables.correlation_table(results)}
    updates = {"components": components, "layers": layers, "experts": experts}
    by_parameter, by_alpha = plots.error_by_parameter(results), plots.alpha_by_parameter(results)
    by_step, by_routing = plots.error_by_step(results, results.far_role), plots.routing_by_alpha(routing.rows)
    by_part = plots.updates_by_part(components.rows, layers.rows)
    bank, steps = {"bank": tables.bank_table(results)}, {"errors_by_step": tables.step_table(results)}
    protocol = f"{_protocol(study, results)} {METHODS_TEXT}"
    direction, routed = "Where the direction lives", "Routing along the direction"
    best = "Best coordinate against the parameter"
    return [
        filled("summary", "Errors", protocol, errors, ("results",), error_by_parameter=by_parameter),
        Section("why", "Why: what the diagnostics say", " ".join(reasons(results))),
        claims_section(results.claims, ("role", "method", "against"), results.bootstrap),
        filled("values", "Errors by value", VALUES, {"errors_by_value": tables.value_table(results)}),
        filled("alphas", best, ALPHAS, alphas, alpha_by_parameter=by_alpha),
        filled("line", "Along the line", LINE, bank, ("bank",), error_along_line=plots.error_along_line(results)),
        filled("steps", "Error by step", STEPS, steps, ("errors_by_step",), error_by_step=by_step),
        filled("updates", direction, UPDATES, updates, ("experts",), updates_by_part=by_part),
        filled("routing", routed, ROUTING, {"routing": routing}, ("routing",), routing_by_alpha=by_routing),
        filled("comparisons", "Paired comparisons", COMPARISONS, {"comparisons": tables.comparison_table(results)}),
        filled("chosen", "Chosen on validation", CHOSEN, {"chosen": tables.chosen_table(results)}),
    ]
