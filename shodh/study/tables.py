"""The tables of a study's report, each from the finished cells alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from shodh.analysis.page import Table
from shodh.study.results import READINGS, TEST, Result, Results, geometric_mean
from shodh.study.verdict import paired, separation_and_error

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
    """Error by mix, model and regime: on the test split, and on the validation split at equal cost."""
    header = ["mix", "model", "regime", "seeds", "error", "lowest", "highest", *(f"at equal {r}" for r in READINGS)]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        for regime in seeds[0].regimes:
            at = [spread(results.error(r, regime, reading, mix) for r in seeds)[0] for reading in READINGS]
            rows.append([mix, label, regime, len(seeds), *spread(r.test_error(regime) for r in seeds), *at])
    alone: dict[tuple[str, str], list[Result]] = {}
    for r in results.all:
        if r.cell["model"].startswith("specialist"):
            share = int(r.cell["share"])
            label = "specialist" if share == 1 else f"specialist, 1/{share} of the steps"
            alone.setdefault((r.regimes[0], label), []).append(r)
    for (regime, label), seeds in alone.items():
        errors = spread(r.test_error(regime) for r in seeds)
        rows.append([f"{regime} alone", label, regime, len(seeds), *errors, None, None, None])
    return Table(header, rows)


def transfer_table(results: Results) -> Table:
    """Transfer index by regime and reading, against specialists with all steps and with the steps a regime gets."""
    header = ["mix", "regimes", "model", "regime", "seeds", "index", "lowest", "highest", "same steps a regime"]
    header += [f"at equal {r}" for r in READINGS]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        count = len(seeds[0].regimes)
        for regime in seeds[0].regimes:
            test = [results.transfer(r, regime, TEST) for r in seeds]
            share = [results.transfer(r, regime, TEST, count) for r in seeds]
            at = [spread(results.transfer(r, regime, reading) for r in seeds)[0] for reading in READINGS]
            known = sum(v is not None for v in test)
            rows.append([mix, count, label, regime, known, *spread(test), spread(share)[0], *at])
    return Table(header, rows)


def comparison_table(results: Results) -> Table:
    """Every sparse model against every dense one and every control, paired over seeds."""
    header = ["mix", "model", "against", "reading", "seeds", "ratio", "95 % low", "95 % high", "p paired t"]
    header += ["p sign-flip", "lower in", "verdict"]
    rows: list[list[Any]] = []
    for mix in results.mixes:
        labels = results.labels(mix)
        pairs = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
        for label, other in pairs:
            for reading in (TEST, "flops", "seconds"):
                c = paired(results, mix, label, other, reading)
                if c is not None:
                    numbers = [c.seeds, c.ratio, c.low, c.high, c.p_t, c.p_sign, c.wins, c.verdict]
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
    """(mix, model, regime, field) -> VRMSE by autoregressive step, a list a seed; persistence as a model of its own."""
    curves: dict[tuple[str, str, str, str], list[list[float | None]]] = {}
    for mix, label, seeds in models_of(results):
        for r in seeds:
            for regime, values in r.values["evaluation"]["regimes"].items():
                for field, kinds in values.get("rollout", {}).items():
                    curves.setdefault((mix, label, regime, field), []).append(kinds["model"])
                    curves[(mix, "persistence", regime, field)] = [kinds["persistence"]]
    return curves


def rollout_table(results: Results) -> Table:
    """VRMSE of the first and the last step, and the seeds that diverged (not finite, or above 1 and growing)."""
    rows: list[list[Any]] = []
    for (mix, label, regime, field), seeds in rollout_curves(results).items():
        first, last = (spread(steps[i] for steps in seeds)[0] for i in (0, -1))
        rows.append([mix, label, regime, field, len(seeds), first, last, sum(diverged(s) for s in seeds)])
    header = ["mix", "model", "regime", "field", "seeds", "first step", "last step", "diverged"]
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


def cosine_curves(results: Results) -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """(mix, model, group of weights) -> {step: cosines of all pairs of regimes and all seeds}."""
    curves: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for mix, label, seeds in models_of(results):
        for r in seeds:
            for point in r.values["history"]:
                for group, pairs in point["cosines"].items():
                    known = [v for v in pairs.values() if v is not None]
                    curves.setdefault((mix, label, group), {}).setdefault(point["step"], []).extend(known)
    return curves


def cosine_table(results: Results) -> Table:
    """Mean cosine before training, and after it."""
    rows: list[list[Any]] = []
    for (mix, label, group), steps in cosine_curves(results).items():
        first, last = min(steps), max(steps)
        rows.append([mix, label, group, spread(steps[first])[0], *spread(steps[last])])
    return Table(["mix", "model", "weights", "untrained", "trained", "lowest", "highest"], rows)


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
