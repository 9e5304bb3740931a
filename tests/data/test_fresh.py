"""Fresh data: a sample follows from its name alone."""

from __future__ import annotations

import pytest
import torch

from shodh.core.errors import ConfigError
from shodh.data.fresh import FreshRegime

KEYS = [(seed, step, number) for seed in (0, 1) for step in (0, 5) for number in (0, 1, 2)]
#: States of order one, transformed in float32 in batches of other sizes.
ROUNDING = 1e-4


@pytest.mark.parametrize("name", ["advection_left", "fisher", "kolmogorov"])
def test_sample_does_not_depend_on_its_batch_or_history(name: str) -> None:
    regime, same = FreshRegime(name, unit=None), FreshRegime(name, unit=None)
    together = regime.samples(KEYS)
    regime.samples([(7, 7, 7)])
    alone = torch.cat([regime.samples([key]) for key in reversed(KEYS)]).flip(0)
    assert together.shape == (len(KEYS), 3, 1, 32, 32)
    assert torch.allclose(together, alone, atol=ROUNDING)
    assert torch.equal(together, same.samples(KEYS))


def test_samples_of_other_names_are_others() -> None:
    first = FreshRegime("advection_left", unit=None).samples(KEYS)[:, 0].flatten(1)
    other = FreshRegime("advection_right", unit=None).samples(KEYS)[:, 0].flatten(1)
    every = torch.cat((first, other))
    correlation = torch.corrcoef(every).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.9  # Few large waves: chance alone makes some alike.
    assert not torch.cdist(every, every).fill_diagonal_(1).lt(1.0).any()


def test_parameters_are_drawn_a_sample() -> None:
    """Decay of the largest waves by diffusion: rates spread over the range, and stay in it."""
    frames = FreshRegime("diffusion", unit=None).samples([(0, 0, n) for n in range(64)])[:, :, 0]
    energy = torch.fft.rfft2(frames)[:, :, 1, 1].abs()
    rates = (energy[:, 0] / energy[:, 1]).log() / 2
    assert 0.015 <= float(rates.min()) < 0.017 and 0.028 < float(rates.max()) <= 0.0301


@pytest.mark.parametrize("unit", [1.0, 2.0, None])
def test_constants_are_those_of_other_samples(unit: float | None) -> None:
    regime = FreshRegime("fisher", unit=unit)
    frames = regime.samples([("elsewhere", n) for n in range(256)])
    mean, deviation = (0.0, unit) if unit else regime.constants[:2]
    assert float(frames.std()) == pytest.approx(deviation, rel=0.03)
    assert float(frames.mean()) == pytest.approx(mean, abs=0.05 * deviation)
    assert float((frames[:, 2] - frames[:, 1]).square().mean()) == pytest.approx(regime.change, rel=0.05)


@pytest.mark.parametrize("unit", [1.0, None])
def test_noise_is_white_on_what_is_given_and_follows_from_the_name(unit: float | None) -> None:
    clean, noisy = FreshRegime("fisher", unit=unit), FreshRegime("fisher", unit=unit, noise=0.1)
    difference = noisy.samples(KEYS) - clean.samples(KEYS)
    assert torch.equal(difference[:, 2], torch.zeros_like(difference[:, 2]))
    given = difference[:, :2] / (0.1 * (unit or clean.constants.deviation))
    assert float(given.std()) == pytest.approx(1, rel=0.02) and abs(float(given.mean())) < 0.05
    every = torch.corrcoef(given.reshape(2 * len(KEYS), -1)).fill_diagonal_(0)
    assert float(every.abs().max()) < 5 / 32  # Five standard errors of independent fields of 32^2 cells.
    alone = torch.cat([noisy.samples([key]) for key in KEYS])
    assert torch.allclose(alone, noisy.samples(KEYS), atol=ROUNDING)
    persists = (noisy.samples(KEYS)[:, 1] - noisy.samples(KEYS)[:, 2]).square().mean()
    assert float(persists) == pytest.approx(noisy.change, rel=0.1) and noisy.change > clean.change


def test_unknown_regime_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown regime 'advection'"):
        FreshRegime("advection")
