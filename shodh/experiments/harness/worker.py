"""One run of a study in a process of its own: ``python -m shodh.experiments.harness.worker JOB.json``, on every rank.

A process a run: one that runs out of memory, diverges or crashes takes nothing else with it.
"""

from __future__ import annotations

import sys
from pkgutil import resolve_name

import torch

from shodh.checkpoint.folder import prune
from shodh.core.devices import pick_device
from shodh.core.distributed import rank
from shodh.core.strict_json import write_json
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.workers import STOPPED, begin_worker, leave_ranks
from shodh.train.jobs import pretrain
from shodh.train.run_folder import RunFolder, describe_environment
from shodh.train.runtime import run_ranks


def carry_out(run: Run) -> bool:
    """Train on all ranks, resuming; then rank 0 measures and writes the result. False if a signal stopped it."""
    if run.trains and not pretrain(run.config, "auto", run.weights[0] if run.weights else None, kind=run.kind):
        return False
    first = rank() == 0
    leave_ranks()
    if first:
        write_result(run, torch.device(pick_device("auto")))
    return True


def write_result(run: Run, device: torch.device) -> None:
    """Measure a trained run, and write what was found, of which run, and where.

    With ``keep_checkpoints: false`` told, the last checkpoint and the best one are then left.
    """
    values = resolve_name(run.measure)(run, device)
    said = {"run": {"name": run.name, **run.labels}, "identity": run.identity()}
    write_json(run.result, {**said, **values, "env": describe_environment()})
    if not run.told.get("keep_checkpoints", True):
        prune_checkpoints(RunFolder(run.config.run_dir))


def prune_checkpoints(folder: RunFolder) -> None:
    """Drop all checkpoints but the last and the best, which a resume, a conversion or a new evaluation starts from."""
    latest = folder.latest()
    if latest is not None:
        prune(folder.path, latest, keep=1)


def main() -> int:
    job = begin_worker()
    if "prepare" in job:
        return 0 if resolve_name(job["prepare"])(job) else STOPPED
    return 0 if carry_out(Run.of_job(job, sys.argv[1])) else STOPPED


if __name__ == "__main__":
    run_ranks(main)
