"""Gray-Scott in two dimensions: growth of a perturbation, and the published patterns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.physics import get_regime
from shodh.physics.regimes.gray_scott import REACTION_RADIUS, gray_scott_reaction
from shodh.physics.solvers.reaction_diffusion import ReactionDiffusion


def uniform_state(feed: float, kill: float) -> tuple[float, float]:
    """The reacted uniform state: ``u v = F + k`` and ``F (1 - u) = u v^2``."""
    substrate = 0.5 * (1.0 - math.sqrt(1.0 - 4.0 * (feed + kill) ** 2 / feed))
    return substrate, (feed + kill) / substrate


@pytest.mark.parametrize("mode", [(3, 0), (2, 5)])
def test_a_perturbation_grows_at_the_rate_of_its_discrete_symbol(mode: tuple[int, int]) -> None:
    feed, kill, cells, time = 0.03, 0.055, 32, 20.0
    u, v = uniform_state(feed, kill)
    system = ReactionDiffusion(
        gray_scott_reaction(feed, kill), (2e-5, 1e-5), (1 / cells,) * 2, periodic=(True, True),
        reaction_radius=REACTION_RADIUS,
    )  # fmt: skip
    jacobian = torch.tensor([[-v * v - feed, -2 * u * v], [v * v, 2 * u * v - feed - kill]], dtype=torch.float64)
    h = 1 / cells
    square = sum((2 * math.sin(math.pi * m / cells) / h) ** 2 for m in mode)
    matrix = jacobian - square * torch.diag(torch.tensor([2e-5, 1e-5], dtype=torch.float64))
    x = torch.arange(cells, dtype=torch.float64) / cells
    shape = torch.cos(2 * math.pi * (mode[0] * x[:, None] + mode[1] * x))
    base = torch.tensor([u, v], dtype=torch.float64).view(2, 1, 1, 1)
    start = 1e-7 * torch.tensor([1.0, 0.7], dtype=torch.float64)
    end = system.advance(base + start.view(2, 1, 1, 1) * shape, time, 0.25) - base
    expected = torch.linalg.matrix_exp(matrix * time) @ start
    measured = (end[:, 0] * shape).sum((1, 2)) / shape.square().sum()
    # Second order in time: the error over 80 steps of a quarter is of the order (0.25 |J|)^2.
    torch.testing.assert_close(measured, expected, rtol=5e-3, atol=0.0)


def test_worms_fill_the_plane_and_stay_bounded() -> None:
    """At The Well's (F, k) of worms patches spread; concentrations stay between 0 and 1."""
    regime = get_regime("gray_scott_2d", feed=0.058, kill=0.065, length=0.5, frame_interval=400.0, patch_size=0.1)
    values = regime.simulate([0], (32, 32), 4).values
    for name in ("substrate", "autocatalyst"):
        assert values[name].min() >= -1e-6 and values[name].max() <= 1.0 + 1e-6
    spread = [float(np.std(values["autocatalyst"][0, i])) for i in range(4)]
    assert min(spread) > 0.02
