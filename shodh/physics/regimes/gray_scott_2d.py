"""Regime ``gray_scott_2d``: the Gray-Scott reaction in a periodic square, the data set of The Well.

Equations, scheme and parameters are those of :mod:`shodh.physics.regimes.gray_scott`; the family runs over ``(feed,
kill)``. The defaults are The Well's square of edge 2 and its 10 units of time between frames. Its 128 cells across
resolve the fronts; with 64 cells use ``length=1``.
"""

from __future__ import annotations

from dataclasses import dataclass

from shodh.physics.regimes.gray_scott import GrayScott


@dataclass(frozen=True)
class GrayScott2d(GrayScott):
    """Gray-Scott reaction in two dimensions; parameters as `GrayScott`, with these defaults."""

    length: float = 2.0
    patch_size: float = 0.2
    frame_interval: float = 10.0

    name = "gray_scott_2d"
    boundary = ("periodic", "periodic")
