"""What the comparison of arms says of errors that are given."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from shodh.core.errors import ConfigError
from shodh.core.strict_json import write_json

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("objective")


def test_arms_are_paired_by_seed_and_averages_stand_beside_the_last_weights(objective: ModuleType) -> None:
    def run(*scales: float) -> dict[str, object]:
        fields = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        names = ("", " ema")
        tests = {
            name: {"flow": {"vrmse": [[scale * error for error in field] for field in fields]}}
            for name, scale in zip(names, scales)
        }
        return {"test": tests}

    # Seeds differ twofold, which pairs do not see; the second arm lacks one of them.
    runs = {"plain-0": run(1.0, 0.5), "plain-1": run(2.0, 1.02), "plain-2": run(4.0, 1.96), "other-1": run(3.0)}
    rows = {row["arm"]: row for row in objective.compare_arms(runs, ["plain", "other"], range(3))}
    assert list(rows) == ["plain", "plain ema", "other"]
    assert rows["plain"]["by_seed"] == pytest.approx([3.5, 7.0, 14.0]) and "ratio" not in rows["plain"]
    ema = rows["plain ema"]
    assert ema["ratio"] == pytest.approx((0.5 * 0.51 * 0.49) ** (1 / 3))
    assert 0.49 <= ema["nested"][0] <= ema["ratio"] <= ema["nested"][1] <= 0.51 and ema["verdict"] == "lower"
    assert rows["other"]["ratio"] == pytest.approx(1.5) and rows["other"]["verdict"] == "open"
    assert rows["other"]["nested"] is None  # One seed.


def test_a_file_of_other_settings_is_no_record_to_go_on_with(objective: ModuleType, tmp_path: Path) -> None:
    """A run of two families once went on, without a word, with the errors that stood in the file of another."""
    path, arms = tmp_path / "record.json", {"plain": "", "noise": "operator.input_noise=1.0"}
    record = objective.open_record(path, arms, config="demo.yaml", settings=["a=1"])
    assert record["runs"] == {}
    record["runs"]["plain-0"] = {"error": 1.0}
    write_json(path, record)
    again = objective.open_record(path, {**arms, "more": "x=1"}, config="demo.yaml", settings=["a=1"])
    assert again["runs"] == record["runs"]
    for changes in ({"config": "many.yaml"}, {"settings": ["a=2"]}):
        with pytest.raises(ConfigError, match="choose another --out"):
            objective.open_record(path, arms, **{"config": "demo.yaml", "settings": ["a=1"], **changes})
    with pytest.raises(ConfigError, match="arm noise"):
        objective.open_record(path, {"noise": "operator.input_noise=2.0"}, config="demo.yaml", settings=["a=1"])
    write_json(path, {"runs": {"plain-0": {}}})
    with pytest.raises(ConfigError, match="does not say"):
        objective.open_record(path, arms, config="demo.yaml", settings=["a=1"])
