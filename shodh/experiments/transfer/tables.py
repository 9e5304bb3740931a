"""The tables of a study's report, each from the finished runs alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pandas as pd
import scipy

from shodh.experiments.harness.results import ERROR, SEED, mean, over_seeds, spread, to_table
from shodh.experiments.transfer.results import (
    LAST,
    READINGS,
    ROLLOUT,
    SHARES,
    SPECIALIST,
    TEST,
    Claim,
    Result,
    Results,
    over_persistence,
    rank_pairs,
)
from shodh.experiments.transfer.verdict import SAID
from shodh.report.page import Table

ROUTED = ("sparse_hash", "sparse_frozen", "sparse_oracle")
MODEL = ["mix", "label", "regime"]
NAMES = {"label": "model"} | {str(r): f"at equal {r}" for r in READINGS}


def models_of(results: Results) -> Iterator[tuple[str, str, list[Result]]]:
    """(mix, label, results over seeds) of every mixed model."""
    for mix in results.mixes:
        for label in results.labels(mix):
            yield mix, label, results.of(mix, label)


def _by_reading(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Mean over seeds by model and regime, a column a reading."""
    means = over_seeds(frame, [*MODEL, "reading"])["mean"].unstack("reading")
    return means.reindex(columns=columns)


def _over_reading(frame: pd.DataFrame, reading: str, error: str) -> pd.DataFrame:
    """`over_seeds` of a reading by model and regime, its mean as ``error``."""
    return over_seeds(frame[frame["reading"] == reading], MODEL).rename(columns={"mean": error})


def error_table(results: Results) -> Table:
    """Error by mix, model and regime: on the test split, of rollouts, and on the validation split at equal cost."""
    if results.frame.empty:
        return Table([], [])
    readings = [LAST] * bool((results.frame["reading"] == LAST).any()) + [ROLLOUT, *READINGS]
    found = _over_reading(results.frame, TEST, "error").join(_by_reading(results.frame, readings))
    return to_table(found.reset_index(), {**NAMES, LAST: "last weights"})


def transfer_table(results: Results) -> Table:
    """Transfer index by regime and reading, against specialists with all steps and with a share of steps or samples."""
    frame, main = results.transfers, index_reading(results.transfers)
    if frame.empty:
        return Table([], [])
    others = [share for share in SHARES if share != main and (frame["reading"] == share).any()]
    found = _over_reading(frame, main, "index").join(_by_reading(frame, [*others, *READINGS, ROLLOUT])).reset_index()
    alone = {mix: SPECIALIST if main == TEST else results.equal_samples(mix) for mix in results.mixes}
    pairs = [results.paired(Claim(m, model, alone[m], TEST, r)) for m, model, r in found[MODEL].values]
    ends = {"95 % low": [c and c.low for c in pairs], "95 % high": [c and c.high for c in pairs]}
    found.insert(1, "regimes", [len(results.regimes(mix)) for mix in found["mix"]])
    return to_table(found.assign(**ends), {**NAMES, "share": "same steps a regime", "batch": "same samples"})


def index_reading(transfers: pd.DataFrame) -> str:
    """Which column of the transfers is the index: against specialists with all samples, where there are some."""
    return SHARES[-1] if transfers.empty or not (transfers["reading"] == TEST).any() else TEST


def number_table(results: Results) -> Table:
    """Transfer by number of regimes: geometric mean of the index over the regimes of each mix."""
    frame = results.transfers
    if frame.empty:
        return Table([], [])
    frame = frame[frame["reading"] == index_reading(frame)]
    by_run = frame.groupby(["mix", "label", SEED], sort=False)[ERROR]
    whole = by_run.agg(lambda e: float(scipy.stats.gmean(e))).reset_index()
    found = over_seeds(whole, ["mix", "label"]).reset_index()
    found.insert(1, "regimes", [len(results.regimes(mix)) for mix in found["mix"]])
    return to_table(found, {"label": "model", "mean": "index"})


def comparison_table(results: Results) -> Table:
    """Every mixed model against every other, paired over seeds: estimates, and the verdict of those that are claims."""
    header = ["mix", "model", "against", "reading", "seeds", "ratio", "95 % low", "95 % high", "p paired t"]
    header += ["p sign-flip", "lower in", "p Holm", "verdict"]
    rows: list[list[Any]] = []
    for mix in results.mixes:
        for reading in (TEST, "flops", "seconds", ROLLOUT):
            for pair in itertools.combinations(results.labels(mix), 2):
                claim = Claim(mix, *pair, reading)
                c, claimed = results.paired(claim), results.claims.get(claim)
                if c is not None:
                    said = [None, None] if claimed is None else [claimed.p_holm, SAID[claimed.verdict]]
                    rows.append([*claim[:4], c.seeds, c.ratio, c.low, c.high, c.p_differs, c.p_sign, c.wins, *said])
    return Table(header, rows)


def router_table(results: Results) -> Table:
    """Sparse models: what was varied, how the regimes were separated, and the error."""
    header = ["mix", "model", "router", "balance", "experts", "groups", "seeds", "error", "lowest", "highest", "U"]
    header += ["NMI", "idle experts"]
    rows: list[list[Any]] = []
    for mix, label, seeds in models_of(results):
        routing = seeds[0].values["evaluation"]["routing"]
        if routing is None:
            continue
        variant = seeds[0].run["variant"]
        router = variant.get("router") or (label.split("_")[1] if label in ROUTED else "of the base run")
        varied = [router, variant.get("balance"), routing["num_experts"], variant.get("groups")]
        separation = [mean(r.routing(key) for r in seeds) for key in ("regime_information", "nmi")]
        errors = spread(results.errors(mix, label))
        rows.append([mix, label, *varied, len(seeds), *errors, *separation, mean(r.dead_experts() for r in seeds)])
    return Table(header, rows)


def separation_table(results: Results) -> Table:
    """U and error of every sparse run."""
    rows: list[list[Any]] = [
        [r.run["mix"], r.label, r.seed, u, error] for r, u, error in rank_pairs(results.mixed, results)
    ]
    return Table(["mix", "model", "seed", "U", "error"], rows)


def rollout_curves(results: Results) -> dict[tuple[str, str, str, str], list[list[float | None]]]:
    """(mix, model, regime, field) -> VRMSE by autoregressive step, a list a seed.

    With the specialists of each mix's regimes, and persistence as a model of its own.
    """
    curves: dict[tuple[str, str, str, str], list[list[float | None]]] = {}
    for mix in results.mixes:
        for r in [*(r for r in results.mixed if r.run["mix"] == mix), *results.whole_specialists(mix)]:
            for regime, values in r.values["evaluation"]["regimes"].items():
                for field, kinds in values.get("rollout", {}).items():
                    curves.setdefault((mix, r.label, regime, field), []).append(kinds["model"])
                    curves[(mix, "persistence", regime, field)] = [kinds["persistence"]]
    return curves


def rollout_table(results: Results) -> Table:
    """VRMSE of the first, the last, and all steps; seeds whose rollout left the data (`left_the_data`)."""
    curves = rollout_curves(results)
    rows: list[list[Any]] = []
    for (mix, label, regime, field), seeds in curves.items():
        first, last = (mean(steps[i] for steps in seeds) for i in (0, -1))
        (still,) = curves[(mix, "persistence", regime, field)]
        over = mean(over_persistence(steps, still) for steps in seeds)
        rows.append([mix, label, regime, field, len(seeds), first, last, over, sum(map(left_the_data, seeds))])
    header = ["mix", "model", "regime", "field", "seeds", "first step", "last step", "all steps / persistence"]
    return Table([*header, "left the data"], rows)


def left_the_data(steps: list[float | None]) -> bool:
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
    header = ["mix", "model", "regime", "field and mode", "max / gradient"]
    return Table(header, [[*key, max(values)] for key, values in found.items()])


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
        same = mean(within.get((mix, label, group), {}).get(last, []))
        rows.append([mix, label, group, mean(steps[first]), *spread(steps[last]), same])
    return Table(["mix", "model", "weights", "untrained", "trained", "lowest", "highest", "same regime"], rows)


def plasticity_table(results: Results) -> Table:
    """How fast a trained model learns a fresh regime, beside an untrained one."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results.all:
        if r.values["plasticity"] is not None:
            found.setdefault((r.run["mix"], r.label), []).append(r.values["plasticity"])
    rows: list[list[Any]] = []
    for key, seeds in found.items():
        ends = [mean(p[kind][-1] for p in seeds) for kind in ("trained", "fresh")]
        rows.append([*key, seeds[0]["regime"], len(seeds), *spread(p["area_ratio"] for p in seeds), *ends])
    header = ["learned before", "model", "fresh regime", "seeds", "area ratio", "lowest", "highest"]
    return Table([*header, "last error, trained", "last error, fresh"], rows)


def run_table(results: Results, missing: dict[str, str]) -> Table:
    """Every run: size, work, time; and those without a result, with the reason."""
    rows: list[list[Any]] = []
    for r in results.all:
        sizes = [r.values["total_parameters"] / 1e6, r.values["active_parameters"] / 1e6]
        work, seconds = r.cost("flops"), r.cost("seconds")
        rows.append([r.run["name"], r.values["steps"], *sizes, work and work / 1e12, seconds, "finished"])
    rows += [[name, None, None, None, None, None, reason] for name, reason in missing.items()]
    return Table(["run", "steps", "M parameters", "M active", "TFLOP", "seconds of steps", "state"], rows)
