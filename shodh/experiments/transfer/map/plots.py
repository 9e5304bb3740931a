"""The figures of a map's page."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from shodh.experiments.transfer.map.results import MapResults, Point
from shodh.experiments.transfer.map.settings import DENSE, SPECIALIST
from shodh.report.figures import INK, ratios


def heat_maps(results: MapResults) -> Figure | None:
    """Transfer index of the dense model by number of regimes and width, a panel a scale; None of one place alone."""
    scales = list(dict.fromkeys(point.fields for point in results.points))
    if len(results.points) < 2:
        return None
    figure = Figure(figsize=(5.2 * len(scales), 3.8), layout="constrained")
    for panel, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        counts = sorted({p.number for p in results.points if p.fields == scale})
        dims = sorted({p.dim for p in results.points if p.fields == scale})
        values = np.full((len(dims), len(counts)), np.nan)
        for row, dim in enumerate(dims):
            for column, count in enumerate(counts):
                c = results.comparison(Point(scale, count, dim), DENSE, SPECIALIST)
                if c is not None:
                    values[row, column] = c.ratio
                    panel.text(column, row, f"{c.ratio:.2f}", ha="center", va="center", color=INK)
        image = panel.imshow(np.log(values), cmap="RdBu_r", vmin=-0.5, vmax=0.5, origin="lower", aspect="auto")
        image.set_alpha(0.75)
        panel.set_xticks(range(len(counts)), [str(c) for c in counts])
        panel.set_yticks(range(len(dims)), [str(d) for d in dims])
        panel.set_xlabel("regimes")
        panel.set_ylabel("width")
        panel.set_title(f"dense, {scale}", color=INK)
    return figure


def index_by_arm(results: MapResults) -> Figure | None:
    """Transfer index of every arm, a group a place of the map; bars are the t intervals over seeds."""
    points = results.points
    series: dict[str, list[list[float]]] = {}
    for arm in (arm for arm in results.study.arms if any(arm in results.arms(p) for p in points)):
        found = [(i, results.comparison(p, arm, SPECIALIST)) for i, p in enumerate(points)]
        series[arm] = [
            [i, c.ratio, c.low if c.low > 0 else c.ratio, c.high if np.isfinite(c.high) else c.ratio]
            for i, c in found
            if c is not None and np.isfinite(c.ratio)
        ]
    places = [f"K {p.number}, width {p.dim}\n{p.fields}" for p in points]
    figure = ratios(series, places, "transfer index: error / specialist's")
    if figure is not None:
        highest = max(ratio for rows in series.values() for _, ratio, *_ in rows)
        figure.axes[0].set_ylim(bottom=0.8, top=1.3 * max(1.0, highest))
    return figure
