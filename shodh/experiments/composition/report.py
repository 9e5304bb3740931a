"""The report of a composition study: answers in plain words, tables and figures, as JSON, CSV, PNG and one page."""

from __future__ import annotations

from typing import Any

from shodh.experiments.composition import plots, tables
from shodh.experiments.composition.methods import DRAWS, WIDE_BANK
from shodh.experiments.composition.results import Results, mean, read_results
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.composition.verdict import (
    RULE,
    asked_readout,
    does_composition_help,
    does_it_beat_the_rivals,
    far_role,
    reasons,
    which_readout_is_enough,
)
from shodh.merge.coordinates import LIMIT
from shodh.report.comparison import what_seeds_can_show
from shodh.report.page import Headline, Section, Table, records, text_table, write_page
from shodh.train.run_folder import describe_environment

SHOWN_ROWS = 60
PAGE = "Composition study {}"


def write_ccm_report(study: CCMConfig, results: Results | None = None) -> str:
    """Write ``<study>/report`` from ``results``, by default of the seeds that are evaluated; returns its top as text.

    Needs the results alone, neither models nor data.

    Raises
    ------
    ConfigError
        A result was measured with other settings.
    """
    results = read_results(study) if results is None else results
    headline = _headline(study, results)
    sections = _sections(study, results) if len(results) else []
    data = {
        "study": study.name,
        "question": study.question,
        **headline.record(),
        "reasons": reasons(results) if len(results) else [],
        "published_improvement": study.published_improvement,
        "seeds": [seed.seed for seed in results.seeds],
        "env": describe_environment(),
        **{section.key: records(section) for section in sections},
    }
    write_page(study.folder / "report", PAGE.format(study.name), headline, sections, data=data)
    shown = [s.tables["summary"] for s in sections if s.key == "summary"]
    return "\n\n".join([f"{headline.verdict}.\n{headline.text}", *map(text_table, shown)]) + "\n"


def _headline(study: CCMConfig, results: Results) -> Headline:
    numbers: dict[str, Any] = {"seeds finished": f"{len(results)} of {study.seeds}", "backbone": study.backbone}
    if not len(results):
        return Headline("No result yet", study.question, "neutral", numbers, note=RULE)
    answer = does_composition_help(results, study.published_improvement)
    method, role = asked_readout(results), far_role(results)
    if method is not None:
        for name in ("anchor", method):
            numbers[f"error of {name}, {role}"] = mean(results.role_errors(name, role))
        numbers["improvement, %"] = mean(results.improvements(method, role))
    if study.published_improvement is not None:
        numbers["published, %"] = study.published_improvement
    said = (study.question, answer.text, does_it_beat_the_rivals(results), which_readout_is_enough(results))
    text = "\n".join([*filter(None, said), what_seeds_can_show(len(results))])
    return Headline(answer.verdict, text, answer.tone, numbers, note=RULE)


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
COMPARISONS = "Ratio of errors, its 95 % interval, and tests paired over seeds."
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


def _sections(study: CCMConfig, results: Results) -> list[Section]:
    role = far_role(results)
    published = study.published_improvement
    components, layers, experts = (tables.update_table(results, k) for k in ("components", "layers", "experts"))
    routing = tables.routing_table(results)
    found = [
        _section(
            "summary",
            "Errors",
            f"{_protocol(study, results)} {METHODS_TEXT}",
            {"summary": tables.summary_table(results, published), "results": tables.long_table(results)},
            files_only=("results",),
            error_by_parameter=plots.error_by_parameter(results),
        ),
        Section("why", "Why: what the diagnostics say", " ".join(reasons(results))),
        _section("values", "Errors by value", VALUES, {"errors_by_value": tables.value_table(results)}),
        _section(
            "alphas",
            "Best coordinate against the parameter",
            ALPHAS,
            {"alphas": tables.alpha_table(results), "correlations": tables.correlation_table(results)},
            alpha_by_parameter=plots.alpha_by_parameter(results),
        ),
        _section(
            "line",
            "Along the line",
            LINE,
            {"bank": tables.bank_table(results)},
            files_only=("bank",),
            error_along_line=plots.error_along_line(results),
        ),
        _section(
            "steps",
            "Error by step",
            STEPS,
            {"errors_by_step": tables.step_table(results)},
            files_only=("errors_by_step",),
            error_by_step=plots.error_by_step(results, role),
        ),
        _section(
            "updates",
            "Where the direction lives",
            UPDATES,
            {"components": components, "layers": layers, "experts": experts},
            files_only=("experts",),
            updates_by_part=plots.updates_by_part(components.rows, layers.rows),
        ),
        _section(
            "routing",
            "Routing along the direction",
            ROUTING,
            {"routing": routing},
            files_only=("routing",),
            routing_by_alpha=plots.routing_by_alpha(routing.rows),
        ),
        _section("comparisons", "Paired comparisons", COMPARISONS, {"comparisons": tables.comparison_table(results)}),
        _section("chosen", "Chosen on validation", CHOSEN, {"chosen": tables.chosen_table(results)}),
    ]
    return [section for section in found if section is not None]


def _section(
    key: str, title: str, text: str, found: dict[str, Table], files_only: tuple[str, ...] = (), **figures: Any
) -> Section | None:
    """A section, without empty tables; None if all are."""
    known = {stem: table for stem, table in found.items() if table.rows}
    if not known:
        return None
    drawn = {stem: figure for stem, figure in figures.items() if figure is not None}
    return Section(key, title, text, tables=known, figures=drawn, files_only=files_only, rows_shown=SHOWN_ROWS)
