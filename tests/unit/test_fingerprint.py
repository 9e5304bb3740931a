"""The fingerprint of an operator: what it forgets, and what it tells apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shodh.moe.fingerprint import CHANNELS, fingerprint, fingerprint_size

N = 32
Operator = Callable[[Tensor, list[Tensor]], Tensor]  # Spectrum and wave numbers -> the spectrum of the next frame.


def transport(*cells: float) -> Operator:
    def step(spectrum: Tensor, waves: list[Tensor]) -> Tensor:
        phase = sum(c * k for c, k in zip(cells, waves, strict=False))
        return spectrum * torch.exp(-2j * math.pi / N * phase)

    return step


def decay(rate: float) -> Operator:
    return lambda spectrum, waves: spectrum * torch.exp(-rate * sum(k.square() for k in waves))


def dispersion(rate: float, axis: int = 0) -> Operator:
    return lambda spectrum, waves: spectrum * torch.exp(1j * rate * waves[axis] ** 3)


OPERATORS: dict[str, Operator] = {
    "to +x": transport(2.0),
    "to -x": transport(-2.0),
    "to +y": transport(0.0, 2.0),
    "diffusion": decay(0.02),
    "anti-diffusion": decay(-0.002),
    "dispersion": dispersion(0.02),
}


def random_frames(operator: Operator, seed: int, *shape: int, ndim: int = 2, frames: int = 2) -> Tensor:
    """Frames ``[*shape, T, *grid]`` of random states with a falling spectrum."""
    waves = list(torch.meshgrid(*(torch.fft.fftfreq(N, 1 / N),) * ndim, indexing="ij"))
    size = sum(k.square() for k in waves)
    axes = tuple(range(-ndim, 0))
    noise = torch.randn(*shape, *(N,) * ndim, generator=torch.Generator().manual_seed(seed))
    low = torch.stack([k.abs() for k in waves]).amax(0) < N / 3
    spectra = [torch.fft.fftn(noise, dim=axes) * (1 + size) ** -1.25 * low]
    for _ in range(frames - 1):
        spectra.append(operator(spectra[-1], waves))
    return torch.stack([torch.fft.ifftn(s, dim=axes).real for s in spectra], -ndim - 1)


def batch(seed: int, samples: int = 32, ndim: int = 2) -> tuple[Tensor, Tensor]:
    """Frames ``[B, 2, 1, *grid]`` of all operators, and the operator of each sample."""
    every = [random_frames(op, 100 * seed + n, samples, ndim=ndim) for n, op in enumerate(OPERATORS.values())]
    return torch.cat(every).unsqueeze(2), torch.arange(len(OPERATORS)).repeat_interleave(samples)


def wrapped(frames: Tensor, periodic: bool = True) -> Tensor:
    return torch.full((len(frames), frames.ndim - 3), periodic)


@pytest.mark.parametrize(("ndim", "ends"), [(2, False), (2, True), (3, False)])
def test_the_nearest_centroid_names_the_operator_of_unseen_states(ndim: int, ends: bool) -> None:
    """Also in a window cut from a larger state, whose ends are open."""

    def features(seed: int, samples: int) -> tuple[Tensor, Tensor]:
        frames, operator = batch(seed, samples, ndim)
        frames = frames[..., 4:28, 4:28] if ends else frames
        return fingerprint(frames, wrapped(frames, not ends)), operator

    (known, of_known), (new, of_new) = (features(seed, 32 if ndim == 2 else 6) for seed in (1, 2))
    centres = torch.stack([known[of_known == n].mean(0) for n in range(len(OPERATORS))])
    assert (torch.cdist(new, centres).argmin(1) == of_new).double().mean() > 0.95


def test_features_forget_amplitude_and_place() -> None:
    frames, _ = batch(3, 4)
    expected = fingerprint(frames, wrapped(frames))
    assert expected.dtype == torch.float32 and expected.shape == (len(frames), fingerprint_size(1, 2))
    for scale in (3.7, 1e-12, 1e12):
        torch.testing.assert_close(fingerprint(scale * frames, wrapped(frames)), expected, rtol=0, atol=2e-5)
    moved = frames.roll((5, 11), (-2, -1))
    torch.testing.assert_close(fingerprint(moved, wrapped(frames)), expected, rtol=0, atol=2e-5)
    assert (fingerprint(moved, wrapped(frames, False)) - expected).abs().max() > 0.1, "a window has a place"


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("periodic", [True, False])
def test_features_are_bounded_whatever_the_frames(ndim: int, periodic: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    frames = torch.randn(6, 3, 2, *(8, 6, 1)[-ndim:], generator=draw)
    frames[1] *= 1e15
    frames[2] *= 1e-15
    frames[3] = 7.0
    frames[4] = 0.0
    frames[5, 2] = frames[5, 1]
    found = fingerprint(frames, wrapped(frames, periodic))
    assert found.isfinite().all() and found.abs().max() <= 1 + 1e-5
    assert (found[3:5] == 0).all(), "a constant says nothing"


def test_size_depends_on_neither_grid_nor_history_and_many_channels_are_taken_together() -> None:
    for channels, grid, frames in ((1, (4, 4), 2), (3, (64, 16), 5), (20, (4, 4, 1), 2), (96, (2, 2, 2), 3)):
        x = torch.randn(2, frames, channels, *grid)
        assert fingerprint(x, wrapped(x)).shape == (2, fingerprint_size(channels, len(grid)))
    assert fingerprint_size(96, 3) == fingerprint_size(CHANNELS, 3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 1, 1), (1, 2, 1), (2, 3, 1)])
def test_a_grid_that_resolves_few_waves_or_none_has_finite_features(grid: tuple[int, ...]) -> None:
    found = fingerprint(torch.randn(2, 3, 2, *grid), torch.ones(2, len(grid), dtype=torch.bool))
    assert found.shape == (2, fingerprint_size(2, len(grid))) and found.abs().max() <= 1 + 1e-5
    if math.prod(grid) == 1:
        assert not found.any()


def test_a_transported_wave_has_the_phase_of_its_speed_in_every_pair_of_frames() -> None:
    place = torch.arange(N) * 2 * math.pi / N
    frames = torch.stack([(place - 0.3 * t).cos() for t in range(4)])[None, :, None, :, None].expand(1, 4, 1, N, N)
    features = fingerprint(frames, wrapped(frames))[0]
    cells = (len(features) - 3) // 5
    strongest = features[:cells].abs().argmax()
    found = torch.complex(features[strongest], features[cells + strongest])
    assert abs(complex(found) - complex(math.cos(0.3), -math.sin(0.3))) < 2e-2


def flux(strength: float) -> Callable[[Tensor], Tensor]:
    """``u -> u - strength d(u^2)/dx``, the nonlinear part of a step of Burgers' equation."""
    wave = 2j * math.pi / N * torch.fft.fftfreq(N, 1 / N)[:, None]
    return lambda u: u - strength * torch.fft.ifft2(wave * torch.fft.fft2(u.square())).real


def test_fluxes_of_opposite_sign_differ_in_what_the_square_has_alone() -> None:
    states = random_frames(transport(0.0), 7, 64)[:, 0]
    states = states / states.std((1, 2), keepdim=True)
    frames = [torch.stack((states, flux(sign * 0.2)(states)), 1).unsqueeze(2) for sign in (1, -1)]
    found = torch.stack([fingerprint(x, wrapped(x)) for x in frames]).double()
    cells = (found.shape[-1] - 3) // 5
    for part, least, most in ((slice(0, 3 * cells), 0.3, 0.7), (slice(3 * cells, 5 * cells), 0.95, 1.0)):
        centres, new = found[:, :32, part].mean(1), found[:, 32:, part]
        right = torch.stack([torch.cdist(new[n], centres).argmin(1) == n for n in (0, 1)]).double().mean()
        assert least <= right <= most
    # A state of the other sign is moved by the opposite flux; its other features are the same.
    mirrored = fingerprint(-frames[1], wrapped(frames[1]))
    torch.testing.assert_close(mirrored[:, : 3 * cells], found[1, :, : 3 * cells].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mirrored[:, 3 * cells : -3], -found[1, :, 3 * cells : -3].float(), rtol=0, atol=1e-5)


def test_an_absent_channel_is_zero_and_changes_no_other() -> None:
    frames = torch.cat((batch(4, 2)[0], batch(5, 2)[0]), 2)
    exists = torch.ones(len(frames), 2, dtype=torch.bool)
    exists[::2, 1] = False
    garbage = torch.where(exists[:, None, :, None, None], frames, torch.nan)
    found = fingerprint(garbage, wrapped(frames), exists).unflatten(1, (2, -1))
    expected = fingerprint(frames, wrapped(frames)).unflatten(1, (2, -1))
    assert (found[::2, 1] == 0).all()
    torch.testing.assert_close(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found[1::2], expected[1::2])
    padded = torch.where(exists[:, None, :, None, None], frames, 1.0)
    torch.testing.assert_close(fingerprint(padded, wrapped(frames)).unflatten(1, (2, -1)), found)


def test_a_sample_does_not_see_its_batch() -> None:
    frames, _ = batch(6, 3)
    periodic = wrapped(frames)
    periodic[::2, 0] = False
    together = fingerprint(frames, periodic)
    alone = torch.cat([fingerprint(f, p) for f, p in zip(frames.split(1), periodic.split(1), strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    half = fingerprint(frames.bfloat16(), periodic)
    assert half.dtype == torch.float32
