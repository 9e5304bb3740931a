"""Reading the optimiser's moments: fragments that any number of ranks, expert degree and ZeRO stage can read.

``optimizer/rank_NNNNN.safetensors`` holds what one rank kept: ``exp_avg/<parameter>`` and ``exp_avg_sq/<parameter>``,
flat, and as metadata where each begins in the flat parameter of the whole model (``starts``), and the number of updates
so far. The float32 weights that go with them are those of ``model.safetensors``. Who reads takes the ranges that it
needs from mapped files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh.checkpoint.shares import Place, flat_tensors, places, shard_range, shares
from shodh.core.errors import CheckpointError
from shodh.core.reading import parse_json
from shodh.core.weights import StoredTensor, check_fit, open_file, persistent_buffers, read_metadata

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragments:
    """The fragments of all ranks that wrote; nothing is read before it is asked for.

    Raises
    ------
    CheckpointError
        A file is not one of these, or they disagree.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._parts: dict[str, list[tuple[int, StoredTensor]]] = {}
        updates: set[int] = set()
        self._folder = Path()
        for path in paths:
            self._folder = path.parent
            try:
                metadata = read_metadata(path)
                updates.update(parse_json(metadata["updates"], str(path), CheckpointError))
                starts = parse_json(metadata["starts"], str(path), CheckpointError)
                for key, stored in open_file(path).items():
                    self._parts.setdefault(key, []).append((int(starts[key.partition("/")[2]]), stored))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} holds no fragments of an optimiser's state") from error
        if len(updates) != 1:
            raise CheckpointError(f"the files in {self._folder} do not agree on one number of updates: {updates}")
        (self.updates,) = updates
        for parts in self._parts.values():
            parts.sort(key=lambda part: part[0])

    def keys(self) -> list[str]:
        return sorted(self._parts)

    def read(self, key: str, start: int, numel: int) -> Tensor:
        """The numbers ``start .. start + numel - 1`` of ``exp_avg/<parameter>`` or another key.

        Raises
        ------
        CheckpointError
            The files do not hold each of them once.
        """
        found, place = [], start
        for begin, stored in self._parts.get(key, []):
            low, high = max(begin, start), min(begin + stored.numel, start + numel)
            if low < high:
                if low != place:
                    break
                found.append(stored.part(low - begin, high - begin))
                place = high
        if place != start + numel:
            raise CheckpointError(f"{self._folder} holds {place - start} of the {numel} numbers of {key} from {start}")
        return torch.cat(found) if found else torch.empty(0)


def check_weights_fit(engine: Any, weights: Mapping[str, StoredTensor], source: Path) -> None:
    """Compare names and shapes with those of the engine's whole model; raises `CheckpointError`."""
    expected = {place.name: place.shape for place in places(engine.module)}
    expected |= {name: tuple(buffer.shape) for name, buffer in persistent_buffers(engine.module)}
    check_fit(expected, {name: stored.shape for name, stored in weights.items()}, source)


@torch.no_grad()
def load_training_state(engine: Any, weights: Mapping[str, StoredTensor], fragments: Fragments, source: Path) -> None:
    """Weights, moments and buffers of a fresh engine; its configured rates, decay and betas stay.

    Raises
    ------
    CheckpointError
        The weights are those of another model; nothing was changed then.
    """
    where = places(engine.module)
    buffers = dict(persistent_buffers(engine.module))
    check_weights_fit(engine, weights, source)
    optimizer = engine.optimizer.optimizer
    for flat in flat_tensors(engine):
        flat.zero_()  # Padding too.
        moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
        step = torch.tensor(fragments.updates, dtype=torch.float32, device=flat.device)
        optimizer.state[flat] = {"step": step, **moments}
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = fragments.updates
    for share in shares(engine):
        if share.flat is None:
            continue
        stop = share.start + share.numel
        share.flat[share.own].copy_(weights[share.name].part(share.start, stop))
        for key in MOMENTS:
            state = optimizer.state[share.flat][key]
            state[share.own].copy_(fragments.read(f"{key}/{share.name}", share.start, share.numel))
    for place in where:
        _load_parameter(engine.optimizer, place, weights[place.name])
    for name, buffer in buffers.items():
        buffer.copy_(weights[name].read())


def _load_parameter(zero: Any, place: Place, stored: StoredTensor) -> None:
    """The model's own copy, rounded to its precision."""
    p: Any = place.parameter
    if not place.sharded:
        p.data.copy_(stored.part(place.first, place.first + p.numel()).view(p.shape))
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    start, numel = shard_range(zero, p)
    p.ds_tensor.data[:numel].copy_(stored.part(place.first + start, place.first + start + numel))
    if p.ds_status == ZeroParamStatus.AVAILABLE:
        p.data.copy_(stored.part(place.first, place.first + p.ds_numel).view(p.ds_shape))


@torch.no_grad()
def set_masters(engine: Any, state: Mapping[str, Tensor]) -> None:
    """Give the optimiser float32 weights: DeepSpeed makes its own from the model after it was cast to bf16.

    Parameters
    ----------
    state : mapping
        Weights by name, of stacked experts this rank's; those that are not float32 are left out, and so are frozen
        ones, which no optimiser has.
    """
    first = {place.name: place.first for place in places(engine.module)}
    for share in shares(engine):
        if share.flat is not None and state[share.name].dtype == torch.float32:
            start = share.start - first[share.name]
            share.flat[share.own].copy_(state[share.name].flatten()[start : start + share.numel])
