"""The figures of a study's report; each function returns one, without pyplot's state."""

from __future__ import annotations

from matplotlib.figure import Figure

from shodh.report.figures import INK, bare, style_of
from shodh.report.page import Table


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
        style = style_of(model, models)
        panel.errorbar(x, y, yerr=ranges, linestyle="", capsize=3, markersize=5, label=model, **style)
    panel.axhline(1, color=INK, linewidth=0.8)
    panel.set_xticks(range(len(places)), [f"{regime}\nin {mix}" for mix, regime in places], fontsize=8)
    panel.set_ylabel("transfer index: error / specialist's")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=min(4, len(models)))
    bare(panel)
    return figure


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
