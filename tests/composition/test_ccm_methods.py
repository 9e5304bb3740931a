"""Every method on a family whose answer is known: its data are rollouts of the composed models themselves."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from known_family import EXTRAPOLATION, HIGH, HISTORY, LOW, PREFIX

from shodh.experiments.composition.bench import Bench, Line
from shodh.experiments.composition.calibrate import Chosen, TaskVectors, fine_tune
from shodh.experiments.composition.members import Case, read_case
from shodh.experiments.composition.methods import METHODS, Trial, possible
from shodh.experiments.composition.settings import CCMConfig
from shodh.merge.readout import Calibration

FAR = EXTRAPOLATION[0]
#: Float32 rollouts of weights that were rounded once.
ROUNDING = 2e-5


def at(evaluated: dict[str, Any], value: float) -> dict[str, Any]:
    found: dict[str, Any] = next(v for v in evaluated["values"] if v["value"] == value)
    return found


@pytest.fixture
def trial(bench: Bench, case: Case) -> Trial:
    chosen = Chosen(Calibration(1.0, "linear", 0.0, {}), {"task_arithmetic": 0.5}, 1e-3)
    return Trial(bench, chosen, TaskVectors(bench.family, ["task_arithmetic"], 0), case, 0)


@pytest.mark.parametrize("value", (LOW, 0.0225, FAR))
def test_read_outs_find_the_coordinate_of_the_data(evaluated: dict[str, Any], value: float) -> None:
    """From metadata, the prefix or the gradient, inside and outside, where the coordinate is 1.25 of the bank."""
    expected = 2 * (value - 0.02) / (HIGH - LOW)
    methods = at(evaluated, value)["methods"]
    for name in ("coord", "scale", "scale_wide", "prefix", "prefix_wide", "line_search", "oracle"):
        assert methods[name]["alpha"] == pytest.approx(expected, abs=1e-6), name
        assert methods[name]["error"] < ROUNDING, name
    # A search ends where its steps no longer pay.
    assert methods["gradient"]["alpha"] == pytest.approx(expected, abs=1e-3)
    assert methods["gradient"]["error"] < 1e-3
    assert methods["prefix_each"]["alpha"] == pytest.approx([expected] * 3)
    assert max(abs(a - expected) for a in methods["gradient_by_layer"]["alpha"]) < 1e-2


def test_validation_finds_the_map_the_factor_and_the_scalings(evaluated: dict[str, Any]) -> None:
    chosen = evaluated["chosen"]
    assert chosen["line"]["scale"] == "linear" and chosen["line"]["gamma"] == pytest.approx(1.0, abs=1e-3)
    assert chosen["line"]["losses"]["linear"] < ROUNDING < 0.01 < chosen["line"]["losses"]["log"]
    for name in ("task_arithmetic", "ties", "dare"):
        losses = chosen["losses"][name]
        assert len(losses) > 3 and losses[str(chosen["scalings"][name])] == min(losses.values())
    rates = chosen["losses"]["prefix_finetune"]
    assert rates[f"{chosen['rate']:g}"] == min(rates.values())


def test_controls_merges_and_tuning_do_not(evaluated: dict[str, Any]) -> None:
    methods = at(evaluated, FAR)["methods"]
    known = {"coord", "scale", "scale_wide", "prefix", "prefix_each", "prefix_wide", "line_search"}
    known |= {"gradient", "gradient_by_layer", "oracle"}
    assert set(methods) == set(METHODS) - {"gradient_by_expert"}  # a dense model has no experts
    for name in set(methods) - known:
        assert methods[name]["error"] > 0.01, name
    assert methods["wrong_sign"]["alpha"] == -methods["scale"]["alpha"]
    assert methods["wrong_sign"]["error"] > methods["average"]["error"] > methods["high"]["error"]


def test_costs_are_counted(evaluated: dict[str, Any]) -> None:
    methods = at(evaluated, FAR)["methods"]
    assert (methods["prefix"]["forward"], methods["prefix"]["backward"]) == (13, 0)
    assert methods["prefix_wide"]["forward"] == 25
    assert methods["line_search"]["forward"] > 13 and methods["line_search"]["backward"] == 0
    gradient, tuned = methods["gradient"], methods["prefix_finetune"]
    assert (tuned["forward"], tuned["backward"]) == (gradient["forward"], gradient["backward"])
    assert gradient["forward"] == gradient["backward"] > 1
    assert methods["gradient_by_layer"]["forward"] > gradient["forward"]
    assert [methods[m]["networks"] for m in ("persistence", "scale", "ensemble")] == [0, 1, 2]


def test_the_average_is_the_middle_of_the_line(trial: Trial) -> None:
    middle = Line(trial.bench, trial.case).later(0.0)
    torch.testing.assert_close(trial.outcome("average").errors, middle, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trial.outcome("task_arithmetic").errors, middle, rtol=1e-4, atol=1e-6)


def test_experts_keep_their_own_errors_whatever_ran_before(trial: Trial) -> None:
    """All methods share one network: each must put its own weights."""
    alone = trial.outcome("low").errors
    trial.outcome("prefix_finetune")
    again = trial.with_weights(trial.family.low).errors
    assert torch.equal(alone, again)
    assert not any(p.requires_grad for p in trial.family.model.parameters())


def test_an_ensemble_at_an_end_is_the_expert_and_between_it_is_no_composed_model(
    known: CCMConfig, bench: Bench, trial: Trial
) -> None:
    for value, expert in ((LOW, "low"), (HIGH, "high")):
        there = Trial(bench, trial.chosen, trial.vectors, read_case(known, bench.family, value, "test"), 0)
        outcome = there.outcome("ensemble")
        torch.testing.assert_close(outcome.errors, there.outcome(expert).errors, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]
    between = Trial(bench, trial.chosen, trial.vectors, read_case(known, bench.family, 0.0225, "test"), 0)
    assert between.outcome("ensemble").errors.mean() > 100 * between.outcome("scale").errors.mean()


def test_each_trajectory_may_have_a_coordinate_of_its_own(known: CCMConfig, bench: Bench, trial: Trial) -> None:
    """Trajectories of two values in one case: one coordinate cannot serve both."""
    parts = [read_case(known, bench.family, value, "test") for value in (LOW, 0.0325)]
    both = Case(0.0325, torch.cat([p.frames[:2] for p in parts]), torch.cat([p.static[:2] for p in parts]))
    mixed = Trial(bench, trial.chosen, trial.vectors, both, 0)
    each, one = mixed.outcome("prefix_each"), mixed.outcome("prefix")
    assert each.alpha == [-1.0, -1.0, 1.25, 1.25]
    assert each.errors.max() < ROUNDING < 0.01 < one.errors.mean()


@pytest.mark.parametrize("method", ("prefix", "prefix_each", "line_search", "gradient"))
def test_read_outs_do_not_see_the_frames_that_count(bench: Bench, trial: Trial, method: Any) -> None:
    frames = trial.case.frames.clone()
    frames[:, HISTORY + PREFIX :] = 0.5
    blind = Trial(bench, trial.chosen, trial.vectors, replace(trial.case, frames=frames), 0)
    assert blind.outcome(method).alpha == trial.outcome(method).alpha


def test_fine_tuning_lowers_the_loss_that_it_sees(bench: Bench, case: Case) -> None:
    before = bench.observed(bench.model_of(bench.family.anchor), case).mean()
    after = bench.observed(fine_tune(bench, case, 1e-3, 5).forecaster, case).mean()
    assert after < 0.95 * before


def test_the_published_limit_clips_and_the_wide_one_goes_on(trial: Trial) -> None:
    """A value whose coordinate is 2.25, and one whose coordinate is 8."""
    for value, near, far in ((0.0425, 1.5, 2.25), (0.1, 1.5, 3.0)):
        there = Trial(trial.bench, trial.chosen, trial.vectors, replace(trial.case, value=value), 0)
        assert there.outcome("scale").alpha == there.outcome("coord").alpha == near
        assert there.outcome("scale_wide").alpha == pytest.approx(far)


def test_random_directions_differ_and_are_repeated_by_their_seed(bench: Bench, trial: Trial) -> None:
    first = trial.outcome("random_direction").errors
    other = Trial(bench, trial.chosen, trial.vectors, trial.case, 1)
    assert torch.equal(METHODS["random_direction"](trial).errors, first)
    assert not torch.equal(other.outcome("random_direction").errors, first)


def test_a_value_outside_the_metadata_is_answered_with_one_warning(
    trial: Trial, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shodh"):
        for method in ("coord", "scale", "wrong_sign"):
            trial.outcome(method)  # type: ignore[arg-type]
    assert [r.getMessage() for r in caplog.records] == [
        "viscosity = 0.0325 lies outside 0.01 to 0.03, 0.125 of the range's length (linear) away: this extrapolates"
    ]


def test_what_a_family_cannot_have_is_passed_over(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not possible("gradient_by_expert", trial) and possible("coord_log", trial)
    zero = Trial(trial.bench, trial.chosen, trial.vectors, replace(trial.case, value=0.0), 0)
    assert not possible("coord_log", zero) and possible("coord", zero)
