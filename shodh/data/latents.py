"""The latent cache: every snapshot encoded once by the tokenizer, so that operator training reads no full fields.

Layout, one set of files per chunk of trajectories (`Chunk`), under ``<root>/<key>/<regime>/<split>/``::

    <name>.npy          float32 latents [B, T, L, *latent grid]
    <name>.static.npy   float32 static features of the operator [B, S, *latent grid]
    <name>.json         shapes and checksums; written last, so that it marks the other two as whole

The key is a digest of the tokenizer and of the data: another of either gets another folder, and a stale cache is
never read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from shodh.schema.normalize import FieldNormalizer
from shodh.data.formats import TrajectoryFile
from shodh.data.identity import describe_source
from shodh.data.source import RegimeSource, Split
from shodh.core.distributed import Share, each
from shodh.core.errors import DataError
from shodh.core.files import atomic_path, checksum
from shodh.core.strict_json import dumps
from shodh.core.reading import read_json

Encode = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
FORMAT_VERSION = 2
CHUNK_FRAMES = 256  # of a file that are encoded, and lost if the process is killed, at once
log = logging.getLogger("shodh")


def data_identity(sources: Iterable[RegimeSource]) -> str:
    """Hex digest of the files behind the sources: their names, contents and splits, and the wanted fields."""
    digest = hashlib.sha256()
    for source in sources:
        wanted = (source.name, source.fields, source.present, source.mapping, source.placement, source.opening)
        digest.update(repr(wanted).encode())
        if source.trajectories is not None:
            digest.update(repr(source.trajectories).encode())
        digest.update(dumps(describe_source(source), sort_keys=True).encode())
    return digest.hexdigest()


def latent_key(
    tokenizer_checksum: str, sources: Iterable[RegimeSource], settings: Mapping[str, Any] | None = None
) -> str:
    """Name of the cache's folder: 16 hex digits from the tokenizer, the data, and whatever else changes latents.

    Parameters
    ----------
    tokenizer_checksum : str
        Of the tokenizer's weights.
    sources : iterable of RegimeSource
    settings : mapping, optional
        Plain values, for example the checksum of a space.
    """
    parts = [FORMAT_VERSION, tokenizer_checksum, data_identity(sources), dict(settings or {})]
    return hashlib.sha256(dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def split_folder(root: str | os.PathLike[str], key: str, regime: str, split: Split) -> Path:
    """Folder of the latents of one split of one regime."""
    return Path(root) / key / regime / split


@dataclass(frozen=True)
class Chunk:
    """Consecutive trajectories of one file, which are encoded, and kept, together.

    Attributes
    ----------
    name : str
        Of the files of its latents: that of the file of fields, and where that has several chunks the number of the
        first trajectory.
    first : int
        Number of the first trajectory in the split.
    """

    name: str
    file: TrajectoryFile
    first: int
    trajectories: int


def chunks_of(source: RegimeSource, split: Split) -> list[Chunk]:
    """The chunks of a split, of at least one trajectory and up to `CHUNK_FRAMES`, in order.

    Raises
    ------
    DataError
        Files of one name.
    """
    chunks: list[Chunk] = []
    start = 0
    for file in source.files[split]:
        count, most = file.num_trajectories, max(1, CHUNK_FRAMES // file.num_frames)
        for local in range(0, count, most):
            name = file.path.stem if count <= most else f"{file.path.stem}.{local:05d}"
            chunks.append(Chunk(name, file, start + local, min(most, count - local)))
        start += count
    repeated = sorted(name for name, number in Counter(chunk.name for chunk in chunks).items() if number > 1)
    if repeated:
        raise DataError(
            f"regime {source.name!r}: several files of the split {split!r} are called {repeated[:5]}; rename some"
        )
    return chunks


def write_latents(
    folder: str | os.PathLike[str],
    source: RegimeSource,
    split: Split,
    encode: Encode,
    *,
    normalizer: FieldNormalizer | None = None,
    batch_size: int = 8,
    share: Share = each,
) -> int:
    """Encode a split; chunks that are complete already are left as they are.

    The files of a chunk appear whole or not at all, and a run that was killed is finished by calling this again.

    Parameters
    ----------
    folder : path-like
        From `split_folder`.
    source, split
    encode : callable
        ``(fields [N, C, *grid], static [N, S, *grid]) -> latents [N, L, *latent grid]``, or a pair of these and the
        operator's static features ``[N, S', *latent grid]``; S' is 0 without. Gets float32 tensors
        in CPU memory, frames of one trajectory, which keeps the features of its first frame. May give tensors of any
        device and floating dtype.
    normalizer : FieldNormalizer, optional
        Applied to the fields first.
    batch_size : int
        Frames in a call of ``encode``.
    share : callable
        Who encodes which chunks: `each`, or `divide` among all ranks.

    Returns
    -------
    int
        Chunks that were encoded.

    Raises
    ------
    DataError
        If a field cannot be read, or latents are not finite or change their shape.
    OSError
        If the disk is full.
    """
    frames = _FrameReader(source, split, normalizer, batch_size)

    def write(chunk: Chunk) -> bool:
        if _is_complete(Path(folder), chunk):
            return False
        _encode_chunk(Path(folder), chunk, frames, encode)
        return True

    return sum(share(chunks_of(source, split), write))


def file_stems(source: RegimeSource, split: Split) -> list[str]:
    """Names of the chunks of a split, in order."""
    return [chunk.name for chunk in chunks_of(source, split)]


@dataclass(frozen=True)
class LatentShapes:
    """Content of a manifest: shapes of the latents and of the static features, sizes and checksums of both files."""

    latents: tuple[int, ...]
    static: tuple[int, ...]
    latent_bytes: int
    static_bytes: int
    latent_sha256: str
    static_sha256: str


@dataclass(frozen=True)
class _FrameReader:
    """Reads trajectories of a split as batches of normalised frames."""

    source: RegimeSource
    split: Split
    normalizer: FieldNormalizer | None
    batch_size: int

    def batches(self, trajectory: int, num_frames: int) -> Iterable[tuple[Tensor, Tensor]]:
        """``(fields [N, C, *grid], static [N, S, *grid])`` of consecutive frames."""
        source = self.source
        static = torch.empty(source.num_static_channels, *source.grid)
        source.read_static(self.split, trajectory, static.numpy())
        if self.normalizer is not None:
            self.normalizer.normalize_static_(static, source.name)
        for start in range(0, num_frames, self.batch_size):
            frames = range(start, min(start + self.batch_size, num_frames))
            fields = torch.empty(len(frames), source.num_channels, *source.grid)
            source.read(self.split, trajectory, frames, fields.numpy())
            if self.normalizer is not None:
                self.normalizer.normalize_(fields, source.name, static)
            yield fields, static.expand(len(frames), *static.shape)


def _encode_chunk(folder: Path, chunk: Chunk, frames: _FrameReader, encode: Encode) -> None:
    """Encode a chunk. Written front to back: a full disk raises, a map would crash."""
    file, name, count = chunk.file, chunk.name, chunk.trajectories
    with atomic_path(latent_path(folder, name)) as latent_file, atomic_path(static_path(folder, name)) as static_file:
        with open(latent_file, "wb") as latent_stream, open(static_file, "wb") as static_stream:
            latents = _ArrayWriter(latent_stream, (count, file.num_frames), f"{file.path}: latents")
            static = _ArrayWriter(static_stream, (count,), f"{file.path}: static features")
            for trajectory in range(chunk.first, chunk.first + count):
                for number, (fields, masks) in enumerate(frames.batches(trajectory, file.num_frames)):
                    result = encode(fields, masks)
                    batch, features = result if isinstance(result, tuple) else (result, result[:, :0])
                    latents.append(batch)
                    if number == 0:
                        static.append(features[:1])
            sizes = (latent_stream.tell(), static_stream.tell())
            whole = (latents.close(), static.close())
        shapes = LatentShapes(*whole, *sizes, checksum(latent_file), checksum(static_file))
    with atomic_path(manifest_path(folder, name)) as temporary:
        temporary.write_text(dumps({"version": FORMAT_VERSION, **asdict(shapes)}))


class _ArrayWriter:
    """Appends float32 samples to an .npy file whose leading sizes are known beforehand."""

    def __init__(self, stream: BinaryIO, leading: tuple[int, ...], what: str) -> None:
        self.stream, self.leading, self.what = stream, leading, what
        self.sample: tuple[int, ...] | None = None
        self.count = 0

    def append(self, samples: Tensor) -> None:
        """Append ``[N, ...]``."""
        values = np.ascontiguousarray(samples.detach().to("cpu", torch.float32).numpy())
        if self.sample is None:
            self.sample = values.shape[1:]
            header = {"descr": "<f4", "fortran_order": False, "shape": (*self.leading, *self.sample)}
            np.lib.format.write_array_header_1_0(self.stream, header)
        if values.shape[1:] != self.sample:
            raise DataError(f"{self.what} have shape {values.shape[1:]}, the first ones had {self.sample}")
        if not np.isfinite(values).all():
            raise DataError(f"{self.what} hold NaN or infinity; the tokenizer cannot encode this file")
        self.stream.write(values.astype("<f4", copy=False).tobytes())
        self.count += len(values)

    def close(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        if self.sample is None or self.count != int(np.prod(self.leading)):
            raise DataError(
                f"{self.what}: {self.count} samples, expected {self.leading}; encode must keep their number"
            )
        return (*self.leading, *self.sample)


def latent_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.npy"


def static_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.static.npy"


def manifest_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.json"


def read_manifest(folder: Path, stem: str) -> LatentShapes:
    """Shapes of a file's latents, checked against the sizes on disk: reading beyond a map's end kills a process."""
    path = manifest_path(folder, stem)
    if not path.exists():
        raise DataError(f"{path}: no such file; the latents of {stem!r} were not (completely) encoded")
    try:
        content = read_json(path, "description", DataError)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        del given["version"]
        shapes = LatentShapes(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged; remove it and encode again ({error!r})") from error
    for array, size in (
        (latent_path(folder, stem), shapes.latent_bytes),
        (static_path(folder, stem), shapes.static_bytes),
    ):
        if not array.is_file() or array.stat().st_size != size:
            raise DataError(f"{array}: missing or truncated, expected {size} bytes; remove {path} and encode again")
    return shapes


def _is_complete(folder: Path, chunk: Chunk) -> bool:
    name = chunk.name
    try:
        shapes = read_manifest(folder, name)
    except DataError:
        return False
    sums = {latent_path(folder, name): shapes.latent_sha256, static_path(folder, name): shapes.static_sha256}
    if damaged := [path for path, expected in sums.items() if checksum(path) != expected]:
        log.warning("%s is damaged: its checksum is not the one that was written; it is encoded again", damaged[0])
        return False
    return shapes.latents[:2] == (chunk.trajectories, chunk.file.num_frames)
