"""The figures of a study's report; each function returns one, without pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shodh.report.figures import INK, MARKERS
from shodh.report.page import Table

#: Names that look the same in every figure; others follow in their own order.
KNOWN = (
    *("sparse", "dense_active", "dense_total", "specialist", "sparse_hash", "sparse_frozen", "sparse_oracle"),
    *("persistence", "trained", "fresh", "dense_router", "dpot"),
)


MAX_PANELS = 12  # of one figure; the tables hold everything


def _first(panels: Mapping[Any, Any]) -> dict[Any, Any]:
    """As many panels as fit a figure."""
    return dict(list(panels.items())[:MAX_PANELS])


def _note_rest(figure: Figure, total: int) -> None:
    """Say that there is more than the figure shows."""
    if total > MAX_PANELS:
        figure.suptitle(f"the first {MAX_PANELS} of {total}; the others are in the tables", fontsize=8, color=INK)


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a name among those of a figure."""
    others = [n for n in names if n not in KNOWN]
    number = KNOWN.index(name) if name in KNOWN else len(KNOWN) + others.index(name)
    colour = colormaps["tab10"](number) if number < 10 else colormaps["Dark2"]((number + 3) % 8)
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)]}


def _bare(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)


def index_bars(table: Table) -> Figure | None:
    """Transfer index by mix and regime, a point a model with the range over seeds; the line is no transfer."""
    rows = [row for row in table.rows if row[5] is not None]
    if not rows:
        return None
    places = list(dict.fromkeys((row[0], row[3]) for row in rows))
    models = list(dict.fromkeys(row[2] for row in rows))
    figure = Figure(figsize=(max(6.0, 1.4 + 0.32 * len(places) * len(models)), 3.8), layout="constrained")
    panel = figure.subplots()
    for number, model in enumerate(models):
        mine = [row for row in rows if row[2] == model]
        x = [places.index((row[0], row[3])) + 0.75 * ((number + 0.5) / len(models) - 0.5) for row in mine]
        y = [row[5] for row in mine]
        ranges = [[row[5] - row[6] for row in mine], [row[7] - row[5] for row in mine]]
        style = _style(model, models)
        panel.errorbar(x, y, yerr=ranges, linestyle="", capsize=3, markersize=5, label=model, **style)
    panel.axhline(1, color=INK, linewidth=0.8)
    panel.set_xticks(range(len(places)), [f"{regime}\nin {mix}" for mix, regime in places], fontsize=8)
    panel.set_ylabel("transfer index: error / specialist's")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=min(4, len(models)))
    _bare(panel)
    return figure


def error_curves(curves: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float]]]], unit: str) -> Figure:
    """Validation error by cost, a panel a (mix, regime): ``{(mix, regime): {model: [(cost, error)]}}``."""
    total, curves = len(curves), _first(curves)
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for panel, ((mix, regime), models) in zip(panels, curves.items(), strict=False):
        for model, points in models.items():
            panel.plot(*zip(*points, strict=True), markersize=4, label=model, **_style(model, list(models)))
        panel.axhline(1, color=INK, linewidth=0.6, linestyle=":")
        panel.set_title(f"{regime} in {mix}", fontsize=10, color=INK)
        panel.set_xlabel(unit)
        panel.locator_params(axis="x", nbins=5)
        panel.set_ylabel("error / persistence")
        panel.set_yscale("log")
        _bare(panel)
    panels[0].legend(fontsize=7, frameon=False)
    _note_rest(figure, total)
    return figure


def scatter(table: Table) -> Figure | None:
    """Error by U, a point a sparse cell, a colour a model."""
    if not table.rows:
        return None
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.subplots()
    models = list(dict.fromkeys(row[1] for row in table.rows))
    for model in models:
        mine = [row for row in table.rows if row[1] == model]
        style = _style(model, models)
        panel.plot([r[3] for r in mine], [r[4] for r in mine], linestyle="", label=model, **style)
    panel.set_xlabel("regime information U, mean over layers")
    panel.set_ylabel("error / persistence")
    panel.set_xlim(-0.03, 1.03)
    panel.legend(fontsize=7, frameon=False)
    _bare(panel)
    return figure


def lines(groups: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, y: str, zero: bool) -> Figure:
    """Lines by name, a panel a group; ``zero`` draws the axis."""
    total, groups = len(groups), _first(groups)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(name for curves in groups.values() for name in curves))
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, (title, curves) in zip(panels, groups.items(), strict=False):
        for name, points in curves.items():
            panel.plot(*zip(*points, strict=True), markersize=3.5, label=name, **_style(name, names))
        if zero:
            panel.axhline(0, color=INK, linewidth=0.7)
        panel.set_title(title, fontsize=9, color=INK)
        panel.set_xlabel(x)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_ylabel(y)
        _bare(panel)
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    _note_rest(figure, total)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure
