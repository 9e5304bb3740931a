"""Metrics: reduced once, written as lines, cut off where a run is repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shodh.train.metrics import (
    MetricWriter,
    RegimeMeans,
    StepRecord,
    nonfinite_regimes,
    read_metrics,
    reduce_metrics,
)
from shodh.train.pictures import share_picture

CPU = torch.device("cpu")


def test_every_reduction_of_one_rank_is_the_value_itself() -> None:
    metrics = {"a": (torch.tensor(1.5), "mean"), "b": (2, "sum"), "c": (-3.0, "max"), "d": (torch.tensor(4), "mean")}
    assert reduce_metrics(metrics, CPU) == {"a": 1.5, "b": 2.0, "c": -3.0, "d": 4.0}
    assert reduce_metrics({}, CPU) == {}


def test_reduced_tensors_may_carry_a_graph() -> None:
    value = torch.tensor(2.0, requires_grad=True) ** 2
    assert reduce_metrics({"a": (value, "mean")}, CPU) == {"a": 4.0}


def test_means_by_regime_weigh_samples_not_batches() -> None:
    means = RegimeMeans(["a", "b", "absent"])
    means.add("error", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
    means.add("error", torch.tensor([8.0]), torch.tensor([0]))
    values = {name: value for name, (value, _) in means.reduce("valid").items()}
    assert values == {"valid/error/a": 4.0, "valid/error/b": 2.0, "valid/error": 3.0}
    means = RegimeMeans(["a"])
    means.add("of no sample", torch.empty(0), torch.empty(0, dtype=torch.long))
    assert means.reduce("valid") == {}


def write(folder: Path, steps: range, resume_step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    writer = MetricWriter(folder, resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / (step + 1)})
    writer.image(steps[-1], "picture", np.zeros((4, 5, 3), dtype=np.uint8))
    writer.close()


def test_resumed_run_continues_the_lines_of_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "run", range(6))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-15])  # killed in the middle of a line
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3, 4]
    write(tmp_path / "run", range(3, 8), resume_step=3)
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["train/loss"] for line in lines] == [1.0 / (s + 1) for s in range(8)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_damaged_line_costs_that_line(tmp_path: Path) -> None:
    write(tmp_path / "run", range(6))
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1], lines[3] = b"\x00\x00\xff", b"7"
    lines[2:2] = [b'{"step": Infinity}', b'{"step": 1e999}', b"[" * 10**5, b'{"step": {"step": 1}}', b'{"time": 1}']
    path.write_bytes(b"\n".join(lines))  # and the last without its end of line
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 4, 5]
    write(tmp_path / "run", range(6, 7), resume_step=6)
    assert [line["step"] for line in read_metrics(path)] == [0, 2, 4, 5, 6]


def test_a_kill_while_cutting_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", range(6))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shodh.core.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricWriter(tmp_path / "run", 3)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_share_picture_shows_which_expert_took_a_regime() -> None:
    table = torch.zeros(2, 2, 4, dtype=torch.long)
    table[:, 0, 0], table[:, 1, 3] = 10, 1000
    picture = share_picture(table, ["a", "b"])
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    mirrored = share_picture(table.flip(-1), ["a", "b"])
    assert picture.shape == mirrored.shape and not np.array_equal(picture, mirrored)
    assert np.array_equal(picture, share_picture(7 * table, ["a", "b"])), "shares, not counts"


def test_record_keeps_every_step_on_the_device_until_it_is_taken() -> None:
    record = StepRecord()
    for step in range(3):
        record.add(step, {"loss": torch.tensor(step + 0.5), "norm": math.inf if step == 1 else torch.tensor(2.0)})
    assert not record.full
    assert [(step, values) for step, _, values in record.take()] == [
        (0, {"loss": 0.5, "norm": 2.0}), (1, {"loss": 1.5, "norm": math.inf}), (2, {"loss": 2.5, "norm": 2.0})
    ]  # fmt: skip
    assert record.take() == []


def test_values_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path)
    writer.write(0, {"a": math.nan, "b": -math.inf, "c": 1.0}, when=5.0)
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 0, "time": 5.0, "a": None, "b": None, "c": 1.0}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["a"])


def test_regimes_of_errors_that_are_not_finite_are_named() -> None:
    errors = [(torch.tensor([0, 2]), torch.tensor([1.0, math.nan])), (torch.tensor([1]), torch.tensor([math.inf]))]
    assert nonfinite_regimes(errors, ["a", "b", "c"]) == ["b", "c"]
    assert nonfinite_regimes(errors[:1], ["a", "b", "c"]) == ["c"]
