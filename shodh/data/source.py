"""One regime on disk: files of three splits that agree with each other, and the fields a model wants from them."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np

from shodh.data.formats import FileHints, TrajectoryFile
from shodh.data.formats.agreement import require_agreement
from shodh.data.formats.base import rescale_
from shodh.data.formats.splits import SPLITS as SPLITS
from shodh.data.formats.splits import Former, Split, find_files, open_splits
from shodh.data.formats.views import FileView
from shodh.data.checks import require_constant, require_mask
from shodh.data.stats import KEYS, WHERE, Statistics, compute_statistics, read_stats
from shodh.core.distributed import Share, each, from_first
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import Boundary, Field, Placement, RegimeSchema, field_slices, mask_names

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 64

# Mean and scale of fields by our names; one that is left out is read as it is stored.
Constants: TypeAlias = Mapping[str, tuple[float, float]]

# From a source, names in its files and what computes them: their statistics, kept from an earlier run or computed.
Kept: TypeAlias = "Callable[[RegimeSource, Sequence[str], Callable[[], Statistics]], Statistics]"


class RegimeSource:
    """The files of one regime, in any format that `shodh.data.formats` knows.

    Parameters
    ----------
    name : str
        Name of the regime in the mixture and in reports.
    path : path-like
        Folder with ``data/{train,valid,test}/*.hdf5`` or ``.h5``, or with ``train`` ... directly; files or folders of
        other formats are split as `shodh.data.formats.splits` says.
    fields : sequence of Field
        The vocabulary: fields by our names, in the order of the channels. A wanted vector at ``"face"`` that
        is stored at ``"center"`` is averaged onto the upper faces when it is read (a wall face gets zero). It is
        then **not exactly divergence-free**: away from walls its staggered divergence is the central-difference
        divergence of the stored values, at walls not even that.
    mapping : mapping, optional
        ``{our name: name in the files}`` where they differ; ``None`` as the name of a *static* field says that the
        files have none, and gives zeros (no solid anywhere).
    placement : mapping, optional
        ``{our name: placement as stored}`` for vectors of files that do not say it, or say it wrongly.
    only : sequence of str, optional
        Names of the fields that this regime has; all of them if omitted. The channels of the others are read as zeros,
        which mean nothing.
    layers : int, optional
        Files of two space dimensions are given a periodic third one with this many equal layers, near-cubic cells, and
        vectors without a component along it.
    format : str
        Of the files; see `shodh.data.formats.open_file`.
    hints : FileHints, optional
        What the format does not say: boundary, lengths, time between frames.
    split : 3 numbers
        Shares of train, valid and test, for files that are not split.
    trajectories : sequence of int, optional
        Numbers of the training trajectories that are used, statistics included; all of them if omitted.
    parameters : mapping, optional
        ``{name of a condition: parameter of the files}`` where they differ, or its value where the files do not say it,
        or None where there is none.
    former, leave_out, opened : optional
        Splits that files keep, files that are not opened, and files that are open already; see
        `shodh.data.formats.splits.open_splits`.

    Raises
    ------
    ConfigError
        If the wanted fields, the mapping or the placement make no sense.
    DataError
        If the folder or its training files are missing, or a file is damaged, lacks a field, has it with another
        rank or time dependence, or differs from the first one in what `shodh.data.formats.agreement` names.
    """

    def __init__(
        self,
        name: str,
        path: str | os.PathLike[str],
        fields: Sequence[Field],
        *,
        mapping: Mapping[str, str | None] | None = None,
        placement: Mapping[str, Placement] | None = None,
        format: str = "auto",
        hints: FileHints | None = None,
        split: Sequence[float] = (0.8, 0.1, 0.1),
        only: Sequence[str] | None = None,
        layers: int | None = None,
        trajectories: Sequence[int] | None = None,
        parameters: Mapping[str, str | float | None] | None = None,
        former: Former | None = None,
        leave_out: Collection[Path] = (),
        opened: Mapping[Path, TrajectoryFile] | None = None,
    ) -> None:
        self.name = name
        self.path = Path(path)
        self.fields = tuple(fields)
        self.layers = layers
        self.present = tuple(f for f in self.fields if only is None or f.name in only)
        self.mapping = dict(mapping or {})
        self.placement = dict(placement or {})
        self.parameters = dict(parameters or {})
        self._stored_name = self._resolve_names()
        self._check_placement()
        self._open: OrderedDict[Path, TrajectoryFile] = OrderedDict()
        self._checked_masks: set[tuple[Split, int]] = set()
        self._named: set[tuple[Split, int]] = set()
        self.opening = (format, hints, tuple(split))
        self.described: dict[str, Any] | None = None  # `describe_source`, where another rank has found it
        self.all_files = open_splits(
            self.path, format=format, hints=hints, shares=split, former=former, leave_out=leave_out, opened=opened
        )
        self.files = dict(self.all_files)
        if not self.files["train"]:
            if not self.path.exists():
                raise DataError(
                    f"regime {name!r}: no training files: {self.path} does not exist; make data with "
                    "tools/generate_data.py or correct the path"
                )
            folder = self.path / "data" if (self.path / "data").is_dir() else self.path
            raise DataError(
                f"regime {name!r}: no training files; expected {folder / 'train'}/*.hdf5 (or .h5), or one file; make "
                "data with tools/generate_data.py or correct the path"
            )
        for file in (f for files in self.files.values() for f in files):
            self._check_file(file)
        self.trajectories = None if trajectories is None else tuple(sorted(trajectories))
        if self.trajectories is not None:
            self.files["train"] = self._chosen(self.files["train"], self.trajectories)
        RegimeSchema(name, self.present, self.boundary)  # Refuses fields that do not go with the boundary.
        self._starts = {s: [0, *accumulate(f.num_trajectories for f in fs)] for s, fs in self.files.items()}

    def _chosen(self, files: Sequence[TrajectoryFile], numbers: Sequence[int]) -> list[TrajectoryFile]:
        """Views of the files that hold the trajectories of these numbers."""
        chosen: list[TrajectoryFile] = []
        start = 0
        for file in files:
            local = [n - start for n in numbers if start <= n < start + file.num_trajectories]
            if local:
                chosen.append(FileView(file, local, range(file.num_frames)))
            start += file.num_trajectories
        if beyond := [n for n in numbers if n >= start]:
            raise DataError(
                f"regime {self.name!r}: training trajectories {beyond} are asked for, and {self.path} has {start}, "
                "numbered from 0"
            )
        return chosen

    @property
    def _first(self) -> TrajectoryFile:
        return self.files["train"][0]

    @property
    def flat(self) -> bool:
        """Whether the files have two space dimensions and are read with a third one."""
        return self.layers is not None and len(self._first.grid) == 2

    @property
    def grid(self) -> tuple[int, ...]:
        return (*self._first.grid, self.layers) if self.layers and self.flat else self._first.grid

    @property
    def lengths(self) -> tuple[float, ...]:
        if self.layers and self.flat:
            return (*self._first.lengths, self.layers * math.prod(self._first.spacing) ** 0.5)
        return self._first.lengths

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(length / cells for length, cells in zip(self.lengths, self.grid, strict=True))

    @property
    def boundary(self) -> tuple[Boundary, ...]:
        return (*self._first.boundary, "periodic") if self.flat else self._first.boundary

    @cached_property
    def schema(self) -> RegimeSchema:
        """The fields that are present, with the boundary of the files; ConfigError if they do not go together."""
        return RegimeSchema(self.name, self.present, self.boundary)

    @property
    def dynamic(self) -> tuple[Field, ...]:
        """Fields of the vocabulary that change in time: the channels of `read`."""
        return tuple(f for f in self.fields if not f.static)

    @property
    def static(self) -> tuple[Field, ...]:
        """Static fields of the vocabulary: the channels of `read_static`."""
        return tuple(f for f in self.fields if f.static)

    @property
    def num_channels(self) -> int:
        """Channels of the dynamic fields of the vocabulary together."""
        return sum(f.num_components(len(self.grid)) for f in self.dynamic)

    @property
    def num_static_channels(self) -> int:
        return sum(f.num_components(len(self.grid)) for f in self.static)

    def num_trajectories(self, split: Split) -> int:
        return self._starts[split][-1]

    def num_frames(self, split: Split) -> list[int]:
        """Frames of each trajectory of a split."""
        return [f.num_frames for f in self.files[split] for _ in range(f.num_trajectories)]

    def name_short(self, split: Split, frames: int, wanted_for: str) -> int:
        """Count the trajectories with fewer frames than are wanted, and name them in the log, once."""
        counts = self.num_frames(split)
        short = [n for n, count in enumerate(counts) if count < frames]
        if short and (split, frames) not in self._named:
            self._named.add((split, frames))
            names = []
            for file, local in (self.locate(split, n) for n in short[:5]):
                number = file.trajectories[local] if isinstance(file, FileView) else local
                names.append(f"{file.path.name}[{number}] with {file.num_frames}")
            log.warning(
                "regime %s: %d of %d %s trajectories are shorter than the %d frames of %s and left out: %s%s",
                self.name, len(short), len(counts), split, frames, wanted_for, ", ".join(names),
                " ..." if len(short) > 5 else "",
            )  # fmt: skip
        return len(short)

    def locate(self, split: Split, trajectory: int) -> tuple[TrajectoryFile, int]:
        """The file that holds a trajectory of a split, and its number there."""
        starts = self._starts[split]
        if not 0 <= trajectory < starts[-1]:
            raise IndexError(f"trajectory {trajectory} of {starts[-1]} in the split {split!r} of {self.name!r}")
        number = int(np.searchsorted(starts, trajectory, side="right")) - 1
        return self.files[split][number], trajectory - starts[number]

    def read(
        self, split: Split, trajectory: int, frames: range, out: np.ndarray, constants: Constants | None = None
    ) -> None:
        """Read the dynamic fields of frames of a trajectory into ``out`` [T, C, *grid], float32.

        In physical units, or ``(x - mean) / scale`` with the ``constants`` of `FieldNormalizer`, to the bits that it
        gives: cheaper while the values lie in the cache.
        """
        file, local = self.locate(split, trajectory)
        self._read_channels(self.dynamic, file, local, frames, out, constants or {})

    def read_static(self, split: Split, trajectory: int, out: np.ndarray) -> None:
        """Read the static fields of a trajectory into ``out`` [S, *grid], float32; DataError for a mask that is none."""
        file, local = self.locate(split, trajectory)
        self._read_channels(self.static, file, local, range(1), out[None], {})
        if (split, trajectory) not in self._checked_masks:
            ranges = field_slices(self.static, len(self.grid))
            for name in sorted(mask_names(self.fields) & {f.name for f in self.present}):
                require_mask(out[ranges[name]], name, f"{file.path}: trajectory {local}")
            self._checked_masks.add((split, trajectory))

    @property
    def time_step(self) -> float | None:
        """From frame to frame, of the first file, to six digits; None where it varies, or is not known."""
        steps = np.diff(np.atleast_2d(np.asarray(self._first.time, dtype=np.float64))[0])
        if not steps.size or not np.isfinite(steps).all() or not np.allclose(steps, steps.mean(), rtol=1e-3, atol=0):
            return None
        return float(f"{steps.mean():.6g}")

    @property
    def known_time_step(self) -> float | None:
        """`time_step`; None too where frames are but counted, because nobody states their times."""
        _, hints, _ = self.opening
        counted = self._first.header.timeless and (hints is None or hints.time_step is None)
        return None if counted else self.time_step

    def statistics(self, share: Share = each, kept: Kept | None = None) -> Statistics:
        """Statistics of the training split, by our field names.

        Taken from ``stats.yaml`` beside the data; computed from the training files, and logged, where that is missing
        or lacks a field. Of a part of the files that are called training files it is always computed, from this part
        alone. A vector that is averaged onto faces on reading has the statistics of the stored one. Mean and std of a
        masked scalar are those of the cells where it exists.

        Parameters
        ----------
        share : callable
            Who reads which trajectories.
        kept : Kept, optional
            Where computed ones are kept. All ranks call it together then.

        Raises
        ------
        DataError
            A masked scalar exists nowhere.
        """
        wanted = {f.name: stored for f in self.present if (stored := self._stored_name[f.name]) is not None}
        masks = {f.name: wanted[f.masked_by] for f in self.present if f.masked_by in wanted}
        path = self.path / "stats.yaml"

        def given() -> tuple[bool, Statistics]:
            whole = self._trains_on_all()
            return whole, read_stats(path) if whole and path.is_file() else {key: {} for key in (*KEYS, WHERE)}

        def compute(names: Sequence[str]) -> Statistics:
            work = partial(compute_statistics, self.files["train"], names, share=share)
            return work() if kept is None else kept(self, names, work)

        whole, statistics = given() if kept is None else from_first(given)
        if any(stored not in statistics[key] for stored in wanted.values() for key in ("mean", "std")):
            if whole:
                log.warning("%s: no statistics of %s; computing them from the training files", path, sorted(wanted))
            statistics = compute(list(wanted.values()))
        where = statistics[WHERE]
        if any(wanted[name] not in where.get(mask, {}).get("std", {}) for name, mask in masks.items()):
            log.warning("%s: no statistics of where %s exist; computing them from the training files", path, sorted(masks))
            where = compute([*(wanted[n] for n in masks), *sorted(set(masks.values()))])[WHERE]
        found = {
            key: {ours: statistics[key][stored] for ours, stored in wanted.items() if stored in statistics[key]}
            for key in KEYS
        }
        for name, mask in masks.items():
            if wanted[name] not in where.get(mask, {}).get("std", {}):
                raise DataError(f"regime {self.name!r}: {name!r} exists in no cell of the training files; see {mask!r}")
            for key in ("mean", "std"):
                found[key][name] = where[mask][key][wanted[name]]
        return found

    def _trains_on_all(self) -> bool:
        """Whether the training split is what the names call so, all of it, and nothing of it is held out."""
        used = [f.path for f in self.files["train"] if not isinstance(f, FileView)]
        return len(used) == len(self.files["train"]) and used == find_files(self.path).get("train")

    def close(self) -> None:
        """Close all files of this process."""
        while self._open:
            self._open.popitem()[1].close()

    def _resolve_names(self) -> dict[str, str | None]:
        RegimeSchema(self.name, self.fields, ())  # refuses repeated names
        schema = RegimeSchema(self.name, self.present, ())
        if not schema.dynamic:
            raise ConfigError(f"regime {self.name!r}: none of the wanted fields changes in time")
        known = {f.name: f for f in self.fields}
        for name, stored in self.mapping.items():
            if name not in known:
                raise ConfigError(f"regime {self.name!r}: mapping of {name!r}, wanted fields are {sorted(known)}")
            if stored is None and not known[name].static:
                raise ConfigError(f"regime {self.name!r}: {name!r} changes in time and cannot be mapped to null")
        return {name: self.mapping.get(name, name) for name in known}

    def _check_placement(self) -> None:
        for name, placement in self.placement.items():
            field = next((f for f in self.fields if f.name == name), None)
            if field is None or field.kind != "vector" or placement not in get_args(Placement):
                raise ConfigError(
                    f"regime {self.name!r}: placement {name}={placement!r}; expected a wanted vector field and "
                    f"one of {list(get_args(Placement))}"
                )

    def _check_file(self, file: TrajectoryFile) -> None:
        for wanted in self.present:
            self._check_field(file, wanted)
        stored = [name for f in self.present if (name := self._stored_name[f.name]) is not None]
        require_agreement(file, self._first, stored)

    def _check_field(self, file: TrajectoryFile, wanted: Field) -> None:
        stored_name = self._stored_name[wanted.name]
        if stored_name is None:
            return
        try:
            stored = file.field(stored_name)
        except DataError as error:
            hint = f"; map {wanted.name} to its name in the file" + (", or to null" if wanted.static else "")
            raise DataError(f"{error}{hint}") from error
        for what, have, want in (("kind", stored.kind, wanted.kind), ("static", stored.static, wanted.static)):
            if have != want:
                hint = "; a static field, like a mask, is the same at all times" if what == "static" and want else ""
                raise DataError(f"{file.path}: field {stored_name!r} has {what}={have}, wanted is {what}={want}{hint}")
        placement = self._placement(file, wanted)
        if placement == "face" and wanted.placement == "center":
            raise DataError(
                f"{file.path}: field {stored_name!r} lives on faces, wanted is the centre; want it on faces"
            )

    def _placement(self, file: TrajectoryFile, wanted: Field) -> Placement:
        stored = self._stored_name[wanted.name]
        if wanted.name in self.placement or stored is None:
            return self.placement.get(wanted.name, wanted.placement)
        return file.field(stored).placement

    def _read_channels(
        self,
        fields: Sequence[Field],
        file: TrajectoryFile,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        constants: Constants,
    ) -> None:
        """Fill ``out`` [T, C, *grid] with ``fields`` one after the other."""
        start = 0
        for field in fields:
            stop = start + field.num_components(len(self.grid))
            channels = out[:, start:stop]
            scaling = constants.get(field.name, (0.0, 1.0))
            constant, value = scaling[1] == 0.0, scaling[0]
            scaling = (0.0, 1.0) if constant else scaling
            stored = self._stored_name[field.name] if field in self.present else None
            if stored is None:
                channels[...] = 0.0
            elif self.flat:
                self._read_flat(field, file, trajectory, frames, channels, scaling)
            else:
                self._read_field(field, file, trajectory, frames, channels, scaling)
            if constant:
                require_constant(channels, field, value, f"{file.path}: trajectory {trajectory}")
                channels[...] = 0.0
            start = stop

    def _read_field(
        self,
        field: Field,
        file: TrajectoryFile,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        scaling: tuple[float, float],
    ) -> None:
        """Fill ``out`` [T, C, *grid of the file] with one field that the files have."""
        stored = self._stored_name[field.name]
        assert stored is not None
        shift, scale = scaling
        averaged = field.placement == "face" and self._placement(file, field) == "center"
        target = out[0] if field.static else out
        if averaged:
            self._handle(file).read(stored, trajectory, frames, target)
            average_to_faces(out, file.boundary)
            rescale_(out, shift, scale)
        else:
            self._handle(file).read(stored, trajectory, frames, target, shift=shift, scale=scale)

    def _read_flat(
        self,
        field: Field,
        file: TrajectoryFile,
        trajectory: int,
        frames: range,
        out: np.ndarray,
        scaling: tuple[float, float],
    ) -> None:
        """`_read_field` of a file of two dimensions into equal layers; a vector's third component is zero."""
        layer = np.empty((len(out), field.num_components(2), *file.grid), dtype=np.float32)
        self._read_field(field, file, trajectory, frames, layer, scaling)
        out[:, : layer.shape[1]] = layer[..., None]
        out[:, layer.shape[1] :] = 0.0

    def _handle(self, file: TrajectoryFile) -> TrajectoryFile:
        """``file``, noted as used last; the one unused for longest is closed when too many are open."""
        self._open[file.path] = file
        self._open.move_to_end(file.path)
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file


def average_to_faces(vector: np.ndarray, boundary: Sequence[Boundary]) -> None:
    """Move a collocated vector [..., D, *grid] to the upper faces, in place, by the mean of the two neighbours.

    Component ``i`` of cell ``c`` becomes ``(u_i[c] + u_i[c + e_i]) / 2``; a periodic axis wraps, on a walled axis
    the last face gets zero, on an open one the value of the last cell. Second order; constants are kept. On periodic
    axes the staggered divergence of the result is the central-difference divergence of ``vector``.
    """
    ndim = len(boundary)
    for axis, kind in enumerate(boundary):
        channel: tuple[Any, ...] = (..., axis, *(slice(None),) * ndim)
        component = np.moveaxis(vector[channel], axis - ndim, 0)
        first = component[0].copy()
        component[:-1] += component[1:]
        component[:-1] *= 0.5
        if kind == "periodic":
            component[-1] = 0.5 * (component[-1] + first)
        elif kind == "wall":
            component[-1] = 0.0
