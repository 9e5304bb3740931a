"""The sections on load, specialisation and fingerprint, and the headline of the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from shodh.report.page import Headline, Section, Table
from shodh.routing import plots
from shodh.routing.fingerprint import read_regimes
from shodh.routing.resampling import Interval, share_intervals
from shodh.routing.samples import Look
from shodh.routing.statistics import bifurcation_step, load, purity, shares
from shodh.routing.verdict import SPECIALISED_U, THRESHOLDS, LayerFigures, classify, decide
from shodh.routing.view import MIN_TRAJECTORIES, View

FOLDS = 5
WIDEST = 6  # experts whose shares and intervals fit side by side on the page
Fingerprint = dict[str, dict[str, Any]]
SAMPLES_CAUTION = (
    f"Samples of one trajectory resemble each other too, and some regime has fewer than {MIN_TRAJECTORIES} "
    "trajectories to draw instead: take the intervals for too narrow."
)


def headline(view: View) -> Headline:
    """The verdict, its numbers and the ten-second picture."""
    figures = {layer: _layer_figures(view, layer) for layer in view.layers}
    first = decide(figures, view.source, _bifurcation(view) if view.labelled else {})
    tables = {layer: shares(view.units(layer).table) for layer in view.layers}
    curves = {layer: view.u_over_time(layer) for layer in view.layers} if view.labelled else {}
    first.figures = {"routing": plots.first_look(tables, view.regimes, curves)}
    return first


def _layer_figures(view: View, layer: int) -> LayerFigures:
    counts = view.units(layer).table.sum(0)
    figures, estimate = load(counts), view.estimate(layer)
    return LayerFigures(
        u=None if estimate is None or np.isnan(estimate.u.value) else estimate.u.value,
        entropy=float(figures.entropy),
        effective=float(figures.effective),
        experts=len(counts),
        dead=int(figures.dead),
        max_share=float(shares(counts).max()),
    )


def _bifurcation(view: View) -> dict[int, int | None]:
    return {layer: bifurcation_step(*view.u_over_time(layer), SPECIALISED_U) for layer in view.layers}


def load_section(view: View) -> Section:
    """How evenly experts are used: at the end of the run, and over time."""
    header = ["layer", "experts", "MaxVio", "CV", "Gini", "entropy / max", "effective experts", "dead"]
    rows, summary, totals = [], {}, {}
    for layer in view.layers:
        counts = view.units(layer).table.sum(0)
        figures, found = load(counts), _layer_figures(view, layer)
        verdict = classify(found.u, found.entropy, found.experts)
        rows.append([layer, len(counts), *(float(v) for v in figures[:5]), found.dead])
        summary[str(layer)] = {"share": shares(counts), **figures._asdict(), "verdict": verdict}
        totals[layer] = shares(counts)
    over_time = _load_over_time(view)
    groups = {
        label: {layer: (t["step"], t[key]) for layer, t in over_time.items()}
        for label, key in (("MaxVio", "max_violation"), ("effective experts", "effective"))
    }
    figures_ = {"load_by_expert": plots.load_bars(totals)}
    if max(len(t["step"]) for t in over_time.values()) > 1:
        figures_["load_over_time"] = plots.curve_grid(groups)
    keys = ["step", *(k for k in next(iter(over_time.values())) if k != "step")]
    lines = [[layer, *row] for layer, t in over_time.items() for row in zip(*(t[k] for k in keys), strict=True)]
    return Section(
        "load",
        "Load of the experts",
        "How evenly all tokens are spread over the experts. MaxVio is the largest load over the mean, less one (0 is "
        "even); effective experts is the number of evenly used ones with the same entropy; dead ones get less than a "
        f"hundredth of the even share. The table is from {view.source}, curves are of the {view.course} split.",
        {"source": view.source, "layers": summary},
        {"load": Table(header, rows), "load_by_step": Table(["layer", *keys], lines)},
        figures_,
    )


def _load_over_time(view: View) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for layer in view.layers:
        series = view.series(layer)
        found[layer] = {"step": series.steps, **load(series.counts.sum(1))._asdict()}
    return found


def specialisation_section(view: View) -> Section:
    """Which expert takes which regime, and how much the one tells about the other."""
    if not view.labelled:
        why = "names no regimes" if not view.trace.labelled else f"has one regime, {view.regimes[0]}"
        return Section(
            "specialisation",
            "Regimes and experts",
            f"Not available: the trace {why}, so that U and NMI mean nothing here.",
            {"available": False},
        )
    steps = _bifurcation(view)
    rows, share_rows, shown, summary = [], [], [], {}
    for layer in view.layers:
        units, estimate = view.units(layer), view.estimate(layer)
        assert estimate is not None
        pure, chance = float(purity(units.table)), float(shares(units.table.sum(1)).max())
        u, nmi = estimate.u, estimate.nmi
        rows.append([layer, u.value, _range(u), nmi.value, _range(nmi), pure, chance, steps[layer]])
        table = shares(units.table)
        low, high = share_intervals(units, view.rng("shares", layer))
        for r, regime in enumerate(view.regimes):
            share_rows += [[layer, regime, e, table[r, e], low[r, e], high[r, e]] for e in range(table.shape[1])]
            cells = [f"{table[r, e]:.2f} ({low[r, e]:.2f}-{high[r, e]:.2f})" for e in range(table.shape[1])]
            shown.append([layer, regime, *cells])
        summary[str(layer)] = {
            "u": u._asdict(),
            "nmi": nmi._asdict(),
            "correction": estimate.method,
            "purity": pure,
            "purity_by_chance": chance,
            "bifurcation_step": steps[layer],
            "shares": dict(zip(view.regimes, table, strict=True)),
        }
    curves = {layer: view.u_over_time(layer) for layer in view.layers}
    lines = [[layer, *row] for layer, (when, u_) in curves.items() for row in zip(when, u_, strict=True)]
    files = {
        "expert_shares": Table(["layer", "regime", "expert", "share", "low", "high"], share_rows),
        "u_by_step": Table(["layer", "step", "u"], lines),
    }
    widest = max(len(row) for row in shown) - 2
    names = ["layer", "regime", *(f"expert {e}" for e in range(widest))]
    wide = {"expert_shares_by_regime": Table(names, [row + [None] * (len(names) - len(row)) for row in shown])}
    if widest > WIDEST:
        wide = {}
    header = ["layer", "U", "U, 95 %", "NMI", "NMI, 95 %", "purity", "purity by chance", "bifurcation step"]
    kind = view.units(view.layers[0]).kind
    method = summary[str(view.layers[0])]["correction"]
    caution = "" if kind != "samples" else f" {SAMPLES_CAUTION}"
    width = view.trace.tables.width
    return Section(
        "specialisation",
        "Regimes and experts",
        "U = I(regime; expert) / H(regime) is 1 when the expert names the regime; NMI = I / sqrt(H(expert) H(regime)). "
        "With more experts than regimes a perfect split has U = 1 but NMI below 1 (two experts a regime: 0.707). "
        f"Both are corrected for the bias of few samples ({method}); intervals draw {kind} anew, not tokens, which are "
        f"not independent.{caution} The bifurcation step is the first from which U stays above {SPECIALISED_U} to the "
        f"end of the {view.course} split (to {width} step{'s' if width > 1 else ''}).",
        {"source": view.source, "resampled": kind, "thresholds": THRESHOLDS, "layers": summary},
        {"specialisation": Table(header, rows), **wide, **files},
        files_only=tuple(files),
    )


def _range(interval: Interval) -> str | None:
    return None if np.isnan(interval.low) else f"{interval.low:.2f} to {interval.high:.2f}"


def fingerprint_section(view: View) -> Section:
    """How well the regime of a held-out sample is read off its routing."""
    title = "Fingerprint: the regime read off the routing"
    try:
        found = fingerprint(view.look, view.regimes)
    except ValueError as error:
        return Section("fingerprint", title, f"Not available: {error}.", {"available": False})
    rows = [[name, f["accuracy"], f["chance"], f["samples"]] for name, f in found.items()]
    tables = {"trace_fingerprint": Table(["classifier", "accuracy", "chance", "samples"], rows)}
    matrices = {name: shares(f["confusion"]) for name, f in found.items() if "by layer" not in name}
    for name, f in found.items():
        if "by layer" not in name:
            stem = "trace_confusion_" + name.replace(" ", "_")
            lines = [[regime, *row] for regime, row in zip(f["regimes"], f["confusion"].tolist(), strict=True)]
            tables[stem] = Table(["true \\ read", *f["regimes"]], lines)
    regimes = next(iter(found.values()))["regimes"]
    return Section(
        "fingerprint",
        title,
        "Each sample is described by the share of its tokens at every expert of every layer, and its regime is read by "
        "the nearest mean distribution (as MoE-POT does) and by logistic regression. Classifiers are fitted on other "
        "trajectories than they are tested on, fold by fold; chance is to name the most frequent regime.",
        dict(found),
        tables,
        {"trace_confusion": plots.matrices(matrices, regimes, "read as", "true")},
        files_only=tuple(stem for stem in tables if stem.startswith("trace_confusion")),
    )


def fingerprint(look: Look, regimes: list[str]) -> Fingerprint:
    """Accuracy, chance and confusion ``[true, read]`` by classifier, cross-validated over trajectories.

    Raises
    ------
    ValueError
        There are no samples, fewer than two regimes, or a regime has a single trajectory.
    """
    if not look:
        raise ValueError("the trace has no sample records (routing_samples=0, or a trace of version 1)")
    samples = list(look.values())
    present = [r for r in regimes if any(s.regime == r for s in samples)]
    if len(present) < 2:
        raise ValueError("all samples are of one regime")
    groups = [(s.regime, s.trajectory if s.trajectory >= 0 else -1 - i) for i, s in enumerate(samples)]
    by_regime = {r: sorted({t for name, t in groups if name == r}) for r in present}
    few = [r for r, trajectories in by_regime.items() if len(trajectories) < 2]
    if few:
        raise ValueError(
            f"the samples of {few[0]} are of one trajectory, and reading needs others to learn from; trace more of them"
        )
    folds = min(FOLDS, *(len(trajectories) for trajectories in by_regime.values()))
    fold = np.array([by_regime[r].index(t) % folds for r, t in groups])
    labels = np.array([present.index(s.regime) for s in samples])
    layers = sorted(samples[0].counts)
    by_layer = {layer: shares(np.stack([s.counts[layer] for s in samples])) for layer in layers}
    found = _cross_validate(np.concatenate(list(by_layer.values()), 1), labels, fold, present)
    for layer, features in by_layer.items() if len(layers) > 1 else ():
        alone = _cross_validate(features, labels, fold, present)["nearest mean"]
        found[f"nearest mean by layer {layer} alone"] = alone
    return found


def _cross_validate(features: np.ndarray, labels: np.ndarray, fold: np.ndarray, regimes: list[str]) -> Fingerprint:
    confusion: dict[str, np.ndarray] = {}
    for number in np.unique(fold):
        test = fold == number
        readings = read_regimes(features[~test], labels[~test], features[test], labels[test], len(regimes))
        for name, reading in readings.items():
            confusion[name] = confusion.get(name, 0) + reading.confusion
    chance = float(np.bincount(labels).max() / len(labels))
    return {
        name: {
            "accuracy": float(np.trace(table) / table.sum()),
            "chance": chance,
            "samples": len(labels),
            "regimes": regimes,
            "confusion": table,
        }
        for name, table in confusion.items()
    }
