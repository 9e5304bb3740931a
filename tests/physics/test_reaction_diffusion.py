"""Stabilised steps, the reaction-diffusion core and the Gray-Scott regime."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import NonFiniteError
from shodh.physics import get_regime
from shodh.physics.regimes.gray_scott import gray_scott_reaction
from shodh.physics.solvers.reaction_diffusion import ReactionDiffusion, laplacian
from shodh.physics.solvers.stabilized import legendre_stages, legendre_step, legendre_steps, stability_limit

FEED, KILL = 0.04, 0.055
DIFFUSIVITY = (2e-5, 1e-5)


def uniform_state(feed: float = FEED, kill: float = KILL) -> tuple[float, float]:
    """The stable non-trivial uniform state ``(u, v)``."""
    root = math.sqrt(1.0 - 4.0 * (feed + kill) ** 2 / feed)
    v = 0.5 * feed / (feed + kill) * (1.0 + root)
    return (feed + kill) / v, v


@pytest.mark.parametrize("stages", [3, 9])
def test_legendre_step_is_second_order_with_a_source_in_time(stages: int) -> None:
    rate = torch.tensor([-1.0, -3.0], dtype=torch.float64)

    def solve(steps: int) -> torch.Tensor:
        values = torch.ones(2, dtype=torch.float64)
        for index in range(steps):
            values = legendre_step(lambda y, t: rate * y + math.cos(t), values, 2 * index / steps, 2 / steps, stages)
        return values

    # y' = r y + cos t has the solution C e^(rt) + (sin t - r cos t) / (1 + r^2).
    particular = lambda t: (math.sin(t) - rate * math.cos(t)) / (1 + rate**2)  # noqa: E731
    exact = (1 - particular(0)) * torch.exp(2 * rate) + particular(2)
    coarse, fine = ((solve(n) - exact).norm() for n in (16, 32))
    assert 1.9 < math.log2(coarse / fine) < 2.1


@pytest.mark.parametrize("stages", [3, 7, 31])
def test_legendre_step_is_stable_up_to_its_limit_and_not_beyond(stages: int) -> None:
    stiffness = torch.linspace(0, 1.2 * stability_limit(stages), 5001, dtype=torch.float64)
    factor = legendre_step(lambda y, _: -stiffness * y, torch.ones_like(stiffness), 0.0, 1.0, stages).abs()
    assert factor[stiffness <= stability_limit(stages)].max() <= 1.0
    assert factor[-1] > 1.0
    assert legendre_stages(stability_limit(stages) / 1.051) == stages


def test_steps_cover_stiff_intervals_with_a_bounded_number_of_stages() -> None:
    steps, stages = legendre_steps(2.0, 1e4)
    assert stages <= 31 and 1e4 * 2.0 / steps < stability_limit(stages)
    assert legendre_steps(2.0, 0.0, max_step=0.5) == (4, 3)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_laplacian_has_its_symbol_on_periodic_and_closed_axes(ndim: int) -> None:
    """``exp(ikx)`` and, between closed ends, ``cos(pi m (i + 1/2) / n)`` are eigenvectors."""
    space, spacing = (8, 6, 7)[:ndim], (0.1, 0.2, 0.15)[:ndim]
    periodic = (True, False, False)[:ndim]
    mode, eigenvalue = torch.ones(2, *space, dtype=torch.float64), 0.0
    for axis, (n, h, wraps) in enumerate(zip(space, spacing, periodic)):
        waves = 2 * (axis + 1) if wraps else axis + 1  # half waves along the axis
        line = torch.cos(math.pi * waves * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
        mode *= line.view([n if a == axis else 1 for a in range(ndim)])
        eigenvalue -= (2.0 * math.sin(0.5 * math.pi * waves / n) / h) ** 2
    torch.testing.assert_close(laplacian(mode, spacing, periodic), eigenvalue * mode, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavenumber", [(1, 0, 0), (2, 1, 0), (4, 3, 2)])
def test_perturbation_grows_at_the_rate_of_the_linearised_equations(wavenumber: tuple[int, int, int]) -> None:
    """``max Re eig(J - k_d^2 D)`` with the discrete wavenumber, from the least damped eigenvector."""
    space, spacing = (16, 12, 14), (0.01, 0.012, 0.009)
    system = ReactionDiffusion(gray_scott_reaction(FEED, KILL), DIFFUSIVITY, spacing, periodic=(True,) * 3)
    u, v = uniform_state()
    jacobian = torch.tensor([[-(v**2) - FEED, -2 * u * v], [v**2, 2 * u * v - FEED - KILL]], dtype=torch.float64)
    phase = sum(
        2 * math.pi * m * torch.arange(n, dtype=torch.float64).view([-1 if a == axis else 1 for a in range(3)]) / n
        for axis, (m, n) in enumerate(zip(wavenumber, space))
    )
    squared = sum((2 * math.sin(math.pi * m / n) / h) ** 2 for m, n, h in zip(wavenumber, space, spacing))
    matrix = jacobian - squared * torch.diag(torch.tensor(DIFFUSIVITY, dtype=torch.float64))
    values, vectors = torch.linalg.eig(matrix)
    leading = values.real.argmax()
    expected = system.growth_rate(jacobian, wavenumber, space)
    assert expected == pytest.approx(float(values[leading].real), rel=1e-12)
    # The real part of a complex eigenvector turns: follow the complex amplitude with the left eigenvector.
    wave = torch.exp(1j * phase)
    start = 1e-7 * (vectors[:, leading].view(2, 1, 1, 1, 1) * wave).real
    rest = torch.tensor([u, v], dtype=torch.float64).view(2, 1, 1, 1, 1)
    state = system.advance(rest + start, 4.0, 0.02)
    left = torch.linalg.inv(vectors)[leading]

    def amplitude(values: torch.Tensor) -> complex:
        mode = ((values - rest).squeeze(1) * wave.conj()).mean((1, 2, 3))
        return complex((left * mode).sum())

    growth = math.log(abs(amplitude(state)) / abs(amplitude(rest + start))) / 4.0
    # Quadratic terms are 1e-7, the time error dt^2 |lambda|^3 / 6 is below 1e-5.
    assert growth == pytest.approx(expected, abs=2e-5)


def test_gray_scott_pulse_converges_at_second_order_in_space() -> None:
    """A pulse on a line, against cell averages of a grid sixteen times finer."""
    length = 0.4

    def solve(cells: int) -> torch.Tensor:
        x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        patch = torch.exp(-((torch.sin(math.pi * (x - 0.4)) / 0.2) ** 2))
        state = torch.stack((1 - 0.5 * patch, 0.25 * patch)).unsqueeze(1)
        system = ReactionDiffusion(gray_scott_reaction(0.03, 0.062), DIFFUSIVITY, (length / cells,), periodic=(True,))
        return system.advance(state, 60.0, 0.5)

    reference = solve(1024)

    def error(cells: int) -> float:
        return float((solve(cells) - reference.view(2, 1, cells, -1).mean(-1)).norm()) / math.sqrt(cells)

    assert 1.8 < math.log2(error(64) / error(128)) < 2.2


def test_closed_box_keeps_what_does_not_react() -> None:
    system = ReactionDiffusion(lambda s: torch.zeros_like(s), (1.0, 0.3), (0.1, 0.2), periodic=(False, False))
    start = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = system.advance(start, 0.05, 1.0)
    torch.testing.assert_close(end.sum((2, 3)), start.sum((2, 3)), rtol=1e-13, atol=0)
    assert end.std() < 0.7 * start.std()


def test_patterns_live_and_concentrations_stay_positive() -> None:
    result = get_regime("gray_scott").simulate([0], (24, 24, 24), 3)
    for field in result.schema.dynamic:
        values = result.values[field.name].astype(np.float64)
        assert values.min() >= 0.0
        deviation = values - values.mean((2, 3, 4), keepdims=True)
        change = np.linalg.norm(values[:, 1:] - values[:, :-1]) / np.linalg.norm(deviation[:, 1:])
        assert 0.1 < change < 0.6
    assert (result.diagnostics["autocatalyst_std"] > 0.05).all()


def test_blow_up_names_regime_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a wrong bound of the reaction's rate makes it blow up: here one that leaves out the feed."""
    monkeypatch.setattr("shodh.physics.regimes.gray_scott.REACTION_RADIUS", 2.0 - 40.0)
    with pytest.raises(NonFiniteError, match=r"gray_scott.*seed 7.*time_step"):
        get_regime("gray_scott", feed=40.0, time_step=20.0).simulate([7], (8, 8, 8), 3)
