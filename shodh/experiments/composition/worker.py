"""One stage of a study in a process of its own, on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from shodh.checkpoint.convert import convert
from shodh.checkpoint.description import is_pretrained
from shodh.config.reading import section_from_dict
from shodh.core.devices import pick_device
from shodh.core.distributed import rank, world_size
from shodh.core.reading import read_object
from shodh.experiments.composition.evaluate import evaluate_seed
from shodh.experiments.composition.settings import CCMConfig, Member
from shodh.train.jobs import pretrain
from shodh.train.runtime import quiet_logs, run_ranks
from shodh.train.workers import STOPPED, ignore_interrupts, leave_ranks


def train_member(study: CCMConfig, seed: int, member: Member) -> bool:
    """Train on all ranks, resuming, experts from the anchor; then rank 0 converts. False if a signal stopped it."""
    config = study.run_config(seed, member, world_size())
    if not pretrain(config, "auto", None if member == "anchor" else study.folder_of(seed, "anchor")):
        return False
    first = rank() == 0
    leave_ranks()
    out = study.folder_of(seed, member)
    if first and not is_pretrained(out):
        convert(config.run_dir, out, verify=True)
    return True


def main() -> int:
    quiet_logs()
    ignore_interrupts()
    job = read_object(Path(sys.argv[1]))
    study = section_from_dict(CCMConfig, job["study"], sys.argv[1])
    if job["member"] is not None:
        return 0 if train_member(study, job["seed"], job["member"]) else STOPPED
    if rank() == 0:
        evaluate_seed(study, job["seed"], torch.device(pick_device("auto")))
    return 0


if __name__ == "__main__":
    run_ranks(main)
