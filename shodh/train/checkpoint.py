"""Checkpoints that are whole or absent.

DeepSpeed writes what it needs to resume; its own saving is neither atomic nor checked. Around it: everything is written
into a hidden folder, checksummed into a manifest, and published by one rename when every rank has finished; ``latest``
is moved after that. A checkpoint also holds the weights in the exchange format (``model.safetensors``), so that nothing
but resuming ever needs DeepSpeed's pickles.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shodh.errors import CheckpointError
from shodh.files import sync_to_disk, write_atomically
from shodh.train.run_folder import RunFolder, describe_environment
from shodh.train.runtime import together

WEIGHTS = "model.safetensors"
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


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


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
        state.update((name, buffer.detach().cpu().clone()) for name, buffer in _persistent_buffers(model))
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights; raises `CheckpointError` that names it."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"no weights at {path}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy an exchange-format state into a model that holds all experts; names and shapes must agree."""
    expected = {name: p.shape for name, p in model.named_parameters()}
    expected.update((name, b.shape) for name, b in _persistent_buffers(model))
    problems = [f"lacks {name}" for name in sorted(expected.keys() - state.keys())]
    problems += [f"has unknown {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {list(state[name].shape)}, the model's {list(expected[name])}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])
        for name, b in _persistent_buffers(model):
            b.copy_(state[name])


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
            write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
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
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        manifest["files"].items()
        return manifest
    except OSError as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged") from error


def verify_checkpoint(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Compare files with the manifest, every ``share[1]``-th of them from ``share[0]`` on; returns the manifest.

    Raises
    ------
    CheckpointError
        Names the file that is missing, truncated or changed.
    """
    manifest = read_manifest(checkpoint)
    for name in sorted(manifest["files"])[share[0] :: share[1]]:
        expected, path = manifest["files"][name], checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, and {expected['size']} were written")
        if checksum(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written")
    return manifest


def load_checkpoint(engine: Any, checkpoint: Path, topology: dict[str, int]) -> dict[str, Any]:
    """Restore weights, optimiser and buffers into an engine; returns the loop's state. Collective.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or ranks, expert degree or ZeRO stage are not those that wrote it.
    """
    rank, world = _rank_and_world()
    with together():
        manifest = verify_checkpoint(checkpoint, (rank, world))
        written = manifest["topology"]
        if written != topology:
            differ = [f"{k}={written.get(k)} (now {v})" for k, v in topology.items() if written.get(k) != v]
            raise CheckpointError(
                f"{checkpoint} was written with {', '.join(differ)}; resume with the same, or start a new run from its "
                f"weights with --init-from {checkpoint}"
            )
    with together():
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed could not load {checkpoint}")
    state: dict[str, Any] = manifest["state"]
    return state
