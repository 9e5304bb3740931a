"""Section: the regime of held-out trajectories read off their routing, also of regimes left out of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shodh.report.figures import INK
from shodh.report.page import Section, Table
from shodh.routing.fingerprint import CLASSIFIERS, Reading, read_regimes
from shodh.routing.probe.drawing import heat, panels
from shodh.routing.probe.record import Recording

TEXT = (
    "Can the regime of a sample be read off its routing alone, the share of its tokens that each expert of each layer "
    "took? Classifiers are fitted on the samples of some trajectories and tested on those of others, from another "
    "split; the model was trained on neither. Chance is the accuracy of always naming the most frequent regime."
)


def features(recordings: Sequence[Recording]) -> tuple[np.ndarray, np.ndarray]:
    """Shares by layer and expert ``[N, layers * E]`` of all samples, and the regime's number of each."""
    shares = [r.shares().reshape(len(r.trajectory), -1) for r in recordings]
    return np.concatenate(shares), np.repeat(np.arange(len(recordings)), [len(s) for s in shares])


def fingerprint_section(fit: Sequence[Recording], test: Sequence[Recording]) -> Section:
    """Fingerprints of regimes; ``fit`` and ``test`` hold the same regimes in order, left-out ones last."""
    known = [i for i, r in enumerate(test) if not r.regime.left_out]
    unseen = [i for i, r in enumerate(test) if r.regime.left_out]
    section = Section("probe_fingerprint", "Fingerprint of held-out trajectories", TEXT)
    if len(test) < 2:
        section.text = f"Not available: there is one regime, {test[0].name}, and to tell regimes apart takes two."
        section.summary = {"available": False}
        return section
    readings = {"trained regimes": _read(fit, test, known)} if len(known) > 1 else {}
    if unseen:
        readings["with left-out regimes"] = _read(fit, test, [*known, *unseen])
    names = [r.name for r in test]
    rows = [
        [group, name, reading.accuracy, reading.chance, int(reading.confusion.sum())]
        for group, found in readings.items()
        for name, reading in found.items()
    ]
    section.tables["fingerprint"] = Table(["regimes", "classifier", "accuracy", "chance", "samples"], rows)
    section.summary = {
        "accuracy": {group: {n: r.accuracy for n, r in found.items()} for group, found in readings.items()},
        "chance": {group: next(iter(found.values())).chance for group, found in readings.items()},
        "trajectories": {r.name: len(np.unique(r.trajectory)) for r in test},
        "split_by": "trajectory",
    }
    last = list(readings)[-1]
    section.figures["fingerprint_confusion"] = _confusion_figure(
        readings[last], names if unseen else names[: len(known)]
    )
    if unseen:
        table, summary = _resemblance(fit, test, known, unseen)
        section.tables["left_out_regimes"] = table
        section.summary["left_out"] = summary
        section.text += (
            " Left-out regimes: 'told apart' is the share of their samples that a logistic regression fitted with "
            "samples of all regimes names rightly (chance: of all regimes one), 'looks like' which trained regime one "
            "fitted without them names."
        )
    return section


def _read(fit: Sequence[Recording], test: Sequence[Recording], chosen: Sequence[int]) -> dict[str, Reading]:
    fit_x, fit_y = features([fit[i] for i in chosen])
    test_x, test_y = features([test[i] for i in chosen])
    return read_regimes(fit_x, fit_y, test_x, test_y, len(chosen))


def _resemblance(
    fit: Sequence[Recording], test: Sequence[Recording], known: Sequence[int], unseen: Sequence[int]
) -> tuple[Table, dict[str, Any]]:
    """What each left-out regime is taken for by classifiers that know the trained regimes alone."""
    fit_x, fit_y = features([fit[i] for i in known])
    confusion = _read(fit, test, [*known, *unseen])["logistic regression"].confusion
    names = [test[i].name for i in known]
    rows: list[list[Any]] = []
    summary: dict[str, Any] = {}
    chance = 1 / len(confusion)
    for place, i in enumerate(unseen, len(known)):
        told = float(confusion[place, place] / confusion[place].sum())
        summary[test[i].name] = {"told_apart": told, "chance": chance, "looks_like": {}}
        for name, classify in CLASSIFIERS.items():
            taken = classify(fit_x, fit_y, features([test[i]])[0])
            shares = np.bincount(taken, minlength=len(known)) / len(taken)
            summary[test[i].name]["looks_like"][name] = dict(zip(names, shares.tolist(), strict=True))
            rows.append([test[i].name, told, chance, name, *shares.tolist()])
    header = ["left-out regime", "told apart", "chance", "classifier", *(f"looks like {n}" for n in names)]
    return Table(header, rows), summary


def _confusion_figure(readings: dict[str, Reading], names: Sequence[str]) -> Figure:
    side = max(2.4, 0.55 * len(names) + 1)
    figure, axes = panels(1, len(readings), side + 0.6, side * 0.75, extra=1.0)
    for number, (panel, (name, reading)) in enumerate(zip(axes[0], readings.items(), strict=True)):
        share = reading.confusion / np.maximum(reading.confusion.sum(1, keepdims=True), 1)
        heat(panel, share, low=0, high=1, cmap="Greens")
        panel.set_title(f"{name}: {reading.accuracy:.0%} (chance {reading.chance:.0%})", fontsize=9, color=INK)
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        panel.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), fontsize=8)
        panel.set_xlabel("read")
    axes[0, 0].set_ylabel("true")
    return figure
