"""What the figures of the probe share."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from shodh.report.figures import INK


def expert_colours(count: int) -> list[Any]:
    """One colour an expert, the same in every figure."""
    if count <= 10:
        return list(colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    if count <= 20:
        return list(colormaps["tab20"].colors[:count])  # type: ignore[attr-defined]
    return [colormaps["gist_rainbow"](i / count) for i in range(count)]


def panels(rows: int, columns: int, width: float, height: float, extra: float = 0.7) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels ``[rows, columns]``, sizes in inches a panel."""
    figure = Figure(figsize=(0.8 + width * columns, extra + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def heat(panel: Any, values: np.ndarray, *, low: float, high: float, cmap: str, text: str = "{:.2f}") -> Any:
    """A matrix as colours, with its numbers where they fit; NaN is left white."""
    image = panel.imshow(np.ma.masked_invalid(values), vmin=low, vmax=high, cmap=cmap, aspect="auto")
    if max(values.shape) <= 12:
        shade = image.cmap(image.norm(np.nan_to_num(values)))[..., :3] @ np.array([0.3, 0.6, 0.1])
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if shade[row, column] < 0.5 else INK
                panel.text(column, row, text.format(value), ha="center", va="center", color=ink, fontsize=8)
    return image
