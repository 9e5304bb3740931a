"""The laboratory: a tiny tokenizer, and runs of the tiny configuration."""

from __future__ import annotations

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
    stages = {stage: ROOT / "ds_configs" / f"zero{stage}.json" for stage in (1, 2, 3)}
    # Noise, shifts and a selection bias, so that whatever a checkpoint could forget is in play.
    operator = {
        "input_noise": 0.05,
        "random_shifts": True,
        "experts": {"balance": {"bias_rate": 1.0e-3}},
        "train": {"checkpoint_every": 5, "keep_checkpoints": 3, "valid_every": 5},
    }
    config = write_config(folder / "tiny.yaml", operator=operator)
    run_ranks(1, rank_jobs.train_tokenizer, config, [f"deepspeed={stages[1]}"])
    return Laboratory(config, stages, load_config(config).tokenizer_dir)
