"""What the numbers of a model mean: fields, regimes, the domain of each regime and its normalisation, in one file.

Every run, latent cache, checkpoint and pretrained folder has one ``space.json``. Values are in *physical* units (those
of the files) or in *model* units (normalised); `Space.to_model` and `Space.to_physical` go between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shodh.core.errors import CheckpointError, DataError, ShodhError
from shodh.core.reading import read_object
from shodh.core.strict_json import dumps, write_json
from shodh.schema.conditions import Condition, Values, condition_values
from shodh.schema.domain import Domain, channel_units, existing_channels
from shodh.schema.fields import Field, field_slices
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.presence import channel_mask, existing_cells, pad_absent

SPACE_FILE = "space.json"
_FORMAT = "shodh-space"
Constants = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class RegimeSpace:
    """Domain of a regime, and mean and scale of each of its fields."""

    name: str
    domain: Domain
    constants: tuple[tuple[str, float, float], ...]

    @classmethod
    def of(cls, name: str, domain: Domain, constants: Constants) -> Self:
        return cls(name, domain, tuple((field, *pair) for field, pair in constants.items()))


@dataclass(frozen=True)
class Space:
    """Fields, regimes, domains and normalisation.

    Parameters
    ----------
    fields : tuple of Field
        The vocabulary; channels are those of the dynamic fields in this order, and of the static ones in theirs.
    ndim : int
        Space dimensions of arrays: 3 of models with a tokenizer, also for flat data.
    regimes : tuple of RegimeSpace
        In the order of their labels.
    conditions : tuple of Condition
        What the operator is told of a sample beside its fields, in order.

    Raises
    ------
    DataError
        Regimes or conditions repeat, a constant is not finite or of no field, or ``ndim`` is not 2 or 3.
    """

    fields: tuple[Field, ...]
    ndim: int
    regimes: tuple[RegimeSpace, ...]
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        known = {f.name for f in self.fields}
        if self.ndim not in (2, 3):
            raise DataError(f"a space has 2 or 3 dimensions, not {self.ndim!r}")
        if not self.regimes or len(set(self.names)) < len(self.names):
            raise DataError(f"a space has regimes of different names, at least one, not {list(self.names)}")
        if len(set(self.condition_names)) < len(self.conditions):
            raise DataError(f"a space has conditions of different names, not {list(self.condition_names)}")
        for regime in self.regimes:
            if strangers := sorted({field for field, *_ in regime.constants} - known):
                raise DataError(f"regime {regime.name!r} has constants of {strangers}; the fields are {sorted(known)}")
        self.normalizer  # noqa: B018 - checks the constants

    @classmethod
    def of(cls, normalizer: FieldNormalizer, fields: Sequence[Field], domains: Mapping[str, Domain]) -> Self:
        """The regimes of ``domains`` with constants of a normaliser, which may know more.

        Raises
        ------
        DataError
            The normaliser lacks a regime.
        """
        if unknown := [name for name in domains if name not in normalizer.constants]:
            raise DataError(f"no normalisation for the regimes {unknown}; there are {list(normalizer.regimes)}")
        regimes = (RegimeSpace.of(name, domain, normalizer.constants[name]) for name, domain in domains.items())
        return cls(tuple(fields), normalizer.ndim, tuple(regimes))

    # Regimes

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Regimes in the order of their labels."""
        return tuple(regime.name for regime in self.regimes)

    @cached_property
    def domains(self) -> tuple[Domain, ...]:
        """Domains in the order of the labels."""
        return tuple(regime.domain for regime in self.regimes)

    def number(self, regime: str) -> int:
        """Label of a regime; raises `DataError` for one that is not known."""
        if regime not in self.names:
            raise DataError(f"no regime {regime!r}; this model knows {list(self.names)}")
        return self.names.index(regime)

    def only(self, names: Sequence[str]) -> Self:
        """The same with some regimes, in another order. Errors as `number`."""
        regimes = tuple(self.regimes[self.number(name)] for name in names)
        return replace(self, regimes=regimes, conditions=tuple(c.within(names) for c in self.conditions))

    # Conditions

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What the operator is told of a sample beside its fields."""
        return tuple(c.name for c in self.conditions)

    def unconditioned(self) -> Self:
        """The same without conditions: what a tokenizer, and its latents, depend on."""
        return replace(self, conditions=())

    def told(self, number: int, given: Mapping[str, Values] | None, samples: int) -> Tensor:
        """What an operator is told of samples of a regime, ``[samples, N]``: `condition_values`."""
        return condition_values(self.conditions, self.names[number], given, samples)

    def usual(self, label: Tensor) -> Tensor:
        """The same ``[B, N]`` by label, where nothing is given; raises `DataError` where a condition varies."""
        rows = {number: self.told(number, None, 1)[0] for number in label.unique().tolist()}
        return torch.stack([rows[number] for number in label.tolist()]).to(label.device)

    # Channels

    @cached_property
    def dynamic(self) -> tuple[Field, ...]:
        """Fields that change in time."""
        return tuple(f for f in self.fields if not f.static)

    @cached_property
    def static(self) -> tuple[Field, ...]:
        """Fields that do not."""
        return tuple(f for f in self.fields if f.static)

    @property
    def num_channels(self) -> int:
        """Channels of the dynamic fields."""
        return sum(f.num_components(self.ndim) for f in self.dynamic)

    @property
    def num_static(self) -> int:
        """Channels of the static fields."""
        return sum(f.num_components(self.ndim) for f in self.static)

    def fields_of(self, number: int) -> tuple[Field, ...]:
        """Dynamic fields that exist in a regime."""
        return tuple(f for f in self.dynamic if f.name not in self.domains[number].absent)

    def channels(self, number: int) -> dict[str, slice]:
        """Channels of the fields that exist in a regime; of vectors, the components that do."""
        return existing_channels(self.dynamic, self.domains[number], self.ndim)

    def channel_numbers(self, number: int) -> list[int]:
        """The channels of `channels`, one by one."""
        return [c for s in self.channels(number).values() for c in range(s.start, s.stop)]

    def constants(self, number: int) -> dict[str, tuple[float, float]]:
        """Mean and scale of the fields of a regime."""
        return {field: (mean, scale) for field, mean, scale in self.regimes[number].constants}

    def masks(self, number: int) -> dict[str, int]:
        """Static channel of the mask of each masked field that exists in a regime."""
        there = {f.name for f in self.static if f.name not in self.domains[number].absent}
        slices = field_slices(self.static, self.ndim)
        return {f.name: slices[f.masked_by].start for f in self.fields_of(number) if f.masked_by in there}

    def solid_channel(self, number: int) -> int | None:
        """Static channel of the field ``solid``; None where the regime has none."""
        there = {f.name for f in self.static if f.name not in self.domains[number].absent}
        return field_slices(self.static, self.ndim)["solid"].start if "solid" in there else None

    def exists(self, label: Tensor, *, static: bool = False) -> Tensor:
        """Which channels each sample has: labels ``[B] -> [B, C]``, bool."""
        fields = self.static if static else self.dynamic
        return self._rows(label, f"exists {static}", lambda d: channel_mask(fields, d, self.ndim))

    def cells(self, static: Tensor, label: Tensor) -> Tensor | None:
        """In which cells each channel exists: ``[B, S, *grid] -> [B, C, *grid]``, bool; None: in all."""
        return existing_cells(static, self.exists(label, static=True), self.normalizer.masked, self.num_channels)

    def presence(self, label: Tensor) -> Tensor:
        """1 where a dynamic field exists in the regime of a sample: ``[B] -> [B, F]``."""
        names = [f.name for f in self.dynamic]
        return self._rows(label, "presence", lambda d: torch.tensor([float(n not in d.absent) for n in names]))

    def periodic(self, label: Tensor) -> Tensor:
        """Which axes of a sample's domain wrap around: ``[B] -> [B, axes]``, bool."""
        axes = self.ndim
        return self._rows(label, "periodic", lambda d: torch.tensor([end == "periodic" for end in d.boundary[:axes]]))

    def units(self, label: Tensor) -> Tensor:
        """`channel_units` of the domain of a sample: ``[B] -> [B, C, 1, 1, 1]``."""
        rows = self._rows(label, "units", lambda d: channel_units(self.dynamic, [d])[0])
        return rows.view(len(label), -1, 1, 1, 1)

    def _rows(self, label: Tensor, name: str, row: Callable[[Domain], Tensor]) -> Tensor:
        """A row of each sample, by its domain; made and copied to a device once, as each copy would wait for it."""
        key = name, label.device
        if key not in self._tables:
            self._tables[key] = torch.stack([row(domain) for domain in self.domains]).to(label.device)
        return self._tables[key][label]

    @cached_property
    def _tables(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def pad(self, frames: Tensor, static: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """What operators on fields are given: ones in channels that a regime lacks, zeros in the cells of masks.

        Frames ``[B, T, C, *grid]`` and static fields ``[B, S, *grid]``, in model units; padding twice changes nothing.
        """
        cells = self.cells(static, label)
        frames = frames if cells is None else torch.where(cells.unsqueeze(1), frames, 0.0)
        exists = self.exists(label).repeat_interleave(frames.shape[1], 0)
        padded = pad_absent(frames.flatten(0, 1), exists).unflatten(0, frames.shape[:2])
        return padded, pad_absent(static, self.exists(label, static=True))

    # Units

    @cached_property
    def normalizer(self) -> FieldNormalizer:
        """The same constants, as what applies them."""
        constants = {r.name: self.constants(n) for n, r in enumerate(self.regimes)}
        return FieldNormalizer(self.fields, self.ndim, constants, {r.name: dict(r.domain.units) for r in self.regimes})

    def to_model(self, values: Tensor, regime: int | str | Tensor, static: Tensor | None = None) -> Tensor:
        """Physical -> model units; arguments as `FieldNormalizer.normalize`, static fields as they are stored."""
        return self.normalizer.normalize(values, regime, static)

    def to_physical(self, values: Tensor, regime: int | str | Tensor, static: Tensor | None = None) -> Tensor:
        """Model -> physical units; arguments as `to_model`."""
        return self.normalizer.denormalize(values, regime, static)

    def static_to_model(self, static: Tensor, regime: str) -> Tensor:
        """Static fields ``[B, S, *grid]`` as they are stored -> as models are given them."""
        return torch.stack([self.normalizer.normalize_static_(s.clone(), regime) for s in static])

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        regimes = [
            {
                "name": regime.name,
                "domain": regime.domain.to_dict(),
                "constants": {field: {"mean": mean, "scale": scale} for field, mean, scale in regime.constants},
            }
            for regime in self.regimes
        ]
        fields = [asdict(f) for f in self.fields]
        conditions = {"conditions": [c.to_dict() for c in self.conditions]} if self.conditions else {}
        return {"format": _FORMAT, "version": 1, "ndim": self.ndim, "fields": fields, "regimes": regimes, **conditions}

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of everything that `to_dict` says, hexadecimal."""
        return digest(self.to_dict())

    def document(self) -> dict[str, Any]:
        """`to_dict` with its checksum: what ``space.json`` holds."""
        return {**self.to_dict(), "checksum": self.checksum}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], source: str) -> Self:
        """Undo `document`; raises `CheckpointError` that names ``source`` for anything else."""
        content = {key: value for key, value in document.items() if key != "checksum"}
        if content.get("format") != _FORMAT or content.get("version") != 1:
            raise CheckpointError(
                f"{source}: expected format {_FORMAT!r} of version 1, got {content.get('format')!r} of version "
                f"{content.get('version')!r}; update Shodh, or make the folder anew"
            )
        try:
            fields = tuple(Field(**f) for f in content["fields"])
            regimes = tuple(
                RegimeSpace.of(
                    str(regime["name"]),
                    Domain.from_dict(regime["domain"]),
                    {name: (float(v["mean"]), float(v["scale"])) for name, v in regime["constants"].items()},
                )
                for regime in content["regimes"]
            )
            conditions = tuple(Condition.from_dict(c) for c in content.get("conditions", ()))
            space = cls(fields, content["ndim"], regimes, conditions)
        except (KeyError, TypeError, ValueError, AttributeError, ShodhError) as error:
            raise CheckpointError(f"{source} is damaged: {_reason(error)}") from error
        if not document.get("checksum") == digest(content) == space.checksum:
            raise CheckpointError(f"{source} is damaged: its checksum is not that of its content")
        return space

    @classmethod
    def from_former(
        cls, content: Mapping[str, Any], fields: Sequence[Field], names: Sequence[str] | None, source: str
    ) -> Self:
        """From what versions up to 0.2.0 wrote: the keys ``normalizer`` and ``domains``, fields in ``config.yaml``.

        Raises
        ------
        CheckpointError
            Names ``source``; it is damaged, or lacks a regime of ``names`` or its domain.
        """
        try:
            normalizer = FieldNormalizer.from_dict(content["normalizer"])
            if names is None:
                names = normalizer.regimes
            if "domains" not in content:
                raise CheckpointError(
                    f"{source} lacks the domains of its regimes: an older version wrote it; the training command with "
                    "--resume auto writes it anew, without training"
                )
            if unknown := [name for name in names if name not in content["domains"]]:
                raise CheckpointError(f"{source} was not made with the regimes {unknown}")
            domains = {name: Domain.from_dict(content["domains"][name]) for name in names}
            return cls.of(normalizer, fields, domains)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ShodhError) as error:
            raise CheckpointError(f"{source} is damaged: {_reason(error)}") from error

    def save(self, folder: Path) -> Path:
        """Write ``space.json`` into a folder, whole or not at all."""
        path = folder / SPACE_FILE
        write_json(path, self.document())
        return path

    @classmethod
    def load(cls, folder: Path, former: Sequence[Field] | None = None) -> Self:
        """Read the ``space.json`` of a folder.

        Parameters
        ----------
        former : sequence of Field, optional
            The vocabulary, where a file of a version up to 0.2.0 is taken too.

        Raises
        ------
        CheckpointError
            The file is missing, damaged, or was changed after it was written; it is named.
        """
        path = folder / SPACE_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {SPACE_FILE}: it does not say what its numbers mean")
        content = read_object(path)
        if "format" not in content and former is not None:
            return cls.from_former(content, former, None, str(path))
        return cls.from_document(content, str(path))


def digest(content: Any) -> str:
    """SHA-256 of plain values, hexadecimal, whatever the order of their keys."""
    return hashlib.sha256(dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ShodhError) else repr(error)
