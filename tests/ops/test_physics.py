"""What the discrete operators promise: conservation, impermeable walls, completeness, second order."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from decode_cases import random_case
from torch import Tensor

from shodh.ops import curl, decode_velocity, divergence

PI = math.pi
BOUNDARIES = [*product(("periodic", "wall"), repeat=2), *product(("periodic", "wall"), repeat=3)]


def gradient_scale(velocity: Tensor, spacing: tuple[float, ...]) -> float:
    """Largest velocity over the smallest spacing."""
    return float(velocity.abs().max()) / min(spacing)


@pytest.mark.parametrize("seed", range(40))
def test_divergence_vanishes_to_rounding_in_double_precision(seed: int) -> None:
    case = random_case(seed, torch.float64)
    velocity = decode_velocity(case.potential, case.harmonic, **case.box)
    scale = max(gradient_scale(velocity, case.spacing), float(case.potential.abs().max()) / min(case.spacing) ** 2)
    assert divergence(velocity, **case.box).abs().max() <= 1e-13 * scale


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_flow_through_walls(boundary: tuple[str, ...]) -> None:
    ndim = len(boundary)
    potential = torch.randn(2, 3 if ndim == 3 else 1, *(5, 6, 7)[:ndim])
    harmonic = torch.randn(2, boundary.count("periodic"))
    for exact in (False, True):
        velocity = decode_velocity(potential, harmonic, boundary=boundary, spacing=(1.0, 0.5, 0.3)[:ndim], exact=exact)
        for axis, kind in enumerate(boundary):
            last_face = velocity[:, axis].select(axis + 1, -1)
            assert bool((last_face == 0).all()) == (kind == "wall")


def test_pinned_entries_are_never_read() -> None:
    potential = torch.randn(1, 3, 4, 5, 6)
    clean = decode_velocity(potential, None, boundary=("wall", "periodic", "wall"))
    spoilt = potential.clone()
    spoilt[:, 1:, -1] = math.nan  # tangential to the wall across x
    spoilt[:, :2, :, :, -1] = math.inf  # tangential to the wall across z
    assert torch.equal(decode_velocity(spoilt, None, boundary=("wall", "periodic", "wall")), clean)
    exact = decode_velocity(potential, None, boundary=("wall", "periodic", "wall"), exact=True)
    assert torch.equal(decode_velocity(spoilt, None, boundary=("wall", "periodic", "wall"), exact=True), exact)


def dense(operator, channels: int, grid: tuple[int, ...]) -> Tensor:
    """Matrix of a linear operator on fields ``[channels, *grid]``."""
    size = channels * math.prod(grid)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, channels, *grid)
    return operator(basis).flatten(1).T


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_divergence_free_field_is_a_decode(boundary: tuple[str, ...]) -> None:
    """curl A + h reaches all fields without divergence and without flux through walls, mean flow included."""
    ndim, grid, spacing = len(boundary), (4, 3, 5)[: len(boundary)], (1.0, 0.7, 0.4)[: len(boundary)]
    box = {"boundary": boundary, "spacing": spacing}
    free = torch.ones(ndim, *grid, dtype=torch.bool)
    for axis, kind in enumerate(boundary):
        if kind == "wall":
            free[axis].select(axis, -1).fill_(False)
    constraint = dense(lambda u: divergence(u, **box), ndim, grid)[:, free.flatten()]

    periodic = boundary.count("periodic")
    decode = dense(lambda a: decode_velocity(a, None, **box), 3 if ndim == 3 else 1, grid)
    zero = torch.zeros(periodic, 3 if ndim == 3 else 1, *grid, dtype=torch.float64)
    constants = decode_velocity(zero, torch.eye(periodic, dtype=torch.float64), **box).flatten(1).T
    reach = torch.cat([decode, constants], 1)
    assert torch.linalg.matrix_rank(reach) == constraint.shape[1] - torch.linalg.matrix_rank(constraint)

    target = torch.zeros(free.numel(), dtype=torch.float64)
    noise = torch.randn(constraint.shape[1], dtype=torch.float64)
    target[free.flatten()] = noise - torch.linalg.pinv(constraint) @ (constraint @ noise)
    residual = target - reach @ (torch.linalg.pinv(reach) @ target)
    assert residual.abs().max() < 1e-11 * target.abs().max()


def test_channel_profile_is_harmonic_plus_departure_from_the_mean() -> None:
    """U(z) between walls across z, built by summing the departure from the bulk velocity over z."""
    profile = torch.rand(1, 9, dtype=torch.float64)
    bulk = profile.mean()
    potential = torch.zeros(1, 3, 4, 5, 9, dtype=torch.float64)
    potential[:, 1] = -torch.cumsum(profile - bulk, 1)[:, None, None]
    velocity = decode_velocity(
        potential, torch.tensor([[bulk, 0.0]]).double(), boundary=("periodic", "periodic", "wall")
    )
    expected = torch.zeros_like(velocity)
    expected[:, 0] = profile[:, None, None]
    assert torch.allclose(velocity, expected, atol=1e-14)


def test_mean_flow_along_a_periodic_axis_is_the_harmonic_part() -> None:
    potential, harmonic = torch.randn(2, 3, 6, 5, 7, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    velocity = decode_velocity(potential, harmonic, boundary=("periodic", "wall", "periodic"), spacing=(0.5, 1.0, 2.0))
    assert torch.allclose(velocity.mean((2, 3, 4))[:, [0, 2]], harmonic, atol=1e-13)


def test_curl_is_the_decode_without_harmonic_part() -> None:
    case = random_case(3, torch.float64)
    zero = torch.zeros(3, case.box["boundary"].count("periodic"), dtype=torch.float64)
    assert torch.equal(curl(case.potential, **case.box), decode_velocity(case.potential, zero, **case.box))


def coordinates(cells: int, length: float, face: bool) -> Tensor:
    """Upper faces or centres of the cells."""
    return (torch.arange(cells, dtype=torch.float64) + (1.0 if face else 0.5)) * length / cells


def mesh(cells: tuple[int, ...], lengths: tuple[float, ...], faces: tuple[bool, ...]) -> list[Tensor]:
    return list(torch.meshgrid(*map(coordinates, cells, lengths, faces), indexing="ij"))


def order(errors: list[float]) -> float:
    """Convergence order from the last halving of the spacing."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("stencil", ["staggered", "central"])
def test_taylor_green_converges_at_second_order(stencil: str) -> None:
    """Stream function cos(x) cos(y): u = (-cos(x) sin(y), sin(x) cos(y)), at the placement of each stencil."""
    errors = []
    staggered = stencil == "staggered"
    for n in (16, 32, 64):
        cells, lengths = (n, 3 * n // 2), (2 * PI, 2 * PI)
        spacing = (2 * PI / cells[0], 2 * PI / cells[1])
        x, y = mesh(cells, lengths, (staggered, staggered))
        velocity = decode_velocity((x.cos() * y.cos())[None, None], None, spacing=spacing, stencil=stencil)[0]
        xu, yu = mesh(cells, lengths, (staggered, False))
        xv, yv = mesh(cells, lengths, (False, staggered))
        expected = torch.stack([-xu.cos() * yu.sin(), xv.sin() * yv.cos()])
        errors.append(float((velocity - expected).abs().max()))
    assert 1.95 < order(errors) < 2.05


def test_wall_bounded_flow_converges_at_second_order() -> None:
    """A = sin(pi z) (sin y, sin x, 0) + (0, 0, cos x cos y) between walls at z = 0 and z = 1."""
    errors = []
    for n in (8, 16, 32):
        cells, lengths = (n, 3 * n // 2, 5 * n // 4), (2 * PI, 2 * PI, 1.0)
        spacing = tuple(length / c for length, c in zip(lengths, cells, strict=True))
        (_, y, z), (x2, _, z2) = mesh(cells, lengths, (False, True, True)), mesh(cells, lengths, (True, False, True))
        x3, y3, _ = mesh(cells, lengths, (True, True, False))
        potential = torch.stack([(PI * z).sin() * y.sin(), (PI * z2).sin() * x2.sin(), x3.cos() * y3.cos()])
        velocity = decode_velocity(potential[None], None, spacing=spacing, boundary=("periodic", "periodic", "wall"))[0]
        xu, yu, zu = mesh(cells, lengths, (True, False, False))
        xv, yv, zv = mesh(cells, lengths, (False, True, False))
        xw, yw, zw = mesh(cells, lengths, (False, False, True))
        expected = torch.stack(
            [
                -xu.cos() * yu.sin() - PI * (PI * zu).cos() * xu.sin(),
                PI * (PI * zv).cos() * yv.sin() + xv.sin() * yv.cos(),
                (PI * zw).sin() * (xw.cos() - yw.cos()),
            ]
        )
        errors.append(float((velocity - expected).abs().max()))
    assert 1.9 < order(errors) < 2.1


@pytest.mark.parametrize("stencil", ["staggered", "central"])
def test_divergence_converges_at_second_order(stencil: str) -> None:
    """On a field that is not divergence-free: u = (sin x cos y, sin y cos x), div u = 2 cos x cos y."""
    errors = []
    staggered = stencil == "staggered"
    for n in (16, 32, 64):
        cells, lengths = (n, 3 * n // 2), (2 * PI, 2 * PI)
        xu, yu = mesh(cells, lengths, (staggered, False))
        xv, yv = mesh(cells, lengths, (False, staggered))
        velocity = torch.stack([xu.sin() * yu.cos(), yv.sin() * xv.cos()])[None]
        x, y = mesh(cells, lengths, (False, False))
        value = divergence(velocity, spacing=(2 * PI / cells[0], 2 * PI / cells[1]), stencil=stencil)[0]
        errors.append(float((value - 2 * x.cos() * y.cos()).abs().max()))
    assert 1.95 < order(errors) < 2.05
