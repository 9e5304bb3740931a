"""What a run says of its speed and energy where a card, or NVML, does not answer; no card is needed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from shodh.config.reading import config_from_dict
from shodh.evaluate.speed import speed_table
from shodh.train import throughput
from shodh.train.callbacks import step_metrics
from shodh.train.callbacks.step_metrics import StepMetrics
from shodh.train.throughput import Throughput, energy_counter, product_rate

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def rate_of(answer: float | Exception) -> Callable[..., float]:
    def rate(*_: object) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return rate


@pytest.mark.parametrize(
    ("device", "answer", "mfu"),
    [
        (CARD, 8e12, 0.25),
        (CARD, 0.0, None),
        (CARD, math.inf, None),
        (CARD, math.nan, None),
        (CARD, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None),
        (CARD, RuntimeError(""), None),
        (CARD, ZeroDivisionError(), None),
        (CPU, AssertionError("nothing is measured on a CPU"), None),
    ],
)
def test_a_rate_that_cannot_be_measured_ends_no_run(
    device: torch.device, answer: float | Exception, mfu: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "product_rate", rate_of(answer))
    tree = {"name": "p", "data": {"grid": [16, 16, 16], "regimes": [{"name": "r", "path": "d"}]}}
    found = Throughput(config_from_dict(tree, "a test"), 2, device, of_tokenizer=True)
    vars(found)["flops"] = 2 * 10**12
    for _ in range(2):
        values = found.of(2.0)
        assert values["perf/tflops"] == 2.0 and values.get("perf/mfu") == mfu


def test_measuring_draws_nothing_from_global_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert product_rate(torch.float32, CPU, side=8, products=1) > 0
    assert torch.equal(torch.get_rng_state(), before)


def nvml(monkeypatch: pytest.MonkeyPatch, millijoules: Callable[[Any], int]) -> None:
    """A machine with a card whose driver answers so."""
    module = ModuleType("pynvml")
    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda name: {"GPU-1234": "the card"}[name],
        "nvmlDeviceGetTotalEnergyConsumption": millijoules,
    }
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))


def test_energy_is_read_of_the_card_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_counter(CPU) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    silent = energy_counter(CARD)
    assert silent is not None and math.isnan(silent())
    answers = iter((lambda: 5000, lambda: 1 // 0))
    nvml(monkeypatch, lambda card: {"the card": next(answers)}[card]())
    counter = energy_counter(CARD)
    assert counter is not None and counter() == 5.0
    assert math.isnan(counter())


@pytest.mark.parametrize("tells", [True, False])
def test_a_run_reports_energy_where_its_card_tells(
    tells: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter((100.0, 160.0, 200.0) if tells else (100.0, math.nan, math.nan))
    monkeypatch.setattr(step_metrics, "energy_counter", lambda device: lambda: next(readings))
    metrics = StepMetrics(tmp_path, 1, trackers=lambda step: {})
    engine = SimpleNamespace(device=CPU, get_global_grad_norm=lambda: 1.0)
    train, topology = SimpleNamespace(steps=2, failed_save="raise"), SimpleNamespace(global_batch=4)
    trainer: Any = SimpleNamespace(
        engine=engine,
        train=train,
        topology=topology,
        step=0,
        waited=0.0,
        rate=0.1,
        applied=True,
        due=lambda every: True,
    )
    metrics.start(trainer)
    for step in (1, 2):
        trainer.step, trainer.metrics = step, {"train/loss": (1.0, "mean")}
        metrics.after_step(trainer)
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("perf/energy_j") for line in lines] == ([60.0, 40.0] if tells else [None, None])
    for line in lines:
        assert ("perf/power_w" in line) == tells
        if tells:
            seconds = line["perf/step_ms"] / 1e3
            assert line["perf/power_w"] == pytest.approx(line["perf/energy_j"] / seconds)


def test_the_report_tells_what_was_measured_and_no_more(tmp_path: Path) -> None:
    card = {"perf/mfu": 0.4, "mem/peak_gib": 20.0, "perf/energy_j": 3.6e6, "perf/power_w": 700.0}
    lines = [
        {"step": 9, "time": 1.0, "perf/samples_per_s": 1.0, **card, "mem/peak_gib": 30.0},
        {"step": 19, "time": 2.0, "perf/samples_per_s": 10.0, **card},
        {"step": 29, "time": 3.0, "perf/samples_per_s": 14.0, **card, "perf/mfu": None},
        {"step": 29, "time": 4.0, "valid/nmse": 1.0},
    ]
    for name, keys in (("tokenizer", ("step", "time", "perf/samples_per_s")), ("operator", tuple(lines[0]))):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps({k: line[k] for k in keys if k in line}) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    runs = {name: tmp_path / name for name in ("tokenizer", "operator", "none")}
    table = speed_table(runs)
    columns = ["stage", "steps", "samples/s", "MFU", "power (W)", "J a sample", "energy (kWh)", "peak memory (GiB)"]
    assert table.header == columns
    assert table.rows == [
        ["tokenizer", 30, 12.0, *[None] * 5],
        ["operator", 30, 12.0, 0.4, 700.0, pytest.approx(700 / 12), pytest.approx(3.0), 30.0],
    ]
    assert speed_table({"tokenizer": tmp_path / "tokenizer"}).header == columns[:3]
    assert speed_table({"none": tmp_path / "none"}).rows == []
