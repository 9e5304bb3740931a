"""Figures of reports: what they say stays inside them."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shodh.report.figures import lines, ratios, training_curve

REGIMES = [
    "open_channel",
    "magnetohydrodynamics",
    "decaying_turbulence",
    "rayleigh_benard",
    *(f"r{n}" for n in range(8)),
]
NAMES = ["dense", "own_feed_forward", "own_feed_forward_and_attention", *(f"model_{n}" for n in range(9))]


def curve(regimes: list[str]) -> Figure | None:
    held_out = {f"valid/latent_nmse/{name}": 0.5 for name in regimes}
    return training_curve([{"step": s, "train/latent_nmse": 1.0 / s, "moe/regime_information": 0.5, **held_out}
                           for s in (1, 2, 4)])  # fmt: skip


FIGURES = {
    "ratios": lambda: ratios({name: [[0, 1.1, 1.0, 1.2]] for name in NAMES}, ["here"], "index"),
    "one name": lambda: ratios({"dense": [[0, 1.1, 1.0, 1.2]]}, ["here"], "index"),
    "lines": lambda: lines({"p": {name: [(0, 1.0), (1, 2.0)] for name in NAMES}}, "step", "error"),
    "two regimes": lambda: curve(REGIMES[:2]),
    "twelve regimes": lambda: curve(REGIMES),
}


@pytest.mark.parametrize("name", FIGURES)
def test_legend_is_inside_the_figure_and_beside_the_panels(name: str) -> None:
    figure = FIGURES[name]()
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(renderer), figure.bbox
    assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
    assert not any(box.overlaps(panel.get_window_extent(renderer)) for panel in figure.axes)
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels))
    assert min(panel.get_window_extent(renderer).height for panel in figure.axes) > 0.3 * whole.height


def test_training_curve_shows_every_regime() -> None:
    figure = curve([f"r{n}" for n in range(17)])  # More than there are markers.
    assert figure is not None
    (legend,) = figure.legends
    assert sum(text.get_text().startswith("held out") for text in legend.get_texts()) == 17
