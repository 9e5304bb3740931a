"""Settings of the data: fields, regimes and their mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from shodh.config.base import (
    FLAT_LAYERS,
    MAX_CELLS,
    Count,
    FieldName,
    FieldSets,
    FileFormat,
    Grid,
    Layers,
    PositiveInt,
    RegimeName,
    Section,
    Weight,
)
from shodh.core.errors import ConfigError
from shodh.schema.fields import Boundary, Placement, StaticScale
from shodh.schema.fields import Field as PhysicalField


class FieldConfig(Section):
    """A physical field the model learns (or, if ``static``, is given)."""

    name: FieldName
    kind: Literal["scalar", "vector"] = "scalar"
    solenoidal: bool = False
    static: bool = False
    masked_by: str | None = Field(None, description="static field that is 1 where this scalar does not exist, else 0")
    positive: bool = Field(False, description="a scalar that is never negative; decoding keeps it so")
    static_scale: StaticScale = Field("none", description="how a static scalar reaches the models; log: over decades")
    optional: bool = Field(False, description="some regimes do not have it; the models see which")

    def build(self) -> PhysicalField:
        """The field; raises `ConfigError` for settings that do not go together."""
        placement: Placement = "face" if self.kind == "vector" else "center"
        return PhysicalField(
            self.name,
            self.kind,
            "1",
            placement,
            self.solenoidal,
            self.static,
            self.masked_by,
            self.positive,
            self.static_scale,
            self.optional,
        )


class RegimeConfig(Section):
    """One physical regime: a folder of The Well files with train, valid and test splits, or files of other formats."""

    name: RegimeName
    path: Path
    share: PositiveFloat = Field(1.0, description="share of every global batch, relative to the other regimes")
    fields: dict[str, str | None] = Field(
        default_factory=dict, description="our field name -> name in the file; null: absent, a static field of zeros"
    )
    only: tuple[str, ...] | None = Field(
        None, description="fields that this regime has, by our names; the others are absent; null: all of data.fields"
    )
    placement: Placement | None = Field(
        None, description="where vectors live in the files; null: read the file's attribute, 'center' without one"
    )
    format: FileFormat = Field("auto", description="format of the files; auto: from their names and content")
    split: tuple[Weight, Weight, Weight] = Field(
        (0.8, 0.1, 0.1), description="shares of train, valid, test for files that are not split into folders"
    )
    boundary: tuple[Boundary, ...] | None = Field(None, description="by axis, where the format does not say")
    lengths: tuple[PositiveFloat, ...] | None = Field(None, description="box, where the format does not say")
    time_step: PositiveFloat | None = Field(None, description="from frame to frame, where the format does not say")
    channels: tuple[str, ...] | None = Field(
        None, description="names of an array's channels, where it has none; a repeated name is a vector"
    )
    trajectories: tuple[Count, ...] | None = Field(
        None, min_length=1, description="numbers of the training trajectories that are learned from; null: all"
    )
    axes: str | None = Field(None, description="letters of the arrays' axes: n(umber), t, x, y, z, c(hannel); nxytc")
    parameters: dict[str, str | float | None] = Field(
        default_factory=dict,
        description="name in operator.conditions -> name in the file, or the value where the files do not say it; "
        "null: absent",
    )

    @model_validator(mode="after")
    def _check(self) -> RegimeConfig:
        if not self.split[0] > 0:
            raise ValueError(f"split {list(self.split)}: the share of the training trajectories must be positive")
        if self.trajectories is not None and len(set(self.trajectories)) < len(self.trajectories):
            raise ValueError(f"trajectories {list(self.trajectories)} are repeated; name each once")
        return self


class DataConfig(Section):
    """What is learned, and from where."""

    grid: Grid = (32, 32, 32)
    fields: tuple[FieldConfig, ...] = (
        FieldConfig(name="velocity", kind="vector", solenoidal=True),
        FieldConfig(name="tracer", masked_by="solid"),
        FieldConfig(name="solid", static=True),
    )
    regimes: tuple[RegimeConfig, ...] = Field(min_length=1)
    history: Layers = Field(2, description="past frames the operator sees")
    stride: PositiveInt = Field(1, description="frames between two model steps")
    strides: tuple[PositiveInt, ...] = Field(
        (),
        description="several, for the operator's training windows, all alike; none: stride alone, which validation and "
        "evaluation have in any case; operator.conditions [time_step] tells them apart",
    )
    workers: int = Field(0, ge=0, le=1024, description="loader processes per rank")
    mixture_temperature: PositiveFloat | None = Field(
        None, description="shares times windows^(1/temperature): 1 in proportion to size, large equal; null: shares"
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if math.prod(self.grid) > MAX_CELLS:
            raise ValueError(
                f"data.grid {list(self.grid)} has {math.prod(self.grid)} cells; at most {MAX_CELLS} can be"
            )
        if len(set(self.strides)) < len(self.strides):
            raise ValueError(f"data.strides {list(self.strides)} are repeated; name each once")
        for what, names in (("regimes", [r.name for r in self.regimes]), ("fields", [f.name for f in self.fields])):
            repeated = sorted({n for n in names if names.count(n) > 1})
            if repeated:
                raise ValueError(f"data.{what} has repeated names {repeated}")
        known = [f.name for f in self.fields]
        for regime in self.regimes:
            named = [("maps", name) for name in regime.fields] + [("has only", name) for name in regime.only or ()]
            for verb, name in named:
                if name not in known:
                    raise ValueError(f"regime {regime.name!r} {verb} {name!r}, which is not in data.fields {known}")
            absent = [name for name in regime.fields if name not in self.present(regime)]
            if absent:
                raise ValueError(f"regime {regime.name!r} maps {absent}, and has only {list(self.present(regime))}")
            lacking = [f.name for f in self.fields if not f.optional and f.name not in self.present(regime)]
            if lacking:
                raise ValueError(f"regime {regime.name!r} lacks {lacking}; mark them 'optional: true' in data.fields")
            if all(f.static for f in self.fields if f.name in self.present(regime)):
                raise ValueError(f"regime {regime.name!r} needs at least one field that changes in time")
        masks = [f.name for f in self.fields if f.static and f.kind == "scalar" and f.static_scale == "none"]
        for f in self.fields:
            if f.masked_by is not None and f.masked_by not in masks:
                raise ValueError(
                    f"field {f.name!r} is masked_by {f.masked_by!r}, not one of the static scalars without a "
                    f"static_scale {masks}"
                )
        if all(f.static for f in self.fields):
            raise ValueError("data.fields needs at least one field that changes in time")
        for f in self.fields:
            try:
                f.build()
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @property
    def training_strides(self) -> tuple[int, ...]:
        """Of the operator's training windows."""
        return self.strides or (self.stride,)

    def present(self, regime: RegimeConfig) -> tuple[str, ...]:
        """Names of the fields a regime has, in the order of ``fields``."""
        return tuple(f.name for f in self.fields if regime.only is None or f.name in regime.only)

    @property
    def field_sets(self) -> FieldSets:
        """What `present` gives of the regimes, without repetition, in their order."""
        return tuple(dict.fromkeys(self.present(regime) for regime in self.regimes))

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the fields that a regime may lack: those that change in time, then the static ones."""
        return tuple(f.name for f in sorted(self.fields, key=lambda f: f.static) if f.optional)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Cells of the three axes that the models see: a field in two dimensions is eight equal layers."""
        x, y, z = (*self.grid, FLAT_LAYERS)[:3]
        return x, y, z
