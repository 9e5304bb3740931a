"""Mixing in Fourier space against slow references, and the properties that it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh.models.fourier import FourierMixing, SpectralConvolution, Spectrum, kept_frequencies
from shodh.models.init import initialise

GRIDS = [(6, 5), (8, 8), (4, 5, 6)]


def mixing(grid: tuple[int, ...], modes: int | None, dim: int = 6) -> FourierMixing:
    """With weights large enough that both activations matter."""
    model = FourierMixing(dim, 2, grid, modes).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def mixing_reference(model: FourierMixing, x: Tensor, grid: tuple[int, ...], modes: int | None) -> Tensor:
    """One frequency and one head at a time, in complex numbers."""
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = torch.fft.rfftn(x.unflatten(1, grid), dim=axes, norm="ortho")
    w1, w2 = (torch.complex(w[0], w[1]) for w in (model.w1, model.w2))
    b1, b2 = (torch.complex(*b.view(model.heads, 2, -1).unbind(1)) for b in (model.b1, model.b2))
    out = torch.zeros_like(spectrum)
    size = w1.shape[-1]
    for place in itertools.product(*(range(n) for n in spectrum.shape[1:-1])):
        signed = [k - n if 2 * k >= n and axis < len(grid) - 1 else k for axis, (k, n) in enumerate(zip(place, grid))]
        if modes is not None and any(not (-modes <= k < modes) for k in signed):
            continue
        for head in range(model.heads):
            channels = slice(head * size, (head + 1) * size)
            z = spectrum[(slice(None), *place, channels)] @ w1[head] + b1[head]
            z = torch.complex(F.gelu(z.real), F.gelu(z.imag))
            out[(slice(None), *place, channels)] = z @ w2[head] + b2[head]
    return torch.fft.irfftn(out, s=grid, dim=axes, norm="ortho").flatten(1, -2)


@pytest.mark.parametrize("modes", [None, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_fourier_mixing_is_its_slow_reference(grid: tuple[int, ...], modes: int | None) -> None:
    model = mixing(grid, modes)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, torch.Size(grid).numel(), 6, generator=draw, dtype=torch.float64)
    torch.testing.assert_close(model(x), mixing_reference(model, x, grid, modes), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(4, 3), (2, 3, 4)])
def test_fourier_mixing_has_right_gradients(grid: tuple[int, ...]) -> None:
    model = mixing(grid, 1, dim=4)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, torch.Size(grid).numel(), 4, generator=draw, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))


def test_kept_frequencies_have_both_signs_and_never_repeat() -> None:
    full, half = kept_frequencies((10, 10), 3)
    assert full.tolist() == [0, 1, 2, 7, 8, 9] and half.tolist() == [0, 1, 2]
    full, half = kept_frequencies((6, 6), 9)
    assert full.tolist() == list(range(6)) and half.tolist() == list(range(4))
    assert [len(k) for k in kept_frequencies((5, 4, 7), None)] == [5, 4, 4]


@pytest.mark.parametrize("grid", [(9, 8), (6, 5, 8)])
def test_all_modes_give_the_fields_back(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, *grid, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = Spectrum(grid, None)
    torch.testing.assert_close(spectrum.inverse(spectrum.forward(x)), x, rtol=0, atol=1e-12)


def convolution(grid: tuple[int, ...], modes: int) -> SpectralConvolution:
    model = SpectralConvolution(3, grid, modes)
    initialise(model, 0)
    return model.double()


@pytest.mark.parametrize("grid", [(12, 10), (8, 6, 8)])
def test_spectral_convolution_commutes_with_shifts(grid: tuple[int, ...]) -> None:
    model = convolution(grid, 2)
    x = torch.randn(2, *grid, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifts, axes = tuple(range(3, 3 + len(grid))), tuple(range(1, 1 + len(grid)))
    torch.testing.assert_close(model(x.roll(shifts, axes)), model(x).roll(shifts, axes), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x.roll(shifts, axes)), model(x), atol=0.1)


def test_spectral_convolution_is_the_same_operator_on_a_finer_grid() -> None:
    coarse, fine = convolution((12, 12), 3), convolution((24, 24), 3)
    fine.load_state_dict(coarse.state_dict())

    def wave(n: int) -> Tensor:
        x, y = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) / n for _ in range(2)), indexing="ij")
        phase = 2 * torch.pi * torch.stack((2 * x + y, y - 2 * x, x), -1)
        return torch.cos(phase + torch.tensor([0.1, 0.7, 1.3]))[None]

    torch.testing.assert_close(fine(wave(24))[:, ::2, ::2], coarse(wave(12)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("wave", [(4, 0), (0, 4), (-4, 1), (3, 3)])
def test_frequencies_beyond_the_kept_ones_are_removed(wave: tuple[int, int]) -> None:
    grid, modes = (16, 16), 3
    x, y = torch.meshgrid(*(torch.arange(16, dtype=torch.float64) / 16 for _ in range(2)), indexing="ij")
    field = torch.cos(2 * torch.pi * (wave[0] * x + wave[1] * y)).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    removed = convolution(grid, modes)(field)
    torch.testing.assert_close(removed, torch.zeros_like(removed), rtol=0, atol=1e-12)
