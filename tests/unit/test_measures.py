"""Error measures against plain NumPy: odd sizes, masks, offsets, constant components, predictions that blew up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.evaluate.conserved import drifts
from shodh.schema.measures import (
    MEASURES,
    Truth,
    component_vrmse,
    mean_over,
    mean_square_error,
    measure,
    physical_relative_l2,
)
from shodh.schema.presence import existing_cells
from shodh.train.losses import relative_l2_by_channel

GRID, ZERO = (3, 5, 7), -4.0


def pair(channels: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, truth ``[3, C, 3, 5, 7]``, and where they exist, ``[3, 1, 3, 5, 7]``."""
    draw = torch.Generator().manual_seed(seed)
    target = 1 + torch.randn(3, channels, *GRID, generator=draw) * torch.arange(1, channels + 1).view(-1, 1, 1, 1)
    prediction = target + 0.3 * torch.randn(target.shape, generator=draw)
    return prediction, target, torch.rand(3, 1, *GRID, generator=draw) < 0.6


def plain(name: str, u: np.ndarray, v: np.ndarray) -> float:
    """Of one sample ``[C, cells]``, by definition."""
    square, variance = ((u - v) ** 2).mean(1), v.var(1)
    return {
        "vrmse": float(np.sqrt(square / (variance + 1e-7)).mean()),
        "vrmse_joint": float(np.sqrt(square.sum() / variance.sum())),
        "l2re": float(np.linalg.norm(u - v) / np.linalg.norm(v)),
        "nrmse": float(np.sqrt(((u - v) ** 2).mean() / ((v - ZERO) ** 2).mean())),
    }[name]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_measure_is_its_definition_on_the_cells_that_exist(name: str, channels: int, masked: bool) -> None:
    u, v, exists = pair(channels)
    found = measure(name, u, v, exists=exists if masked else None, zero=ZERO)
    for sample in range(3):
        cells = exists[sample, 0] if masked else torch.ones(GRID, dtype=torch.bool)
        expected = plain(name, *(x[sample][:, cells].double().numpy() for x in (u, v)))
        assert float(found[sample]) == pytest.approx(expected, rel=1e-5)
    if masked:
        junk = torch.where(exists, 0.0, 1e6)
        assert torch.equal(measure(name, u + junk, v - junk, exists=exists, zero=ZERO), found)


def test_vrmse_agrees_with_the_installed_package() -> None:
    metrics = pytest.importorskip("the_well.benchmark.metrics")
    metadata = type("Metadata", (), {"n_spatial_dims": 3})
    u, v, _ = pair(4)
    theirs = metrics.VRMSE.eval(u.movedim(1, -1), v.movedim(1, -1), metadata).mean(-1)
    # The package divides by the unbiased variance, its paper by the mean square; they differ by n / (n - 1).
    cells = u[0, 0].numel()
    torch.testing.assert_close(measure("vrmse", u, v), theirs * (cells / (cells - 1)) ** 0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", [0.0, 2.0])
@pytest.mark.parametrize("rounding", [0.0, 1e-5])
def test_a_component_that_does_not_vary_has_no_vrmse_and_spoils_no_other(level: float, rounding: float) -> None:
    u, v, _ = pair(3)
    v[:, 2] = level + rounding * torch.randn(3, *GRID)
    flat = measure("vrmse", u, v)
    torch.testing.assert_close(flat, measure("vrmse", u[:, :2], v[:, :2]))
    assert float(flat.max()) < 1, "an error over next to no variance would be thousands"
    assert component_vrmse(mean_square_error(u, v), Truth.of(v)).isnan().tolist() == [[False, False, True]] * 3
    # As one vector, what is predicted for it counts.
    assert bool((measure("vrmse_joint", u + 1, v) > measure("vrmse_joint", u, v)).all())
    still = v[:, 2:]
    assert all(bool(measure(name, u[:, 2:], still).isnan().all()) for name in ("vrmse", "vrmse_joint"))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prediction_that_blew_up_has_an_infinite_error_not_an_undefined_one(name: str, value: float) -> None:
    u, v, _ = pair(2)
    u[1, 0, 0, 0, 0] = value
    assert measure(name, u, v).isinf().tolist() == [False, True, False]


@pytest.mark.parametrize(("mean", "scale"), [(300.0, 5.0), (101325.0, 50.0), (1e12, 1e10), (1e-12, 1e-13), (0.0, 2.0)])
def test_an_error_in_units_flatters_an_offset_and_vrmse_does_not(mean: float, scale: float) -> None:
    u, v, exists = pair()
    there = exists.flatten(1)
    errors, truth = (u - v).double().flatten(1), v.double().flatten(1) + mean / scale
    found = physical_relative_l2(u, v, (mean, scale), exists=exists)
    expected = (errors * there).norm(dim=1) / (truth * there).norm(dim=1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-12)
    shifted = measure("vrmse", u + 3, v + 3, exists=exists)
    torch.testing.assert_close(shifted, measure("vrmse", u, v, exists=exists), rtol=1e-4, atol=0)
    if mean / scale > 50:
        assert float(found.max()) < 0.05
    assert physical_relative_l2(u, 0 * v, (300.0, 0.0)).tolist() == [0, 0, 0], "a constant comes back as its value"


def test_losses_count_the_cells_that_exist_alone() -> None:
    u, v, exists = pair(2)
    for of in (relative_l2_by_channel, lambda u, v, exists=None: mean_over((u - v).square(), exists)):
        found = of(u, v, exists=exists)
        for sample in range(3):
            cells = exists[sample, 0]
            alone = of(u[sample][:, cells][None], v[sample][:, cells][None])
            torch.testing.assert_close(found[sample], alone[0], rtol=1e-5, atol=1e-7)
        assert bool(of(u, v, exists=torch.zeros_like(exists)).isfinite().all())


def test_a_mask_that_a_regime_lacks_masks_nothing() -> None:
    static = torch.ones(2, 2, 3, 3)  # padded with ones where it is absent
    cells = existing_cells(static, torch.tensor([[True, True], [False, True]]), [(1, 0)], 3)
    assert cells is not None and cells.shape == (2, 3, 3, 3)
    assert not cells[0, 1].any() and bool(cells[1].all()) and bool(cells[0, [0, 2]].all())
    assert existing_cells(static, torch.ones(2, 2, dtype=torch.bool), [], 3) is None


def test_a_translation_conserves_mean_and_energy_and_decay_does_not() -> None:
    _, v, _ = pair(3)
    moved = drifts(Truth.of(v), Truth.of(v.roll((1, 2), (2, 4))), ZERO)
    assert max(float(d.max()) for d in moved.values()) < 1e-6
    # In physical units: half of the value, not of the distance from the mean.
    halved = drifts(Truth.of(v), Truth.of(0.5 * (v - ZERO) + ZERO), ZERO)
    torch.testing.assert_close(halved["drift_square"], torch.full((3,), 0.75), rtol=1e-5, atol=0)
    mean = (v - ZERO).mean((2, 3, 4)).norm(dim=1) / (v - ZERO).square().mean((2, 3, 4)).sum(1).sqrt()
    torch.testing.assert_close(halved["drift_mean"], 0.5 * mean, rtol=1e-4, atol=0)
    assert drifts(Truth.of(0 * v), Truth.of(v), 0.0)["drift_mean"].isnan().all(), "nothing to compare with at rest"
