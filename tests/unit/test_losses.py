"""Losses against their published definitions."""

from __future__ import annotations

import pytest
import torch

from shodh.config import TokenizerLoss
from shodh.schema.fields import Field
from shodh.schema.measures import measure
from shodh.train.losses import (
    field_slices,
    reconstruction_loss,
    reconstruction_terms,
    relative_l2_by_channel,
)

FIELDS = (Field("tracer"), Field("velocity", "vector", placement="face"), Field("solid", static=True))
DYNAMIC = FIELDS[:2]


def pair(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    target = scale * (1 + torch.randn(3, 4, 6, 5, 8, generator=draw))
    return target + 0.3 * scale * torch.randn(target.shape, generator=draw), target


def test_channels_of_dynamic_fields_follow_each_other() -> None:
    assert field_slices(DYNAMIC) == {"tracer": slice(0, 1), "velocity": slice(1, 4)}


def test_terms_do_not_depend_on_the_scale_of_a_field() -> None:
    small, large = (reconstruction_terms(*pair(scale=s), DYNAMIC) for s in (10.0, 1000.0))
    for name in small:
        assert small[name].shape == (3,)
        torch.testing.assert_close(large[name], small[name], rtol=1e-2, atol=1e-5)


def test_gradient_term_sees_what_the_spectrum_of_an_offset_does_not() -> None:
    _, target = pair()
    terms = reconstruction_terms(target + 0.5, target, DYNAMIC)
    assert terms["gradient/velocity"].max() < 1e-10 < 0.05 < terms["relative_l2/velocity"].min()
    rolled = reconstruction_terms(target.roll(2, 3), target, DYNAMIC)
    assert rolled["spectral/velocity"].max() < 1e-6 < 0.5 < rolled["relative_l2/velocity"].min()


def test_loss_is_the_weighted_mean_over_fields() -> None:
    terms = reconstruction_terms(*pair(), DYNAMIC)
    weights = TokenizerLoss(vrmse=3.0, relative_l2=2.0, gradient=0.5, spectral=0.25)
    expected = sum(
        w * 0.5 * (terms[f"{kind}/tracer"].mean() + terms[f"{kind}/velocity"].mean())
        for kind, w in (("vrmse", 3.0), ("relative_l2", 2.0), ("gradient", 0.5), ("spectral", 0.25))
    )
    torch.testing.assert_close(reconstruction_loss(terms, weights), expected)
    only = reconstruction_loss(terms, TokenizerLoss(vrmse=0.0, relative_l2=1.0, gradient=0.0))
    torch.testing.assert_close(only, 0.5 * (terms["relative_l2/tracer"].mean() + terms["relative_l2/velocity"].mean()))


def test_perfect_reconstruction_costs_nothing_and_gradients_are_finite_there() -> None:
    _, target = pair()
    guess = target.clone().requires_grad_()
    loss = reconstruction_loss(reconstruction_terms(guess, target, DYNAMIC), TokenizerLoss(spectral=1.0))
    loss.backward()
    assert loss.item() == 0.0 and guess.grad.isfinite().all()
    flat = torch.zeros(1, 4, 4, 4, 4)
    terms = reconstruction_terms(flat + 0.1, flat, DYNAMIC)
    assert all(t.isfinite().all() for t in terms.values()), "a field without variance must not divide by zero"


def test_relative_error_by_channel_is_that_of_each_channel_and_bounded_at_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    target, error = torch.randn(2, 3, 4, 5, generator=draw), 0.1 * torch.randn(2, 3, 4, 5, generator=draw)
    found = relative_l2_by_channel(target + error, target)
    for b in range(2):
        for c in range(3):
            assert float(found[b, c]) == pytest.approx(float(error[b, c].norm() / target[b, c].norm()), rel=1e-4)
    at_rest = relative_l2_by_channel(error, torch.zeros_like(target), floor=0.01)
    torch.testing.assert_close(at_rest, error.square().mean((2, 3)).sqrt() / 0.01, rtol=1e-4, atol=0)


def test_vrmse_term_is_the_square_of_the_measure_and_blind_to_a_mean_flow() -> None:
    """A mean flow of ten, as of a channel, would make the relative L2 error of what moves in it a hundredth."""
    prediction, target = pair()
    still = reconstruction_terms(prediction, target, DYNAMIC, ["vrmse"])["vrmse/tracer"]
    expected = measure("vrmse", prediction[:, :1], target[:, :1]).square()
    torch.testing.assert_close(still, expected, rtol=0.03, atol=0)  # The floor.
    flow = torch.zeros(1, 4, 1, 1, 1)
    flow[:, 1] = 10.0
    terms, moved = (reconstruction_terms(prediction + f, target + f, DYNAMIC) for f in (0 * flow, flow))
    torch.testing.assert_close(moved["vrmse/velocity"], terms["vrmse/velocity"], rtol=1e-4, atol=0)
    assert (moved["relative_l2/velocity"] < 0.1 * terms["relative_l2/velocity"]).all()
    weak = torch.tensor([1.0, 1.0, 0.1, 0.03]).view(1, 4, 1, 1, 1)
    wrong = torch.cat((target[:, :3], prediction[:, 3:]), 1)  # One component alone is wrong, and it is the weakest.
    unit = reconstruction_terms(wrong, target, DYNAMIC, ["vrmse"])["vrmse/velocity"]
    scaled = reconstruction_terms(wrong * weak / weak, target * weak / weak, DYNAMIC, ["vrmse"])["vrmse/velocity"]
    torch.testing.assert_close(scaled, unit, rtol=1e-4, atol=0)
