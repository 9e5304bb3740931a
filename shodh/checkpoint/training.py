"""Save and restore a run in training; every rank writes and reads its own share, at any layout of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shodh.checkpoint.folder import (
    OPTIMIZER,
    checksum,
    partial_folder,
    prune,
    publish,
    read_manifest,
)
from shodh.checkpoint.optimizer_state import Fragments, load_training_state, write_fragments
from shodh.checkpoint.run_files import link_description
from shodh.checkpoint.shares import check_cover, check_masters
from shodh.checkpoint.weights import create_weights, fill_weights
from shodh.core.distributed import gather, together
from shodh.core.errors import CheckpointError
from shodh.core.files import sync_to_disk
from shodh.core.weights import WEIGHTS, open_file

FORMAT = 2


def save_checkpoint(engine: Any, run: Path, record: dict[str, Any], keep: int) -> Path:
    """Write, check, publish; then drop all but the newest ``keep`` checkpoints. Collective.

    Parameters
    ----------
    run : Path
        The run folder.
    record : dict
        What the manifest says beside the files: ``state`` of the loop with its ``step``, ``topology`` that wrote, and
        more that JSON can hold.

    Raises
    ------
    SharedError
        A disk is full, or the optimiser's weights are not the model's; the run's other checkpoints are as they were.
    """
    rank = dist.get_rank()
    tag = f"step_{record['state']['step']:08d}"
    partial, own = partial_folder(run, tag), f"{OPTIMIZER}/rank_{rank:05d}.safetensors"
    with together():
        check_masters(engine)
    check_cover(engine)
    with together():
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / OPTIMIZER).mkdir(parents=True)
            create_weights(engine, partial / WEIGHTS)
            described = link_description(run, partial)
    with together():
        write_fragments(engine, partial / own)
        fill_weights(engine, partial / WEIGHTS)
        sync_to_disk(partial / WEIGHTS)
    with together():
        # By name: what another rank wrote need not be in this machine's listing of a shared folder yet.
        names = [own, WEIGHTS, *described] if rank == 0 else [own]
        sums = {n: {"size": (partial / n).stat().st_size, "sha256": checksum(partial / n)} for n in names}
    listed = {name: entry for part in gather(sums) for name, entry in part.items()}
    with together():
        if rank == 0:
            sync_to_disk(partial / OPTIMIZER)
            publish(partial, run, tag, {"format": FORMAT, "tag": tag, "files": listed, **record})
            prune(run, tag, keep)
    return run / "checkpoints" / tag


def load_checkpoint(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Restore weights, optimiser and buffers of a fresh engine, whatever layout wrote them; returns the manifest.

    Collective. The files were compared with the manifest before (`shodh.checkpoint.folder.verify_checkpoint`).

    Raises
    ------
    SharedError
        The checkpoint has no optimiser state, or is of another model.
    """
    with together():
        manifest = read_manifest(checkpoint)
        names = sorted(name for name in manifest["files"] if name.startswith(f"{OPTIMIZER}/"))
        if not names:
            raise CheckpointError(
                f"{checkpoint} holds no state of an optimiser that can be read here (an older version wrote it?); "
                f"start a new run from its weights with --init-from {checkpoint}"
            )
        check_masters(engine)
        fragments = Fragments(checkpoint / name for name in names)
        load_training_state(engine, open_file(checkpoint / WEIGHTS), fragments, checkpoint)
        engine.global_steps = int(manifest["state"]["step"])
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    return manifest
