"""Sound on the staggered grid: dispersion, energy, reflection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.physics import get_regime
from shodh.physics.solvers.acoustics import SoundField, stable_steps

SPACE, SPACING = (12, 10, 9), (0.1, 0.13, 0.08)


def random_sound(periodic: tuple[bool, bool, bool]) -> SoundField:
    draw = torch.Generator().manual_seed(1)
    speed = 0.5 + torch.rand(2, *SPACE, generator=draw, dtype=torch.float64)
    sound = SoundField(speed, SPACING, periodic)
    sound.pressure.normal_(generator=draw)
    sound.velocity = sound.slope(torch.randn(2, *SPACE, generator=draw, dtype=torch.float64))
    return sound


@pytest.mark.parametrize("waves", [(1, 0, 0), (2, 3, 1), (5, 4, 7)])
def test_standing_wave_obeys_the_discrete_dispersion_relation(waves: tuple[int, int, int]) -> None:
    """``sin^2(w dt / 2) = sum C_i^2 sin^2(k_i h_i / 2)``: a wave at rest at first is ``cos(w t)`` at every step."""
    speed, dt = 1.3, 0.03
    sound = SoundField(torch.full((1, *SPACE), speed, dtype=torch.float64), SPACING, (True, True, False))
    mode, total = torch.ones(1, *SPACE, dtype=torch.float64), 0.0
    for axis, (n, m) in enumerate(zip(SPACE, waves)):
        half_waves = m if axis == 2 else 2 * m  # between walls half waves fit
        line = torch.cos(math.pi * half_waves * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
        mode *= line.view([n if a == axis else 1 for a in range(3)])
        total += (speed * dt / SPACING[axis] * math.sin(0.5 * math.pi * half_waves / n)) ** 2
    omega = 2 / dt * math.asin(math.sqrt(total))
    sound.pressure.copy_(mode)
    for step in range(1, 30):
        sound.advance(dt, 1)
        torch.testing.assert_close(sound.pressure, math.cos(omega * step * dt) * mode, rtol=0, atol=1e-12)


@pytest.mark.parametrize("periodic", [(True, True, True), (False, True, False)])
def test_energy_is_conserved_up_to_the_limit_of_stability(periodic: tuple[bool, bool, bool]) -> None:
    sound = random_sound(periodic)
    fastest = float(sound.stiffness.max().sqrt())
    interval = 3.0
    steps = stable_steps(interval, fastest, SPACING, 0.99)
    before = sound.energy(interval / steps)
    assert (before > 0).all()
    sound.advance(interval, steps)
    torch.testing.assert_close(sound.energy(interval / steps), before, rtol=1e-12, atol=0)
    for axis in range(3):
        if not periodic[axis]:
            assert float(sound.velocity[axis].select(axis + 1, -1).abs().max()) == 0.0


def test_beyond_the_limit_of_stability_sound_blows_up() -> None:
    sound = SoundField(torch.ones(1, *SPACE, dtype=torch.float64), SPACING, (True, True, True))
    sound.pressure.normal_(generator=torch.Generator().manual_seed(0))
    steps = stable_steps(30.0, 1.0, SPACING, 1.1)
    sound.advance(30.0, steps)
    assert float(sound.pressure.abs().max()) > 1e6


@pytest.mark.parametrize("cells", [200, 400])
@pytest.mark.parametrize("ratio", [0.5, 3.0])
def test_interface_reflects_by_the_impedances(cells: int, ratio: float) -> None:
    """``R = (c2 - c1) / (c2 + c1)``, ``T = 1 + R`` at equal densities; first order in the place of the interface."""
    h, start, width = 1 / cells, 0.25, 0.03
    speed = torch.ones(1, cells, 1, 1, dtype=torch.float64)
    speed[:, cells // 2 :] = ratio
    sound = SoundField(speed, (h, 1.0, 1.0), (False, True, True))
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) * h
    sound.pressure[0, :, 0, 0] = torch.exp(-(((x - start) / width) ** 2))
    sound.velocity[0][0, :, 0, 0] = torch.exp(-(((x + 0.5 * h - start) / width) ** 2))  # travels upward
    time = 0.25 + 0.15 * min(1.0, 1 / ratio) + 0.02
    sound.advance(time, stable_steps(time, max(1.0, ratio), (h, 1e9, 1e9), 0.5))
    pressure = sound.pressure[0, :, 0, 0]
    reflected, transmitted = pressure[: cells // 2 - cells // 50], pressure[cells // 2 :]
    expected = (ratio - 1) / (ratio + 1)
    assert float(reflected[reflected.abs().argmax()]) == pytest.approx(expected, abs=6 * h)
    assert float(transmitted.max()) == pytest.approx(1 + expected, abs=6 * h)


def test_energy_starts_in_equal_halves_and_stays() -> None:
    result = get_regime("acoustics").simulate([0, 1], (20, 16, 18), 8)
    pressure, velocity = (result.values[f].astype(np.float64)[:, 0] for f in ("pressure", "acoustic_velocity"))
    speed = result.values["sound_speed"].astype(np.float64)
    potential, kinetic = ((pressure / speed) ** 2).mean((1, 2, 3)), (velocity**2).sum(-1).mean((1, 2, 3))
    np.testing.assert_allclose(potential, kinetic, rtol=1e-5)
    assert np.abs(result.diagnostics["energy_drift"]).max() < 1e-5
    assert speed.min() >= 1.0 and speed.max() <= 2.0 and speed.std() > 0.1


def test_sound_moves_between_frames_and_is_irrotational_in_a_wall_bounded_box() -> None:
    result = get_regime("acoustics").simulate([0], (24, 24, 24), 6)
    for name in ("pressure", "acoustic_velocity"):
        values = result.values[name].astype(np.float64)
        change = np.linalg.norm(values[:, 1:] - values[:, :-1]) / np.linalg.norm(values[:, 1:])
        assert 0.1 < change < 0.6
    u = result.values["acoustic_velocity"][0, -1].astype(np.float64)
    assert np.abs(u[:, :, -1, 2]).max() == 0.0
    # No force of this system has a curl: d_x u_y = d_y u_x for ever, here on the periodic axes.
    ddx, ddy = (np.roll(u[..., b], -1, axis=a) - u[..., b] for a, b in ((0, 1), (1, 0)))
    assert np.abs(ddx - ddy).max() < 1e-5 * np.abs(u).max()


@pytest.mark.parametrize("parameters", [{"contrast": 0.5}, {"courant": 1.2}, {"wave_scale": 0.0}])
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        get_regime("acoustics", **parameters)
