"""Free shear layers: growth of the most amplified wave against linear theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.regimes.shear_layer import AMPLIFIED, mean_profile
from shodh.physics.solvers.spectral import SpectralGrid, step
from shodh.physics.solvers.spectral_flow import IncompressibleFlow

# Across: the two layers, half of it apart, shift each other's growth rate by about exp(-k * 24) / 2, 1e-5.
LENGTH = 48.0
CELLS = 256


def linear_theory(viscosity: float) -> tuple[float, NDArray[np.complex128]]:
    """Largest growth rate and the ``w`` of its eigenvector: the Orr-Sommerfeld matrix in Fourier collocation."""
    z = (np.arange(CELLS) + 0.5) * LENGTH / CELLS
    profile = mean_profile(torch.from_numpy(z), LENGTH).numpy()
    wavenumber = 2.0 * np.pi * np.fft.fftfreq(CELLS, LENGTH / CELLS)
    fourier = np.fft.fft(np.eye(CELLS), axis=0)

    def multiplier(symbol: NDArray[np.float64]) -> NDArray[np.complex128]:
        return np.fft.ifft(symbol[:, None] * fourier, axis=0)

    curvature = np.fft.ifft(-(wavenumber**2) * np.fft.fft(profile)).real
    laplacian = multiplier(-(wavenumber**2) - AMPLIFIED**2)
    advection = -1j * AMPLIFIED * (profile[:, None] * laplacian - np.diag(curvature))
    matrix = np.linalg.solve(laplacian, advection + viscosity * laplacian @ laplacian)
    values, vectors = np.linalg.eig(matrix)
    best = values.real.argmax()
    assert abs(values[best].imag) < 1e-6
    return float(values[best].real), vectors[:, best]


def wave(space: SpectralGrid, profile_of_w: NDArray[np.complex128]) -> torch.Tensor:
    """The velocity ``[3, *modes]`` of an eigenvector: ``w e^(ikx)`` with ``u = i w' / k``."""
    wavenumber = 2.0 * np.pi * np.fft.fftfreq(CELLS, LENGTH / CELLS)
    w = profile_of_w / np.abs(profile_of_w).max()
    u = 1j / AMPLIFIED * np.fft.ifft(1j * wavenumber * np.fft.fft(w))
    phase = np.exp(1j * AMPLIFIED * space.centers()[0].numpy())
    fields = [(part * phase).real + np.zeros(space.grid) for part in (u, np.zeros(CELLS), w)]
    return space.forward(torch.from_numpy(np.stack(fields)))


@pytest.fixture(scope="module")
def space() -> SpectralGrid:
    return SpectralGrid((8, 4, CELLS), (2.0 * math.pi / AMPLIFIED, 5.0, LENGTH), torch.float64)


def base_flow(space: SpectralGrid) -> torch.Tensor:
    profile = mean_profile(space.centers()[2], LENGTH).expand(space.grid)
    return space.forward(torch.stack((profile, torch.zeros_like(profile), torch.zeros_like(profile))))


def test_linear_theory_gives_michalkes_growth_rate() -> None:
    assert linear_theory(0.0)[0] == pytest.approx(0.1897, abs=5e-5)


def test_solver_amplifies_the_eigenvector_at_its_rate(space: SpectralGrid) -> None:
    """Without viscosity the layer is steady: after 10 time units a small wave has grown by ``exp(10 sigma)``."""
    rate, w = linear_theory(0.0)
    flow, base = IncompressibleFlow(space, 0.0), base_flow(space)
    state = (base + 1e-6 * wave(space, w))[None]
    before = (state[0] - base).abs().max().item()
    time, steps = 10.0, 100
    for _ in range(steps):
        state = step(flow, state, torch.tensor([time / steps], dtype=torch.float64))
    grown = math.log((state[0] - base).abs().max().item() / before) / time
    assert grown == pytest.approx(rate, rel=1e-4)
    assert grown == pytest.approx(0.1897, abs=1e-4)


@pytest.mark.parametrize("reynolds", [50.0, 100.0])
def test_viscosity_slows_the_growth_as_linear_theory_says(space: SpectralGrid, reynolds: float) -> None:
    """The operator linearised about the layer has that eigenvalue, up to the eigenvector's truncated waves."""
    rate, w = linear_theory(1.0 / reynolds)
    assert rate < 0.1897 - 0.5 / reynolds
    flow, base, small = IncompressibleFlow(space, 1.0 / reynolds), base_flow(space), wave(space, w)
    # Half the difference is the exact derivative of a quadratic term.
    ahead, behind = (flow.tendency((base + sign * small)[None])[0][0] for sign in (1.0, -1.0))
    slope = 0.5 * (ahead - behind) - flow.decay[:3] * small
    assert (slope - rate * small).abs().max() < 2e-6 * rate * small.abs().max()


def test_layers_roll_up_and_the_tracer_marks_the_streams() -> None:
    result = get_regime("shear_layer").simulate([0, 1], (24, 12, 24), 3, spin_up=0.0, frame_interval=8.0)
    cross = (result.values["velocity"][..., 2].astype(np.float64) ** 2).mean((2, 3, 4)) ** 0.5
    assert (cross[:, 2] > 3.0 * cross[:, 0]).all()
    streams = result.values["tracer"][:, 0].mean((1, 2))
    assert (streams.max(1) > 0.95).all() and (streams.min(1) < 0.05).all()
    velocity = result.values["velocity"][:, 0, ..., 0].mean((1, 2))
    assert np.corrcoef(velocity.ravel(), streams.ravel())[0, 1] > 0.99
    totals = result.values["tracer"].astype(np.float64).sum((2, 3, 4))
    assert np.abs(totals / totals[:, :1] - 1.0).max() < 1e-6


@pytest.mark.parametrize("parameters", [{"length_z": 5.0}, {"perturbation": 2.0}, {"reynolds": 0.0}])
def test_impossible_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("shear_layer", **parameters)
