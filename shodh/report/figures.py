"""The figures of a report; each function returns one, without pyplot's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK = "#1b2a41"
MODEL, BASELINE = "#0b6e4f", "#b23a48"
MARKERS = "osD^vP*Xhd<>"


def panel_grid(figure: Any, count: int, columns: int) -> list[Axes]:
    """``count`` panels of a figure or part of one, ``columns`` in a row; the rest of the last row stays empty."""
    panels = figure.subplots(-(-count // columns), columns, squeeze=False).ravel().tolist()
    for panel in panels[count:]:
        panel.set_axis_off()
    return panels[:count]


def slices(
    title: str,
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]],
    solid: np.ndarray | None,
) -> Figure:
    """Truth, prediction and error in the middle plane across y, or of the whole plane, a row a channel.

    Parameters
    ----------
    rows : sequence of (label, truth [X, Y, Z] or [X, Y], prediction)
    solid : ndarray, optional
        Shown in grey.
    """
    flat = rows[0][1].ndim == 2

    def plane_of(values: np.ndarray) -> np.ndarray:
        return values.T if flat else values[:, values.shape[1] // 2].T

    mask = None if solid is None or not solid.any() else plane_of(solid) > 0.5
    height, width = plane_of(rows[0][1]).shape
    # One pair of axes for all pictures, placed by hand: axes, ticks and layouts cost more than what they frame.
    gap = 0.06 * width
    across, up = 3 * width + 2 * gap, len(rows) * height + (len(rows) - 1) * gap
    inches = (5.8, 5.8 * up / across)
    size = (inches[0] + 2.0, inches[1] + 0.75)
    figure = Figure(figsize=size)
    panel = figure.add_axes((0.35 / size[0], 0.1 / size[1], inches[0] / size[0], inches[1] / size[1]))
    panel.set_axis_off()
    for column, name in enumerate(("truth", "prediction", "error")):
        place = (column * (width + gap) + width / 2, up + 0.03 * width)
        panel.text(*place, name, ha="center", va="bottom", color=INK)
    for row, (label, truth, prediction) in enumerate(rows):
        low, high = float(truth.min()), float(truth.max())
        extent = max(abs(low), abs(high))
        bottom = up - height - row * (height + gap)
        for column, values in enumerate((truth, prediction, prediction - truth)):
            colours = colormaps["RdBu_r" if column == 2 else "viridis"].with_extremes(bad="#9aa0a6")
            left, limits = column * (width + gap), (-extent, extent) if column == 2 else (low, high)
            panel.imshow(
                np.ma.masked_array(plane_of(values), mask if mask is not None else np.ma.nomask),
                origin="lower",
                extent=(left, left + width, bottom, bottom + height),
                vmin=limits[0],
                vmax=limits[1],
                cmap=colours,
            )
        panel.text(-0.03 * width, bottom + height / 2, label, rotation=90, ha="right", va="center", color=INK)
        scale = f"colours:\n{low:.3g} to {high:.3g}\nerror: ±{extent:.3g}"
        panel.text(across + 0.06 * width, bottom + height / 2, scale, va="center", fontsize=8, color=INK)
    panel.set_xlim(0, across)
    panel.set_ylim(0, up)
    figure.text(
        0.35 / size[0],
        1 - 0.1 / size[1],
        f"{title}, one model step, normalised; x to the right, {'y' if flat else 'z'} up",
        va="top",
        color=INK,
        fontsize=12,
    )
    return figure


def short(share: float) -> str:
    """A share for a small cell: ``.72``, ``1``, and nothing where it rounds to zero."""
    text = f"{share:.2f}".removeprefix("0")
    return {".00": "", "1.00": "1"}.get(text, text)


def expert_shares(routing: Mapping[str, Any]) -> Figure:
    """Share of each regime's tokens by expert, a panel a layer, with U and NMI."""
    layers = routing["layers"]
    regimes = list(layers[0]["shares"])
    left = 0.3 + 0.085 * max(map(len, regimes))
    experts = len(next(iter(layers[0]["shares"].values())))
    size = (left + 0.2 + max(2.6, 0.32 * experts) * len(layers), 1.1 + 0.6 * len(regimes))
    figure = Figure(figsize=size)
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    figure.subplots_adjust(
        left=left / size[0], right=1 - 0.2 / size[0], bottom=0.55 / size[1], top=1 - 0.35 / size[1], wspace=0.1
    )
    for number, (panel, layer) in enumerate(zip(panels, layers, strict=True)):
        shares = np.array([layer["shares"][r] for r in regimes])
        panel.imshow(shares, vmin=0, vmax=1, cmap="Greens", aspect="auto")
        for (row, column), value in np.ndenumerate(shares):
            panel.text(column, row, short(value), ha="center", va="center", color="white" if value > 0.6 else INK)
        panel.set_title(f"layer {number}: U {layer['regime_information']:.2f}, NMI {layer['nmi']:.2f}", fontsize=9)
        panel.set_xticks(range(shares.shape[1]))
        panel.set_xlabel("expert")
        panel.set_yticks(range(len(regimes)), regimes if number == 0 else [""] * len(regimes))
    return figure


#: What operators are trained on, as metrics name it, and its name beside an axis.
MEASURES = {
    "latent_nmse": "latent error / variance",
    "latent_mse": "latent MSE",
    "field_l2re": "L2RE",
    "field_mse": "MSE",
}


def training_curve(lines: Sequence[Mapping[str, float]]) -> Figure | None:
    """Error of training and validation by step, and U; None if the run has no metrics."""
    measure = next((m for m in MEASURES if any(f"train/{m}" in x for x in lines)), None)
    if measure is None:
        return None
    train = [(line["step"], line[f"train/{measure}"]) for line in lines if f"train/{measure}" in line]
    figure = Figure(figsize=(7.2, 2.9))
    panel = figure.subplots()
    panel.plot(*zip(*train, strict=True), color=INK, label="training")
    held_out = sorted({k for line in lines for k in line if k.startswith(f"valid/{measure}/")})
    for marker, key in zip(cycle(MARKERS), held_out, strict=False):
        points = [(line["step"], line[key]) for line in lines if key in line]
        panel.plot(*zip(*points, strict=True), f"{marker}--", label=f"held out, {key.rsplit('/', 1)[-1]}")
    panel.set_xlabel("step")
    panel.set_ylabel(MEASURES[measure])
    plain_log(panel, "y")
    information = [(line["step"], line["moe/regime_information"]) for line in lines if "moe/regime_information" in line]
    if information:
        right = panel.twinx()
        right.plot(*zip(*information, strict=True), color=MODEL, alpha=0.6, label="regime information U")
        right.set_ylim(0, 1.05)
        right.set_ylabel("U", color=MODEL)
    room = legend_below(figure)  # Placed by hand, which takes no solver.
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.12, right=0.91, bottom=(room + 0.5) / height, top=1 - 0.1 / height)
    return figure


def _short(value: float, _: int | None = None) -> str:
    """``0.02``, ``5e-3``: narrow enough for a small panel."""
    return f"{value:g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def plain_log(panel: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with labels in plain text, at 1, 2 and 5 of each decade where there are few: the mathematics
    of matplotlib's own labels is parsed anew in every process, a good part of a page's time."""
    axis: Axis = getattr(panel, f"{name}axis")
    getattr(panel, f"set_{name}scale")("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


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


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a name among those of a figure."""
    others = [n for n in names if n not in KNOWN]
    number = KNOWN.index(name) if name in KNOWN else len(KNOWN) + others.index(name)
    colour = colormaps["tab10"](number) if number < 10 else colormaps["Dark2"]((number + 3) % 8)
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)]}


def bare(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)


def lines(
    groups: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x: str,
    y: str,
    mark: float | None = None,
    log: bool = False,
) -> Figure | None:
    """Lines by name, a panel a group; ``mark`` draws a horizontal one. None without a point."""
    known = {title: {name: list(p) for name, p in curves.items() if p} for title, curves in groups.items()}
    known = {title: curves for title, curves in known.items() if curves}
    if not known:
        return None
    total, known = len(known), _first(known)
    columns = min(3, len(known))
    rows = -(-len(known) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    panels = panel_grid(figure, len(known), columns)
    names = list(dict.fromkeys(name for curves in known.values() for name in curves))
    for panel, (title, curves) in zip(panels, known.items(), strict=True):
        for name, points in curves.items():
            panel.plot(*zip(*points, strict=True), markersize=3.5, label=name, **style_of(name, names))
        if mark is not None:
            panel.axhline(mark, color=INK, linewidth=0.7, linestyle=":" if mark else "-")
        panel.set_title(title, fontsize=9, color=INK)
        panel.set_xlabel(x)
        whole = all(float(value).is_integer() for points in curves.values() for value, _ in points)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        panel.set_ylabel(y)
        if log:
            panel.set_yscale("log")
        bare(panel)
    _note_rest(figure, total)
    legend_below(figure, 7)
    return figure


def labelled(panels: Sequence[Axes]) -> dict[str, Artist]:
    """What the panels label, each label once."""
    return {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}


def legend_below(figure: Figure, size: float = 8) -> float:
    """All that is `labelled`, in as many columns as fit; the figure grows by it, by so many inches.

    Panels of a constrained layout make room for it, others have to be placed.
    """
    handles = labelled(figure.axes)
    fit = figure.get_figwidth() * 72 / (size * (4.5 + 0.6 * max(map(len, handles))))
    columns = max(1, min(5, len(handles), int(fit)))
    room = -(-len(handles) // columns) * 1.7 * size / 72
    figure.set_figheight(figure.get_figheight() + room)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center" if figure.get_layout_engine() else "lower center",
        ncols=columns,
        fontsize=size,
        frameon=False,
    )
    return room


def ratios(series: Mapping[str, Sequence[Sequence[float]]], places: Sequence[str], y: str) -> Figure | None:
    """Points with their ends, a group a place and side by side in it, and a line at 1; None without a point.

    Parameters
    ----------
    series : mapping
        Name -> (number of the place, value, lower end, upper end) of each point.
    """
    names = list(series)
    if not any(series.values()):
        return None
    figure = Figure(figsize=(max(6.0, 1.5 + 0.31 * len(places) * len(names)), 3.4), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(names):
        place, value, low, high = np.array(series[name], float).reshape(-1, 4).T
        x = place + 0.75 * ((number + 0.5) / len(names) - 0.5)
        ends, style = (value - low, high - value), style_of(name, names)
        panel.errorbar(x, value, yerr=ends, linestyle="", capsize=3, markersize=5, label=name, **style)
    panel.axhline(1, color=INK, linewidth=0.8)
    panel.set_xticks(range(len(places)), places, fontsize=8)
    panel.set_ylabel(y)
    bare(panel)
    legend_below(figure)
    return figure
