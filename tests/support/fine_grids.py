"""Every regime at the spacing of 128 cells an axis in a box that is small enough for a test."""

from __future__ import annotations

import math

from shodh.physics import REGIMES, Regime, get_regime

CELLS = 128
# Boxes of 8 x 8 x 128 cells; where the regime's box cannot be shortened, these cells are longer along x and y.
CHANGES: dict[str, dict[str, float | int | str]] = {
    "open_channel": {"length_x": 2 * math.pi / 16, "length_y": math.pi / 16},
    "rayleigh_benard": {"disturbance": 0.3},
    "shear_layer": {"length_x": 14.13 / 16, "length_y": 14.13 / 16},
    "porous_media": {"geometry": "spheres", "porosity_min": 0.9, "porosity_max": 0.9, "grain": 0.1, "tolerance": 1e-3},
    "obstacle_flow_2d": {"spin_up": 0.1, "frame_interval": 0.05},
    "compressible_2d": {"frame_interval": 0.005},
    "heat": {"frame_interval": 0.002},
}
#: Regimes with time steps; the others solve for each frame.
EXPLICIT = [name for name in sorted(REGIMES) if name != "darcy"]


def fine(name: str) -> tuple[Regime, tuple[int, ...]]:
    """The regime and the grid of its small box."""
    changes = dict(CHANGES.get(name, {}))
    if hasattr(get_regime(name), "spin_up"):
        changes.setdefault("spin_up", 0.0)
    regime = get_regime(name, **changes)
    return regime, (CELLS,) * 2 if regime.schema.ndim == 2 else (8, 8, CELLS)
