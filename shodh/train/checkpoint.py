"""Checkpoints that are whole or absent.

DeepSpeed writes what it needs to resume; its own saving is neither atomic nor checked. Around it: everything is written
into a hidden folder, checksummed into a manifest, and published by one rename when every rank has finished; ``latest``
is moved after that. A checkpoint also holds the weights in the exchange format (``model.safetensors``), so that nothing
but resuming ever needs DeepSpeed's pickles.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from shodh.errors import CheckpointError
from shodh.files import sync_to_disk, write_atomically
from shodh.models.description import METADATA_KEY, is_pretrained, read_description
from shodh.pickles import refuse_foreign_globals
from shodh.strict_json import write_json
from shodh.train.run_folder import RunFolder, describe_environment
from shodh.train.runtime import together
from shodh.weights import INDEX, WEIGHTS, open_weights, persistent_buffers, read_json, read_metadata
from shodh.weights import load_into as load_into
from shodh.weights import load_weights as load_weights

MANIFEST = "manifest.json"


def checksum(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter on every rank: ZeRO-3 shards collected, experts of all ranks stacked by global id."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            value = parameter.detach().clone()
    else:
        value = parameter.detach()
    if getattr(parameter, "allreduce", True):
        return value
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)


def exchange_state(model: nn.Module) -> dict[str, Tensor]:
    """Plain names, plain layout: one CPU tensor a parameter, all experts stacked by global id.

    Collective: every rank calls it, rank 0 gets the tensors and the others an empty dict.
    """
    keep = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = _gathered(parameter)
        if keep:
            state[name] = value.cpu().contiguous().clone()
    if keep:
        state.update((name, buffer.detach().cpu().clone()) for name, buffer in persistent_buffers(model))
    return state


def read_initial_weights(path: Path) -> dict[str, Tensor]:
    """Weights of an operator for a new run: from a checkpoint folder, a converted folder, or a safetensors file.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged; DeepSpeed's own folders are to be converted first.
    """
    if path.is_dir() and (path / MANIFEST).exists():
        manifest = read_manifest(path)
        verify_file(path, WEIGHTS, manifest)
    elif path.is_dir() and next(path.glob("*_model_states.pt"), None) is not None:
        raise CheckpointError(f"{path} is DeepSpeed's own; convert it first: tools/convert_checkpoint.py {path} OUT")
    elif path.is_dir() and not (path / WEIGHTS).exists() and not (path / INDEX).exists():
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}; nor a converted folder: it has no {WEIGHTS}"
        )
    weights = {name: stored.read() for name, stored in open_weights(path).items()}
    prefix = "operator."
    chosen = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)} or weights
    if any(name.startswith("tokenizer.") for name in chosen):
        raise CheckpointError(f"{path} holds a tokenizer alone; expected the weights of an operator")
    return chosen


def source_checksum(path: Path) -> str:
    """What names the weights at ``path``, also after a conversion: SHA-256 of the manifest of their checkpoint.

    Of a converted folder it is the one of the checkpoint that it was made of; of weights without either, the one of
    the file, or of the index of shards.
    """
    if is_pretrained(path) or (path.is_file() and METADATA_KEY in read_metadata(path)):
        return read_description(path).source.sha256
    if path.is_dir():
        path = next(file for name in (MANIFEST, WEIGHTS, INDEX) if (file := path / name).exists())
    return checksum(path)


def set_masters(engine: Any, state: Mapping[str, Tensor]) -> None:
    """Give the optimiser float32 weights: DeepSpeed makes its own from the model after it was cast to bf16.

    Parameters
    ----------
    state : mapping
        Weights by name, of stacked experts this rank's; those that are not float32 are left out, and so are frozen
        ones, which no optimiser has.
    """
    for name, parameter in engine.module.named_parameters():
        if state[name].dtype != torch.float32 or not parameter.requires_grad:
            continue
        value = state[name].flatten().to(parameter.device)
        if hasattr(parameter, "ds_id"):
            _set_shard(parameter, value)
        elif (mapping := parameter._hp_mapping) is not None:
            address = mapping.lp_fragment_address
            mapping.hp_fragment.data.copy_(value[address.start : address.start + address.numel])


def _set_shard(parameter: Tensor, value: Tensor) -> None:
    """ZeRO 3: this rank's share of a parameter, the last one padded. DeepSpeed's setter of whole values cannot pad."""
    from deepspeed.utils import safe_set_local_fp32_param

    optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
    size, place = parameter.ds_tensor.numel(), optimizer._get_param_partition_rank(parameter)  # type: ignore[attr-defined]
    share = value.new_zeros(size)
    part = value[place * size : (place + 1) * size]
    share[: len(part)] = part
    safe_set_local_fp32_param(parameter, share)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _gather_dicts(local: dict[str, Any]) -> dict[str, Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, local)
    return {key: value for part in parts for key, value in part.items()}


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save_checkpoint(
    engine: Any, folder: RunFolder, tag: str, state: dict[str, Any], topology: dict[str, int], keep: int
) -> Path:
    """Write, check, publish; then drop all but the newest ``keep`` checkpoints. Collective.

    Parameters
    ----------
    state : dict
        JSON-able state of the loop (step, seed ...).
    topology : dict
        Ranks, expert-parallel degree and ZeRO stage that wrote it.
    """
    rank, world = _rank_and_world()
    final = folder.checkpoints / tag
    partial = folder.checkpoints / f".{tag}.partial"
    with together():
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with together():
        engine.save_checkpoint(str(folder.checkpoints), tag=partial.name, save_latest=False)
        weights = exchange_state(engine.module)
        if rank == 0:
            save_file(weights, str(partial / WEIGHTS))
    with together():
        sums = {}
        for path in _files(partial)[rank::world]:
            sync_to_disk(path)
            sums[str(path.relative_to(partial))] = {"size": path.stat().st_size, "sha256": checksum(path)}
        files = _gather_dicts(sums)
    with together():
        if rank == 0:
            manifest = {"tag": tag, "state": state, "topology": topology, "env": describe_environment(), "files": files}
            write_json(partial / MANIFEST, manifest, sort_keys=True)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_to_disk(folder.checkpoints)
            write_atomically(folder.path / "latest", tag + "\n")
            _prune(folder, tag, keep)
    return final


def _prune(folder: RunFolder, newest: str, keep: int) -> None:
    tags = sorted(p for p in folder.checkpoints.iterdir() if p.is_dir() and (p / MANIFEST).exists())
    for path in [p for p in tags if p.name != newest][: max(0, len(tags) - keep)]:
        shutil.rmtree(path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; raises `CheckpointError` if there is none or it is damaged."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = read_json(path)
        for key in ("files", "state", "topology"):
            manifest[key].items()
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: expected JSON with files, state and topology") from error


def verify_checkpoint(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Compare files with the manifest, every ``share[1]``-th of them from ``share[0]`` on; returns the manifest.

    Raises
    ------
    CheckpointError
        Names the file that is missing, truncated or changed.
    """
    manifest = read_manifest(checkpoint)
    for name in sorted(manifest["files"])[share[0] :: share[1]]:
        verify_file(checkpoint, name, manifest)
    return manifest


def verify_file(checkpoint: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compare one file with the manifest; raises `CheckpointError` that names it."""
    path = checkpoint / name
    if not path.resolve().is_relative_to(checkpoint.resolve()) or name not in manifest["files"]:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: {name!r} is no file of this checkpoint")
    try:
        size, digest = int(manifest["files"][name]["size"]), str(manifest["files"][name]["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: no size and checksum of {name}") from error
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} is missing")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and {size} were written")
    if checksum(path) != digest:
        raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written")


def require_topology(checkpoint: Path, manifest: Mapping[str, Any], topology: Mapping[str, int]) -> None:
    """Raise `CheckpointError` if ranks, expert degree or ZeRO stage are not those that wrote a checkpoint."""
    written = manifest["topology"]
    differ = [f"{k}={written.get(k)} (now {v})" for k, v in topology.items() if written.get(k) != v]
    if differ:
        raise CheckpointError(
            f"{checkpoint} was written with {', '.join(differ)}; resume with the same, or start a new run from its "
            f"weights with --init-from {checkpoint}"
        )


def load_checkpoint(engine: Any, checkpoint: Path, topology: dict[str, int]) -> dict[str, Any]:
    """Restore weights, optimiser and buffers into an engine; returns the loop's state. Collective.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or would run something when it is loaded; or ranks, expert degree or ZeRO stage
        are not those that wrote it.
    """
    rank, world = _rank_and_world()
    with together():
        manifest = verify_checkpoint(checkpoint, (rank, world))
        # DeepSpeed unpickles freely: look at every program it might run before it does, listed in the manifest or not.
        for path in sorted(checkpoint.rglob("*.pt"))[rank::world]:
            refuse_foreign_globals(path)
        require_topology(checkpoint, manifest, topology)
    with together():
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {checkpoint}")
    state: dict[str, Any] = manifest["state"]
    return state
