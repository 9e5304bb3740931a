"""The figures of a composition study's report; each function returns one, without pyplot's state."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from shodh.experiments.composition.results import Results
from shodh.experiments.composition.settings import METHODS, Role
from shodh.experiments.composition.tables import correlate, step_errors
from shodh.experiments.harness.results import mean
from shodh.report.figures import INK, MARKERS, bare

#: Lines of the first panel, and of the second; the anchor stands in both.
COMPOSITION = (
    *("anchor", "coord", "coord_log", "scale", "scale_wide", "prefix", "prefix_wide", "gradient", "gradient_by_layer"),
    "oracle",
)
OTHERS = ("anchor", "low", "high", "average", "task_arithmetic", "ties", "dare", "ensemble", "prefix_finetune")
CONTROLS = ("persistence", "wrong_sign", "random_direction")


#: Methods with a colour of their own; the others share those of a second palette.
_COLOURED = (
    "low",
    "high",
    "average",
    "scale",
    "prefix",
    "coord",
    "oracle",
    "coord_log",
    "gradient",
    "gradient_by_layer",
)

#: The first of the others, each again with a colour of its own.
_DASHED = (
    *("task_arithmetic", "ties", "dare", "ensemble", "prefix_finetune", "wrong_sign", "random_direction"),
    *("persistence", "prefix_wide", "scale_wide", "line_search", "prefix_each"),
)


def _style(method: str) -> dict[str, Any]:
    """The same colour and marker in every figure."""
    if method == "anchor":
        return {"color": INK, "marker": "s", "linewidth": 2.2, "zorder": 3}
    if method in _COLOURED:
        number = _COLOURED.index(method)
        return {"color": colormaps["tab10"](number), "marker": MARKERS[number], "linewidth": 1.4}
    others = [*_DASHED, *(m for m in METHODS if m not in _DASHED)]
    number = others.index(method)
    dashed = {"linestyle": "--", "linewidth": 1.2}
    return {"color": colormaps["Dark2"](number % 8), "marker": MARKERS[number % len(MARKERS)], **dashed}


def _parameter_axis(panel: Axes, results: Results) -> None:
    """The parameter, logarithmic where its values span a decade; both experts marked and the support shaded."""
    values = [v for v, _ in results.values]
    if min(values) > 0 and max(values) >= 8 * min(values):
        panel.set_xscale("log")
        marked = sorted({min(values), *results.ends, max(values)})
        panel.set_xticks(marked, [f"{v:g}" for v in marked])
        panel.xaxis.set_minor_formatter(NullFormatter())
    inside = [v for v, role in results.values if role != "extrapolation"]
    panel.axvspan(min(inside), max(inside), color="#eef1f5", zorder=0)
    for name, end in zip(("low", "high"), results.ends, strict=True):
        panel.axvline(end, color=INK, linewidth=0.9, linestyle=":")
        panel.text(end, 1.01, name, transform=panel.get_xaxis_transform(), ha="center", fontsize=7, color=INK)
    panel.set_xlabel(f"{results.parameter}; shaded: seen by the anchor")
    bare(panel)


def error_by_parameter(results: Results) -> Figure:
    """Error against the parameter, a line a method with its range over seeds; experts marked."""
    known = [m for m in (COMPOSITION, OTHERS, CONTROLS) if any(method in results.methods for method in m)]
    figure = Figure(figsize=(4.6 * len(known), 4.8), layout="constrained")
    panels = figure.subplots(1, len(known), squeeze=False, sharey=True).ravel()
    titles = {COMPOSITION: "composition", OTHERS: "anchor, experts, merges and tuning", CONTROLS: "controls"}
    for panel, methods in zip(panels, known, strict=True):
        for method in dict.fromkeys(("anchor", *methods)):
            if method in results.methods:
                _error_line(panel, results, method)
        _parameter_axis(panel, results)
        panel.set_yscale("log")
        panel.set_title(titles[methods], fontsize=10, color=INK, pad=14)
        panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    panels[0].set_ylabel("relative L2 error after the prefix")
    return figure


def _error_line(panel: Axes, results: Results, method: str) -> None:
    points = []
    for value, _ in results.values:
        errors = [e for e in results.errors(method, value) if e is not None and e > 0]
        if errors and len(errors) == len(results):
            points.append((value, sum(errors) / len(errors), min(errors), max(errors)))
    if points:
        x, y, low, high = zip(*points, strict=True)
        style = _style(method)
        panel.plot(x, y, markersize=4, label=method, **style)
        panel.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def alpha_by_parameter(results: Results) -> Figure | None:
    """The coordinate that each read-out finds, a point a seed, against the parameter."""
    names = [m for m in ("oracle", "prefix", "line_search", "gradient", "scale") if results.alphas(m)]
    if not names:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    for method in names:
        points = results.alphas(method)
        values = sorted({v for v, *_ in points})
        style = _style(method)
        middle = [fmean(a for v, _, a in points if v == value) for value in values]
        panel.plot(values, middle, label=_with_correlation(results, method), **style)
        if len(results) > 1:
            panel.plot([v for v, *_ in points], [a for *_, a in points], ".", color=style["color"], alpha=0.5)
    panel.axhline(0, color=INK, linewidth=0.6)
    panel.set_ylabel("coordinate alpha: -1 low expert, +1 high expert")
    _parameter_axis(panel, results)
    panel.legend(fontsize=7, frameon=False)
    return figure


def _with_correlation(results: Results, method: str) -> str:
    found = correlate(results, method, results.map)
    return method if found is None else f"{method} (Pearson {found[0]:.2f}, Spearman {found[1]:.2f})"


def error_along_line(results: Results) -> Figure:
    """Error after the prefix at every coordinate of the bank, a line a value, the mean over seeds."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    panel = figure.subplots()
    values = results.values
    for number, (value, role) in enumerate(values):
        banks = [seed.at(value)["bank"] for seed in results.seeds]
        errors = [mean(b["later"][i] for b in banks) for i in range(len(banks[0]["alphas"]))]
        points = [(a, e) for a, e in zip(banks[0]["alphas"], errors, strict=True) if e is not None and e > 0]
        if points:
            line = "--" if role == "extrapolation" else "-"
            colour = colormaps["viridis"](number / max(1, len(values) - 1))
            panel.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=f"{value:g} ({role})")
    panel.set_xlabel("coordinate alpha: -1 low expert, +1 high expert")
    panel.set_ylabel("relative L2 error after the prefix")
    panel.set_yscale("log")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False, title=results.parameter, title_fontsize=7)
    bare(panel)
    return figure


def error_by_step(results: Results, role: Role) -> Figure:
    """Error by counted step, the mean over seeds and the values of a role."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    for method in ("persistence", "anchor", "average", "scale", "prefix", "gradient", "oracle", "prefix_finetune"):
        errors = step_errors(results, method, role) if method in results.methods else []
        points = [(n, e) for n, e in enumerate(errors, 1) if e is not None]
        if points:
            panel.plot(*zip(*points, strict=True), markersize=3.5, label=method, **_style(method))
    panel.set_xlabel("step after the prefix")
    panel.set_ylabel(f"relative L2 error, {role}")
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.legend(fontsize=7, frameon=False)
    bare(panel)
    return figure


def updates_by_part(components: Sequence[Sequence[Any]], layers: Sequence[Sequence[Any]]) -> Figure:
    """Share of the direction's squared norm, and cosine between both updates, by component and by layer.

    Parameters
    ----------
    components, layers : rows of `shodh.experiments.composition.tables.update_table`
    """
    height = 1.1 + 0.24 * max(len(components), len(layers))
    figure = Figure(figsize=(9.6, 2 * height), layout="constrained")
    for row, (kind, rows) in enumerate((("component", components), ("layer", layers))):
        names = [r[0] for r in rows]
        for column, (title, index) in enumerate((("share of direction²", 4), ("cosine of low and high update", 3))):
            panel = figure.add_subplot(2, 2, 2 * row + column + 1)
            panel.barh(names, [r[index] or 0.0 for r in rows], color="#0b6e4f" if column == 0 else "#44536a")
            panel.invert_yaxis()
            panel.axvline(0, color=INK, linewidth=0.8)
            panel.set_title(f"{title}, by {kind}", fontsize=9, color=INK)
            panel.tick_params(labelsize=7)
            bare(panel)
    return figure


def routing_by_alpha(rows: Sequence[Sequence[Any]]) -> Figure | None:
    """Change of routing along the direction, a line a sparse layer.

    Parameters
    ----------
    rows : rows of `shodh.experiments.composition.tables.routing_table`
    """
    if not rows:
        return None
    figure = Figure(figsize=(8.8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("divergence of expert usage from alpha 0, bits", "share of assignments moved")
    for column, (panel, title) in enumerate(zip(panels, titles, strict=True), 2):
        for layer in dict.fromkeys(r[0] for r in rows):
            points = [(r[1], r[column]) for r in rows if r[0] == layer]
            panel.plot(*zip(*points, strict=True), ".-", label=f"layer {layer}", color=colormaps["tab10"](layer % 10))
        panel.set_xlabel("coordinate alpha")
        panel.set_title(title, fontsize=9, color=INK)
        panel.set_ylim(bottom=0)
        bare(panel)
    panels[0].legend(fontsize=7, frameon=False)
    return figure
