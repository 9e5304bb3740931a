"""The tables of a composition study's report."""

from __future__ import annotations

from typing import Any

import scipy

from shodh.experiments.composition.results import BEST_ENDPOINT, Results, SeedResult, deviation
from shodh.experiments.composition.settings import Role
from shodh.experiments.harness.results import mean
from shodh.merge.coordinates import ParameterMap, mapped
from shodh.report.page import Table, format_cell

#: What a method looks at beside the weights of anchor and experts.
USES = {
    "persistence": "last frame",
    BEST_ENDPOINT: "hindsight",
    "task_arithmetic": "validation",
    "ties": "validation",
    "dare": "validation",
    "coord": "parameter",
    "coord_log": "parameter",
    "scale": "parameter, validation",
    "scale_wide": "parameter, validation",
    "prefix": "prefix",
    "prefix_each": "prefix, each trajectory",
    "prefix_wide": "prefix",
    "line_search": "prefix",
    "gradient": "prefix",
    "gradient_by_layer": "prefix",
    "gradient_by_expert": "prefix",
    "oracle": "hindsight",
    "wrong_sign": "control",
    "random_direction": "control",
    "ensemble": "parameter, validation",
    "prefix_finetune": "prefix, validation",
}


def with_spread(values: list[float | None]) -> str:
    """``0.12 +- 0.01`` over seeds."""
    if any(v is None for v in values):
        return "diverged"
    error = deviation(values)
    return format_cell(mean(values)) + ("" if error is None else f" ± {format_cell(error)}")


def summary_table(results: Results, published: float | None) -> Table:
    """A row a method: mean error by role, improvement over the anchor outside the support, and cost."""
    roles, far = results.roles, results.far_role
    header = [
        "method",
        "uses",
        *roles,
        f"{far}, % below anchor",
        "spread",
        "lower in",
        "p",
        "prefix passes",
        "networks",
    ]
    rows: list[list[Any]] = []
    for method in results.methods:
        gains = results.improvements(method, far)
        paired = None if method == "anchor" else results.paired(method, "anchor", far)
        wins = None if paired is None else f"{paired.wins} of {paired.seeds}"
        p = None if paired is None or len(paired.logs) < 2 else paired.p_differs
        cost = _cost(results, method)
        errors = [mean(results.role_errors(method, role)) for role in roles]
        rows.append([method, USES.get(method, "-"), *errors, mean(gains), deviation(gains), wins, p, *cost])
    if published is not None:
        rows.append(["published composition", "-", *[None] * len(roles), published, *[None] * 5])
    return Table(header, rows)


def _cost(results: Results, method: str) -> list[Any]:
    """Rollouts over the prefix, forward and backward, the mean over seeds and values; networks that are deployed."""
    rows = results.frame[results.frame["method"] == method]
    if rows.empty:
        return [None, None]
    forward, backward = rows["forward"].mean(), rows["backward"].mean()
    return [f"{forward:.0f}" + (f" + {backward:.0f} back" if backward else ""), int(rows["networks"].iloc[0])]


def value_table(results: Results) -> Table:
    """A row a method, a column a value: mean and spread over seeds."""
    header = ["method", *(f"{value:g} ({role[:5]}.)" for value, role in results.values)]
    rows = [
        [
            method,
            *(with_spread(results.errors(method, v)) if results.has(method, v) else None for v, _ in results.values),
        ]
        for method in results.methods
    ]
    return Table(header, rows)


def step_table(results: Results) -> Table:
    """Mean error by counted step, a row a method, role and step."""
    rows: list[list[Any]] = [
        [method, role, step, error]
        for method in results.methods
        for role in results.roles
        for step, error in enumerate(step_errors(results, method, role), 1)
    ]
    return Table(["method", "role", "counted step", "error"], rows)


def step_errors(results: Results, method: str, role: Role) -> list[float | None]:
    """Mean over seeds and values of a role, by counted step."""
    curves = [
        seed.at(value)["methods"][method]["by_step"]
        for seed in results.seeds
        for value in results.of_role(role)
        if method in seed.at(value)["methods"]
    ]
    return [mean(steps) for steps in zip(*curves, strict=True)]


def comparison_table(results: Results) -> Table:
    """Read-outs and merges against anchor, better endpoint and average, paired over seeds, by role: estimates."""
    rows: list[list[Any]] = []
    others = ("anchor", BEST_ENDPOINT, "average")
    for role in results.roles:
        for method in results.methods:
            for other in others:
                if method in (*others, "persistence") or other not in results.methods:
                    continue
                c = results.paired(method, other, role)
                if c is not None:
                    tests = [c.low, c.high, c.p_differs, c.p_sign] if len(c.logs) > 1 else [None] * 4
                    rows.append([role, method, other, c.ratio, *tests, f"{c.wins} of {c.seeds}"])
    header = ["role", "method", "against", "ratio", "from", "to", "p (t)", "p (signs)", "lower in"]
    return Table(header, rows)


def alpha_table(results: Results) -> Table:
    """Coordinates by value and read-out, mean and spread over seeds; and how far outside the experts' range it lies."""
    names = [m for m in results.methods if results.alphas(m) and m not in ("wrong_sign", "random_direction")]
    rows: list[list[Any]] = []
    for value, role in results.values:
        found = {m: [a for v, _, a in results.alphas(m) if v == value] for m in names}
        told = (with_spread(list(a)) if a else None for a in found.values())
        rows.append([f"{value:g}", role, results.outside(value), *told])
    return Table([results.parameter, "role", "outside, of the range", *names], rows)


def correlation_table(results: Results) -> Table:
    """How far the coordinate that each read-out found follows the parameter, over values and seeds."""
    rows: list[list[Any]] = []
    for method in ("oracle", "prefix", "line_search", "gradient"):
        for scale in maps_of(results):
            found = correlate(results, method, scale)
            if found is not None:
                rows.append([method, scale, len(results.alphas(method)), *found])
    return Table(["read-out", "map", "points", "Pearson", "Spearman"], rows)


def maps_of(results: Results) -> list[ParameterMap]:
    """Maps on which all values lie."""
    return ["linear", "log"] if all(value > 0 for value, _ in results.values) else ["linear"]


def correlate(results: Results, method: str, scale: ParameterMap) -> tuple[float, float] | None:
    """Pearson's and Spearman's correlation of a method's coordinates with the mapped parameter.

    None of fewer than three values, or where the coordinate is the same for all.
    """
    points = results.alphas(method)
    x = [mapped(value, scale) for value, _, _ in points]
    y = [alpha for *_, alpha in points]
    if len(set(x)) < 3 or len(set(y)) < 2:
        return None
    return float(scipy.stats.pearsonr(x, y).statistic), float(scipy.stats.spearmanr(x, y).statistic)


_KEYS = {
    "parameters": "parameters",
    "relative_direction": "|direction| / |anchor|",
    "cosine": "cosine of updates",
    "share_of_direction": "share of direction^2",
    "share_of_shared": "share of shared^2",
}


def update_table(results: Results, kind: str) -> Table:
    """Where the updates live, mean over seeds; ``kind``: ``components``, ``layers`` or ``experts``."""
    seeds = [_parts(seed, kind) for seed in results.seeds]
    rows = [[name, *(mean(parts[name][key] for parts in seeds) for key in _KEYS)] for name in seeds[0]]
    return Table([kind[:-1], *_KEYS.values()], rows)


def _parts(seed: SeedResult, kind: str) -> dict[str, dict[str, Any]]:
    updates = seed.diagnostics["updates"]
    if kind == "experts":
        return {f"{e['layer']} expert {e['expert']}": e for e in updates["experts"]}
    parts: dict[str, dict[str, Any]] = updates[kind]
    return parts


def routing_table(results: Results) -> Table:
    """Change of routing along the direction, mean over seeds: a row a layer and coordinate."""
    found = [seed.diagnostics["routing"] for seed in results.seeds if results.sparse]
    rows: list[list[Any]] = [
        [layer, alpha, *(mean(r[key][layer][number] for r in found) for key in ("divergence", "moved"))]
        for layer in range(len(found[0]["divergence"]) if found else 0)
        for number, alpha in enumerate(found[0]["alphas"])
    ]
    return Table(["sparse layer", "alpha", "usage divergence, bits", "assignments moved"], rows)


def chosen_table(results: Results) -> Table:
    """What validation chose, by seed."""
    rows: list[list[Any]] = []
    for seed in results.seeds:
        chosen = seed.values["chosen"]
        scalings = ", ".join(f"{name} {value:g}" for name, value in chosen["scalings"].items())
        line = chosen["line"]
        rows.append([seed.seed, line["scale"], line["gamma"], line["loss"], scalings or None, chosen["rate"]])
    return Table(["seed", "map", "gamma", "validation error", "scalings", "fine-tuning rate"], rows)


def bank_table(results: Results) -> Table:
    """Mean error over seeds at each coordinate of the bank, by value."""
    rows: list[list[Any]] = []
    for value, role in results.values:
        banks = [seed["bank"] for seed in results.at_value(value)]
        for number, alpha in enumerate(banks[0]["alphas"]):
            rows.append([value, role, alpha, *(mean(b[key][number] for b in banks) for key in ("observed", "later"))])
    return Table([results.parameter, "role", "alpha", "error on the prefix", "error after it"], rows)
