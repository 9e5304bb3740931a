"""The laboratory: a tiny tokenizer, and runs of the tiny configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_jobs
from helper import ROOT, run_ranks
from laboratory import Laboratory

from shodh.config import load_config


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Laboratory:
    folder = tmp_path_factory.mktemp("runs")
    stages = {}
    for stage in (1, 2, 3):
        content = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
        content["zero_optimization"] = {"stage": stage}
        stages[stage] = folder / f"zero{stage}.json"
        stages[stage].write_text(json.dumps(content))
    # Noise and a selection bias, so that whatever a checkpoint could forget is in play.
    operator = {
        "input_noise": 0.05,
        "experts": {"balance": {"bias_rate": 1.0e-3}},
        "train": {"checkpoint_every": 5, "keep_checkpoints": 3, "valid_every": 5},
    }
    config = write_config(folder / "tiny.yaml", operator=operator)
    run_ranks(1, rank_jobs.train_tokenizer, config, [f"deepspeed={stages[1]}"])
    return Laboratory(config, stages, load_config(config).tokenizer_dir)
