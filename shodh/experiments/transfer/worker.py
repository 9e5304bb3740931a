"""One job of a study in a process of its own: ``python -m shodh.experiments.transfer.worker JOB.json``, on every rank.

A process a cell: one that runs out of memory, diverges or crashes takes nothing else with it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from shodh.checkpoint.run_files import is_tokenizer
from shodh.config import RegimeConfig, RunConfig, config_from_dict
from shodh.core.devices import pick_device
from shodh.core.distributed import rank
from shodh.core.reading import read_object
from shodh.experiments.finetuning.cells import ZERO_SHOT
from shodh.experiments.finetuning.measure import measure_tuning
from shodh.experiments.transfer.measure import measure_cell
from shodh.experiments.transfer.settings import PlasticityConfig
from shodh.train.jobs import pretrain, train_tokenizer
from shodh.train.opening import open_data
from shodh.train.runtime import quiet_logs, run_ranks, start_distributed
from shodh.train.workers import STOPPED, ignore_interrupts, leave_ranks


def train_cell(job: dict[str, Any], config: RunConfig) -> bool:
    """Train on all ranks, resuming; then rank 0 measures."""
    if not pretrain(config, "auto"):
        return False
    first = rank() == 0
    leave_ranks()
    if first:
        fresh = job["fresh"]
        told = None if fresh is None else (PlasticityConfig(**fresh["probe"]), RegimeConfig(**fresh["regime"]))
        device = torch.device(pick_device("auto"))
        keep = job["keep_checkpoints"]
        measure_cell(job["cell"], config, job["gradient_samples"], told, device, keep)
    return True


def tune_cell(job: dict[str, Any], config: RunConfig) -> bool:
    """Train from the given weights, or from scratch, on all ranks, or not at all; then rank 0 measures."""
    start = None if job["start"] is None else Path(job["start"])
    untrained = job["cell"]["way"] == ZERO_SHOT
    if not untrained and not pretrain(config, "auto", start):
        return False
    first = rank() == 0
    leave_ranks()
    if first:
        device = torch.device(pick_device("auto"))
        measure_tuning(job["cell"], config, start if untrained else None, device)
    return True


def prepare(job: dict[str, Any], config: RunConfig) -> bool:
    """Train the tokenizer unless it is there, and encode the data once for every mix of regimes."""
    if not is_tokenizer(config.tokenizer_dir) and not train_tokenizer(config, "auto"):
        return False
    device = start_distributed()
    by_name = {r.name: r for r in config.data.regimes}
    for mix in job["mixes"]:
        data = config.data.model_copy(update={"regimes": tuple(by_name[name] for name in mix)})
        open_data(config.model_copy(update={"data": data}), None, device)
    return True


def main() -> int:
    quiet_logs()
    ignore_interrupts()
    job = read_object(Path(sys.argv[1]))
    config = config_from_dict(job["config"], sys.argv[1])
    finished = {"prepare": prepare, "cell": train_cell, "tune": tune_cell}[job["kind"]](job, config)
    return 0 if finished else STOPPED


if __name__ == "__main__":
    run_ranks(main)
