"""Shells of wave numbers: Parseval on any boundary, the basis against SciPy, and where single waves fall."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy
import torch

from shodh.evaluate.spectra import Shells, octaves

LENGTHS = (2.0, 1.0, 3.0)


@pytest.mark.parametrize("grid", [(6, 5, 7), (1, 4, 9)])
@pytest.mark.parametrize(
    "boundary", [("periodic",) * 3, ("periodic", "periodic", "wall"), ("open", "wall", "periodic"), ("wall",) * 3]
)
def test_shells_and_bands_sum_to_the_mean_square(grid: tuple[int, ...], boundary: Any) -> None:
    shells = Shells(grid, boundary, LENGTHS)
    u, v = torch.randn(2, 2, 3, *grid, generator=torch.Generator().manual_seed(0)) + 1
    error = shells.energy(shells.transform(u) - shells.transform(v))
    expected = (u - v).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(error.sum(1), expected, rtol=1e-5, atol=0)
    bands = sum(error[:, part].sum(1) for _, part in octaves(shells.count))
    torch.testing.assert_close(bands, expected, rtol=1e-5, atol=0)
    mean = shells.energy(shells.transform(u))[:, 0]
    torch.testing.assert_close(mean, u.mean((2, 3, 4)).square().mean(1), rtol=1e-4, atol=0)


def test_cosines_are_those_of_scipy() -> None:
    shells = Shells((6, 5), ("wall", "open"), (1.0, 1.0))
    u = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(scipy.fft.dctn(u.numpy(), axes=(2, 3), norm="ortho"))
    torch.testing.assert_close(shells.transform(u), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("boundary", "waves", "shell"),
    [("periodic", 3, 3), ("wall", 3, 3), ("wall", 2.5, 3), ("open", 0.5, 1), ("periodic", 0, 0)],
)
def test_a_wave_is_in_the_shell_of_its_wave_length(boundary: Any, waves: float, shell: int) -> None:
    """``cos`` of so many wave lengths along y, the longest axis; 2.5 of them fit between walls alone."""
    places = (torch.arange(16) + 0.5) / 16
    values = (2 * math.pi * waves * places).cos().view(1, 1, 1, 16).expand(1, 1, 4, 16)
    energy = Shells((4, 16), ("periodic", boundary), (1.0, 2.0))
    found = energy.energy(energy.transform(values))[0]
    assert int(found.argmax()) == shell and float(found[shell] / found.sum()) == pytest.approx(1, abs=1e-6)


def test_octaves_cover_every_shell_once() -> None:
    for count in (1, 2, 3, 9, 28):
        covered = [k for _, part in octaves(count) for k in range(count)[part]]
        assert covered == list(range(count))
    assert [label for label, _ in octaves(9)] == ["mean", "1", "2-3", "4-7", "8"]
