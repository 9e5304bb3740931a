"""Equations of one scalar: exact where linear, of fourth order, resolved, opposed to one another."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from shodh.physics.opposed import EQUATIONS, HELD_OUT, OPPOSED, Equation, coloured
from shodh.physics.solvers.exponential import Etdrk4, Waves, phi

N, SAMPLES = 32, 4
WAVES = Waves(N, dtype=torch.float64)
LINEAR = [name for name, e in EQUATIONS.items() if e.nonlinear is None]
CURVED = [name for name, e in EQUATIONS.items() if e.nonlinear is not None]


def drawn(equation: Equation) -> dict[str, Tensor]:
    return equation.draw(torch.rand(SAMPLES, 4, generator=torch.Generator().manual_seed(1)))


def noise(waves: Waves = WAVES) -> Tensor:
    return coloured(waves, torch.randn(SAMPLES, N, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


def solved(name: str, **changes: object) -> Tensor:
    equation = replace(EQUATIONS[name], **changes)  # type: ignore[arg-type]
    return equation.solve(WAVES, noise(), drawn(equation), 3)


def test_sixteen_stand_apart() -> None:
    assert len(OPPOSED) == 16 and not any("angle" in EQUATIONS[name].ranges for name in (*OPPOSED, *HELD_OUT))
    assert len(HELD_OUT) == 8 and len(EQUATIONS) == 26


def test_coefficients_agree_with_their_definition_across_the_change_of_formula() -> None:
    """Closed forms lose the digits that `phi` keeps near zero, so the reference is a long series."""
    radius = torch.tensor([1e-9, 1e-3, 0.99, 1.0, 1.01, 3.0], dtype=torch.float64)
    z = (radius[:, None] * torch.exp(1j * torch.linspace(0, 2 * math.pi, 7, dtype=torch.float64))).flatten()
    for order, found in enumerate(phi(z), 1):
        reference = sum(z**j / float(math.factorial(j + order)) for j in range(40))
        assert torch.allclose(found, reference, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_equation_is_solved_exactly(name: str) -> None:
    """A plane wave is multiplied by ``exp(L t)``, written out in real numbers here."""
    equation, k = EQUATIONS[name], (2, -1)
    parameters = drawn(equation)
    axis = torch.arange(N, dtype=torch.float64) * 2 * math.pi / N
    phase = k[0] * axis[:, None] + k[1] * axis[None]
    found = equation.solve(WAVES, torch.cos(phase).expand(SAMPLES, N, N), parameters, 3)
    value, *more = (v.view(-1, 1, 1) for v in parameters.values())
    x, y = (torch.cos(more[0]), torch.sin(more[0])) if more else (1.0, 1.0)
    growth, turn = {
        "advection_right": (0.0, -k[0]),
        "advection_left": (0.0, k[0]),
        "advection_up": (0.0, -k[1]),
        "advection_down": (0.0, k[1]),
        "diffusion": (-5.0, 0.0),
        "hyperdiffusion": (-25.0, 0.0),
        "dispersion_x": (0.0, k[0] ** 3),
        "dispersion_y": (0.0, -(k[1] ** 3)),
        "advection_any": (0.0, -x * k[0] - y * k[1]),
        "advection_diagonal": (0.0, -k[0] - k[1]),
        "advection_antidiagonal": (0.0, k[1] - k[0]),
        "diffusion_x": (-4.0, 0.0),
        "diffusion_y": (-1.0, 0.0),
        "dispersion_any": (0.0, x * k[0] ** 3 + y * k[1] ** 3),
    }[name]
    for frame in (1, 2):
        time = frame * equation.interval * value
        exact = torch.exp(growth * time) * torch.cos(phase + turn * time)
        assert torch.allclose(found[:, frame], exact, atol=1e-12)


@pytest.mark.parametrize("name", CURVED)
def test_scheme_converges_at_fourth_order(name: str) -> None:
    """From long waves: short ones that a stiff equation damps at once lower the order until steps resolve that."""
    equation, parameters = EQUATIONS[name], drawn(EQUATIONS[name])
    smooth = WAVES.field(WAVES.spectrum(noise()) * (WAVES.squared <= 4))

    def last(factor: int) -> Tensor:
        return replace(equation, steps=factor * equation.steps).solve(WAVES, smooth, parameters, 2)[:, -1]

    fine = last(32)
    errors = [float((last(factor) - fine).square().mean().sqrt()) for factor in (4, 8)]
    assert 3.5 < math.log2(errors[0] / errors[1]) < 5.5


def test_scheme_with_a_linear_rate_as_the_rest_is_of_fourth_order() -> None:
    """``u' = -u`` taken apart as ``L = -0.4`` and ``N(u) = -0.6 u``, against ``e^-t``."""
    errors = []
    for steps in (4, 8):
        scheme = Etdrk4.of(torch.tensor([-0.4 + 0j], dtype=torch.complex128), 1 / steps, torch.float64)
        state = torch.ones(1, dtype=torch.complex128)
        for _ in range(steps):
            state = scheme.step(state, lambda u: -0.6 * u)
        errors.append(abs(state.item() - math.exp(-1)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("name", EQUATIONS)
def test_regime_is_bounded_resolved_and_worth_predicting(name: str) -> None:
    """In float32, as it is used: against four times the steps, and in what a step changes."""
    equation, waves = EQUATIONS[name], Waves(N)
    frames = equation.solve(waves, noise(waves), drawn(equation), 3)
    fluctuation = (frames - frames.mean((2, 3), keepdim=True)).square().mean().sqrt()
    assert frames.isfinite().all() and float(frames.abs().max()) < 15
    error = (frames - solved(name, steps=4 * equation.steps)).square().mean().sqrt()
    assert float(error / fluctuation) < 5e-3
    energy, size = torch.fft.rfft2(frames[:, -1]).abs().square().mean(0), waves.squared.sqrt()
    last = energy[(size > 9) & (waves.kept > 0)].mean()
    assert float(last / energy[(size > 0) & (size < 4)].mean()) < 1e-2
    change = (frames[:, 2] - frames[:, 1]).square().mean().sqrt() / fluctuation
    assert 0.02 < float(change) < 1.0


@pytest.mark.parametrize("name", [n for n, e in EQUATIONS.items() if e.conserves_mean])
def test_mean_is_conserved(name: str) -> None:
    means = solved(name).mean((2, 3))
    assert float((means - means[:, :1]).abs().max()) < 1e-12


@pytest.mark.parametrize("name", [n for n, e in EQUATIONS.items() if not e.conserves_mean])
def test_mean_moves_where_it_is_not(name: str) -> None:
    means = solved(name).mean((2, 3))
    assert float((means - means[:, :1]).abs().max()) > 1e-3


def test_every_two_equations_take_one_state_to_different_ones() -> None:
    """The state is Fisher's, which all of them take; the difference is beside the larger of both changes."""
    state = torch.sigmoid(2 * noise())
    after = {}
    for name, equation in EQUATIONS.items():
        plain = replace(equation, spin_up=0, start=lambda u: u)
        after[name] = plain.solve(WAVES, state, drawn(equation), 2)[:, 1] - WAVES.field(WAVES.spectrum(state))
    for a, b in combinations(EQUATIONS, 2):
        difference = (after[a] - after[b]).square().mean().sqrt()
        assert difference > 0.1 * max(after[name].square().mean().sqrt() for name in (a, b)), (a, b)


@pytest.mark.parametrize(("one", "other", "axes"), [
    ("advection_right", "advection_left", (1,)), ("advection_up", "advection_down", (2,)),
    ("advection_right", "advection_up", None), ("dispersion_x", "dispersion_y", None),
    ("burgers", "burgers_back", (1, 2)), ("diffusion_x", "diffusion_y", None),
    ("advection_diagonal", "advection_antidiagonal", (2,)), ("korteweg", "korteweg_y", None),
])  # fmt: skip
def test_opposed_equations_are_mirror_images(one: str, other: str, axes: tuple[int, ...] | None) -> None:
    """Of a state that is turned about its first cell, or whose axes are swapped."""

    def mirrored(u: Tensor) -> Tensor:
        if axes is not None:
            return u.flip(axes).roll([1] * len(axes), axes)
        swapped = u.transpose(1, 2)
        return swapped if "dispersion" not in one else swapped.flip(2).roll(1, 2)

    parameters = drawn(EQUATIONS[one])
    straight = EQUATIONS[one].solve(WAVES, noise(), parameters, 2)[:, 1]
    turned = EQUATIONS[other].solve(WAVES, mirrored(noise()), parameters, 2)[:, 1]
    assert torch.allclose(mirrored(straight), turned, atol=1e-10)
