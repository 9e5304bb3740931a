"""DeepSpeed's own checkpoint folders (ZeRO 1, 2, 3 at any expert degree, and universal) as stored tensors.

ZeRO keeps the float32 master weights in flat partitions, one file a rank; parameters lie in them one after the other,
cut where a rank's share ends. A parameter is found again as the fragments of all ranks that share it, in their order:
all ranks for a replicated parameter, the ranks that hold the same experts for an expert. Nothing is copied here: the
fragments are views of the mapped files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh.checkpoint.foreign.pickles import Fragment, flat_values, read_pt
from shodh.core.errors import CheckpointError
from shodh.core.weights import StoredTensor

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_\d+_model_states\.pt")


@dataclass(frozen=True)
class DeepSpeedState:
    """What a DeepSpeed folder holds.

    Attributes
    ----------
    tensors : dict
        Weights in the exchange format.
    step : int, optional
    lower_precision : bool
        The run computed in bf16 or fp16, with float32 master weights beside.
    """

    tensors: dict[str, StoredTensor]
    step: int | None
    lower_precision: bool


@dataclass(frozen=True)
class Placement:
    """Which rank of an expert-parallel group keeps which experts, by global id, in the order of its rows."""

    num_experts: int
    experts: tuple[tuple[int, ...], ...]

    @property
    def ep_size(self) -> int:
        return len(self.experts)


def is_deepspeed_folder(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*mp_rank_*_model_states.pt"))


def read_deepspeed_folder(path: Path, masters: bool = True) -> DeepSpeedState:
    """Weights of a folder that ``engine.save_checkpoint`` or DeepSpeed's ``ds_to_universal`` wrote.

    Parameters
    ----------
    masters : bool
        Take the float32 master weights of the optimiser; else, where they are stored, the weights of the module.

    Raises
    ------
    CheckpointError
        A file is missing, damaged or not what DeepSpeed writes; it is named.
    """
    models = sorted(path.glob("mp_rank_*_model_states.pt")) or sorted(
        path.glob("zero_pp_rank_*_model_states.pt"), key=_rank_of
    )
    if not models:
        raise CheckpointError(f"{path} is no DeepSpeed checkpoint: it has no *_model_states.pt")
    states = [_read_model_state(file) for file in models]
    first = states[0]
    tensors = _buffers(first, models[0])
    placements = _placements(first, models[0])
    if (path / "zero").is_dir():
        tensors.update(_read_universal(path / "zero", first, placements))
    elif models[0].name.startswith("zero_pp_rank"):
        tensors.update(_read_zero3(_optimizer_files(path), states, models))
    else:
        _check_expert_files(path, placements)
        optimizers = _optimizer_files(path, required=False)
        if optimizers and masters:
            tensors.update(_read_zero12(optimizers, first, placements, models[0]))
        else:
            tensors.update(_read_module(path, first, placements, models[0]))
    step = first.get("global_steps")
    lower = any(getattr(t, "dtype", None) in (torch.bfloat16, torch.float16) for t in first["module"].values())
    return DeepSpeedState(tensors, step if isinstance(step, int) else None, lower)


def _rank_of(path: Path) -> int:
    match = _RANK.search(path.name)
    if match is None or int(match.group(2)) != 0:
        raise CheckpointError(f"{path} is of a tensor-parallel run, which this project does not write")
    return int(match.group(1))


def _read_model_state(path: Path) -> dict[str, Any]:
    state = read_pt(path)
    if not isinstance(state, dict) or not isinstance(state.get("module"), Mapping) or "ds_version" not in state:
        raise CheckpointError(f"{path} is not DeepSpeed's: expected its module and ds_version")
    config = state.get("ds_config")
    if isinstance(config, dict) and config.get("use_data_before_expert_parallelism"):
        raise CheckpointError(f"{path}: use_data_before_expert_parallelism orders ranks in a way that is not supported")
    if state.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{path} is of a tensor-parallel run, which this project does not write")
    return state


def _optimizer_files(path: Path, required: bool = True) -> list[Path]:
    """One file a rank, in the order of the ranks."""
    files = sorted(path.glob("*_optim_states.pt"), key=_rank_of)
    if not files and required:
        raise CheckpointError(f"{path} has no *_optim_states.pt, and ZeRO 3 keeps the weights there")
    for rank, file in enumerate(files):
        if _rank_of(file) != rank:
            raise CheckpointError(f"{path}: the optimizer file of rank {rank} is missing (found {file.name})")
    return files


def _read_optimizer(path: Path, world: int) -> dict[str, Any]:
    content = read_pt(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state or "partition_count" not in state:
        raise CheckpointError(f"{path} is not an optimizer file of ZeRO")
    counts = state["partition_count"]
    most = max(counts) if isinstance(counts, list) else counts
    if most != world:
        raise CheckpointError(f"{path} was written by {most} ranks, and {world} optimizer files are there")
    return state


def _buffers(state: dict[str, Any], path: Path) -> dict[str, StoredTensor]:
    found = {}
    for name in state.get("buffer_names") or []:
        if name not in state["module"]:
            raise CheckpointError(f"{path} is damaged: it lists the buffer {name} and lacks it")
        found[name] = _stored(state["module"][name], name, path)
    return found


def _stored(tensor: Any, name: str, path: Path) -> StoredTensor:
    flat = flat_values(tensor, name, path)
    return StoredTensor(tuple(tensor.shape), (flat,), path)


def _shapes(state: dict[str, Any], path: Path) -> list[dict[str, tuple[int, ...]]]:
    """Name and shape of the parameters of each optimiser group, in order."""
    groups = state.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        raise CheckpointError(f"{path} is damaged: it has no param_shapes")
    if state.get("frozen_param_shapes"):
        raise CheckpointError(f"{path} has frozen parameters, which no run of this project has")
    return [{name: tuple(int(n) for n in shape) for name, shape in group.items()} for group in groups]


def _placements(state: dict[str, Any], path: Path) -> dict[str, Placement]:
    """Placement by name of the expert layer's stacked weights (``blocks.0.feed_forward.experts``)."""
    found = {}
    for layer in state.get("ds_autoep_layers") or []:
        try:
            ranks = sorted(layer["expert_placement"]["ranks"], key=lambda entry: int(entry["rank"]))
            experts = tuple(tuple(int(e) for e in entry["experts"]) for entry in ranks)
            placement, prefix = Placement(int(layer["num_experts"]), experts), str(layer["expert_key_prefix"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its expert placement lacks {error}") from error
        if sorted(e for group in placement.experts for e in group) != list(range(placement.num_experts)):
            raise CheckpointError(
                f"{path} is damaged: {prefix} has {placement.num_experts} experts, and they are not each placed once"
            )
        found[prefix] = placement
    return found


def _check_expert_files(path: Path, placements: Mapping[str, Placement]) -> None:
    """ZeRO 1 and 2 write a file an expert; all must be there, and none more."""
    found = {tuple(int(n) for n in m.groups()) for p in path.iterdir() if (m := _EXPERT.fullmatch(p.name))}
    wanted = {(layer, e) for layer, p in enumerate(placements.values()) for e in range(p.num_experts)}
    for layer, expert in sorted(wanted - found):
        name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
        raise CheckpointError(f"expert file {path / name} is missing")
    if found - wanted:
        layer, expert = min(found - wanted)
        raise CheckpointError(
            f"{path} has a file of expert {expert} in layer {layer}, and its experts are "
            f"{[p.num_experts for p in placements.values()]} by layer"
        )


def _stack(
    name: str, shape: tuple[int, ...], parts: Sequence[Sequence[Tensor]], placement: Placement, path: Path
) -> StoredTensor:
    """Experts of all expert-parallel ranks by global id; ``parts[r]`` are the fragments of rank r's rows."""
    rows: dict[int, list[Tensor]] = {}
    size = math.prod(shape[1:])
    for fragments, experts in zip(parts, placement.experts, strict=True):
        stored = sum(f.numel() for f in fragments)
        if stored != len(experts) * size:
            raise CheckpointError(f"{path}: {name} has {stored} values for {len(experts)} experts of {size}")
        for row, expert in enumerate(experts):
            rows[expert] = _cut(fragments, row * size, size)
    pieces = tuple(piece for expert in range(placement.num_experts) for piece in rows[expert])
    return StoredTensor((placement.num_experts, *shape[1:]), pieces, path)


def _cut(fragments: Sequence[Tensor], start: int, size: int) -> list[Tensor]:
    """Values ``[start, start + size)`` of fragments that follow each other."""
    cut = []
    for fragment in fragments:
        first, last = max(start, 0), min(start + size, fragment.numel())
        if first < last:
            cut.append(fragment[first:last])
        start -= fragment.numel()
    return cut


def _placement_of(name: str, placements: Mapping[str, Placement]) -> Placement | None:
    return placements.get(name.rpartition(".")[0])


def _read_zero12(
    files: list[Path], model: dict[str, Any], placements: Mapping[str, Placement], model_path: Path
) -> dict[str, StoredTensor]:
    states = [_read_optimizer(file, len(files)) for file in files]
    found = {}
    for group, shapes in enumerate(_shapes(model, model_path)):
        for name, shape in shapes.items():
            by_rank = [_fragment(s, group, name, f) for s, f in zip(states, files, strict=True)]
            placement = _placement_of(name, placements)
            if placement is None:
                found[name] = StoredTensor(shape, tuple(p for p in by_rank if p is not None), files[0].parent / name)
                continue
            if len(files) % placement.ep_size:
                raise CheckpointError(
                    f"{files[0].parent}: {len(files)} ranks do not divide into EP {placement.ep_size}"
                )
            parts = [[p for p in by_rank[r :: placement.ep_size] if p is not None] for r in range(placement.ep_size)]
            found[name] = _stack(name, shape, parts, placement, files[0].parent)
    return found


def _fragment(state: dict[str, Any], group: int, name: str, path: Path) -> Tensor | None:
    """The part of a parameter in one rank's partition of its group, if it has any."""
    try:
        flat = flat_values(state["single_partition_of_fp32_groups"][group], f"partition {group}", path)
        address = state["param_slice_mappings"][group].get(name)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it has no float32 partition of group {group}") from error
    if address is None:
        return None
    if not isinstance(address, Fragment) or not 0 <= address.start <= address.start + address.numel <= flat.numel():
        raise CheckpointError(f"{path} is damaged: {name} lies outside its partition of {flat.numel()} values")
    return flat[address.start : address.start + address.numel]


def _read_zero3(files: list[Path], models: list[dict[str, Any]], paths: list[Path]) -> dict[str, StoredTensor]:
    if len(models) != len(files):
        raise CheckpointError(f"{files[0].parent} has {len(models)} model files and {len(files)} optimizer files")
    states = [_read_optimizer(file, len(files)) for file in files]
    placements = _placements(models[0], paths[0])
    parts: dict[str, list[Tensor]] = {}  # by name, the share of each rank in turn
    shapes: dict[str, tuple[int, ...]] = {}
    shared_by: dict[str, int] = {}
    for state, model, file, model_path in zip(states, models, files, paths, strict=True):
        for group, by_name in enumerate(_shapes(model, model_path)):
            flat, count, start = *_zero3_group(state, group, file), 0
            for name, shape in by_name.items():
                share = -(-math.prod(shape) // count)
                if start + share > flat.numel():
                    raise CheckpointError(f"{file} is damaged: {name} lies outside its partition of {flat.numel()}")
                parts.setdefault(name, []).append(flat[start : start + share])
                shapes[name], shared_by[name] = shape, count
                start += share
    found = {}
    folder = files[0].parent
    for name, shape in shapes.items():
        placement, size = _placement_of(name, placements), math.prod(shape)
        # Without experts all ranks share a parameter; with them, the ranks that hold the same ones.
        groups = 1 if placement is None else placement.ep_size
        shares = [_cut(parts[name][r::groups], 0, size) for r in range(groups)]
        if any(len(parts[name][r::groups]) != shared_by[name] for r in range(groups)):
            raise CheckpointError(f"{folder}: {name} is shared by {shared_by[name]} ranks of {len(files)}")
        if placement is None:
            found[name] = StoredTensor(shape, tuple(shares[0]), folder / name)
        else:
            found[name] = _stack(name, shape, shares, placement, folder)
    return found


def _zero3_group(state: dict[str, Any], group: int, path: Path) -> tuple[Tensor, int]:
    """One rank's flat partition of a sub-group, and among how many ranks that is shared."""
    try:
        flat = flat_values(state["fp32_flat_groups"][group], f"partition {group}", path)
        groups = state.get("ds_zero_partition_groups")
        count = int(state["partition_count"] if groups is None else groups[group]["partition_count"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: it has no float32 partition of group {group}") from error
    return flat, count


def _read_module(
    path: Path, model: dict[str, Any], placements: Mapping[str, Placement], model_path: Path
) -> dict[str, StoredTensor]:
    """ZeRO 1 and 2: the weights as the run computed with them, experts from their own files."""
    names = {name: _stored(t, name, model_path) for name, t in model["module"].items()}
    for layer, (prefix, placement) in enumerate(placements.items()):
        for weight in ("w1", "w2", "w3"):
            pieces, shape = [], ()
            for expert in range(placement.num_experts):
                file = path / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
                content = read_pt(file)
                key = f"{prefix}.{weight}.{expert}"
                if not isinstance(content, dict) or key not in content:
                    raise CheckpointError(f"{file} is damaged: it lacks {key}")
                pieces.append(flat_values(content[key], key, file))
                shape = tuple(content[key].shape)
            names[f"{prefix}.{weight}"] = StoredTensor((placement.num_experts, *shape), tuple(pieces), path)
    return names


def _read_universal(
    folder: Path, model: dict[str, Any], placements: Mapping[str, Placement]
) -> dict[str, StoredTensor]:
    """One folder a parameter, whole, in float32."""
    found = {}
    for shapes in _shapes(model, folder.parent):
        for name, shape in shapes.items():
            path = folder / name / "fp32.pt"
            content = read_pt(path)
            tensor = content.get("param") if isinstance(content, dict) else content
            placement = _placement_of(name, placements)
            whole = shape if placement is None else (placement.num_experts, *shape[1:])
            stored = _stored(tensor, name, path)
            if math.prod(stored.shape) != math.prod(whole):
                raise CheckpointError(f"{path} is {list(stored.shape)}, and {name} is {list(whole)}")
            found[name] = StoredTensor(whole, stored.fragments, path)
    return found
