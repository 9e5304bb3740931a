"""Readings of finished cells, and the answers drawn from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from results_cases import REGIMES, result, study_of

from shodh.study import plots, tables
from shodh.study.report import write_study_report
from shodh.study.results import Results
from shodh.study.settings import StudyConfig
from shodh.study.verdict import decide_cause, does_routing_help, index_comparison, what_lowers_the_error


def test_errors_are_over_persistence_and_never_squares() -> None:
    for measure in ("latent_mse", "field_l2re"):
        assert result("sparse", 0, {"a": 0.7}, measure=measure).test_error("a") == pytest.approx(0.7)


def test_error_at_equal_work_is_read_where_the_cheapest_model_stopped() -> None:
    falling = [{"a": e} for e in (1.0, 0.8, 0.6, 0.4, 0.2)]
    cheap = result("dense_active", 0, {"a": 0.2}, curve=falling)
    dear = result("dense_total", 0, {"a": 0.2}, curve=falling, flops=2.0)
    results = Results([cheap, dear])
    assert results.error(cheap, "a", "flops", "both") == pytest.approx(0.2)
    assert results.error(dear, "a", "flops", "both") == pytest.approx(0.6)
    assert results.error(dear, "a", "seconds", "both") == pytest.approx(0.6)
    assert results.error(dear, "a", "steps", "both") == pytest.approx(0.2)


def test_between_checkpoints_the_logarithm_of_the_error_is_interpolated() -> None:
    falling = result("sparse", 0, {"a": 0.25}, curve=[{"a": e} for e in (1.0, 0.5, 0.25)], steps=2)
    assert falling.error("a", "flops", 1.5) == pytest.approx(math.sqrt(0.5 * 0.25))
    rising = result("sparse", 0, {"a": 0.9}, curve=[{"a": e} for e in (1.0, 0.5, 0.9)], steps=2)
    assert rising.error("a", "flops", 2.0) == pytest.approx(0.5)


def test_transfer_index_is_the_mixed_error_over_the_specialists() -> None:
    mixed = result("dense_active", 0, {"a": 0.6, "b": 0.5})
    alone = [
        result("specialist", 0, {"a": 0.3}, mix="a"),
        result("specialist", 1, {"a": 0.1}, mix="a"),
        result("specialist_share", 0, {"a": 0.4}, mix="a", share=2),
    ]
    results = Results([mixed, *alone])
    assert results.transfer(mixed, "a", "test") == pytest.approx(2.0)
    assert results.transfer(mixed, "a", "test", share=2) == pytest.approx(1.5)
    assert results.transfer(mixed, "b", "test") is None
    index = index_comparison(study_of([1, 1, 1], [1.2, 1.21, 1.19]), "both", "dense_active")
    assert index is not None and index.ratio == pytest.approx(1.2, rel=1e-3) and index.verdict == "higher"


@pytest.mark.parametrize(
    ("sparse", "verdict"),
    [
        ([0.80, 0.81, 0.79], "Sparse routing lowers the error"),
        ([1.20, 1.21, 1.19], "Dense wins at equal active size"),
        ([1.001, 0.999, 1.0], "No difference at equal active size"),
        ([0.8, 1.2, 1.0], "Undecided: no difference that these seeds can show"),
    ],
)
def test_answer_says_what_the_numbers_say(sparse: list[float], verdict: str) -> None:
    answer = does_routing_help(study_of(sparse, [1.0, 1.0, 1.0]), "both")
    assert answer.verdict == verdict
    assert "of 3 seeds" in answer.text and "its specialists" in answer.text


def test_one_seed_is_no_answer() -> None:
    assert does_routing_help(study_of([0.1], [1.0]), "both").verdict.startswith("Undecided")


@pytest.mark.parametrize(
    ("verdicts", "cause"),
    [
        (("equal", "lower", "lower"), "neither"),
        (("higher", "lower", "lower"), "neither"),
        (("open", "lower", "lower"), "undecided"),
        (("lower", "equal", "equal"), "capacity"),
        (("lower", "lower", "lower"), "finer specialisation"),
        (("lower", "lower", "equal"), "separation"),
        (("lower", "lower", "higher"), "separation"),
        (("lower", "lower", "open"), "undecided"),
    ],
)
def test_rule_of_what_lowers_the_error(verdicts: tuple[str, str, str], cause: str) -> None:
    assert decide_cause(*verdicts) == cause


def test_cause_is_read_from_the_controls() -> None:
    low, high = [0.80, 0.81, 0.79], [1.0, 1.01, 0.99]
    controls = {"sparse_hash": high, "sparse_oracle": low}
    assert what_lowers_the_error(study_of(low, high, **controls), "both")[0] == "separation"
    cause, reason = what_lowers_the_error(study_of(low, high), "both")
    assert cause == "not asked" and "sparse_hash, sparse_oracle" in reason


def test_tables_are_json_and_have_a_cell_for_every_column() -> None:
    results = study_of([0.8, 0.9], [1.0, 1.0], sparse_hash=[1.0, 1.1])
    made = [
        *(
            f(results)
            for f in (tables.error_table, tables.transfer_table, tables.comparison_table, tables.router_table)
        ),
        *(f(results) for f in (tables.rollout_table, tables.cosine_table, tables.number_table)),
        tables.cell_table(results, {"lost": "out of memory"}),
    ]
    for table in made:
        assert table.rows and all(len(row) == len(table.header) for row in table.rows)
        json.dumps(table.rows, allow_nan=False)
    assert made[-1].rows[-1][0] == "lost" and made[-1].rows[-1][-1] == "out of memory"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([0.5, 0.9], False), ([0.6, 1.5], True), ([0.5, None], True), ([1.1, 1.2], False), ([0.3, 2.0, 1.5], False)],
)
def test_diverged_rollouts(steps: list[float | None], expected: bool) -> None:
    assert tables.diverged(steps) == expected


def study_settings(out: Path) -> StudyConfig:
    mixes = {"both": REGIMES}
    return StudyConfig(name="s", question="?", out=out, base=out / "base.yaml", mixes=mixes, models=("sparse",))


def test_report_of_results(tmp_path: Path) -> None:
    """Every section that these results can fill is written, and the answer stands in the JSON."""
    results = study_of([0.80, 0.81, 0.79], [1.0, 1.0, 1.0])
    text = write_study_report(study_settings(tmp_path), [], results)
    summary = json.loads((tmp_path / "s" / "report" / "summary.json").read_text())
    assert summary["verdict"] == "Sparse routing lowers the error" and summary["verdict"] in text
    page = (tmp_path / "s" / "report" / "index.html").read_text()
    for name in ("transfer_index", "curves_by_flops", "rollout_by_step", "gradient_cosines"):
        assert (tmp_path / "s" / "report" / f"{name}.png").stat().st_size > 0 and name in page


def test_figures_of_many_panels_show_the_first_and_say_so() -> None:
    many = {str(n): {"sparse": [(1.0, 2.0), (2.0, 1.0)]} for n in range(plots.MAX_PANELS + 3)}
    figure = plots.lines(many, "step", "error", False)
    assert sum(bool(panel.lines) for panel in figure.axes) == plots.MAX_PANELS
    assert figure.get_suptitle().startswith("the first 12 of 15")


def test_report_of_several_mixes_answers_mix_by_mix(tmp_path: Path) -> None:
    better = study_of([0.80, 0.81, 0.79], [1.0, 1.0, 1.0]).all
    worse = [
        result(model, s, {"a": e + 0.01 * s}, mix="alone")
        for model, e in (("sparse", 1.3), ("dense_active", 1.0))
        for s in range(3)
    ]
    write_study_report(study_settings(tmp_path), [], Results([*better, *worse]))
    summary = json.loads((tmp_path / "s" / "report" / "summary.json").read_text())
    answers = {row["mix"]: row["does routing help"] for row in summary["answers"]["answers"]}
    assert answers == {"both": "Sparse routing lowers the error", "alone": "Dense wins at equal active size"}
    assert all(text in summary["verdict"] for text in answers.values())
    indices = {(row["mix"], row["model"]): row["index"] for row in summary["mixes"]["mixes"]}
    assert indices["both", "sparse"] == pytest.approx(0.8)
    assert indices["alone", "sparse"] == pytest.approx(1.31)
