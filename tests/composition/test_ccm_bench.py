"""What is measured: which frames count, in which units, and that batches change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from known_family import HISTORY, MEAN, PREFIX, REGIME, ROLLOUT, SCALE

from shodh.core.errors import DataError
from shodh.experiments.composition.bench import Bench, Line
from shodh.experiments.composition.members import Case
from shodh.models.operator import OperatorOutput


def test_unrolled_steps_are_the_model_s_rollout(bench: Bench, case: Case) -> None:
    """The same frames, in normalised and in physical units."""
    model = bench.family.put(bench.family.low)
    window = case.frames[:, :HISTORY]
    forecaster = model.forecaster
    with torch.no_grad():
        encoded = forecaster.encode(window, case.static, 0)
        ours = forecaster.rollout(*encoded, forecaster.labels(0, window), 4)
    static = torch.zeros(len(window), 0, *window.shape[3:])
    theirs = model.rollout(MEAN + SCALE * window, static, REGIME, 4)
    torch.testing.assert_close(MEAN + SCALE * ours, theirs, rtol=1e-5, atol=1e-5)


def test_errors_are_relative_and_physical(bench: Bench, case: Case) -> None:
    """Persistence, against the definition: last observed frame against each counted one."""
    physical = MEAN + SCALE * case.frames.double().numpy()
    last = physical[:, PREFIX + HISTORY - 1]
    expected = [
        [
            np.linalg.norm(last[n] - physical[n, PREFIX + HISTORY + t])
            / np.linalg.norm(physical[n, PREFIX + HISTORY + t])
            for t in range(ROLLOUT)
        ]
        for n in range(len(physical))
    ]
    np.testing.assert_allclose(bench.later(bench.persistence, case).numpy(), expected, rtol=1e-5)


def test_frames_that_count_are_hidden_from_the_prefix_and_the_other_way_round(bench: Bench, case: Case) -> None:
    model = bench.model_of(bench.family.low)
    observed, later = bench.observed(model, case), bench.later(model, case)
    changed = case.frames.clone()
    changed[:, HISTORY + PREFIX :] += 1.0
    assert torch.equal(bench.observed(model, replace(case, frames=changed)), observed)
    assert not torch.equal(bench.later(model, replace(case, frames=changed)), later)
    changed = case.frames.clone()
    changed[:, :PREFIX] += 1.0
    assert torch.equal(bench.later(model, replace(case, frames=changed)), later)
    assert not torch.equal(bench.observed(model, replace(case, frames=changed)), observed)


def test_batches_change_nothing(bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trajectories, in batches of two and of three."""
    slider = bench.family.slider("layer")
    at = np.full(len(slider.groups), 0.3)
    found = []
    for batch in (2, 3):
        monkeypatch.setattr(bench, "batch", batch)
        line = Line(bench, case)
        loss, gradient = bench.loss_and_gradient(slider, case)(at)
        found.append((line.observed(0.3), line.later(0.3), loss, gradient))
        assert loss == pytest.approx(line.observed_mean(0.3), rel=1e-5)
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-4, atol=1e-6)
    assert np.abs(found[0][3]).max() > 1e-2


def test_gradient_is_the_slope_of_the_observed_loss(bench: Bench, case: Case) -> None:
    """A central difference of second order in float32, over a step that leaves both its errors below 1 %."""
    at, step = 0.3, 1e-2
    _, gradient = bench.loss_and_gradient(bench.family.slider(), case)(np.array([at]))
    line = Line(bench, case)
    slope = (line.observed_mean(at + step) - line.observed_mean(at - step)) / (2 * step)
    assert gradient[0] == pytest.approx(slope, rel=1e-2)


def test_a_rollout_that_is_not_finite_is_infinitely_bad(bench: Bench, case: Case) -> None:
    diverges = replace(bench.persistence, operator=lambda states, *_: OperatorOutput(states[:, -1] * torch.inf, []))
    assert torch.isinf(bench.later(diverges, case)).all()


def test_too_few_frames_are_refused(bench: Bench, case: Case) -> None:
    short = replace(case, frames=case.frames[:, :-1])
    with pytest.raises(DataError, match="trajectories of 6 frames; history 2, prefix 2 and rollout 3 need 7"):
        bench.later(bench.persistence, short)
    with pytest.raises(DataError, match="the prefix has 2 frames, and the model reads 2"):
        Bench(bench.family, 0, ROLLOUT)
