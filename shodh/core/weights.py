"""Folders of safetensors: read without loading, written tensor by tensor, checked on the way in.

A `StoredTensor` is a tensor that lies in files: its values are the fragments, one after the other, mapped and not read.
Whatever wrote the files (this project, DeepSpeed's flat partitions), a model is a mapping of names to stored tensors,
and writing it never holds more than `CHUNK` values on the heap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shodh.core.errors import CheckpointError
from shodh.core.files import WEIGHTS, naming, sync_to_disk
from shodh.core.reading import read_object
from shodh.core.strict_json import dumps

AVERAGED = "ema.safetensors"  # beside `WEIGHTS` in a checkpoint: their average over the training
INDEX = "model.safetensors.index.json"
CHUNK = 2**24  # values cast and written at once
MAX_SHARD_SIZE = 5 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class LazyTensor(Protocol):
    """A tensor whose values are read or computed part by part, when they are needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def numel(self) -> int: ...

    def part(self, start: int, stop: int) -> Tensor:
        """The values ``start .. stop - 1`` of the flat tensor, in its own dtype."""

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The values in order, cast, a bounded number at once."""

    def read(self) -> Tensor:
        """The whole tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of ``shape`` whose values are ``fragments`` (flat tensors of one dtype) one after the other."""

    shape: tuple[int, ...]
    fragments: tuple[Tensor, ...]
    path: Path

    def __post_init__(self) -> None:
        if not self.fragments:
            raise CheckpointError(f"{self.path} holds no values for a tensor of shape {list(self.shape)}")
        stored = sum(f.numel() for f in self.fragments)
        if stored != self.numel:
            raise CheckpointError(f"{self.path} holds {stored} values for a tensor of shape {list(self.shape)}")
        if len({f.dtype for f in self.fragments}) > 1:
            raise CheckpointError(f"{self.path} mixes dtypes within a tensor: {[str(f.dtype) for f in self.fragments]}")

    @classmethod
    def of(cls, tensor: Tensor, path: Path) -> StoredTensor:
        """A tensor as it is."""
        return cls(tuple(tensor.shape), (tensor.detach().reshape(-1),), path)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.fragments[0].dtype

    def read(self) -> Tensor:
        """The tensor; still mapped where it is one piece, else put together in memory."""
        flat = self.fragments[0] if len(self.fragments) == 1 else torch.cat(self.fragments)
        return flat.view(self.shape)

    def part(self, start: int, stop: int) -> Tensor:
        """The values ``start .. stop - 1`` of the flat tensor."""
        if len(self.fragments) == 1:
            return self.fragments[0][start:stop]
        parts, first = [], 0
        for fragment in self.fragments:
            parts.append(fragment[max(0, start - first) : max(0, stop - first)])
            first += fragment.numel()
        return torch.cat(parts)

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The values in order, cast, at most `CHUNK` at once."""
        for fragment in self.fragments:
            for part in fragment.split(CHUNK):
                yield part.to(dtype)


Weights = Mapping[str, StoredTensor]
LazyWeights = Mapping[str, LazyTensor]
Progress = Callable[[int], object]  # told the bytes of each part that is done


def ignore(done: int) -> None:
    """No progress is shown."""


def target_dtypes(
    tensors: LazyWeights, dtype: torch.dtype | None, keep: Collection[str] = ()
) -> dict[str, torch.dtype]:
    """What each tensor is written as: ``dtype``, but integers and the names in ``keep`` as they are."""
    return {
        name: t.dtype if dtype is None or name in keep or not t.dtype.is_floating_point else dtype
        for name, t in tensors.items()
    }


# Reading


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, mapped.

    Raises
    ------
    CheckpointError
        The file is missing, truncated or not safetensors; it is named.
    """
    return {name: StoredTensor.of(tensor, path) for name, tensor in load_weights(path).items()}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of weights; raises `CheckpointError` that names it.

    The tensors are mapped from the file, so that only what is used is read.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text a safetensors file carries beside its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of a folder with one file or an index of shards.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged, or the tensor that the index and the shards disagree on.
    """
    if path.is_file() or not path.exists():
        return open_file(path)
    if (path / INDEX).is_file():
        return _open_shards(path)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path} holds no weights: neither {WEIGHTS} nor {INDEX}")
    return open_file(path / WEIGHTS)


def _open_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    wanted = read_object(index).get("weight_map")
    if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of tensor names to file names")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(wanted.values())):
        # A name with a folder in it could point anywhere on the disk.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a .safetensors file beside it")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing: {INDEX} names it")
        tensors = open_file(folder / shard)
        listed = {name for name, file in wanted.items() if file == shard}
        if tensors.keys() != listed:
            differ = sorted(tensors.keys() ^ listed)
            raise CheckpointError(f"{folder / shard} and {INDEX} disagree on {', '.join(differ[:3])}")
        found.update(tensors)
    return found


# Writing


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in shards of at most ``limit`` bytes, in order; a tensor above the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a safetensors file: its first bytes, the byte at which each tensor begins, its size."""

    header: bytes
    offsets: dict[str, int]
    size: int


def plan_file(
    shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lay out a safetensors file; ``offsets`` have the order of the file."""
    # As the format asks: no holes. As the library does: wide dtypes first, so that all values are aligned.
    order = sorted(shapes, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, end = {}, 0
    for name in order:
        starts[name], end = end, end + math.prod(shapes[name]) * dtypes[name].itemsize
        described = {"dtype": _SAFETENSORS_NAMES[dtypes[name]], "shape": list(shapes[name])}
        header[name] = {**described, "data_offsets": [starts[name], end]}
    text = dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return Layout(first, {name: len(first) + start for name, start in starts.items()}, len(first) + end)


def write_file(
    path: Path,
    tensors: LazyWeights,
    dtypes: Mapping[str, torch.dtype],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = ignore,
) -> None:
    """Write one safetensors file tensor by tensor; the library's own writer wants all of them in memory.

    Parameters
    ----------
    dtypes : mapping
        What each tensor is cast to (`target_dtypes`).
    metadata : mapping, optional
        Text to go into the header.
    progress : callable
        Told the bytes of each part that is written.
    """
    layout = plan_file({name: t.shape for name, t in tensors.items()}, dtypes, metadata)
    with naming(path), path.open("wb") as file:
        file.write(layout.header)
        for name in layout.offsets:
            for part in tensors[name].chunks(dtypes[name]):
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
                progress(part.numel() * part.itemsize)
    sync_to_disk(path)


def write_weights(
    folder: Path,
    tensors: LazyWeights,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = ignore,
) -> list[Path]:
    """Write ``model.safetensors``, or shards and their index above ``max_shard_size`` bytes; returns the files."""
    sizes = {name: tensors[name].numel * dtypes[name].itemsize for name in sorted(tensors)}
    shards = plan_shards(sizes, max_shard_size)
    if len(shards) == 1:
        write_file(folder / WEIGHTS, tensors, dtypes, metadata, progress)
        return [folder / WEIGHTS]
    weight_map, paths = {}, []
    for number, names in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(path, {name: tensors[name] for name in names}, dtypes, metadata, progress)
        weight_map.update(dict.fromkeys(names, path.name))
        paths.append(path)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(dumps(index, indent=1, sort_keys=True) + "\n")
    sync_to_disk(folder / INDEX)
    return paths


def differences(
    written: Weights, source: LazyWeights, dtypes: Mapping[str, torch.dtype], progress: Progress = ignore
) -> list[str]:
    """Names whose bits in ``written`` are not those of ``source`` after the cast, or that only one of them has."""
    found = sorted(written.keys() ^ source.keys())
    for name in sorted(written.keys() & source.keys()):
        ours, theirs, wanted = written[name], source[name], dtypes[name]
        if ours.shape != theirs.shape or ours.dtype != wanted or not _same_bits(ours, theirs, wanted, progress):
            found.append(name)
    return found


def _same_bits(one: StoredTensor, other: LazyTensor, dtype: torch.dtype, progress: Progress) -> bool:
    position = 0
    flat = one.fragments[0]  # What was written is one piece.
    for part in other.chunks(dtype):
        mine = flat[position : position + part.numel()]
        # Bytes, not numbers: NaN is to equal itself, and minus zero is not zero.
        if not torch.equal(mine.contiguous().view(torch.uint8), part.contiguous().view(torch.uint8)):
            return False
        position += part.numel()
        progress(part.numel() * part.itemsize)
    return True


# Models


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a model's state, by name."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def check_fit(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]], source: Path) -> None:
    """Compare the shapes a model expects with those a file has; raises `CheckpointError` with the difference."""
    ours = {name: list(shape) for name, shape in expected.items()}
    theirs = {name: list(shape) for name, shape in found.items()}
    problems = [f"lacks {name}" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"has unknown {name}" for name in sorted(theirs.keys() - ours.keys())]
    problems += [
        f"{name} is {theirs[name]}, the model's {ours[name]}"
        for name in sorted(ours.keys() & theirs.keys())
        if theirs[name] != ours[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:3])}{more}")


def check_kinds(tensors: Mapping[str, Tensor] | Weights, source: Path) -> None:
    """Refuse integers where floating-point numbers are meant."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{source}: {name} is {tensor.dtype}, and weights are floating-point numbers")


def check_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are NaN or infinite; the tensors are named."""
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: {', '.join(wrong[:3])}{more} hold NaN or infinity, and are no weights")


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of every parameter and persistent buffer."""
    return {name: t.shape for name, t in [*model.named_parameters(), *persistent_buffers(model)]}


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: Path, *, finite: bool = True) -> None:
    """Copy an exchange-format state into a model that holds all experts; names and shapes must agree.

    Raises
    ------
    CheckpointError
        They do not, or weights are NaN or infinite, and ``finite`` ones are wanted; names the tensors.
    """
    check_fit(expected_shapes(model), {name: tensor.shape for name, tensor in state.items()}, source)
    check_kinds(state, source)
    if finite:
        check_finite(state, source)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]:
            tensor.copy_(state[name])
