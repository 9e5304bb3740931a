"""What all settings share: strictness, and types of values."""

from __future__ import annotations

import typing
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

# Names of fields and regimes go into those of files, weights and metrics.
FieldName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
RegimeName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
Fraction = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Weight = typing.Annotated[float, Field(ge=0.0)]
Count = typing.Annotated[int, Field(ge=0)]
FileFormat = Literal["auto", "well", "pdebench", "dpot", "fno", "jhtdb", "rock"]
Grid = typing.Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]
#: Layers along z of a field that has two space dimensions: one latent cell.
FLAT_LAYERS = 8


class Section(BaseModel):
    """A strict group of settings: unknown keys are an error, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
