"""The figures of an evaluation beside those of `shodh.report.figures`: each function returns one, or None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shodh.report.figures import BASELINE, INK, MODEL, bare, labelled, plain_log
from shodh.report.page import format_cell

TOKENIZER, TRUTH = "#7b6fa6", INK
STYLES: Mapping[str, Mapping[str, Any]] = {
    "truth": {"color": TRUTH, "linestyle": "-", "linewidth": 2.2, "alpha": 0.45},
    "model": {"color": MODEL, "linestyle": "-"},
    "persistence": {"color": BASELINE, "linestyle": "--"},
    "tokenizer": {"color": TOKENIZER, "linestyle": ":"},
}
MOST = 12  # panels of a figure; the tables hold everything


def _panels(titles: list[str], width: float = 3.6, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A panel each, at most three in a row, with room for a legend below; placed by hand, which takes no solver."""
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = (width * columns + 0.3, height * rows + 0.45)
    figure = Figure(figsize=size)
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    figure.subplots_adjust(
        left=0.62 / size[0], right=1 - 0.12 / size[0], bottom=0.95 / size[1], top=1 - 0.35 / size[1],
        wspace=0.68 / (width - 0.68), hspace=0.85 / (height - 0.85),
    )  # fmt: skip
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9, color=INK)
        panel.tick_params(labelsize=8)
        bare(panel)
    for panel in panels[len(titles) :]:
        panel.remove()
    return figure, panels[: len(titles)]


def _legend(figure: Figure, panels: list[Axes]) -> None:
    handles = labelled(panels)
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", ncols=len(handles), fontsize=8, frameon=False
    )


def _fields(regimes: Mapping[str, Any], measure: str) -> list[tuple[str, str]]:
    """Regimes and fields that have a measure, as many as a figure has panels."""
    return [(name, field) for name, regime in regimes.items() for field in regime.get(measure, {})][:MOST]


def rollouts(regimes: Mapping[str, Any]) -> Figure | None:
    """VRMSE by autoregressive step with its 95 % interval, a panel a field of a regime."""
    shown = _fields(regimes, "rollout")
    if not shown:
        return None
    figure, panels = _panels([f"{name}: {field}" for name, field in shown])
    for panel, (name, field) in zip(panels, shown, strict=True):
        top = 0.0
        for of, values in regimes[name]["rollout"][field].items():
            found = np.array(values, float)
            there = np.isfinite(found)  # of the tokenizer alone, the first and the last
            steps, known = np.arange(1, len(values) + 1)[there], found[there]
            panel.plot(steps, known, marker="o", markersize=3, label=of, **STYLES[of])
            low, high = np.array(regimes[name]["intervals"]["rollout"][field][of], float)[there].T
            panel.fill_between(steps, low, high, color=STYLES[of]["color"], alpha=0.15, linewidth=0)
            ends = high[np.isfinite(high) & (high < 3 * known)]  # a wide interval may leave the panel, a curve not
            top = max([top, *known, *ends])
        panel.axhline(0.5, color=INK, linewidth=0.6, linestyle="-", alpha=0.5)
        panel.set_ylim(0, 1.08 * max(top, 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_xlabel("autoregressive step", fontsize=8)
        panel.set_ylabel("VRMSE", fontsize=8)
    _legend(figure, panels)
    return figure


def spectra(regimes: Mapping[str, Any], step: int) -> Figure | None:
    """Energy of truth and model by shell, and of the errors, at one step; a panel a field of a regime."""
    known = {name: r["spectra"][str(step)] for name, r in regimes.items() if str(step) in r.get("spectra", {})}
    shown = [(name, field) for name, by_measure in known.items() for field in by_measure["energy"]][:MOST]
    if not shown:
        return None
    figure, panels = _panels([f"{name}: {field}" for name, field in shown])
    for panel, (name, field) in zip(panels, shown, strict=True):
        energy, errors = known[name]["energy"][field], known[name]["error_energy"][field]
        largest = 0.0
        for of in ("truth", "model"):
            waves, density = _density(energy[of])
            largest = max([largest, *density[np.isfinite(density)]])
            panel.plot(waves, density, label=of, **STYLES[of])
        for of, values in errors.items():
            style = {**STYLES[of], "linewidth": 0.9, "marker": ".", "markersize": 2.5}
            panel.plot(*_density(values), label=f"error of {of}", **style)
        if largest > 0:
            panel.set_ylim(1e-7 * largest, 3 * largest)
        plain_log(panel, "x")
        plain_log(panel, "y")
        panel.minorticks_off()
        panel.set_xlabel("wave number / (2 pi / longest axis)", fontsize=8)
        panel.set_ylabel("mean energy of a shell", fontsize=8)
    _legend(figure, panels)
    return figure


def _density(shells: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Wave numbers, and the mean energy of the shells around them: about five points an octave, without the mean."""
    values = np.array(shells, float)[1:]
    edges = np.unique(np.round(1.15 ** np.arange(1 + np.ceil(np.log(len(values) + 1) / np.log(1.15)))).astype(int) - 1)
    edges = edges[edges < len(values)]
    counts = np.diff([*edges, len(values)])
    return np.add.reduceat(np.arange(1.0, len(values) + 1), edges) / counts, np.add.reduceat(values, edges) / counts


def strip(trajectories: pd.DataFrame, regimes: Mapping[str, Any]) -> Figure | None:
    """One-step VRMSE of every trajectory, a dot each, with the mean and its 95 % interval; a row a field."""
    chosen = trajectories[(trajectories["measure"] == "vrmse") & (trajectories["step"] == 1)]
    shown = _fields(regimes, "vrmse")
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 0.95 + 0.62 * len(shown)))
    panel = figure.subplots()
    size = figure.get_size_inches()
    figure.subplots_adjust(left=2.1 / size[0], right=0.98, bottom=0.55 / size[1], top=1 - 0.3 / size[1])
    kinds = [of for of in STYLES if of in set(chosen["of"])]
    for row, (name, field) in enumerate(shown):
        mine = chosen[(chosen["regime"] == name) & (chosen["field"] == field)]
        for number, of in enumerate(kinds):
            values = mine[mine["of"] == of].groupby("trajectory")["value"].mean()
            values = values[np.isfinite(values)]
            height, colour = row + 0.24 * (number - (len(kinds) - 1) / 2), STYLES[of]["color"]
            panel.plot(values, np.full(len(values), height), "o", markersize=3.5, color=colour, alpha=0.55, label=of)
            low, high = regimes[name]["intervals"]["vrmse"][field].get(of, (np.nan, np.nan))
            panel.plot([low, high], [height, height], color=colour, linewidth=1.4, solid_capstyle="butt")
            mean = regimes[name]["vrmse"][field].get(of, np.nan)
            panel.plot([mean], [height], "|", markersize=11, markeredgewidth=2, color=colour)
    panel.set_yticks(range(len(shown)), [f"{name}: {field}" for name, field in shown], fontsize=8)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.axvline(1, color=INK, linewidth=0.6, alpha=0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_xlabel("one-step VRMSE: a dot a trajectory; bar and line: mean and 95 % interval", fontsize=8)
    handles = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    panel.legend(
        list(handles.values()), list(handles), fontsize=8, frameon=False, loc="lower center",
        bbox_to_anchor=(0.5, 1.0), ncols=len(handles),
    )  # fmt: skip
    bare(panel)
    return figure


def interval_cell(ends: Any) -> str:
    """``0.71 to 0.78``; ``-`` where there is none."""
    low, high = (None, None) if ends is None else ends
    return f"{format_cell(low)} to {format_cell(high)}" if low is not None and np.isfinite([low, high]).all() else "-"
