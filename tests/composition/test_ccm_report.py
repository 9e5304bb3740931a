"""The report: what its tables and figures hold, and that it needs the results alone."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from composition_cases import HIGH, LOW, case_study, plain_errors, results_of, seed_result, write_results

from shodh.core.errors import CheckpointError, ConfigError
from shodh.experiments.composition import plots, tables
from shodh.experiments.composition.report import write_ccm_report
from shodh.experiments.composition.results import BEST_ENDPOINT, read_results
from shodh.experiments.composition.settings import METHODS, CCMConfig


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CCMConfig, str]:
    """A study of three seeds with results and a report; there are neither models nor data."""
    study = case_study(tmp_path_factory.mktemp("reported"))
    write_results(study, sparse=True)
    return study, write_ccm_report(study)


def test_the_page_answers_first(reported: tuple[CCMConfig, str]) -> None:
    study, text = reported
    page = (study.folder / "report" / "index.html").read_text()
    top = page[: page.index("<nav>")]
    for said in ("Composition beats the anchor out of distribution", "below that of the better expert", "is enough"):
        assert said in text and said in top, said
    for said in ("published, %", "is counted on the 3 steps that follow", "Jensen-Shannon"):
        assert said in page, said
    assert text.count("\n") > len(METHODS)


def test_every_file_of_the_report_is_there(reported: tuple[CCMConfig, str]) -> None:
    folder = reported[0].folder / "report"
    found = {path.name for path in folder.iterdir()}
    figures = ("error_by_parameter", "alpha_by_parameter", "error_along_line", "error_by_step", "updates_by_part")
    files = ("summary", "results", "errors_by_value", "correlations", "bank", "layers", "routing", "comparisons")
    assert found >= {f"{stem}.png" for stem in (*figures, "routing_by_alpha")} | {f"{stem}.csv" for stem in files}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verdict"] == "Composition beats the anchor out of distribution"
    assert summary["seeds"] == [0, 1, 2] and summary["published_improvement"] == 42.8 and len(summary["reasons"]) > 4


def test_the_summary_holds_errors_improvement_and_the_published_figure(reported: tuple[CCMConfig, str]) -> None:
    by_method = {row["method"]: row for row in rows(reported[0].folder / "report" / "summary.csv")}
    assert float(by_method["prefix"]["extrapolation"]) == pytest.approx(0.404)
    assert float(by_method["prefix"]["extrapolation, % below anchor"]) == pytest.approx(50.0)
    assert float(by_method["published composition"]["extrapolation, % below anchor"]) == 42.8
    assert by_method["prefix"]["lower in"] == "3 of 3" and by_method["anchor"]["lower in"] == ""
    assert by_method["ensemble"]["networks"] == "2" and by_method["prefix"]["prefix passes"] == "13"
    assert set(by_method) == {*METHODS, BEST_ENDPOINT, "published composition"}


def test_every_error_is_kept_in_full(reported: tuple[CCMConfig, str]) -> None:
    study = reported[0]
    found = rows(study.folder / "report" / "results.csv")
    assert len(found) == 3 * len(study.family.values) * len(METHODS)
    for row in found[::17]:
        expected = plain_errors(row["method"], float(row["value"]), row["role"], int(row["seed"]))
        assert float(row["error"]) == expected


def test_tables_say_where_a_rollout_diverged(tmp_path: Path) -> None:
    def errors(method: str, value: float, role: str, seed: int) -> float | None:
        return None if method == "wrong_sign" and value > HIGH else plain_errors(method, value, role, seed)

    study = case_study(tmp_path)
    write_results(study, errors=errors)
    text = write_ccm_report(study)
    assert re.search(r"wrong_sign .* - ", text)
    by_method = {row["method"]: row for row in rows(study.folder / "report" / "errors_by_value.csv")}
    assert by_method["wrong_sign"]["0.008 (extra.)"] == "diverged" != by_method["wrong_sign"]["0.0005 (extra.)"]


def test_a_method_that_a_value_cannot_have_has_not_diverged(tmp_path: Path) -> None:
    study = case_study(tmp_path)
    results = results_of(study)
    for seed in results.seeds:
        del seed.values["values"][0]["methods"]["coord_log"]
    by_method = {row[0]: row[1:] for row in tables.value_table(results).rows}
    assert by_method["coord_log"][0] is None and by_method["coord_log"][1] == "0.202 ± 0.002"


def test_distances_outside_the_range_are_on_the_chosen_map(tmp_path: Path) -> None:
    """Range 1e-3 to 4e-3: 8e-3 lies half of it away on the logarithm, and four thirds on the linear map."""
    for scale, expected in (("log", 0.5), ("linear", 4 / 3)):
        table = tables.alpha_table(results_of(case_study(tmp_path), scale=scale))
        by_value = {row[0]: row[2] for row in table.rows}
        assert by_value["0.008"] == pytest.approx(expected) and by_value["0.002"] == 0.0


def test_the_figure_marks_the_experts_and_the_ends_of_the_parameter(tmp_path: Path) -> None:
    """Its axis is logarithmic whatever map validation chose: the values span more than a decade."""
    for scale in ("log", "linear"):
        figure = plots.error_by_parameter(results_of(case_study(tmp_path), scale=scale))
        for panel in figure.axes:
            assert panel.get_xscale() == "log" and "anchor" in panel.get_legend_handles_labels()[1]
            assert list(panel.get_xticks()) == [5e-4, LOW, HIGH, 8e-3]
            vertical = [line.get_xdata() for line in panel.lines if len(set(line.get_xdata())) == 1]
            assert [float(x[0]) for x in vertical] == [LOW, HIGH]
            assert {text.get_text() for text in panel.texts} == {"low", "high"}
    shown = [label for panel in figure.axes for label in panel.get_legend_handles_labels()[1]]
    assert {"scale", "prefix", "oracle", "low", "ties", "ensemble", "wrong_sign"} <= set(shown)


def test_lines_of_the_figure_are_means_over_seeds(tmp_path: Path) -> None:
    figure = plots.error_by_parameter(results_of(case_study(tmp_path)))
    line = next(line for line in figure.axes[0].lines if line.get_label() == "prefix")
    assert list(line.get_xdata()) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    assert list(line.get_ydata()) == pytest.approx([0.404, 0.202, 0.202, 0.202, 0.404])


def test_routing_is_averaged_over_seeds_by_layer(tmp_path: Path) -> None:
    table = tables.routing_table(results_of(case_study(tmp_path), sparse=True))
    assert [row for row in table.rows if row[1] == -1.5] == [
        [0, -1.5, pytest.approx(0.15), pytest.approx(0.15)],
        [1, -1.5, pytest.approx(0.3), pytest.approx(0.3)],
    ]
    assert tables.routing_table(results_of(case_study(tmp_path))).rows == []


def test_shares_of_the_direction_stand_by_component(tmp_path: Path) -> None:
    table = tables.update_table(results_of(case_study(tmp_path)), "components")
    assert [[row[0], row[4]] for row in table.rows] == [["attention or mixing", 0.75], ["output", 0.25]]


def test_a_report_of_some_seeds_says_so(tmp_path: Path) -> None:
    study = case_study(tmp_path)
    write_results(study)
    study.results_file(1).unlink()
    text = write_ccm_report(study)
    assert "in too few seeds to tell" in text
    assert "2 of 3" in (study.folder / "report" / "index.html").read_text()


def test_a_report_before_any_result_says_so(tmp_path: Path) -> None:
    study = case_study(tmp_path)
    assert write_ccm_report(study).startswith("No result yet.")
    assert (study.folder / "report" / "index.html").exists()


@pytest.mark.parametrize("change", ({"prefix": 1}, {"methods": ("anchor", "scale")}))
def test_results_of_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_results(case_study(tmp_path))
    other = case_study(tmp_path, **change)
    with pytest.raises(ConfigError, match=rf"seed0.json is of other settings of {next(iter(change))};"):
        read_results(other)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    study = case_study(tmp_path)
    write_results(study)
    study.results_file(2).write_text(json.dumps(seed_result(study, 2))[:-9])
    with pytest.raises(CheckpointError, match=r"seed2\.json"):
        read_results(study)


def test_a_real_evaluation_can_be_reported(known: CCMConfig, evaluated: dict[str, Any]) -> None:
    assert "The error of prefix is 100.0 % below that of the anchor (one seed)." in write_ccm_report(known)
    correlations = rows(known.folder / "report" / "correlations.csv")
    oracle = next(row for row in correlations if (row["read-out"], row["map"]) == ("oracle", "linear"))
    assert float(oracle["Pearson"]) == pytest.approx(1.0) and int(oracle["points"]) == 4
