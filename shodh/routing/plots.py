"""Figures of the routing analysis; every function returns a figure without pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shodh.report.figures import INK, bare, panel_grid, short
from shodh.routing.verdict import SPECIALISED_U

MAX_PANELS = 6
ANNOTATED = 64  # cells of a matrix that are small enough in number to carry their values
T = TypeVar("T")
Curves = Mapping[int, tuple[np.ndarray, np.ndarray]]


def chosen(items: Sequence[T]) -> list[T]:
    """At most `MAX_PANELS` layers, regimes or experts, evenly spread, with the first and the last."""
    if len(items) <= MAX_PANELS:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, MAX_PANELS)]


def first_look(shares: Mapping[int, np.ndarray], regimes: Sequence[str], u: Curves) -> Figure:
    """The ten-second picture: regime x expert shares by layer above, U over time below (left out without curves)."""
    layers = chosen(list(shares))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    height = max(1.3, 0.34 * len(regimes) + 0.75)
    below = 2.5 if u else 0.0
    figure = Figure(figsize=(8.6, rows * height + below + 0.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[rows * height, below]) if u else [figure]
    for number, (panel, layer) in enumerate(zip(panel_grid(parts[0], len(layers), columns), layers, strict=True)):
        names = regimes if number % columns == 0 else [""] * len(regimes)
        matrix(panel, shares[layer], f"layer {layer}", names, "expert")
    parts[0].suptitle("Share of each regime's tokens by expert", fontsize=10, color=INK)
    if u:
        curves(parts[1].subplots(), u, "U", (-0.03, 1.06), SPECIALISED_U)
        parts[1].suptitle("Regime information U over training: 1 when the expert names the regime", fontsize=10)
    return figure


def matrix(panel: Axes, values: np.ndarray, title: str, names: Sequence[str], label: str, top: float = 1.0) -> None:
    """A matrix of shares, with its values where they fit."""
    panel.imshow(values, vmin=0, vmax=top, cmap="Greens", aspect="auto")
    if values.size <= ANNOTATED and values.shape[1] <= 8:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = "white" if value > 0.6 * top else INK
                panel.text(column, row, short(value), ha="center", va="center", color=color, fontsize=8)
    panel.set_title(title, fontsize=9, color=INK)
    panel.set_xlabel(label, fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.tick_params(labelsize=8)
    if len(names) <= 24:
        panel.set_yticks(range(len(names)), names)


def curves(panel: Axes, lines: Curves, label: str, limits: tuple[float, float] | None, mark: float | None) -> None:
    """One curve a layer over steps."""
    shown = chosen(list(lines))
    for number, layer in enumerate(shown):
        steps, values = lines[layer]
        color = colormaps["viridis"](0.9 * number / max(1, len(shown) - 1))
        marker = "o" if len(steps) < 30 else None
        panel.plot(steps, values, color=color, lw=1.3, marker=marker, ms=3.5, label=f"layer {layer}")
    if mark is not None:
        panel.axhline(mark, color="#9aa0a6", lw=0.8, ls="--")
    if limits is not None:
        panel.set_ylim(*limits)
    panel.set_xlabel("step", fontsize=8)
    panel.set_ylabel(label, fontsize=8)
    panel.tick_params(labelsize=8)
    bare(panel)
    panel.legend(fontsize=8, frameon=False, ncols=2)


def curve_grid(groups: Mapping[str, Curves]) -> Figure:
    """A panel of curves a quantity, two in a row."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(8.6 if columns > 1 else 6.4, 2.5 * rows), layout="constrained")
    for panel, (label, lines) in zip(panel_grid(figure, len(groups), columns), groups.items(), strict=True):
        curves(panel, lines, label, None, None)
    return figure


def load_bars(shares: Mapping[int, np.ndarray]) -> Figure:
    """Share of all tokens by expert, a row a layer."""
    layers = list(shares)
    experts = max(len(s) for s in shares.values())
    table = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        table[row, : len(shares[layer])] = shares[layer]
    width = min(8.6, 3.0 + 0.45 * experts)
    figure = Figure(figsize=(width, 0.9 + 0.3 * min(len(layers), 24)), layout="constrained")
    top = max(float(np.nanmax(table)), 2.0 / experts)
    matrix(figure.subplots(), table, "Share of all tokens", [f"layer {n}" for n in layers], "expert", top)
    return figure


def matrices(tables: Mapping[str, np.ndarray], names: Sequence[str] | None, x: str, y: str, top: float = 1.0) -> Figure:
    """Matrices side by side, three in a row; ``names`` of the rows, or numbers."""
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    tallest = max(len(t) for t in tables.values())
    height = min(3.0, 0.9 + 0.3 * tallest)
    figure = Figure(figsize=(1.4 + 2.4 * columns, rows * height), layout="constrained")
    panels = panel_grid(figure, len(tables), columns)
    for number, (panel, (title, table)) in enumerate(zip(panels, tables.items(), strict=True)):
        labels = [] if names is None else list(names) if number % columns == 0 else [""] * len(names)
        matrix(panel, table, title, labels, x, top)
        if names is None:
            panel.set_ylabel(y, fontsize=8)
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
