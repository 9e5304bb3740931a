"""The spectral core: exactness of transforms and products, order in time, staggered output, blow-ups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shodh.physics.solvers.operators import divergence
from shodh.physics.solvers.spectral import (
    COURANT_LIMIT,
    BlowUp,
    SpectralGrid,
    advance,
    random_scalar,
    random_vector,
    step,
)
from shodh.physics.solvers.spectral_flow import IncompressibleFlow, enstrophy, kinetic_energy
from shodh.physics.solvers.stability import Clock

TAU = 2.0 * math.pi
BOX = (TAU, TAU, TAU)


def make_grid(cells: int | tuple[int, ...], lengths: tuple[float, ...] = BOX) -> SpectralGrid:
    grid = (cells,) * len(lengths) if isinstance(cells, int) else cells
    return SpectralGrid(grid, lengths, torch.float64)


def broad(k: Tensor) -> Tensor:
    """Amplitude of a field that reaches up to the smallest scales."""
    return 1.0 / (1.0 + k)


def smooth(k: Tensor) -> Tensor:
    return k * torch.exp(-((k / 2.5) ** 2))


def observed_order(errors: list[float]) -> float:
    """Order between the two finest of a sequence of halved steps."""
    return math.log2(errors[-2] / errors[-1])


def test_two_dimensional_taylor_green_decays_exactly() -> None:
    """The advective term is a gradient and diffusion is integrated exactly, so only rounding is left."""
    space, viscosity, k, time = make_grid((24, 18, 4)), 0.05, 2, 0.7
    x, y, z = space.centers()
    velocity = torch.stack(
        torch.broadcast_tensors(
            torch.sin(k * x) * torch.cos(k * y) + 0 * z, -torch.cos(k * x) * torch.sin(k * y), 0 * z
        )
    )
    state = advance(
        IncompressibleFlow(space, viscosity), space.forward(velocity)[None], time, courant=0.5 * COURANT_LIMIT
    )
    energy = kinetic_energy(space, state).item()
    assert energy == pytest.approx(0.25 * math.exp(-4.0 * viscosity * k**2 * time), rel=1e-12)
    expected = velocity * math.exp(-2.0 * viscosity * k**2 * time)
    assert (space.inverse(state)[0] - expected).abs().max() < 1e-12


def test_pressure_of_the_taylor_green_vortex() -> None:
    space = make_grid((16, 18, 5))
    x, y, z = space.centers()
    velocity = torch.stack(
        torch.broadcast_tensors(torch.sin(x) * torch.cos(y) + 0 * z, -torch.cos(x) * torch.sin(y), 0 * z)
    )
    pressure = space.inverse(IncompressibleFlow(space, 0.01).pressure(space.forward(velocity)[None]))[0]
    assert (pressure - 0.25 * (torch.cos(2 * x) + torch.cos(2 * y))).abs().max() < 1e-13


def test_products_are_free_of_aliasing() -> None:
    """The rotational form on a grid equals the convective form of the same modes on a grid twice as fine."""
    coarse, fine = make_grid((16, 15, 12)), make_grid((32, 30, 24))
    small = random_vector(coarse, 1, "velocity", broad)
    large = torch.zeros(3, *fine.modes, dtype=torch.complex128)
    for axis_x in (slice(0, 6), slice(-5, None)):
        for axis_y in (slice(0, 5), slice(-4, None)):
            large[:, axis_x, axis_y, :4] = small[:, axis_x, axis_y, :4]
    velocity = fine.inverse(large)
    slopes = fine.inverse(fine.gradient(large))
    expected = -fine.project(fine.forward(torch.einsum("jxyz,ijxyz->ixyz", velocity, slopes)))
    found = IncompressibleFlow(coarse, 0.0).tendency(small[None])[0][0]
    assert found.abs().max() > 1e-3
    for axis_x in (slice(0, 6), slice(-5, None)):
        for axis_y in (slice(0, 5), slice(-4, None)):
            difference = found[:, axis_x, axis_y, :4] - expected[:, axis_x, axis_y, :4]
            assert difference.abs().max() < 1e-14


def test_advection_conserves_energy_and_tracer_variance() -> None:
    """The truncated Euler equations do so exactly: the tendency does no work."""
    space = make_grid((16, 15, 12), (TAU, 5.0, 3.0))
    state = torch.cat((random_vector(space, 1, "u", broad), space.forward(random_scalar(space, 1, "c", broad))[None]))
    slope = IncompressibleFlow(space, 0.0).tendency(state[None])[0]
    work = space.mean_product(slope, state[None])[0]
    size = space.mean_product(slope, slope)[0].sqrt() * space.mean_product(state, state).sqrt()
    assert work[:3].sum().abs() < 1e-13 * size[:3].sum()
    assert work[3].abs() < 1e-13 * size[3]


def test_steps_are_of_fourth_order() -> None:
    space = make_grid(16)
    flow = IncompressibleFlow(space, 0.05, injection=0.5, forced_wavenumber=1.5)
    start = torch.cat((random_vector(space, 2, "u", smooth), space.forward(random_scalar(space, 2, "c", smooth))[None]))

    def solve(steps: int) -> Tensor:
        state = start[None]
        for _ in range(steps):
            state = step(flow, state, torch.tensor([0.8 / steps], dtype=torch.float64))
        return state

    reference = solve(96)
    errors = [(solve(n) - reference).abs().max().item() for n in (6, 12, 24)]
    assert 3.7 < observed_order(errors) < 4.6


def test_energy_budget_closes_at_fourth_order() -> None:
    """``E(t) - E(0) = integral of (injection - 2 nu enstrophy)``, the integral by Simpson's rule over the steps."""
    space, viscosity, injection = make_grid(16), 0.05, 0.5
    flow = IncompressibleFlow(space, viscosity, injection=injection, forced_wavenumber=1.5)
    start = random_vector(space, 3, "u", smooth)[None]

    def gap(steps: int) -> float:
        state, dt, rates = start, 0.8 / steps, []
        for index in range(steps + 1):
            rates.append(injection - 2.0 * viscosity * enstrophy(space, state).item())
            if index < steps:
                state = step(flow, state, torch.tensor([dt], dtype=torch.float64))
        simpson = dt / 3.0 * (rates[0] + rates[-1] + 4.0 * sum(rates[1:-1:2]) + 2.0 * sum(rates[2:-1:2]))
        change = kinetic_energy(space, state).item() - kinetic_energy(space, start).item()
        return abs(change - simpson)

    errors = [gap(n) for n in (8, 16, 32)]
    assert observed_order(errors) > 3.6
    assert errors[-1] < 1e-5


@pytest.mark.parametrize("cells, lengths", [((13, 12, 15), (TAU, 3.0, 11.0)), ((16, 9), (2.0, 7.0))])
def test_faces_are_discretely_divergence_free(cells: tuple[int, ...], lengths: tuple[float, ...]) -> None:
    space = make_grid(cells, lengths)
    spectrum = random_vector(space, 4, "u", broad)[None]
    faces = space.to_faces(spectrum, solenoidal=True)
    terms = [(u - torch.roll(u, 1, dims=1 + a)) / space.spacing[a] for a, u in enumerate(faces.unbind(1))]
    scale = faces.abs().max() / min(space.spacing)
    assert sum(terms).abs().max() < 1e-13 * scale
    # Point values of the same field are not.
    points = space.to_faces(spectrum, solenoidal=False)
    terms = [(u - torch.roll(u, 1, dims=1 + a)) / space.spacing[a] for a, u in enumerate(points.unbind(1))]
    assert sum(terms).abs().max() > 1e-3 * scale


def test_faces_hold_the_values_there() -> None:
    space = make_grid((12, 10, 9), (TAU, TAU, 3.0))
    x, y, z = space.centers()

    def field(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        w = TAU / 3.0 * z
        return [torch.sin(x + 2 * y + w), torch.cos(2 * x - y) + 0 * z, torch.sin(y + w) + 0 * x]

    spectrum = space.forward(torch.stack(field(x, y, z)))[None]
    found = space.to_faces(spectrum, solenoidal=False)[0]
    for axis in range(3):
        moved = [c + 0.5 * h * (a == axis) for a, (c, h) in enumerate(zip(space.centers(), space.spacing))]
        assert (found[axis] - field(*moved)[axis]).abs().max() < 1e-13


def test_discrete_projection_is_a_second_order_change() -> None:
    changes = []
    for cells in (16, 32, 64):
        space = make_grid(cells)
        spectrum = random_vector(space, 5, "u", lambda k: (k < 4.5).double())[None]
        change = space.to_faces(spectrum, solenoidal=True) - space.to_faces(spectrum, solenoidal=False)
        changes.append(change.square().mean().sqrt().item())
    assert 1.9 < observed_order(changes) < 2.1


def test_stored_fp32_faces_are_divergence_free_to_rounding() -> None:
    space = make_grid(24)
    faces = space.to_faces(random_vector(space, 6, "u", broad)[None], solenoidal=True).float()
    rest = divergence(faces.double().unbind(1), space.spacing, first=1).abs().max()
    assert 0 < rest < 4 * torch.finfo(torch.float32).eps * faces.abs().max() / min(space.spacing)


def test_random_fields_do_not_depend_on_the_grid() -> None:
    coarse, fine = make_grid((16, 16, 18)), make_grid((48, 48, 54))
    small, large = (space.inverse(random_vector(space, 7, "x", lambda k: (k < 5).double())) for space in (coarse, fine))
    # The centre of a coarse cell is the centre of the middle one of its three fine cells.
    assert (small - large[:, 1::3, 1::3, 1::3]).abs().max() < 1e-12
    assert not torch.equal(coarse.noise(7, "x", 2), coarse.noise(8, "x", 2))


def test_random_vectors_are_solenoidal_or_gradients_with_unit_rms() -> None:
    space = make_grid((16, 12, 14), (TAU, 4.0, 5.0))
    vortices = random_vector(space, 1, "u", broad)
    gradient = random_vector(space, 1, "u", broad, solenoidal=False)
    assert space.divergence(vortices).abs().max() < 1e-14
    assert space.curl(gradient).abs().max() < 1e-14
    for field in (vortices, gradient):
        assert space.inverse(field).square().mean().item() == pytest.approx(1.0)


def test_trajectories_take_steps_of_their_own() -> None:
    space = make_grid(12)
    flow = IncompressibleFlow(space, 0.05)
    slow, fast = random_vector(space, 1, "u", smooth), 7.0 * random_vector(space, 2, "u", smooth)
    clock = Clock(2)
    both = advance(flow, torch.stack((slow, fast)), 0.3, 0.8, clock)
    steps = clock.steps
    assert steps[1] > 3 * steps[0] > 0
    for index, field in enumerate((slow, fast)):
        single = Clock(1)
        alone = advance(flow, field[None], 0.3, 0.8, single)
        assert single.steps[0] == steps[index]
        assert (alone[0] - both[index]).abs().max() < 1e-12


def test_unstable_or_broken_trajectory_is_named() -> None:
    space = make_grid(8)
    good = random_vector(space, 1, "u", smooth)
    for bad in (good * math.nan, good * 1e9):
        with pytest.raises(BlowUp) as caught:
            advance(IncompressibleFlow(space, 0.1), torch.stack((good, bad)), 1.0, 0.8)
        assert caught.value.index == 1


def test_outer_share_tells_smooth_from_rough() -> None:
    space = make_grid(32)
    rough = space.outer_share(random_vector(space, 1, "u", lambda k: torch.ones_like(k))[None])
    fine = space.outer_share(random_vector(space, 1, "u", smooth)[None])
    # White: the shell between the cubes of half-width 8.5 and 10.5 modes, (21^3 - 17^3) / 21^3 = 0.47.
    assert rough.item() == pytest.approx(0.47, abs=0.03)
    assert fine.item() < 1e-8
