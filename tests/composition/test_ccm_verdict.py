"""Errors by role, and the rules that answer a study's questions, on results whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from composition_cases import COMPOSED, HIGH, LOW, Errors, case_study, plain_alpha, plain_errors, results_of

from shodh.experiments.composition import verdict
from shodh.experiments.composition.results import BEST_ENDPOINT, Results
from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.composition.tables import correlate


@pytest.fixture
def study(tmp_path: Path) -> CCMConfig:
    return case_study(tmp_path)


@pytest.fixture
def results(study: CCMConfig) -> Results:
    return results_of(study)


def composed_at(far: float) -> Errors:
    """Composition with a given error outside, apart from what the seeds differ by."""

    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        outside = method in COMPOSED and role == "extrapolation"
        return far * (1 + 0.01 * seed) if outside else plain_errors(method, value, role, seed)

    return errors


def test_roles_are_means_over_their_values(results: Results) -> None:
    assert results.roles == ["support", "interpolation", "extrapolation"]
    assert results.of_role("extrapolation") == [5e-4, 8e-3]
    assert results.role_errors("low", "extrapolation") == pytest.approx([1.25, 1.2625, 1.275])
    # The better of both at each value, not the better mean.
    assert results.role_errors(BEST_ENDPOINT, "extrapolation") == pytest.approx([0.5, 0.505, 0.51])
    assert results.improvements("prefix", "extrapolation") == pytest.approx([50.0] * 3)
    assert results.methods[:5] == ["persistence", "anchor", "low", "high", BEST_ENDPOINT]


def test_a_rollout_that_diverged_is_no_number(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        return None if (method, value, seed) == ("coord", 8e-3, 1) else plain_errors(method, value, role, seed)

    results = results_of(study, errors=errors)
    assert results.role_errors("coord", "extrapolation")[1] is None
    assert results.improvements("coord", "extrapolation")[1] is None
    paired = results.paired("coord", "anchor", "extrapolation")
    assert paired is not None and (paired.seeds, paired.diverged, len(paired.logs)) == (3, 1, 2)
    assert "coord 50.0 %" not in verdict.does_composition_help(results, None).text


@pytest.mark.parametrize(
    ("far", "expected", "tone"),
    [
        (0.4, "Composition beats the anchor out of distribution", "good"),
        (1.2, "Composition is worse than the anchor out of distribution", "bad"),
        (0.8, "Composition makes no difference out of distribution", "fair"),
    ],
)
def test_the_verdict_follows_the_errors(study: CCMConfig, far: float, expected: str, tone: str) -> None:
    answer = verdict.does_composition_help(results_of(study, errors=composed_at(far)), 42.8)
    assert (answer.verdict, answer.tone) == (expected, tone)
    assert f"prefix {100 * (1 - far / 0.8):.1f} %" in answer.text
    assert "Published on this kind of family: 42.8 %." in answer.text


def test_seeds_that_disagree_are_undecided(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        if method in COMPOSED and role == "extrapolation":
            return (0.4, 0.9, 0.8)[seed]
        return plain_errors(method, value, role, 0)

    assert verdict.does_composition_help(results_of(study, errors=errors), None).verdict.startswith("Undecided")


def test_two_seeds_decide_nothing(tmp_path: Path) -> None:
    answer = verdict.does_composition_help(results_of(case_study(tmp_path, seeds=2)), None)
    assert answer.verdict == "Composition lies below the anchor out of distribution, in too few seeds to tell"


def test_a_study_without_read_outs_asks_nothing(tmp_path: Path) -> None:
    results = results_of(case_study(tmp_path, methods=("anchor", "low")))
    assert verdict.does_composition_help(results, None).verdict == "Not asked"
    assert verdict.does_it_beat_the_rivals(results) == ""
    assert verdict.which_readout_is_enough(results) == "No read-out has a finite error."


def test_the_better_expert_is_named(results: Results) -> None:
    text = verdict.does_it_beat_the_rivals(results)
    assert "prefix is 20.0 % below that of the better expert at each value" in text
    assert "prefix is 44.4 % below that of the plain average" in text


@pytest.mark.parametrize(
    ("errors", "enough", "rest"),
    [
        ({}, "coord is enough", "coord has the lowest mean error of all read-outs (0.404)."),
        (
            {"prefix": 0.3},
            "prefix is enough",
            "coord 0.404, coord_log 0.404, scale 0.404, scale_wide 0.404 are cheaper, and not within",
        ),
        ({"gradient": 0.395}, "coord_log is enough", "gradient has the lowest mean error of all read-outs (0.399)"),
    ],
)
def test_the_cheapest_read_out_near_the_best_is_enough(
    study: CCMConfig, errors: dict[str, float], enough: str, rest: str
) -> None:
    given = {"coord": 0.4, **errors} if errors != {"gradient": 0.395} else {"coord": 0.41, **errors}

    def chosen(method: str, value: float, role: str, seed: int) -> float | None:
        return given[method] * (1 + 0.01 * seed) if method in given else plain_errors(method, value, role, seed)

    text = verdict.which_readout_is_enough(results_of(study, errors=chosen))
    assert text.startswith(enough) and rest in text


# Reasons


def test_all_is_well_where_composition_works(results: Results) -> None:
    said = verdict.reasons(results)
    assert "Outside the support the anchor has 0.33 times the error of persistence." in said
    assert "The anchor's error outside the support is 2.00 times that inside (0.808, 0.404)." in said
    assert "The best coordinate in hindsight has 0.50 times the anchor's error there, and prefix finds it." in said
    assert any("(log): Pearson 0.99, Spearman 1.00." in s for s in said)  # the bank ends before the values do
    assert "The cosine of the experts' updates is 0.10, the direction's norm 2.00 times that of their mean." in said


def test_an_anchor_that_extrapolates_leaves_no_room(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        return 0.4 if method == "anchor" else plain_errors(method, value, role, seed)

    said = verdict.anchor_leaves_room(results_of(study, errors=errors))
    assert said is not None and said.endswith("it extrapolates well itself, which leaves little to gain.")


def test_an_anchor_that_predicts_nothing_is_named(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        return 0.1 if method == "persistence" else plain_errors(method, value, role, seed)

    said = verdict.anchor_predicts(results_of(study, errors=errors))
    assert said == "Outside the support the anchor is no better than persistence (0.808, 0.1)."


def test_an_expert_that_learned_nothing_is_named(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        if value in (LOW, HIGH):
            return {"anchor": 0.4, "low": 0.2, "high": 0.4}.get(method, 1.0)
        return plain_errors(method, value, role, seed)

    said = verdict.experts_learned(results_of(study, errors=errors))
    assert said == (
        "At the experts' own values fine-tuning improves on the anchor by 50.0 % (low) and 0.0 % (high); outside the "
        "support prefix improves on it by 50.0 %; the high expert learned nothing, so the line has no such end."
    )


@pytest.mark.parametrize(
    ("oracle", "expected"),
    [(0.9, "does not lead to these values"), (0.3, "prefix has 1.33 times the error of that: the read-out loses")],
)
def test_the_line_and_the_read_out_are_told_apart(study: CCMConfig, oracle: float, expected: str) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        if method == "oracle":
            return oracle * (1 + 0.01 * seed)
        return plain_errors(method, value, role, seed)

    said = verdict.line_leads_there(results_of(study, errors=errors))
    assert said is not None and expected in said


def test_a_direction_that_is_not_the_parameter_s_is_named(study: CCMConfig) -> None:
    results = results_of(study, alphas=lambda method, value: -plain_alpha(method, value))
    assert correlate(results, "oracle", "log") == pytest.approx((-0.992, -1.0), abs=1e-3)
    said = verdict.best_alpha_follows(results)
    assert said is not None and said.endswith("the direction is not that of the parameter.")


def test_correlations_use_the_map_of_the_parameter(study: CCMConfig) -> None:
    """Coordinates that are logarithmic: Pearson's is 1 on that map alone, Spearman's on both."""
    results = results_of(study, alphas=plain_alpha)
    pearson, rank = correlate(results, "line_search", "linear") or (0.0, 0.0)
    assert pearson < 0.95 and rank == pytest.approx(1.0)
    same = results_of(study, alphas=lambda method, value: 0.25)
    assert correlate(same, "oracle", "log") is None and verdict.best_alpha_follows(same) is None


def test_best_coordinates_at_the_end_of_the_bank_are_counted(study: CCMConfig) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        return plain_errors("prefix" if method == "prefix_wide" else method, value, role, seed) / (
            2 if method == "prefix_wide" else 1
        )

    results = results_of(study, errors=errors, alphas=lambda method, value: 1.5 if value > HIGH else -1.0)
    assert verdict.best_alpha_is_inside(results) == (
        "Outside the support the best coordinate is at the bank's end, 1.5, in 3 of 6 cases; a bank twice as wide has "
        "0.50 times prefix's error."
    )


def test_experts_that_moved_alike_are_named(study: CCMConfig) -> None:
    said = verdict.updates_differ(results_of(study, cosine=0.97))
    assert said is not None and said.endswith("both moved alike, whatever their parameter.")


def test_controls_are_compared_with_the_same_coordinate(results: Results) -> None:
    said = verdict.direction_matters(results)
    assert said == (
        "The plain average, which uses no direction, improves on the anchor by 10.0 %; the wrong sign has 3.00 times "
        "the error of scale; a random direction has 3.00 times the error of scale."
    )
