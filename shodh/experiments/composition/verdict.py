"""The questions of a composition study, answered by rules from its numbers; and the reasons that diagnostics give."""

from __future__ import annotations

import math
from collections.abc import Callable

from shodh.experiments.composition.results import OUT, RIVALS, Claim, Results
from shodh.experiments.composition.settings import Role
from shodh.experiments.composition.tables import correlate
from shodh.experiments.harness.report import Answer, over_trajectories
from shodh.experiments.harness.results import mean
from shodh.merge.readout import BANK
from shodh.report.page import Tone
from shodh.report.statistics import MARGIN, MIN_SEEDS, describe

#: Read-outs of composition with one coordinate a value, from the cheapest to the dearest.
READOUTS = (
    *("coord", "coord_log", "scale", "scale_wide"),
    *("prefix", "prefix_each", "prefix_wide", "line_search", "gradient"),
)
FINER = ("gradient_by_layer", "gradient_by_expert")
# Below this rank correlation the best coordinate is not said to follow the parameter.
FOLLOWS = 0.7
# Above this cosine both experts are said to have moved alike.
ALIKE = 0.9


def does_composition_help(results: Results, published: float | None) -> Answer:
    """Composition against the anchor outside the support, and by how much, beside the published figure."""
    method, role = results.asked, results.far_role
    claim = Claim(role, method or "", "anchor")
    paired = results.claims.get(claim)
    if method is None or paired is None:
        return Answer("Not asked", "No read-out of composition has a finite error in any seed.", "neutral")
    verdicts: dict[str, tuple[str, Tone]] = {
        "lower": ("Composition beats the anchor out of distribution", "good"),
        "higher": ("Composition is worse than the anchor out of distribution", "bad"),
        "equal": ("Composition makes no difference out of distribution", "fair"),
        "open": ("Undecided: no difference that these seeds can show", "fair"),
    }
    verdict, tone = verdicts[paired.verdict]
    if len(paired.logs) < MIN_SEEDS:
        side = "below" if paired.ratio < 1 else "above"
        verdict = f"Composition lies {side} the anchor out of distribution, in too few seeds to tell"
    text = [f"{describe(method, paired, 'the anchor')}."]
    text += over_trajectories(results.bootstrap(claim))
    gains = {m: mean(results.improvements(m, role)) for m in READOUTS if m in results.methods}
    told = [f"{m} {_percent(gain)}" for m, gain in gains.items() if gain is not None]
    text.append(f"Improvement over the anchor, mean over seeds: {', '.join(told)}.")
    if published is not None:
        text.append(f"Published on this kind of family: {_percent(published)}.")
    return Answer(verdict, " ".join(text), tone)


def _percent(value: float) -> str:
    return f"{value:.1f} %"


def does_it_beat_the_rivals(results: Results) -> str:
    """Against each of `RIVALS` but the anchor, a sentence each."""
    words = {"lower": "better", "higher": "worse", "equal": "no better and no worse", "open": "undecided"}
    return " ".join(
        f"{describe(claim.method, c, RIVALS[claim.other])}: {words[c.verdict]}."
        for claim, c in results.claims.items()
        if claim.other != "anchor"
    )


def which_readout_is_enough(results: Results) -> str:
    """The cheapest read-out within `MARGIN` of the best, in mean error outside the support."""
    role = results.far_role
    errors = {m: mean(results.role_errors(m, role)) for m in (*READOUTS, *FINER) if m in results.methods}
    known = {m: e for m, e in errors.items() if e is not None}
    if not known:
        return "No read-out has a finite error."
    best = min(known, key=lambda m: known[m])
    enough = next(m for m, e in known.items() if e <= (1 + MARGIN) * known[best])
    said = f"{best} has the lowest mean error of all read-outs ({known[best]:.3g})"
    cheaper = ", ".join(f"{m} {e:.3g}" for m, e in list(known.items())[: list(known).index(enough)])
    if cheaper:
        said = f"{said}; {cheaper} are cheaper, and not within {MARGIN:.0%} of it"
    return f"{enough} is enough: the cheapest read-out within {MARGIN:.0%} of the best. {said}."


# Reasons: each looks at one thing, and says what it means; None where it cannot be told.


def anchor_leaves_room(results: Results) -> str | None:
    """An anchor that extrapolates as well as it interpolates leaves nothing to gain."""
    inner = mean(e for role in ("support", "interpolation") for e in _role(results, "anchor", role))
    outer = mean(_role(results, "anchor", OUT))
    if inner is None or outer is None or inner == 0:
        return None
    ratio = outer / inner
    said = f"The anchor's error outside the support is {ratio:.2f} times that inside ({outer:.3g}, {inner:.3g})"
    return f"{said}: it extrapolates well itself, which leaves little to gain." if ratio < 1.1 else f"{said}."


def anchor_predicts(results: Results) -> str | None:
    """An anchor no better than persistence."""
    role = results.far_role
    ours, still = (mean(_role(results, m, role)) for m in ("anchor", "persistence"))
    if ours is None or still is None or still == 0:
        return None
    if ours >= still:
        return f"Outside the support the anchor is no better than persistence ({ours:.3g}, {still:.3g})."
    return f"Outside the support the anchor has {ours / still:.2f} times the error of persistence."


def experts_learned(results: Results) -> str | None:
    """What fine-tuning gains at the experts' own values, beside what composition gains outside.

    Experts that gain nothing there carry no information of the ends.
    """
    gains = {}
    for name, value in zip(("low", "high"), results.ends, strict=True):
        if name not in results.methods or value not in [v for v, _ in results.values]:
            return None
        ours, anchors = mean(results.errors(name, value)), mean(results.errors("anchor", value))
        if ours is None or not anchors:
            return None
        gains[name] = 100 * (1 - ours / anchors)
    told = " and ".join(f"{_percent(gain)} ({name})" for name, gain in gains.items())
    said = f"At the experts' own values fine-tuning improves on the anchor by {told}"
    method = results.asked
    outside = None if method is None else mean(results.improvements(method, results.far_role))
    if outside is not None:
        said = f"{said}; outside the support {method} improves on it by {_percent(outside)}"
    weak = [name for name, gain in gains.items() if gain < 100 * MARGIN]
    if weak:
        said = f"{said}; the {' and the '.join(weak)} expert learned nothing, so the line has no such end"
    return f"{said}."


def line_leads_there(results: Results) -> str | None:
    """Whether any point of the line is better than the anchor outside, and whether the read-out finds it."""
    method, role = results.asked, results.far_role
    oracle = None if "oracle" not in results.methods else results.paired("oracle", "anchor", role)
    if method is None or oracle is None:
        return None
    if oracle.ratio > 1 - MARGIN:
        return (
            f"Even the best coordinate in hindsight has {oracle.ratio:.2f} times the anchor's error there: the line "
            "between the experts does not lead to these values."
        )
    missed = results.paired(method, "oracle", role)
    said = f"The best coordinate in hindsight has {oracle.ratio:.2f} times the anchor's error there"
    if missed is not None and missed.ratio > 1.05:
        return f"{said}; {method} has {missed.ratio:.2f} times the error of that: the read-out loses the rest."
    return f"{said}, and {method} finds it."


def best_alpha_follows(results: Results) -> str | None:
    """Whether the best coordinate follows the parameter."""
    found = correlate(results, "oracle", results.map)
    if found is None:
        return None
    pearson, rank = found
    said = f"Best coordinate against the parameter ({results.map}): Pearson {pearson:.2f}, Spearman {rank:.2f}"
    return f"{said}." if rank >= FOLLOWS else f"{said}: the direction is not that of the parameter."


def best_alpha_is_inside(results: Results) -> str | None:
    """Coordinates at the end of the bank would want to go farther."""
    edge = max(BANK)
    outside = [a for v, _, a in results.alphas("oracle") if v in results.of_role(OUT)]
    ends = sum(abs(a) >= edge for a in outside)
    if not outside or not ends:
        return None
    said = f"Outside the support the best coordinate is at the bank's end, {edge:g}, in {ends} of {len(outside)} cases"
    wide = results.paired("prefix_wide", "prefix", OUT) if {"prefix", "prefix_wide"} <= set(results.methods) else None
    return f"{said}." if wide is None else f"{said}; a bank twice as wide has {wide.ratio:.2f} times prefix's error."


def direction_matters(results: Results) -> str | None:
    """How much of the gain the plain average has, which has no direction; and what the wrong sign costs."""
    method, role = results.asked, results.far_role
    if method is None:
        return None
    gains = {m: mean(results.improvements(m, role)) for m in (method, "average") if m in results.methods}
    parts = []
    if gains.get("average") is not None:
        parts.append(
            f"the plain average, which uses no direction, improves on the anchor by {_percent(gains['average'] or 0)}"
        )
    for control, words in (("wrong_sign", "the wrong sign"), ("random_direction", "a random direction")):
        paired = results.paired(control, "scale", role) if {control, "scale"} <= set(results.methods) else None
        if paired is not None:
            parts.append(f"{words} has {paired.ratio:.2f} times the error of scale")
    return f"{'; '.join(parts)}.".capitalize() if parts else None


def updates_differ(results: Results) -> str | None:
    """Experts that moved alike have a short direction between them."""
    total = [seed.diagnostics["updates"]["total"] for seed in results.seeds]
    cosine = mean(t["cosine"] for t in total)
    if cosine is None:
        return None
    direction, shared = (sum(t[k] for t in total) / len(total) for k in ("direction_norm", "shared_norm"))
    ratio = direction / shared if shared else math.inf
    said = (
        f"The cosine of the experts' updates is {cosine:.2f}, the direction's norm {ratio:.2f} times that of their mean"
    )
    return f"{said}: both moved alike, whatever their parameter." if cosine > ALIKE else f"{said}."


REASONS: tuple[Callable[[Results], str | None], ...] = (
    anchor_predicts,
    anchor_leaves_room,
    experts_learned,
    line_leads_there,
    best_alpha_follows,
    best_alpha_is_inside,
    direction_matters,
    updates_differ,
)


def reasons(results: Results) -> list[str]:
    """What the diagnostics say, a sentence each."""
    return [said for said in (reason(results) for reason in REASONS) if said is not None]


def _role(results: Results, method: str, role: Role) -> list[float | None]:
    return results.role_errors(method, role) if role in results.roles and method in results.methods else []
