"""Errors count the cells where a field exists, and no offset of a field makes them small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.evaluate.regime_evaluation import Means, RegimeEvaluation
from shodh.schema.presence import existing_cells
from shodh.train.losses import mean_over, physical_relative_l2, relative_l2, relative_l2_by_channel, vrmse


def pair(channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, truth ``[3, C, 4, 5, 6]``, and where they exist, ``[3, 1, 4, 5, 6]``."""
    draw = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, channels, 4, 5, 6, generator=draw)
    return u, v, torch.rand(3, 1, 4, 5, 6, generator=draw) < 0.6


MEASURES = {
    "relative_l2": relative_l2,
    "vrmse": vrmse,
    "by_channel": relative_l2_by_channel,
    "mean_over": lambda u, v, exists=None: mean_over((u - v).square(), exists),
    "physical": lambda u, v, exists=None: physical_relative_l2(u, v, (300.0, 5.0), exists=exists),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_measure_is_that_of_the_existing_cells_alone(name: str, channels: int) -> None:
    measure: Any = MEASURES[name]
    u, v, exists = pair(channels)
    found = measure(u, v, exists=exists)
    for sample in range(3):
        cells = exists[sample, 0]
        alone = measure(u[sample][:, cells][None], v[sample][:, cells][None])
        torch.testing.assert_close(found[sample], alone[0], rtol=1e-5, atol=1e-7)
    junk = torch.where(exists, 0.0, 1e6)
    assert torch.equal(measure(u + junk, v - junk, exists=exists), found)
    torch.testing.assert_close(measure(u, v, exists=torch.ones_like(exists)), measure(u, v), rtol=1e-5, atol=1e-7)
    assert bool(measure(u, v, exists=torch.zeros_like(exists)).isfinite().all())


@pytest.mark.parametrize(("mean", "scale"), [(300.0, 5.0), (101325.0, 50.0), (1e30, 1e28), (1e-30, 1e-31), (0.0, 2.0)])
def test_relative_l2_in_units_is_the_published_one_and_flatters_an_offset(mean: float, scale: float) -> None:
    u, v, exists = pair()
    physical = [(x.double() * scale + mean)[exists].norm() for x in (u - v - mean / scale, v)]
    whole = (u - v).double()[exists].norm() * scale / physical[1]
    errors = (u - v).double().flatten(1), (v.double() + mean / scale).flatten(1)
    there = exists.flatten(1)
    expected = (errors[0] * there).norm(dim=1) / (errors[1] * there).norm(dim=1)
    found = physical_relative_l2(u, v, (mean, scale), exists=exists)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)
    assert float(whole) == pytest.approx(float(found.mean()), rel=0.2)
    # What is compared does not depend on the offset.
    assert float(vrmse(u, v, exists=exists).min()) > 1 and float(relative_l2(u, v, exists=exists).min()) > 1
    if mean / scale > 50:
        assert float(found.max()) < 0.05


def test_a_constant_has_no_error_in_units() -> None:
    u, v, _ = pair()
    assert physical_relative_l2(u, 0 * v, (300.0, 0.0)).tolist() == [0, 0, 0]


class OneField(RegimeEvaluation):
    """Two scalars, the first masked by static channel 0, the second constant."""

    divergence = None

    def __init__(self) -> None:
        self.slices, self.masks = {"heat": slice(0, 1), "level": slice(1, 2)}, {"heat": 0}
        self.constants = {"heat": (300.0, 5.0), "level": (7.0, 0.0)}
        self.means = Means()


def test_garbage_in_solids_changes_no_reported_number() -> None:
    u, v, exists = pair(2)
    v[:, 1] = 0  # a constant, normalised
    static = 1 - exists.float()
    results = []
    for junk in (0.0, 1e6):
        part = OneField()
        spoiled = u.clone()
        spoiled[:, :1] += torch.where(exists, 0.0, junk)
        part._add_errors("model", spoiled, v, static)
        part._add_rollout(1, "model", spoiled, v, static)
        results.append(part.result())
    assert results[0] == results[1]
    # The mean over both channels; the constant one has no error.
    expected = sum(float((u - v)[b, :1][exists[b]].square().mean()) / 2 for b in range(3)) / 3
    assert results[0]["decoded_mse"]["model"] == pytest.approx(expected, rel=1e-5)
    assert [results[0][m]["level"]["model"] for m in ("l2re", "vrmse", "l2re_physical")] == [0, 0, 0]


def test_a_mask_that_a_regime_lacks_masks_nothing() -> None:
    static = torch.ones(2, 2, 3, 3)  # padded with ones where it is absent
    cells = existing_cells(static, torch.tensor([[True, True], [False, True]]), [(1, 0)], 3)
    assert cells is not None and cells.shape == (2, 3, 3, 3)
    assert not cells[0, 1].any() and bool(cells[1].all()) and bool(cells[0, [0, 2]].all())
    assert existing_cells(static, torch.ones(2, 2, dtype=torch.bool), [], 3) is None
