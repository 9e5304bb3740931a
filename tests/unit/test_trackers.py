"""Trackers beside ``metrics.jsonl``: TensorBoard's files keep to its size; others may fail, and the run goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh.commands import pretrain
from shodh.config import load_config
from shodh.core.errors import ConfigError
from shodh.train import trackers
from shodh.train.metrics import MetricWriter, read_metrics
from shodh.train.trackers import check_trackers, openers


def write(folder: Path, steps: range, opened: Mapping[str, Any] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    writer = MetricWriter(folder, steps[0], opened)
    for step in steps:
        values = {"train/loss": 1.0 / (step + 3), "train/grad_norm": 0.123456789, "train/lr": 1e-4 / 3}
        writer.write(step, {**values, "train/skipped": 0.0}, when=1e9 + step)
    writer.image(steps[-1], "picture", np.zeros((4, 5, 3), dtype=np.uint8))
    writer.flush()
    writer.close()


def board(folder: Path) -> tuple[EventAccumulator, int]:
    """What TensorBoard reads, and the bytes of its files."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found, sum(path.stat().st_size for path in (folder / "tensorboard").iterdir())


def test_event_files_are_smaller_than_the_lines_they_show(tmp_path: Path) -> None:
    write(tmp_path, range(200))
    found, size = board(tmp_path)
    assert size < (tmp_path / "metrics.jsonl").stat().st_size
    events = found.Scalars("train/loss")
    assert [(e.step, e.wall_time) for e in events] == [(step, 1e9 + step) for step in range(200)]
    assert events[7].value == pytest.approx(0.1) and found.Tags()["images"] == ["picture"]


@pytest.mark.parametrize("drift", [1.0, -1.0])
def test_a_run_that_is_resumed_often_keeps_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    # TensorBoard reads by name, which begins with the second; the clock of the next node may be behind.
    for start in range(0, 200, 20):
        monkeypatch.setattr(time, "time", lambda now=2e9 + drift * start: now)
        write(tmp_path, range(start, start + 100))
        if start == 60:  # killed in the middle of an event
            last = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
            last.write_bytes(last.read_bytes()[:-5])
    found, size = board(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == list(range(280))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(280))
    assert size < (tmp_path / "metrics.jsonl").stat().st_size
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    write(tmp_path, range(5))
    assert [event.step for event in board(tmp_path)[0].Scalars("train/loss")] == list(range(5))


@pytest.mark.parametrize("method", ["open", "write", "image", "flush", "close"])
def test_a_tracker_that_fails_is_switched_off_and_the_run_goes_on(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    class Broken:
        name = "Broken"

        def __getattr__(self, called: str) -> Any:
            def call(*_: Any) -> None:
                calls.append(called)
                if called == method:
                    raise ConnectionError("no\nnetwork")

            return call

    def opened() -> Any:
        if method == "open":
            raise ConnectionError("no\nnetwork")
        return Broken()

    with caplog.at_level(logging.WARNING):
        write(tmp_path, range(3), {"Broken": opened})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert calls[-1:] == ([] if method == "open" else [method]) and calls.count(method) == (method != "open")
    assert len(caplog.records) == 1 and "no network" in caplog.text


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_before_the_run(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    changes = [f"out={tmp_path}", f"trackers.{tracker}={{}}", "parallel.ep_size=1"]
    with pytest.raises(ConfigError) as error:
        pretrain.main(["--config", "demo", "--set", *changes])
    assert f"trackers.{tracker}" in str(error.value) and f"shodh[{tracker}]" in str(error.value)
    assert not list(tmp_path.iterdir())


def config_of(folder: Path, *changes: str) -> Any:
    config = load_config("demo", ["trackers.tensorboard=false", *changes])
    check_trackers(config)
    return openers(config, folder, 0)


def test_wandb_offline_needs_no_network_and_goes_on_under_its_name(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for steps in (range(20), range(10, 30)):
        write(tmp_path, steps, config_of(tmp_path, "trackers.wandb.mode=offline"))
    identity = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))) == 2


def test_mlflow_in_a_folder_has_every_metric_and_how_it_ended(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    write(tmp_path, range(20), config_of(tmp_path, "trackers.mlflow={}"))
    writer = MetricWriter(tmp_path, 20, config_of(tmp_path, "trackers.mlflow={}"))
    writer.write(20, {"train/loss": 0.5, "lost": float("nan")}, when=time.time())
    try:
        raise ValueError
    except ValueError:
        writer.close()
    client = mlflow.MlflowClient(tracking_uri=f"file:{tmp_path / 'mlflow'}")
    run = client.get_run(json.loads((tmp_path / "trackers.json").read_text())["mlflow"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(21)) and run.info.status == "FAILED"
