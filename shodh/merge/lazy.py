"""Tensors that are read or computed in blocks, so that merging needs the memory of a few blocks, whatever the model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from shodh.core.errors import CheckpointError
from shodh.core.weights import LazyTensor, LazyWeights, StoredTensor, Weights

BLOCK = 2**20  # values computed at once; random numbers are drawn by block, so changing it changes them


class BlockTensor(ABC):
    """A tensor of which any part can be had without the rest."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = tuple(shape), dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @abstractmethod
    def part(self, start: int, stop: int) -> Tensor:
        """The values ``start .. stop - 1`` of the flat tensor, in its own dtype."""

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The values in order, cast, a block at once."""
        for start, stop in blocks(self.numel):
            yield self.part(start, stop).to(dtype)

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        out = torch.empty(self.numel, dtype=self.dtype)
        for start, stop in blocks(self.numel):
            out[start:stop] = self.part(start, stop)
        return out.view(self.shape)


def blocks(numel: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive blocks."""
    return ((start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))


class FileTensor(BlockTensor):
    """A tensor of a safetensors file, which is mapped only while a block is read.

    A file that stays mapped counts as memory of the process, page by page, until all of it has been read.
    """

    def __init__(self, stored: StoredTensor, name: str) -> None:
        super().__init__(stored.shape, stored.dtype)
        self.path, self.name = stored.path, name

    def part(self, start: int, stop: int) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name).reshape(-1)[start:stop].clone()
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error}") from error


def from_files(tensors: Weights) -> dict[str, LazyTensor]:
    """The tensors of opened safetensors files (`shodh.core.weights.open_weights`), to be read block by block."""
    return {name: FileTensor(stored, name) for name, stored in tensors.items()}


def from_memory(state: Mapping[str, Tensor], name: str = "memory") -> dict[str, LazyTensor]:
    """Weights that are in memory already, such as a model's ``state_dict()``."""
    return {key: StoredTensor.of(tensor, Path(name)) for key, tensor in state.items()}


def to_memory(weights: LazyWeights) -> dict[str, Tensor]:
    """All tensors, read or computed."""
    return {name: tensor.read() for name, tensor in weights.items()}


class ComputedTensor(BlockTensor):
    """A tensor computed in float64 and rounded once.

    Parameters
    ----------
    name : str
        For the error when a value does not fit the dtype.
    like : LazyTensor
        Whose shape and dtype it has.
    """

    def __init__(self, name: str, like: LazyTensor) -> None:
        super().__init__(like.shape, like.dtype)
        self.name = name

    @abstractmethod
    def values(self, start: int, stop: int) -> Tensor:
        """The values ``start .. stop - 1`` of the flat tensor, in float64."""

    def part(self, start: int, stop: int) -> Tensor:
        return self.rounded(self.values(start, stop))

    def rounded(self, values: Tensor) -> Tensor:
        """Values in the dtype of the tensor; raises `CheckpointError` where they do not fit."""
        rounded = values.to(self.dtype)
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{self.name}: a merged value is not finite in {str(self.dtype).removeprefix('torch.')}; the experts "
                "hold such values, or the coordinate lies too far outside them"
            )
        return rounded


def check_alike(checkpoints: Mapping[str, LazyWeights]) -> None:
    """Refuse checkpoints whose names, shapes or dtypes of tensors differ from those of the first.

    Parameters
    ----------
    checkpoints : mapping
        What to call each in the error -> its weights.

    Raises
    ------
    CheckpointError
        Names the first tensors that differ.
    """
    (first, expected), *others = checkpoints.items()
    for other, found in others:
        problems = [f"{name} is in {first} only" for name in sorted(expected.keys() - found.keys())]
        problems += [f"{name} is in {other} only" for name in sorted(found.keys() - expected.keys())]
        for name in sorted(expected.keys() & found.keys()):
            ours, theirs = (_describe(weights[name]) for weights in (expected, found))
            if ours != theirs:
                problems.append(f"{name} is {ours} in {first} and {theirs} in {other}")
        if problems:
            more = f", and {len(problems) - 2} more" if len(problems) > 2 else ""
            raise CheckpointError(f"{first} and {other} differ in architecture: {'; '.join(problems[:2])}{more}")
    for name, tensor in expected.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{first}: {name} is {tensor.dtype}, and only floating-point numbers can be merged")


def _describe(tensor: LazyTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
