"""The tables of a study's report, each from the finished cells alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from shodh.experiments.transfer.results import (
    READINGS,
    ROLLOUT,
    TEST,
    Result,
    Results,
    geometric_mean,
    over_persistence,
)
from shodh.experiments.transfer.verdict import SAID, paired, separation_and_error, transfer_by_regime
from shodh.report.comparison import holm
from shodh.report.page import Table

ROUTED = ("sparse_hash", "sparse_frozen", "sparse_oracle")


def spread(values: Iterable[float | None]) -> list[float | None]:
    """Mean, lowest and highest of what is known."""
    known = [v for v in values if v is not None]
    return [sum(known) / len(known), min(known), max(known)] if known else [None, None, None]


def models_of(results: Results) -> Iterator[tuple[str, str, list[Result]]]:
    """(mix, label, results over seeds) of every mixed model."""
    for mix in results.mixes:
        for label in results.labels(mix):
            yield mix, label, list(results.of(mix, label).values())


def error_table(results: Results) -> Table:
    """Error by mix, model and regime: on the test split, of rollouts, and on the validation split at equal cost."""
    header = ["mix", "model", "regime", "seeds", "error", "lowest", "highest", "rollout"]
    header += [f"at equal {r}" for r in READINGS]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        for regime in seeds[0].regimes:
            at = [spread(results.error(r, regime, reading, mix) for r in seeds)[0] for reading in READINGS]
            errors = spread(r.test_error(regime) for r in seeds)
            rows.append(
                [mix, label, regime, len(seeds), *errors, _mean_of_all(r.rollout_error(regime) for r in seeds), *at]
            )
    alone: dict[tuple[str, str], list[Result]] = {}
    for r in results.all:
        if r.cell["model"].startswith("specialist"):
            share = int(r.cell["share"])
            label = "specialist" if share == 1 else f"specialist, 1/{share} of the steps"
            alone.setdefault((r.regimes[0], label), []).append(r)
    for (regime, label), seeds in alone.items():
        errors = spread(r.test_error(regime) for r in seeds)
        rows.append(
            [
                f"{regime} alone",
                label,
                regime,
                len(seeds),
                *errors,
                _mean_of_all(r.rollout_error(regime) for r in seeds),
                None,
                None,
                None,
            ]
        )
    return Table(header, rows)


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    """Mean over seeds; None if one of them is not known, so that a diverged one is not passed over."""
    every = list(values)
    return None if None in every else spread(every)[0]


def transfer_table(results: Results) -> Table:
    """Transfer index by regime and reading, against specialists with all steps and with the steps a regime gets."""
    header = ["mix", "regimes", "model", "regime", "seeds", "index", "lowest", "highest", "same steps a regime"]
    header += [*(f"at equal {r}" for r in READINGS), "rollout", "95 % low", "95 % high", "p Holm", "verdict"]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        paired_over_seeds = transfer_by_regime(results, mix, label)
        count = len(seeds[0].regimes)
        for regime in seeds[0].regimes:
            test = [results.transfer(r, regime, TEST) for r in seeds]
            share = [results.transfer(r, regime, TEST, count) for r in seeds]
            at = [spread(results.transfer(r, regime, to) for r in seeds)[0] for to in (*READINGS, ROLLOUT)]
            known = sum(v is not None for v in test)
            c = paired_over_seeds.get(regime)
            tested = [None] * 4 if c is None else [c.low, c.high, c.p_holm, SAID[c.verdict]]
            rows.append([mix, count, label, regime, known, *spread(test), spread(share)[0], *at, *tested])
    return Table(header, rows)


def comparison_table(results: Results) -> Table:
    """Every mixed model against every other, paired over seeds; p for all pairs of a mix and reading at once."""
    header = ["mix", "model", "against", "reading", "seeds", "ratio", "95 % low", "95 % high", "p paired t", "p Holm"]
    header += ["p sign-flip", "lower in", "verdict"]
    rows: list[list[Any]] = []
    for mix in results.mixes:
        for reading in (TEST, "flops", "seconds", ROLLOUT):
            pairs = itertools.combinations(results.labels(mix), 2)
            found = {pair: c for pair in pairs if (c := paired(results, mix, *pair, reading)) is not None}
            for (label, other), c in zip(found, holm(list(found.values())), strict=True):
                numbers = [c.seeds, c.ratio, c.low, c.high, c.p_t, c.p_holm, c.p_sign, c.wins, SAID[c.verdict]]
                rows.append([mix, label, other, reading, *numbers])
    return Table(header, rows)


def router_table(results: Results) -> Table:
    """Sparse models: what was varied, how the regimes were separated, and the error."""
    header = ["mix", "model", "router", "balance", "experts", "groups", "seeds", "error", "lowest", "highest", "U"]
    header += ["NMI", "idle experts"]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        if seeds[0].values["evaluation"]["routing"] is None:
            continue
        variant = seeds[0].cell["variant"]
        router = variant.get("router") or (label.split("_")[1] if label in ROUTED else "of the base run")
        experts = seeds[0].values["evaluation"]["routing"]["num_experts"]
        errors = spread(results.mean_error(r) for r in seeds)
        routing = [spread(r.routing(key) for r in seeds)[0] for key in ("regime_information", "nmi")]
        dead = spread(r.dead_experts() for r in seeds)[0]
        varied = [router, variant.get("balance"), experts, variant.get("groups")]
        rows.append([mix, label, *varied, len(seeds), *errors, *routing, dead])
    return Table(header, rows)


def separation_table(results: Results) -> Table:
    """U and error of every sparse cell."""
    rows: list[list[Any]] = [
        [r.cell["mix"], r.label, r.seed, u, error] for r, u, error in separation_and_error(results)
    ]
    return Table(["mix", "model", "seed", "U", "error"], rows)


def rollout_curves(results: Results) -> dict[tuple[str, str, str, str], list[list[float | None]]]:
    """(mix, model, regime, field) -> VRMSE by autoregressive step, a list a seed.

    With the specialists of each mix's regimes, and persistence as a model of its own.
    """
    curves: dict[tuple[str, str, str, str], list[list[float | None]]] = {}

    def add(mix: str, label: str, r: Result) -> None:
        for regime, values in r.values["evaluation"]["regimes"].items():
            for field, kinds in values.get("rollout", {}).items():
                curves.setdefault((mix, label, regime, field), []).append(kinds["model"])
                curves[(mix, "persistence", regime, field)] = [kinds["persistence"]]

    for mix in results.mixes:
        for label in results.labels(mix):
            for r in results.of(mix, label).values():
                add(mix, label, r)
        regimes = dict.fromkeys(name for r in results.mixed if r.cell["mix"] == mix for name in r.regimes)
        for r in results.all:
            if r.cell["model"] == "specialist" and r.regimes[0] in regimes:
                add(mix, r.label, r)
    return curves


def rollout_table(results: Results) -> Table:
    """VRMSE of the first, the last, and all steps; seeds that diverged (not finite, or above 1 and growing)."""
    curves = rollout_curves(results)
    rows: list[list[Any]] = []
    for (mix, label, regime, field), seeds in curves.items():
        first, last = (spread(steps[i] for steps in seeds)[0] for i in (0, -1))
        (still,) = curves[(mix, "persistence", regime, field)]
        over = _mean_of_all(over_persistence(steps, still) for steps in seeds)
        rows.append([mix, label, regime, field, len(seeds), first, last, over, sum(diverged(s) for s in seeds)])
    header = [
        "mix",
        "model",
        "regime",
        "field",
        "seeds",
        "first step",
        "last step",
        "all steps / persistence",
        "diverged",
    ]
    return Table(header, rows)


def diverged(steps: list[float | None]) -> bool:
    """Whether a rollout left the data: an error that is not finite, or above 1 and still growing at the end."""
    if any(v is None for v in steps):
        return True
    known = [v for v in steps if v is not None]
    return known[-1] > 1 and known[-1] == max(known) and known[-1] > 2 * known[0]


def divergence_table(results: Results) -> Table:
    """Largest divergence over the velocity gradient, over seeds, by model, regime, field and mode."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for mix, label, seeds in models_of(results):
        for r in seeds:
            for regime, values in r.values["evaluation"]["regimes"].items():
                for mode, numbers in values.get("divergence", {}).items():
                    if isinstance(numbers, dict) and numbers["max_over_gradient"] is not None:
                        found.setdefault((mix, label, regime, mode), []).append(numbers["max_over_gradient"])
    return Table(
        ["mix", "model", "regime", "field and mode", "max / gradient"], [[*k, max(v)] for k, v in found.items()]
    )


def cosine_curves(results: Results, key: str = "cosines") -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """(mix, model, group of weights) -> {step: cosines of all seeds, and pairs of regimes or (within) regimes}."""
    curves: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for mix, label, seeds in models_of(results):
        for r in seeds:
            for point in r.values["history"]:
                for group, pairs in point[key].items():
                    known = [v for v in pairs.values() if v is not None]
                    curves.setdefault((mix, label, group), {}).setdefault(point["step"], []).extend(known)
    return curves


def cosine_table(results: Results) -> Table:
    """Mean cosine before training and after it, and after it between two halves of one regime's windows."""
    within = cosine_curves(results, "cosines_within")
    rows: list[list[Any]] = []
    for (mix, label, group), steps in cosine_curves(results).items():
        first, last = min(steps), max(steps)
        same = spread(within.get((mix, label, group), {}).get(last, []))[0]
        rows.append([mix, label, group, spread(steps[first])[0], *spread(steps[last]), same])
    return Table(["mix", "model", "weights", "untrained", "trained", "lowest", "highest", "same regime"], rows)


def plasticity_table(results: Results) -> Table:
    """How fast a trained model learns a fresh regime, beside an untrained one."""
    found: dict[tuple[str, str], list[Result]] = {}
    for r in results.all:
        if r.values["plasticity"] is not None:
            found.setdefault((r.cell["mix"], r.label), []).append(r)
    rows: list[list[Any]] = []
    for (mix, label), seeds in found.items():
        ratios = [r.values["plasticity"]["area_ratio"] for r in seeds]
        ends = [spread(r.values["plasticity"][kind][-1] for r in seeds)[0] for kind in ("trained", "fresh")]
        rows.append([mix, label, seeds[0].values["plasticity"]["regime"], len(seeds), *spread(ratios), *ends])
    header = ["learned before", "model", "fresh regime", "seeds", "area ratio", "lowest", "highest"]
    return Table([*header, "last error, trained", "last error, fresh"], rows)


def number_table(results: Results) -> Table:
    """Transfer by number of regimes: geometric mean of the index over the regimes of each mix."""
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        regimes = seeds[0].regimes
        means: list[float | None] = []
        for r in seeds:
            indices = [i for i in (results.transfer(r, regime, TEST) for regime in regimes) if i is not None]
            means.append(geometric_mean(indices) if len(indices) == len(regimes) else None)
        rows.append([mix, len(regimes), label, len(seeds), *spread(means)])
    return Table(["mix", "regimes", "model", "seeds", "index", "lowest", "highest"], rows)


def cell_table(results: Results, missing: dict[str, str]) -> Table:
    """Every cell: size, work, time; and those without a result, with the reason."""
    rows: list[list[Any]] = []
    for r in results.all:
        sizes = [r.values["total_parameters"] / 1e6, r.values["active_parameters"] / 1e6]
        work, seconds = r.cost("flops"), r.cost("seconds")
        rows.append([r.cell["name"], r.values["steps"], *sizes, work and work / 1e12, seconds, "finished"])
    rows += [[name, None, None, None, None, None, reason] for name, reason in missing.items()]
    return Table(["cell", "steps", "M parameters", "M active", "TFLOP", "seconds of steps", "state"], rows)
