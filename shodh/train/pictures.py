"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def share_picture(table: Tensor, regimes: Sequence[str]) -> np.ndarray:
    """Share of each regime's tokens by expert, one panel a layer: counts ``[L, R, E]`` -> uint8 ``[H, W, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = (table.double() / table.sum(-1, keepdim=True).clamp(min=1)).numpy()
    layers = len(shares)
    figure = Figure(figsize=(2.4 * layers + 1.2, 0.5 * len(regimes) + 1.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, layers, squeeze=False)[0]
    for layer, panel in enumerate(panels):
        panel.imshow(shares[layer], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(f"layer {layer}")
        panel.set_xlabel("expert")
        panel.set_xticks(range(shares.shape[2]))
        panel.set_yticks(range(len(regimes)), regimes if layer == 0 else [""] * len(regimes))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
