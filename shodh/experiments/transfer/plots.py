"""The figures of a study's report; each function returns one, without pyplot's state."""

from __future__ import annotations

from matplotlib.figure import Figure

from shodh.report.figures import bare, ratios, style_of
from shodh.report.page import Table


def index_bars(table: Table) -> Figure | None:
    """Transfer index by mix and regime, a point a model with the range over seeds; the line is no transfer."""
    rows = [row for row in table.rows if row[5] is not None]
    places = list(dict.fromkeys((row[0], row[3]) for row in rows))
    series: dict[str, list[list[float]]] = {}
    for mix, _, model, regime, _, *values in rows:
        series.setdefault(model, []).append([places.index((mix, regime)), *values[:3]])
    return ratios(series, [f"{regime}\nin {mix}" for mix, regime in places], "transfer index: error / specialist's")


def scatter(table: Table) -> Figure | None:
    """Error by U, a point a sparse run, a colour a model."""
    if not table.rows:
        return None
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.subplots()
    models = list(dict.fromkeys(row[1] for row in table.rows))
    for model in models:
        mine = [row for row in table.rows if row[1] == model]
        style = style_of(model, models)
        panel.plot([r[3] for r in mine], [r[4] for r in mine], linestyle="", label=model, **style)
    panel.set_xlabel("regime information U, mean over layers")
    panel.set_ylabel("error / persistence")
    panel.set_xlim(-0.03, 1.03)
    panel.legend(fontsize=7, frameon=False)
    bare(panel)
    return figure
