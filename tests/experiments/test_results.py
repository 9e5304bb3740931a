"""Readings of finished runs, and the answers drawn from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from results_cases import REGIMES, result, study_of

from shodh.experiments.harness.report import claims_section
from shodh.experiments.transfer import tables
from shodh.experiments.transfer.report import write_study_report
from shodh.experiments.transfer.results import Results
from shodh.experiments.transfer.settings import StudyConfig
from shodh.experiments.transfer.verdict import (
    conclude_transfer,
    decide_cause,
    does_routing_help,
    transfer_by_regime,
    what_lowers_the_error,
)
from shodh.report.figures import MAX_PANELS, lines


def test_the_last_weights_stand_beside_the_best_where_runs_keep_these() -> None:
    plain = [result("sparse", 0, {"a": 0.7}), result("dense_active", 0, {"a": 0.8})]
    assert "last weights" not in tables.error_table(Results(plain)).header
    for run, error in zip(plain, (0.9, 0.8), strict=True):
        run.values["last"] = {"a": {"model": 3 * error, "persistence": 3.0}}
    table = tables.error_table(Results(plain))
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert [(row["error"], row["last weights"]) for row in rows] == [pytest.approx(e) for e in ((0.7, 0.9), (0.8, 0.8))]


def test_errors_are_over_persistence_and_never_squares() -> None:
    for measure in ("latent_mse", "field_l2re"):
        assert result("sparse", 0, {"a": 0.7}, measure=measure).error("a", "test") == pytest.approx(0.7)


def test_error_at_equal_work_is_read_where_the_cheapest_model_stopped() -> None:
    falling = [{"a": e} for e in (1.0, 0.8, 0.6, 0.4, 0.2)]
    cheap = result("dense_active", 0, {"a": 0.2}, curve=falling)
    dear = result("dense_total", 0, {"a": 0.2}, curve=falling, flops=2.0)
    results = Results([cheap, dear])
    for model, reading, expected in (
        ("dense_active", "flops", 0.2),
        ("dense_total", "flops", 0.6),
        ("dense_total", "seconds", 0.6),
        ("dense_total", "steps", 0.2),
    ):
        assert results.errors("both", model, reading, "a")[0] == pytest.approx(expected)


def test_between_checkpoints_the_logarithm_of_the_error_is_interpolated() -> None:
    falling = result("sparse", 0, {"a": 0.25}, curve=[{"a": e} for e in (1.0, 0.5, 0.25)], steps=2)
    assert falling.error("a", "flops", 1.5) == pytest.approx(math.sqrt(0.5 * 0.25))
    rising = result("sparse", 0, {"a": 0.9}, curve=[{"a": e} for e in (1.0, 0.5, 0.9)], steps=2)
    assert rising.error("a", "flops", 2.0) == pytest.approx(0.9), "one model serves all regimes: no best step of each"


def test_transfer_index_is_the_mixed_error_over_the_specialists() -> None:
    mixed = result("dense_active", 0, {"a": 0.6, "b": 0.5})
    alone = [
        result("specialist", 0, {"a": 0.3}, mix="a"),
        result("specialist", 1, {"a": 0.1}, mix="a"),
        result("specialist_share", 0, {"a": 0.4}, mix="a", share=2),
    ]
    results = Results([mixed, *alone])
    index = results.transfers.set_index(["regime", "reading"])["error"]
    assert index["a", "test"] == pytest.approx(2.0)
    assert index["a", "share"] == pytest.approx(1.5)
    assert ("b", "test") not in index, "no specialist"
    by_regime = transfer_by_regime(study_of([1, 1, 1], [1.2, 1.21, 1.19]), "both", "dense_active")
    assert set(by_regime) == set(REGIMES)
    for c in by_regime.values():
        assert c.ratio == pytest.approx(1.2, rel=1e-3) and c.verdict == "higher"


def with_specialists_of_equal_samples(seeds: int, lacking: str | None = None) -> Results:
    """Dense at .6 and .5, sparse at .45 and .4, specialists at .3 and .4; trajectories differ by 20 %."""
    errors = {"dense_active": {"a": 0.6, "b": 0.5}, "sparse": {"a": 0.45, "b": 0.4}}
    runs = [result(model, s, e, u=None) for model, e in errors.items() for s in range(seeds)]
    for regime, error in {"a": 0.3, "b": 0.4}.items():
        runs += [
            result("specialist_batch", s, {regime: error}, mix=regime, share=2)
            for s in range(seeds)
            if (regime, s) != (lacking, seeds - 1)
        ]
    for run in runs:
        for values in run.values["errors"].values():
            values["by_trajectory"] = [0.8 * values["model"] / 3, 1.2 * values["model"] / 3]
    return Results(runs)


def test_index_of_a_study_with_specialists_of_equal_samples_alone() -> None:
    results = with_specialists_of_equal_samples(3)
    table = tables.transfer_table(results)
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    found = {(row["model"], row["regime"]): (row["index"], row["95 % low"]) for row in rows}
    assert found["dense_active", "a"] == (pytest.approx(2.0), pytest.approx(2.0))
    assert found["sparse", "b"] == (pytest.approx(1.0), pytest.approx(1.0))
    (row,) = (row for row in tables.number_table(results).rows if row[2] == "dense_active")
    assert pytest.approx((2.0 * 1.25) ** 0.5) in row
    assert {"specialist_batch2"} <= {row[1] for row in tables.rollout_table(results).rows}
    assert "against specialists with as many steps and the same samples" in does_routing_help(results, "both").text


def test_mean_index_is_a_claim_with_both_intervals_and_needs_every_regime() -> None:
    results = with_specialists_of_equal_samples(3)
    claim = next(c for c in results.claims if c.other == "specialist_batch2" and c.label == "dense_active")
    assert results.claims[claim].ratio == pytest.approx((2.0 * 1.25) ** 0.5)
    assert results.claims[claim].verdict == "higher"
    interval = results.bootstrap(claim)
    assert interval is not None and interval.low < (2.0 * 1.25) ** 0.5 < interval.high
    fewer = with_specialists_of_equal_samples(3, lacking="b")
    assert fewer.claims[claim].seeds == 2, "the third seed has no specialist of b"


def test_p_of_a_claim_is_adjusted_for_all_claims_of_the_page() -> None:
    """Four readings of sparse against dense, and two transfer indices of each: eight claims."""
    claims = study_of([0.9, 0.93, 0.87], [1.0, 1.01, 1.0]).claims
    assert len(claims) == 8 and {c.label for c in claims} == {"sparse", "dense_active"}
    smallest = min(claims.values(), key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(8 * smallest.p)
    ordered = sorted(claims.values(), key=lambda c: c.p)
    assert [c.p_holm for c in ordered] == sorted(c.p_holm for c in ordered)


@pytest.mark.parametrize(
    ("sparse", "verdict"),
    [
        ([0.80, 0.81, 0.79], "Sparse routing lowers the error at equal active size"),
        ([1.20, 1.21, 1.19], "Dense wins at equal active size"),
        ([1.001, 0.999, 1.0], "No difference above 2% at equal active size"),
        ([0.8, 1.2, 1.0], "Undecided: no difference that these seeds can show"),
    ],
)
def test_answer_says_what_the_numbers_say(sparse: list[float], verdict: str) -> None:
    answer = does_routing_help(study_of(sparse, [1.0, 1.0, 1.0]), "both")
    assert answer.verdict == verdict
    assert "of 3 seeds" in answer.text and "against specialists with as many steps" in answer.text
    assert "at equal work" in answer.text and "on rollouts" in answer.text


def test_one_seed_is_no_answer() -> None:
    assert does_routing_help(study_of([0.1], [1.0]), "both").verdict.startswith("Undecided")


@pytest.mark.parametrize(
    ("verdicts", "cause"),
    [
        (("equal", "lower", "lower", "equal"), "neither"),
        (("higher", "lower", "lower", "higher"), "neither"),
        (("equal", "lower", "higher", "lower"), "separation, not learned"),
        (("higher", "lower", "higher", "open"), "undecided"),
        (("open", "lower", "lower", "lower"), "undecided"),
        (("lower", "equal", "equal", "lower"), "capacity"),
        (("lower", "open", "equal", "lower"), "undecided"),
        (("lower", "lower", "lower", "lower"), "finer specialisation"),
        (("lower", "lower", "equal", "lower"), "separation"),
        (("lower", "lower", "higher", "lower"), "separation"),
        (("lower", "lower", "open", "lower"), "undecided"),
    ],
)
def test_rule_of_what_lowers_the_error(verdicts: tuple[Any, Any, Any, Any], cause: str) -> None:
    assert decide_cause(*verdicts) == cause
    several = "sharing between regimes" if cause == "finer specialisation" else cause
    assert decide_cause(*verdicts, chooses=True) == several


@pytest.mark.parametrize(
    ("dense", "sparse", "against", "said"),
    [
        (("equal", "lower"), ("equal", "lower"), "equal", "there is no negative transfer to end."),
        (("equal", "lower"), ("equal", "higher"), "higher", "and with it there is, in b"),
        (("open", "equal"), ("equal", "equal"), "equal", "is undecided, and so is"),
        (("higher", "equal"), ("equal", "equal"), "lower", "Routing ends"),
        (("higher", "equal"), ("higher", "equal"), "lower", "does not end negative transfer, but lessens it"),
        (("higher", "equal"), ("lower", "higher"), "equal", "does not end negative transfer."),
        (("higher", "open"), ("open", "equal"), "open", "Whether routing ends"),
    ],
)
def test_end_of_negative_transfer(dense: Any, sparse: Any, against: Any, said: str) -> None:
    by_regime = [dict(zip(REGIMES, verdicts, strict=True)) for verdicts in (dense, sparse)]
    assert said in conclude_transfer(by_regime[0], by_regime[1], against)


def test_negative_transfer_of_one_regime_is_not_averaged_away() -> None:
    """Mixing makes one regime worse by as much as it makes the other better: the mean over regimes shows nothing."""
    found = study_of([1.0, 1.01, 0.99], [1.0, 1.0, 1.0]).all
    for r in found:
        if r.label == "dense_active":
            r.values["errors"]["a"]["model"] *= 1.3 + 0.01 * r.seed
            r.values["errors"]["b"]["model"] /= 1.3
    text = does_routing_help(Results(found), "both").text
    assert "a 1.310 (harm), b 0.769 (gain)" in text


def test_cause_is_read_from_the_controls() -> None:
    low, high = [0.80, 0.81, 0.79], [1.0, 1.01, 0.99]
    controls = {"sparse_hash": high, "sparse_oracle": low}
    assert what_lowers_the_error(study_of(low, high, **controls), "both")[0] == "separation"
    cause, reason = what_lowers_the_error(study_of(high, high, **{**controls, "sparse_oracle": low}), "both")
    assert cause == "separation, not learned" and "that of sparse_oracle 20.0 % below that of dense_active" in reason
    cause, reason = what_lowers_the_error(study_of(low, high), "both")
    assert cause == "not asked" and "sparse_hash, sparse_oracle" in reason


def test_dense_model_with_the_routers_size_is_the_one_compared() -> None:
    low, high = [0.80, 0.81, 0.79], [1.0, 1.01, 0.99]
    answer = does_routing_help(study_of(low, high, dense_router=[0.7, 0.71, 0.69]), "both")
    assert answer.verdict == "Dense wins at equal active size" and "that of dense_router" in answer.text


def test_dense_model_of_one_regime_is_its_specialist() -> None:
    sparse = [result("sparse", s, {"a": 0.5 + 0.01 * s}, mix="alone") for s in range(3)]
    dense = [result("specialist", s, {"a": 1.0}, mix="a") for s in range(3)]
    assert does_routing_help(Results([*sparse, *dense]), "alone").verdict.startswith("Sparse routing lowers")


def test_seconds_of_a_step_are_the_median_over_seeds() -> None:
    runs = [result("sparse", s, {"a": 0.5}, flops=flops) for s, flops in enumerate((1.0, 1.5, 9.0))]
    assert [r.cost_per_step("seconds") for r in Results(runs).all] == [3.0, 3.0, 3.0]


def test_specialists_of_different_shares_are_different_models() -> None:
    shares = [result("specialist_share", 0, {"a": 0.4}, mix="a", share=share) for share in (2, 4)]
    assert [r.label for r in shares] == ["specialist_share2", "specialist_share4"]


def test_rollout_error_is_over_persistence_and_a_lost_one_is_not_passed_over() -> None:
    runs = [result("sparse", s, {"a": 0.5}) for s in range(3)]
    assert runs[0].rollout_error("a") == pytest.approx((0.5 + 1.0) / (1 + 2))

    def mean_rollout() -> float | None:
        table = tables.error_table(Results(runs))
        found: float | None = table.rows[0][table.header.index("rollout")]
        return found

    assert mean_rollout() == pytest.approx(0.5)
    runs[2].values["evaluation"]["regimes"]["a"]["rollout"]["u"]["model"] = [0.5, None]
    assert runs[2].rollout_error("a") == math.inf and mean_rollout() is None
    runs[2].values["evaluation"]["regimes"]["a"]["rollout"] = {}
    assert runs[2].rollout_error("a") is None, "not measured is not diverged"


def test_rollouts_of_specialists_stand_beside_those_of_the_mix() -> None:
    rows = tables.rollout_table(study_of([0.8, 0.9], [1.0, 1.0])).rows
    assert {row[1] for row in rows} == {"sparse", "dense_active", "specialist", "persistence"}


def test_rank_correlation_is_over_models_and_not_over_their_seeds(tmp_path: Path) -> None:
    """Six runs of two models are two points."""
    write_study_report(study_settings(tmp_path), [], study_of([0.8, 0.9, 1.0], [1.0] * 3, sparse_hash=[1.0, 1.1, 1.2]))
    summary = json.loads((tmp_path / "s" / "report" / "summary.json").read_text())
    assert "spearman_u_error" not in summary["routers"]


def test_tables_are_json_and_have_a_cell_for_every_column() -> None:
    results = study_of([0.8, 0.9], [1.0, 1.0], sparse_hash=[1.0, 1.1])
    made = [
        *(
            f(results)
            for f in (tables.error_table, tables.transfer_table, tables.comparison_table, tables.router_table)
        ),
        *(f(results) for f in (tables.rollout_table, tables.cosine_table, tables.number_table)),
        tables.run_table(results, {"lost": "out of memory"}),
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
    assert tables.left_the_data(steps) == expected


def study_settings(out: Path) -> StudyConfig:
    mixes = {"both": REGIMES}
    return StudyConfig(name="s", question="?", out=out, base=out / "base.yaml", mixes=mixes, models=("sparse",))


def test_report_of_results(tmp_path: Path) -> None:
    """Every section that these results can fill is written, and the answer stands in the JSON."""
    results = study_of([0.80, 0.81, 0.79], [1.0, 1.0, 1.0])
    text = write_study_report(study_settings(tmp_path), [], results)
    summary = json.loads((tmp_path / "s" / "report" / "summary.json").read_text())
    assert summary["verdict"] == "Sparse routing lowers the error at equal active size" and summary["verdict"] in text
    page = (tmp_path / "s" / "report" / "index.html").read_text()
    for name in ("transfer_index", "curves_by_flops", "rollout_by_step", "gradient_cosines"):
        assert (tmp_path / "s" / "report" / f"{name}.png").stat().st_size > 0 and name in page


def test_a_model_that_diverged_is_named_and_not_passed_over(tmp_path: Path) -> None:
    results = study_of([0.80, 0.81, 0.79, 0.8], [1.0] * 4)
    results.all[0].values["errors"]["a"]["model"] = None
    text = write_study_report(study_settings(tmp_path), [], results)
    assert (
        "both-sparse-s0." in text and "lower in 3 of 4 seeds; 1 of sparse diverged" in text and "With 3 seeds" in text
    )
    summary = json.loads((tmp_path / "s" / "report" / "summary.json").read_text())
    assert summary["verdict"].startswith("Undecided"), "a model that diverges is not the better one"
    errors = {(row["model"], row["regime"]): row for row in summary["errors"]["errors"]}
    assert (errors["sparse", "a"]["error"], errors["sparse", "a"]["diverged"]) == (None, 1)
    assert errors["sparse", "b"]["error"] == pytest.approx(0.8)


def test_table_of_all_pairs_calls_claims_alone_lower_or_higher() -> None:
    """Three models, three pairs a reading: sparse against dense and against hash are claims, the third pair is none."""
    results = study_of([0.8, 0.81, 0.79], [1.0, 1.01, 0.98], sparse_hash=[0.9, 1.0, 1.1])
    table = tables.comparison_table(results)
    rows = {tuple(row[1:4]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert len(rows) == 3 * 4
    claimed = {key for key, row in rows.items() if row["verdict"] is not None}
    readings = ("test", "flops", "seconds", "rollout")
    assert claimed == {*(("sparse", "dense_active", r) for r in readings), ("sparse", "sparse_hash", "test")}
    assert rows["sparse", "dense_active", "test"]["p Holm"] > rows["sparse", "dense_active", "test"]["p paired t"]


def test_interval_over_trajectories_is_of_the_error_and_not_of_its_square(tmp_path: Path) -> None:
    results = study_of([0.8, 0.8, 0.8], [1.0, 1.0, 1.0])
    for r in results.all:
        r.values["measure"] = "latent_mse"
        for error in r.values["errors"].values():
            error["by_trajectory"] = [0.64 * x if r.label == "sparse" else x for x in (1.0, 2.0, 3.0)]
    (claim,) = (c for c in results.claims if c.reading == "test" and c.regime is None)
    assert results.bootstrap(claim) == pytest.approx((0.8, 0.8))
    assert results.bootstrap(claim._replace(regime="a")) == pytest.approx((0.8, 0.8))
    assert results.bootstrap(claim._replace(reading="rollout")) is None
    section = claims_section(results.claims, claim._fields, results.bootstrap)
    assert section is not None
    table = section.tables["claims"]
    nested = {tuple(row[:5]): row[-2:] for row in table.rows}
    assert nested[tuple(claim)] == pytest.approx([0.8, 0.8])
    assert nested[tuple(claim._replace(reading="rollout"))] == [None, None]
    assert "Over seeds and test trajectories together" in does_routing_help(results, "both").text


def test_figures_of_many_panels_show_the_first_and_say_so() -> None:
    many = {str(n): {"sparse": [(1.0, 2.0), (2.0, 1.0)]} for n in range(MAX_PANELS + 3)}
    figure = lines(many, "step", "error")
    assert figure is not None and sum(bool(panel.lines) for panel in figure.axes) == MAX_PANELS
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
    assert answers == {
        "both": "Sparse routing lowers the error at equal active size",
        "alone": "Dense wins at equal active size",
    }
    assert all(text in summary["verdict"] for text in answers.values())
    indices = {(row["mix"], row["model"]): row["index"] for row in summary["mixes"]["mixes"]}
    assert indices["both", "sparse"] == pytest.approx(0.8)
    assert indices["alone", "sparse"] == pytest.approx(1.31)
