"""Section: which expert takes which place, drawn over the physical field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from shodh.report.figures import INK
from shodh.report.page import Section
from shodh.routing.plots import chosen
from shodh.routing.probe.drawing import expert_colours, panels
from shodh.routing.probe.record import Picture, Recording
from shodh.schema.fields import AXES

TEXT = (
    "The expert of each token (first choice, coloured cells) over the field of the same sample (grey levels; solids "
    "hatched), in the middle planes of the box: one sample a regime, one column a layer."
)


def map_section(recordings: Sequence[Recording], token_grid: Sequence[int]) -> Section:
    """Routing maps of up to six regimes, up to six layers each."""
    shown = chosen(recordings)
    section = Section("routing_map", "Routing over the field", TEXT)
    for recording in shown:
        if recording.picture is not None:
            section.figures[f"map_{recording.name}"] = _map(recording, recording.picture, token_grid)
    section.summary = {"regimes": [r.name for r in shown], "sample": "first window of the first trajectory"}
    return section


def middle_planes(shape: Sequence[int], token_grid: Sequence[int]) -> list[tuple[int, int]]:
    """``(axis, index)`` of the middle planes across y and z, or across the one axis along which there is one token.

    Fields of two axes are one plane, across a third axis that they do not have.
    """
    if len(shape) == 2:
        return [(2, 0)]
    flat = [axis for axis, tokens in enumerate(token_grid) if tokens == 1]
    return [(axis, shape[axis] // 2) for axis in (flat[:1] or (1, 2))]


def _plane(values: np.ndarray, axis: int, index: int) -> np.ndarray:
    return (values if values.ndim == 2 else values.take(index, axis)).T


def _map(recording: Recording, picture: Picture, token_grid: Sequence[int]) -> Figure:
    layers = chosen(range(len(recording.selected)))
    planes = middle_planes(picture.background.shape, token_grid)
    figure, axes = panels(len(planes), len(layers) + 1, 1.9, 1.9, extra=0.9)
    experts = [recording.selected[layer][0, :, 0].reshape(tuple(token_grid)) for layer in layers]
    used = np.unique(np.stack(experts))
    colours = expert_colours(recording.num_experts)
    for row, (axis, index) in zip(axes, planes, strict=True):
        cells = _plane(picture.background, axis, index)
        solid = None if picture.solid is None else _plane(picture.solid, axis, index)
        for column, panel in enumerate(row):
            _draw_field(panel, cells, solid)
            if column == 0:
                names = [a for i, a in enumerate(AXES) if i != axis]
                panel.set_xlabel(names[0], fontsize=8)
                panel.set_ylabel(names[1], fontsize=8)
                continue
            cells_along = picture.background.shape[axis] if axis < picture.background.ndim else 1
            tokens = _plane(experts[column - 1], axis, index * (*token_grid, 1)[axis] // cells_along)
            _draw_tokens(panel, tokens, cells.shape, colours)
    for panel, title in zip(axes[0], [picture.label, *(f"layer {layer}" for layer in layers)], strict=True):
        panel.set_title(title, fontsize=9, color=INK)
    handles = [Patch(color=colours[e], label=f"expert {e}") for e in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.suptitle(recording.name, fontsize=10, color=INK)
    return figure


def _draw_field(panel: Any, cells: np.ndarray, solid: np.ndarray | None) -> None:
    panel.imshow(cells, origin="lower", cmap="gray")
    if solid is not None and solid.any():
        hatched = panel.contourf(solid, levels=[0.5, 1.5], colors="none", hatches=["////"])
        hatched.set_edgecolor("#b9b2a4")
        hatched.set_linewidth(0)
    panel.set_xticks([])
    panel.set_yticks([])


def _draw_tokens(panel: Any, tokens: np.ndarray, shape: Sequence[int], colours: Sequence[Any]) -> None:
    """Token cells as a translucent layer with the edges of the field's cells."""
    height, width = shape
    extent = (-0.5, width - 0.5, -0.5, height - 0.5)
    palette = ListedColormap(list(colours))
    panel.imshow(
        tokens, origin="lower", extent=extent, cmap=palette, vmin=-0.5, vmax=len(colours) - 0.5, alpha=0.5,
        interpolation="nearest",
    )  # fmt: skip
