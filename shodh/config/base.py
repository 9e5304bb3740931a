"""What all settings share: strictness, and types of values."""

from __future__ import annotations

import datetime
import typing
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _as_written(value: Any) -> Any:
    """What YAML reads as a whole number or a date, where text is expected: ``--set name=2024``."""
    written = isinstance(value, int | datetime.date) and not isinstance(value, bool | datetime.datetime)
    return str(value) if written else value


RunName = typing.Annotated[str, BeforeValidator(_as_written), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# Names of fields and regimes go into those of files, weights and metrics.
FieldName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
RegimeName = typing.Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]
Fraction = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Weight = typing.Annotated[float, Field(ge=0.0)]
# Bounds that no run reaches: beyond them sizes overflow, or a dry run takes hours.
Count = typing.Annotated[int, Field(ge=0, le=10**9)]
PositiveInt = typing.Annotated[int, Field(gt=0, le=10**9)]
Batch = typing.Annotated[int, Field(gt=0, le=2**20)]
Width = typing.Annotated[int, Field(gt=0, le=2**16)]  # of a layer, or ranks side by side
Many = typing.Annotated[int, Field(ge=0, le=2**16)]
Layers = typing.Annotated[int, Field(gt=0, le=1024)]
Few = typing.Annotated[int, Field(ge=0, le=64)]
Seeds = typing.Annotated[int, Field(gt=0, le=1000)]
Seed = typing.Annotated[int, Field(ge=0, le=2**63 - 1)]
MAX_CELLS = 2**33
FileFormat = Literal["auto", "well", "pdebench", "dpot", "fno", "jhtdb", "arrays", "rock"]
#: Names of fields that occur together, as `shodh.config.data.DataConfig.present`.
FieldSets = tuple[tuple[str, ...], ...]
Grid = typing.Annotated[tuple[Width, ...], Field(min_length=2, max_length=3)]
#: Layers along z of a field that has two space dimensions: one latent cell.
FLAT_LAYERS = 8


class Section(BaseModel):
    """A strict group of settings: unknown keys are an error, numbers are finite, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
