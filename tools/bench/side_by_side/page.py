"""The page, the table and the JSON of a comparison; where we lose stands first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shodh.core.files import write_atomically
from shodh.core.strict_json import to_json
from shodh.report.figures import BASELINE, INK, MARKERS, MODEL
from shodh.report.page import Headline, Section, Table, format_cell, write_page
from shodh.report.statistics import RULE, holm, what_seeds_can_show, what_trajectories_can_show

from .models import MODELS
from .results import BUDGETS, PERSISTENCE, TASKS, Duel, Results, chosen_rates, duels, mean, with_interval
from .sets import SETS

SEEDS_CHANGE = "Seeds change initial weights and batches; data and split are the same in all."
TITLE = "Side by side with the peers"
COLUMNS = "set budget model ours vrmse low high nrmse rollout_vrmse rollout_low rollout_high rollout_nrmse".split()
COLUMNS += "seeds trajectories rate steps parameters step_ms cpu_s memory_mib".split()


def label(model: str) -> str:
    return MODELS[model].label if model in MODELS else model


def everything(results: Results) -> Table:
    """One row a set, budget and model: errors with intervals, and costs (means over seeds)."""
    rows = []
    for budget in BUDGETS:
        for data in results.sets(budget):
            for model in [*results.models(data, budget), PERSISTENCE]:
                if not (records := results.of(data, model, budget)):
                    continue
                row: list[Any] = [data, budget, model, model in MODELS and MODELS[model].ours]
                for task in TASKS:
                    row += with_interval(results.errors(data, model, budget, task, "vrmse"))
                    row.append(float(mean(results.errors(data, model, budget, task, "nrmse"))))
                row += [len(records), len(records[0]["test"]["one_step"]["vrmse"])]

                def cost(key: str, records: Any = records) -> float | None:
                    return float(np.mean([r[key] for r in records])) if key in records[0] else None

                step = cost("step_seconds")
                row += [records[0].get("rate"), records[0].get("steps"), records[0].get("parameters")]
                row += [None if step is None else 1e3 * step, cost("cpu_seconds"), cost("memory_mib")]
                rows.append(row)
    return Table(COLUMNS, rows)


def matrix(results: Results, budget: str, task: str) -> Table:
    """Mean test VRMSE, a row a set and a column a model; the least of a row is starred."""
    sets = results.sets(budget)
    models = [m for m in MODELS if any(m in results.models(data, budget) for data in sets)]
    rows = []
    for data in sets:
        means: dict[str, float] = {}
        for model in [*models, PERSISTENCE]:
            if len(values := results.errors(data, model, budget, task, "vrmse")):
                means[model] = float(mean(values))
        least = min(means[m] for m in models if m in means)
        row: list[Any] = [SETS[data].label]
        for model in [*models, PERSISTENCE]:
            value = means.get(model)
            row.append(value if value is None or value > least else f"{format_cell(value)} *")
        rows.append(row)
    return Table(["set", *(label(m) for m in models), PERSISTENCE], rows)


def verdicts(found: list[Duel], *, lost: bool) -> Table:
    """Sets where our best model has the higher mean error than the peers' best (or not), worst first."""
    rows = []
    for d in sorted(found, key=lambda d: -d.ratio):
        if (d.ratio > 1) == lost:
            ends = (None, None) if d.interval is None else d.interval
            row = [SETS[d.data].label, label(d.ours), d.error, label(d.theirs), d.other, d.ratio, *ends]
            rows.append([*row, d.comparison.p_holm, d.comparison.verdict])
    header = ["set", "our best", "VRMSE", "peers' best", "VRMSE", "ratio", "low", "high", "p (Holm)", "ours is"]
    return Table(header, rows)


def all_duels(results: Results) -> dict[tuple[str, str], list[Duel]]:
    """By (budget, task), with p adjusted for all of them at once."""
    found = {(b, t): list(duels(results, b, t)) for b in BUDGETS for t in TASKS}
    adjusted = holm({(key, d.data): d.comparison for key, part in found.items() for d in part})
    return {key: [replace(d, comparison=adjusted[key, d.data]) for d in part] for key, part in found.items() if part}


def ratios(results: Results, budget: str, task: str) -> Figure | None:
    """Error of every model over the least of its set, a row a set."""
    table = matrix(results, budget, task)
    if not table.rows:
        return None
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(table.rows)), layout="constrained")
    axes = figure.add_subplot()
    names = {MODELS[m].label: MODELS[m] for m in MODELS}
    for column, name in enumerate(table.header[1:-1], 1):
        values = [row[column] for row in table.rows]
        least = [min(_number(v) for v in row[1:-1] if v is not None) for row in table.rows]
        known = [(_number(v) / m, y) for y, (v, m) in enumerate(zip(values, least)) if v is not None]
        colour = MODEL if names[name].ours else BASELINE
        marker = MARKERS[column % len(MARKERS)]
        axes.scatter(*zip(*known), marker=marker, s=42, facecolors="none", edgecolors=colour, label=name)
    axes.set_xscale("log")
    axes.set_yticks(range(len(table.rows)), [row[0] for row in table.rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(f"VRMSE ({TASKS[task]}, {BUDGETS[budget]}) over the least of its set; green: ours", color=INK)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _number(cell: float | str) -> float:
    return float(cell.removesuffix(" *")) if isinstance(cell, str) else cell


def headline(results: Results, found: dict[tuple[str, str], list[Duel]], missing: list[str]) -> Headline:
    """Where we lose, then where we do not, for each budget and task, and where no model is of use."""
    lines: list[str] = []
    numbers: dict[str, str] = {}
    for (budget, task), part in found.items():
        lost = [SETS[d.data].label for d in sorted(part, key=lambda d: -d.ratio) if d.ratio > 1]
        firsts = sum(MODELS[d.first].ours for d in part)
        numbers |= {
            f"{BUDGETS[budget]}, {TASKS[task]}: lost": f"{len(lost)} of {len(part)}",
            f"{BUDGETS[budget]}, {TASKS[task]}: first": f"{firsts} of {len(part)}",
        }
        where = f" ({', '.join(lost)})" if lost else ""
        lines.append(
            f"{BUDGETS[budget].capitalize()}, {TASKS[task]}: our best model has a higher mean error than the peers' "
            f"best on {len(lost)} of {len(part)} sets{where}; one of ours is first on {firsts}."
        )
        useless = [SETS[data].label for data in results.sets(budget) if _is_useless(results, data, budget, task)]
        if useless:
            lines.append(f"There persistence has a lower error than every model on: {', '.join(useless)}.")
    if missing:
        lines.append(f"Not compared, because not installed: {', '.join(missing)}.")
    first = found.get(("seconds", "one_step"), next(iter(found.values()), []))
    lost = sum(d.ratio > 1 for d in first)
    verdict = f"we lose on {lost} of {len(first)} sets" if first else "nothing to compare yet"
    return Headline(verdict, "\n".join(lines), "bad" if 2 * lost >= len(first) else "fair", numbers, note=RULE)


def _is_useless(results: Results, data: str, budget: str, task: str) -> bool:
    """Whether the last known frame is a better forecast than that of any model."""
    models = [*results.models(data, budget), PERSISTENCE]
    errors = {m: mean(results.errors(data, m, budget, task, "vrmse")) for m in models if results.of(data, m, budget)}
    return min(errors, key=lambda m: float(errors[m])) == PERSISTENCE


def write_results(out: Path, *, scale: Any, rates: str) -> Path:
    """Write ``page/index.html``, ``page/results.csv``, ``page/results.md`` and ``page/peers.json``."""
    results = Results.read(out)
    found = all_duels(results)
    sections = []
    for lost, title in ((True, "Where we lose"), (False, "Where we do not lose")):
        tables = {f"{'lost' if lost else 'held'}_{b}_{t}": verdicts(part, lost=lost) for (b, t), part in found.items()}
        tables = {stem: table for stem, table in tables.items() if table.rows}
        if tables:
            text = (
                "Our best model against the best peer, each chosen by its validation error; errors are of the test "
                "split, means over seeds and trajectories, with the nested bootstrap's interval of their ratio."
            )
            sections.append(Section("lost" if lost else "held", title, text, tables=tables))
    for budget, name in BUDGETS.items():
        tables = {f"{budget}_{task}": matrix(results, budget, task) for task in TASKS if results.sets(budget)}
        figures = {f"ratios_{budget}_{task}": ratios(results, budget, task) for task in TASKS}
        drawn = {stem: figure for stem, figure in figures.items() if figure is not None}
        if tables:
            text = f"Mean test VRMSE at {name}: of one step, and of {scale.rollout} steps; * is the least of a set."
            sections.append(Section(budget, f"All models, {name}", text, tables=tables, figures=drawn))
    whole = everything(results)
    sections += [
        _how(results, scale, rates),
        Section("table", "Everything", "As CSV and Markdown.", files_only=("results",), tables={"results": whole}),
    ]
    missing = [f"{name} ({', '.join(kind.missing)})" for name, kind in (*SETS.items(), *MODELS.items()) if kind.missing]
    page, first = out / "page", headline(results, found, missing)
    env = next((r["env"] for r in reversed(results.cells.values())), None)
    commits = sorted({str(r["env"]["commit"]) for r in results.cells.values()})
    versions = {MODELS[r["model"]].package: r["version"] for r in results.cells.values() if "version" in r}
    data = {
        "env": env,
        "commits": commits,
        "versions": versions,
        "scale": to_json(vars(scale) | {"size": vars(scale.size)}),
        "rates": {"kind": rates, "chosen": chosen_rates(results)},
        "headline": first.record(),
        "rows": [dict(zip(whole.header, row)) for row in whole.rows],
    }
    write_page(page, TITLE, first, sections, data=data, data_name="peers.json")
    write_atomically(page / "results.md", markdown(whole))
    return page / "index.html"


def _how(results: Results, scale: Any, rates: str) -> Section:
    """Models, settings, learning rates and data, and what these numbers cannot say."""
    chosen = chosen_rates(results)
    models = [
        [m.label, f"{m.package} {m.version}", m.published, m.scaled, f"{m.rate:g}", f"{chosen.get(name, m.rate):g}"]
        for name, m in MODELS.items()
    ]
    sets = [[kind.label, kind.recipe, "exponax" if kind.modules else "ours"] for kind in SETS.values()]
    tests = scale.counts["test"]
    text = " ".join(
        [
            f"Fields of {scale.grid} x {scale.grid} cells, {scale.counts['train']} training trajectories of "
            f"{scale.frames} frames, {tests} of the test; {scale.history} frames in, the next one out; batches of "
            f"{scale.batch}, mean square error of normalised fields, AdamW with each one's published decay, gradients "
            f"clipped at 1, a linear rise over a tenth of the steps, half a cosine down. Equal steps: {scale.steps}, "
            f"equal seconds as many steps as take {scale.seconds:g} s. Rates: {rates}. An error above 100, or one "
            "that is not finite, counts as 100.",
            what_seeds_can_show(3, SEEDS_CHANGE),
            *what_trajectories_can_show({"each set": tests}),
        ]
    )
    tables = {
        "models": Table(["model", "code", "published", "scaled", "published rate", "rate"], models),
        "sets": Table(["set", "recipe", "solved by"], sets),
    }
    return Section("how", "How", text, tables=tables)


def markdown(table: Table) -> str:
    """A table for a document."""
    lines = [table.header, ["---"] * len(table.header), *([format_cell(c) for c in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
