"""The exact mode: bitwise conservation in the stored field, at next to no cost in accuracy, and never in silence."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from decode_cases import random_case, smooth_noise

from shodh.core.errors import NonFiniteError
from shodh.ops import checked, decode_velocity, divergence, extension, face_flux

BUILT = ["reference", *(["cpp"] if extension.unavailable_reason("cpp") is None else [])]


@pytest.mark.parametrize("implementation", BUILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discrete_divergence_is_exactly_zero(dtype: torch.dtype, implementation: str) -> None:
    """200 random fields: noise and smooth, three scales, odd sizes, walls on any axis, batches of mixed size."""
    for seed in range(200):
        case = random_case(seed, dtype)
        velocity = decode_velocity(case.potential, case.harmonic, **case.box, exact=True, implementation=implementation)
        assert velocity.isfinite().all()
        balance = divergence(face_flux(velocity, spacing=case.spacing), **case.divergence_box)
        assert balance.abs().max() == 0.0, f"seed {seed}: {case.box}"
        if case.is_dyadic:
            assert divergence(velocity, **case.box).abs().max() == 0.0, f"seed {seed}: {case.box}"


def test_the_plain_decode_is_not_exact() -> None:
    """Otherwise the test above would prove nothing."""
    velocity = decode_velocity(torch.randn(1, 3, 9, 8, 7), torch.randn(1, 3))
    assert divergence(velocity).abs().max() > 0.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (0.1, 0.13, 0.06)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_rounding_costs_next_to_no_accuracy(spacing: tuple[float, ...], offset: float) -> None:
    """Within 1e-6 of the plain decode for smooth fields, also where the potential is far larger than the velocity."""
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 1e6, 1e-6):
        potential = (scale * (smooth_noise((2, 3, 40, 33, 24), generator) + offset)).float()
        harmonic = (scale * torch.randn(2, 2, generator=generator)).float()
        box = {"spacing": spacing, "boundary": ("periodic", "periodic", "wall")}
        exact = decode_velocity(potential, harmonic, **box, exact=True).double()
        plain = decode_velocity(potential.double(), harmonic.double(), **box)
        assert (exact - plain).norm() <= 1e-6 * plain.norm()


def test_samples_do_not_share_a_lattice() -> None:
    potential = torch.randn(3, 3, 7, 6, 5) * torch.tensor([1.0, 1e6, 1e-6]).reshape(3, 1, 1, 1, 1)
    together = decode_velocity(potential, None, exact=True)
    alone = torch.cat([decode_velocity(sample[None], None, exact=True) for sample in potential])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("implementation", BUILT)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_is_never_a_wrong_zero(bad: float, implementation: str) -> None:
    potential = torch.randn(3, 3, 9, 5, 17)
    potential[1, 2, 4, 2, 8], potential[1, 2, 4, 1, 8] = bad, -bad  # the last overflows: u = 6e38
    velocity = decode_velocity(potential, None, exact=True, implementation=implementation)
    assert velocity[1].isnan().all()
    assert velocity[[0, 2]].isfinite().all()
    assert not bool((divergence(velocity)[1] == 0.0).any())
    for exact in (True, False):
        with checked(), pytest.raises(NonFiniteError, match=r"samples \[1\]"):
            decode_velocity(potential, None, exact=exact, implementation=implementation)


def test_harmonic_part_that_is_not_finite_is_found() -> None:
    with checked(), pytest.raises(NonFiniteError):
        decode_velocity(torch.randn(1, 3, 4, 4, 4), torch.tensor([[0.0, math.nan, 0.0]]), exact=True)


def test_zero_stays_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        velocity = decode_velocity(torch.zeros(2, 3, 5, 4, 3, dtype=dtype), None, exact=True)
        assert torch.equal(velocity, torch.zeros_like(velocity))


@pytest.mark.parametrize("implementation", BUILT)
def test_lattice_follows_the_largest_velocity_wherever_it_is(implementation: str) -> None:
    """A jet in one plane that a coarse sample of planes would miss, next to fluid almost at rest."""
    for plane, jet in product(range(9), (300.0, 1e12)):
        potential = 1e-4 * torch.randn(1, 3, 9, 6, 20)
        potential[:, 0, plane] += jet * (2.0 + torch.rand(1, 6, 20))
        velocity = decode_velocity(potential, None, exact=True, implementation=implementation)
        assert divergence(velocity).abs().max() == 0.0
        reference = decode_velocity(potential, None, exact=True, implementation="reference")
        assert torch.equal(velocity, reference)


@pytest.mark.parametrize("implementation", BUILT)
@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.3, 0.3, 0.3)])
def test_potential_far_larger_than_the_velocity(spacing: tuple[float, ...], implementation: str) -> None:
    """A gauge part, constant along two axes, that is up to 1e10 times the rest and leaves the velocity alone."""
    for gauge in (10.0, 1e2, 1e4, 1e7, 1e10):
        potential = torch.randn(2, 3, 19, 7, 33)
        potential[1, 0] = gauge * torch.randn(19, 1, 1)
        velocity = decode_velocity(potential, None, spacing=spacing, exact=True, implementation=implementation)
        assert divergence(velocity, spacing=spacing).abs().max() == 0.0
        plain = decode_velocity(potential.double(), None, spacing=spacing)
        assert (velocity - plain).norm() <= (1e-6 + 2.0**-48 * gauge) * plain.norm()


@pytest.mark.parametrize("implementation", BUILT)
def test_gradient_passes_straight_through_the_rounding(implementation: str) -> None:
    case = random_case(11)
    weight = torch.randn_like(decode_velocity(case.potential, case.harmonic, **case.box))
    gradients = []
    for exact in (False, True):
        potential = case.potential.clone().requires_grad_()
        velocity = decode_velocity(potential, case.harmonic, **case.box, exact=exact, implementation=implementation)
        gradients.append(torch.autograd.grad((velocity * weight).sum(), potential)[0])
    assert torch.equal(*gradients)
