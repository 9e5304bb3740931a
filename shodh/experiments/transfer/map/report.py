"""The page of a map: where mixing harms, and what each way of routing takes away of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shodh.experiments.harness.report import claims_section, write_study
from shodh.experiments.harness.results import mean
from shodh.experiments.harness.workers import read_failures
from shodh.experiments.transfer.map.plots import heat_maps, index_by_arm
from shodh.experiments.transfer.map.results import Claim, MapResults, Point, root_mean
from shodh.experiments.transfer.map.runs import MapRun, by_group
from shodh.experiments.transfer.map.settings import DENSE, DENSE_LONGER, SPECIALIST, MapConfig
from shodh.experiments.transfer.map.unseen import plasticity_section, unseen_section
from shodh.report.page import Headline, Section, Table, filled
from shodh.report.statistics import RULE, Comparison, Verdict, what_seeds_can_show

WORDS: dict[Verdict, str] = {"higher": "harm", "lower": "gain", "equal": "neither", "open": "undecided"}
SEEDS_CHANGE = "Seeds change initial weights and every training sample; held-out samples are the same in all."
AXES = ["fields", "regimes", "width"]


def write_map_report(study: MapConfig, runs: Sequence[MapRun]) -> str:
    """Write ``<study>/report`` from the finished runs and return its top as text."""
    results = MapResults(study, runs)
    sections = [_index(results), _by_regime(results), _effective(results), _gradients(results)]
    sections += [unseen_section(results), plasticity_section(results), _runs(results)]
    rows = {(*claim.point, claim.arm, claim.other): claim for claim in results.claims}
    claims = {row: results.claims[claim] for row, claim in rows.items()}
    sections.append(claims_section(claims, [*AXES, "model", "against"], lambda row: results.bootstrap(*rows[row])))
    return write_study(study, "Map of negative transfer", headline(results), sections, missing(study, runs), ["index"])


def missing(study: MapConfig, runs: Sequence[MapRun]) -> dict[str, str]:
    """Runs without a result, and why: the failure is that of their group."""
    failures = read_failures(study.folder)
    groups = by_group([run for run in runs if not run.finished])
    return {run.name: failures.get(group, "not run yet") for group, some in groups.items() for run in some}


def worst(results: MapResults) -> Point | None:
    """Where the dense model loses most to its specialists."""
    found = {p: results.claims.get(Claim(p, DENSE, SPECIALIST)) for p in results.points}
    known = {p: c.ratio for p, c in found.items() if c is not None and math.isfinite(c.ratio)}
    return max(known, key=lambda p: known[p]) if known else None


def headline(results: MapResults) -> Headline:
    """Whether there is negative transfer in the worst place, and what routing makes of it."""
    point = worst(results)
    if point is None:
        return Headline("Not asked", "No finished dense model with its specialists.")
    dense = results.claims[Claim(point, DENSE, SPECIALIST)]
    place = f"{point.number} regimes, width {point.dim}, {point.fields} fields"
    lines = [
        f"Worst place of the dense map: {place}. Transfer index of the dense model {_with_interval(dense)}: "
        f"{WORDS[dense.verdict]}."
    ]
    numbers: dict[str, Any] = {"point": point._asdict(), "dense": dense.ratio}
    lower = []
    for arm in results.arms(point):
        other = results.baseline(point, arm)
        against = results.claims.get(Claim(point, arm, other))
        index = results.claims.get(Claim(point, arm, SPECIALIST))
        if against is None or index is None:
            continue
        u = results.information(point, arm)
        shown = "" if u is None else f", U {u:.2f}"
        lines.append(
            f"{arm}: error over that of {other} {_with_interval(against)}, {WORDS[against.verdict]}; "
            f"index {_with_interval(index)}, {WORDS[index.verdict]}{shown}."
        )
        numbers[arm] = {"against": other, "ratio": against.ratio, "index": index.ratio, "information": u}
        longer = results.claims.get(Claim(point, arm, DENSE_LONGER))
        if longer is not None:
            lines[-1] += f" Over {DENSE_LONGER}: {_with_interval(longer)}, {WORDS[longer.verdict]}."
        if against.verdict == "lower" and (longer is None or longer.verdict != "higher"):
            lower.append(arm)
    lines.append(what_seeds_can_show(dense.seeds, SEEDS_CHANGE))
    learned = [arm for arm in lower if results.study.learns(arm)]
    if dense.verdict != "higher":
        verdict, tone = "No negative transfer that these seeds can show", "fair"
    elif learned:
        verdict, tone = f"Negative transfer, lowered without labels by {', '.join(learned)}", "good"
    elif lower:
        routers = ", and by no router that learns" if any(map(results.study.learns, results.arms(point))) else ""
        verdict, tone = f"Negative transfer, lowered by {', '.join(lower)}{routers}", "fair"
    else:
        verdict, tone = "Negative transfer, and no routing that these seeds show to lower it", "bad"
    return Headline(verdict, "\n".join(lines), tone, numbers, note=RULE)  # type: ignore[arg-type]


def _with_interval(c: Comparison) -> str:
    """``1.437 (1.402 to 1.473 over 3 seeds)``"""
    ends = f"{c.low:.3f} to {c.high:.3f} over {c.seeds} seeds" if len(c.logs) > 1 else f"{c.seeds} seed"
    return f"{c.ratio:.3f} ({ends})"


def _index(results: MapResults) -> Section | None:
    rows = []
    for point in results.points:
        for arm in results.arms(point):
            claim = results.claims.get(Claim(point, arm, SPECIALIST))
            c, over = claim or results.comparison(point, arm, SPECIALIST), results.comparison(point, arm, DENSE)
            if c is None:
                continue
            found = next(iter(results.of(point, arm).values()))
            rows.append([
                *point, arm, c.seeds, c.ratio, *c.ends, *(results.bootstrap(point, arm, SPECIALIST) or (None, None)),
                None if over is None else over.ratio, results.time(point, arm), results.information(point, arm),
                found["parameters"] / 1e6, found["active"] / 1e6, None if claim is None else WORDS[claim.verdict],
            ])  # fmt: skip
    header = [*AXES, "model", "seeds", "index", "t low", "t high", "low", "high", "over dense", "time", "U"]
    text = (
        "Error over that of specialists of the same width with as many samples of their regime (dense_longer has had "
        "more: no claim), geometric mean over regimes; t intervals over seeds, and bootstrap intervals over seeds and "
        "held-out samples. Over dense: error over that of the dense model of the same width. Time: seconds of training "
        "steps, without the data, over the dense model's, median."
    )
    table = Table([*header, "M parameters", "M active", "verdict"], rows)
    return filled(
        "transfer",
        "Transfer index",
        text,
        {"index": table},
        dense_map=heat_maps(results),
        index_by_model=index_by_arm(results),
    )


def _by_regime(results: MapResults) -> Section | None:
    rows = []
    for point in results.points:
        for arm in results.arms(point):
            for regime in results.regimes(point):
                c = results.comparison(point, arm, SPECIALIST, [regime])
                if c is None:
                    continue
                sides = [mean(map(root_mean, results.squares(point, a, regime).values())) for a in (arm, SPECIALIST)]
                rows.append([*point, arm, regime, c.seeds, *sides, c.ratio, *c.ends])
    header = [*AXES, "model", "regime", "seeds", "error", "specialist", "index", "t low", "t high"]
    text = "Errors over persistence's, means over seeds, and their ratio. Estimates with t intervals: no claims."
    return filled("regimes", "By regime", text, {"index_by_regime": Table(header, rows)})


def _effective(results: MapResults) -> Section | None:
    rows = []
    for point in results.points:
        for arm in results.arms(point):
            for regime in results.regimes(point):
                law, found = results.law(point.fields, regime), results.effective(point, arm, regime)
                if law is not None and found is not None:
                    rows.append([*point, arm, regime, *found, law.slope, law.spread])
    header = [*AXES, "model", "regime", "over specialist of N/K", "effective parameters / N", "slope", "residual"]
    text = (
        "By the law error = c N^-slope that is fitted to the specialists of all widths: how many parameters a "
        "specialist would need for this error, over those of the dense model. With two widths the law has no residual "
        "to judge it by; below the smallest, and above the largest, it is an extrapolation."
    )
    return filled("effective", "Effective parameters of a regime", text, {"effective_parameters": Table(header, rows)})


def _gradients(results: MapResults) -> Section | None:
    pairs, norms = [], []
    for point in results.points:
        seeds = [v["gradients"] for v in results.of(point, DENSE).values() if v.get("gradients")]
        if not seeds:
            continue
        for pair in seeds[0]["cosine"]:
            known = [s["corrected"][pair] for s in seeds if s["corrected"][pair] is not None]
            pairs.append([*point, pair, mean(s["cosine"][pair] for s in seeds), mean(known) if known else None])
        for regime in seeds[0]["norm"]:
            columns = [mean(s[key][regime] for s in seeds) for key in ("norm", "norm_floor", "within")]
            norms.append([*point, regime, *columns])
    text = (
        "Of the trained dense model, mean over seeds, of samples that no step has seen. Corrected: over what two "
        "halves of one regime's samples have in common, so that the noise of few samples is taken out; none where that "
        "is not positive. Norms are over their geometric mean; the floor is the ratio of two halves of one regime."
    )
    tables = {
        "gradient_cosines": Table([*AXES, "regimes", "cosine", "corrected"], pairs),
        "gradient_norms": Table([*AXES, "regime", "norm ratio", "norm floor", "cosine of halves"], norms),
    }
    return filled("gradients", "Gradients of the regimes", text, tables)


def _runs(results: MapResults) -> Section | None:
    rows = [
        [run.name, values["steps"], values["parameters"] / 1e6, values["active"] / 1e6, values["seconds"]]
        for run, values in results.values.items()
    ]
    runs = Table(["run", "steps", "M parameters", "M active", "seconds of steps"], rows)
    errors = [
        [run.name, run.arm, run.fields, len(run.regimes), run.dim, run.seed, regime, root_mean(squares)]
        for run, values in results.values.items()
        for regime, squares in values["errors"].items()
    ]
    tidy = Table(["run", "model", *AXES, "seed", "regime", "error"], errors)
    text = "What was trained, on samples that are fresh at every step, and the error of each regime."
    return filled("runs", "Runs", text, {"runs": runs, "results": tidy}, ("runs", "results"))
