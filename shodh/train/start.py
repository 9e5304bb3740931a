"""What is checked before a training job begins: where it goes on, whether it is the same run, whether it fits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shodh.checkpoint.folder import (
    MANIFEST,
    checkpoints_before,
    published_folders,
    read_manifest,
    remove_leftovers,
    set_aside,
    verify_checkpoint,
)
from shodh.config import RunConfig, to_dict
from shodh.core.distributed import SharedError, gather, rank, together, world_size
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.topology import Topology, refit_topology
from shodh.data.identity import RECORD
from shodh.train.plan import decide_checkpointing, plan_ranks, stage_of, train_of
from shodh.train.preflight import Decision, check_space, inputs_of, put_token
from shodh.train.run_folder import RunFolder

log = logging.getLogger("shodh")


def find_start(folder: RunFolder, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises
    ------
    CheckpointError
        ``resume`` names no complete checkpoint, or there are checkpoints and none is whole.
    ConfigError
        A new run would overwrite an old one.
    """
    if resume is not None and resume != "auto":
        path = Path(resume)
        read_manifest(path)
        return path
    tag = folder.latest()
    if tag is not None and resume is None:
        raise ConfigError(
            f"{folder.path} already holds a run (checkpoint {tag}); go on with --resume auto, choose another "
            "--set name=..., or remove the folder"
        )
    if tag is None and (broken := published_folders(folder.path)):
        raise CheckpointError(
            f"none of the checkpoints in {folder.checkpoints} is whole ({', '.join(p.name for p in broken[-3:])}); "
            "remove them to begin anew, or choose another --set name=..."
        )
    return None if tag is None else folder.checkpoints / tag


def decide(
    config: RunConfig,
    folder: RunFolder,
    resume: str | None,
    more: Iterable[Path],
    device: torch.device,
    of_tokenizer: bool,
) -> Decision:
    """Where the run goes on and how its ranks are laid out, and what all ranks must see; for rank 0.

    Raises
    ------
    CheckpointError, ConfigError, TopologyError
        As `find_start` and `check_same_run`; ranks, experts and batch do not fit; the disk is too full.
    """
    start = find_start(folder, resume)
    if start is None:
        topology, _ = plan_ranks(config, world_size(), of_tokenizer)
    else:
        check_same_run(config, folder, of_tokenizer)
        topology = refit(config, read_manifest(start)["topology"], device, of_tokenizer)
    planned = laid_out(config, topology, of_tokenizer)
    check_space(folder.path, stage_of(planned, world_size(), of_tokenizer).checkpoint_bytes)
    needed = [*more, *([] if start is None else [start / MANIFEST])]
    return Decision(start, topology, inputs_of(config, needed), put_token(folder.path))


def refit(config: RunConfig, written: Mapping[str, Any], device: torch.device, of_tokenizer: bool) -> Topology:
    """The layout of a run that goes on (`refit_topology`); errors and changes are named.

    Without ``micro_batch`` a rank holds all its samples at once, as before, unless they are more than the checkpoint's
    ranks held and a card has no memory for them.
    """
    train, experts = train_of(config, of_tokenizer), config.operator.experts
    sizes = (1, 0) if of_tokenizer else (config.parallel.ep_size, experts.num_experts)
    fixed = (world_size(), *sizes, train.global_batch, train.micro_batch)
    topology = refit_topology(*fixed)
    held = written.get("micro_batch")
    if (
        device.type == "cuda"
        and train.micro_batch is None
        and isinstance(held, int)
        and topology.micro_batch > held > 0
    ):
        planned, memory = laid_out(config, topology, of_tokenizer), device_memory(device)
        if not of_tokenizer:
            planned = decide_checkpointing(planned, world_size(), memory)
        if not stage_of(planned, world_size(), of_tokenizer).fits(memory):
            topology = refit_topology(*fixed, held)
    if topology.ep_size != sizes[0]:
        log.warning("parallel.ep_size=%d does not fit %d ranks; it is %d now", sizes[0], world_size(), topology.ep_size)
    if topology.micro_batch != (train.micro_batch or topology.micro_batch):
        log.warning("micro_batch=%d does not fit %d samples a rank; it is %d now, %d times a step", train.micro_batch,
                    train.global_batch // world_size(), topology.micro_batch, topology.accumulation)  # fmt: skip
    return topology


def laid_out(config: RunConfig, topology: Topology, of_tokenizer: bool) -> RunConfig:
    """The configuration with the expert degree and micro-batch of a layout."""
    name = "tokenizer" if of_tokenizer else "operator"
    section = getattr(config, name)
    train = section.train.model_copy(update={"micro_batch": topology.micro_batch})
    changed: dict[str, Any] = {name: section.model_copy(update={"train": train})}
    if not of_tokenizer:
        changed["parallel"] = config.parallel.model_copy(update={"ep_size": topology.ep_size})
    return config.model_copy(update=changed)


def claim(folder: RunFolder, resume: str | None, start: Path | None) -> Path | None:
    """Make this job the only one that writes to the run folder, and check what it goes on from. Collective.

    Returns ``start``; or, where that is damaged and ``resume`` is ``auto``, the newest older checkpoint that is whole.
    What is damaged is then said and set aside.

    Raises
    ------
    SharedError
        Another job is at work there, or a file of the checkpoint is missing or damaged and no other can be used.
    """
    with together():
        if rank() == 0 and folder.path.exists():  # A new folder is made, and owned, when all is checked.
            folder.own()
            remove_leftovers(folder.path)
            if find_start(folder, resume) != start:
                raise CheckpointError(f"{folder.path} changed while this job started; run the same command again")
    if start is None:
        return None
    older = gather([path for path in reversed(checkpoints_before(start)) if resume == "auto"])[0]
    damaged: list[tuple[Path, str]] = []
    for path in [start, *older]:
        damage = _damage(path)
        if damage is None:
            break
        damaged.append((path, damage))
    else:
        raise SharedError(damaged[0][1] + ("; no checkpoint before it is whole" if resume == "auto" else ""))
    with together():
        if rank() == 0:
            for wrong, damage in damaged:
                log.warning("%s; kept as %s", damage, set_aside(folder.path, wrong, path).name)
    if damaged:
        log.warning("the run goes on from %s, the newest checkpoint that is whole", path)
    return path


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks. Collective.

    Raises
    ------
    SharedError
        Some rank finds damage where rank 0 finds none: it sees other files.
    """
    found = gather(_verified(checkpoint, (rank(), world_size())))
    if not any(found):
        return None
    damage, whose = gather(_verified(checkpoint, (0, 1)) if rank() == 0 else None)[0], [bool(line) for line in found]
    if damage is None:
        raise SharedError(
            f"rank {whose.index(True)} does not see the checkpoint that rank 0 sees: {next(filter(None, found))}; the "
            "run folder must be the same one on all nodes"
        )
    return str(damage)


def _verified(checkpoint: Path, share: tuple[int, int]) -> str | None:
    try:
        verify_checkpoint(checkpoint, share)
    except CheckpointError as error:
        return str(error)
    return None


def check_same_run(config: RunConfig, folder: RunFolder, of_tokenizer: bool = False) -> None:
    """A resumed run must learn the same thing from the same batches; where its data lie may change.

    A tokenizer has nothing of the operator, whose settings may change beside it. Checked before anything is written
    into its folder.
    """
    if not (folder.path / "config.yaml").exists():
        return
    old, new = to_dict(folder.config()), to_dict(config)
    for tree in (old, new):
        for stage in ("tokenizer", "operator"):
            del tree[stage]["train"]  # How long and how fast may change; what is learned, and from what, may not.
        del tree["tokenizer"]["run"]
        if (folder.path / RECORD).exists():
            for regime in tree["data"]["regimes"]:
                del regime["path"]
    learned = ("seed", "data", "tokenizer", *(() if of_tokenizer else ("operator", "finetune")))
    changed = [key for key in learned if old[key] != new[key]]
    if changed:
        places = [where for key in changed for where in _differences(old[key], new[key], key)]
        shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
        raise ConfigError(
            f"{folder.path} was started with other settings of {' and '.join(changed)} ({shown}); resume with its own "
            "config.yaml, or start a new run with --set name=..."
        )


def _differences(old: Any, new: Any, where: str) -> list[str]:
    """Each place where two trees of settings differ, with what the old one has there."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [place for key in old for place in _differences(old[key], new[key], f"{where}.{key}")]
    return [] if old == new else [f"{where} was {old if isinstance(old, str | int | float) else 'another'}"]


def device_memory(device: torch.device) -> int:
    """Bytes of a card, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(model: nn.Module, device: torch.device) -> None:
    """Refuse a model, on the meta device, whose float32 weights alone are more than this machine's memory."""
    needed, there = 4 * sum(p.numel() for p in model.parameters()), device_memory(device)
    if needed > there:
        raise ConfigError(
            f"the weights of a rank need {needed / 2**30:.4g} GiB in float32, and {device} has {there / 2**30:.4g}; "
            "use a smaller model, or a larger parallel.ep_size"
        )
