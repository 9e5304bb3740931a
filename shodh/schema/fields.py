"""The vocabulary of fields: what is simulated, stored, learned and decoded.

Placement on the grid. A box of ``X x Y x Z`` cells. Scalars live at cell centres. Component ``i`` of a vector
with placement ``"face"`` lives on the *upper* face of its cell along axis ``i``, so the discrete divergence of
cell ``c`` is ``sum_i (u_i[c] - u_i[c - e_i]) / h_i``. On a periodic axis ``c - e_i`` wraps. On a walled axis the
face below the first cell and the upper face of the last cell carry zero normal velocity. Through the ends of an
"open" axis things may flow in and out; a solenoidal vector needs axes that are periodic or walled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from shodh.core.errors import ConfigError

Boundary = Literal["periodic", "wall", "open"]
Kind = Literal["scalar", "vector"]
Placement = Literal["center", "face"]
StaticScale = Literal["none", "zscore", "log"]

AXES = ("x", "y", "z")
OUTSIDE = 0.0  # what a masked scalar is given as, in physical units, where it does not exist


@dataclass(frozen=True)
class Field:
    """One named physical quantity.

    Parameters
    ----------
    name : str
        Name in files and configurations, for example ``"velocity"``.
    kind : {"scalar", "vector"}
        A vector has one component per space axis.
    units : str
        Units of the stored values; ``"1"`` if dimensionless.
    placement : {"center", "face"}
        Where values live (see the module's docstring). Scalars are always at the centre.
    solenoidal : bool
        Whether the field is discretely divergence-free in its placement; such a vector is decoded from a
        vector potential.
    static : bool
        Constant in time (a solid mask, a permeability): an input, never a target.
    masked_by : str, optional
        Name of a static field, a *mask*: 1 where this scalar does not exist (a tracer in solids), 0 where it does. What
        files hold in the cells of a mask is never looked at; there it is 0 in model units, and `OUTSIDE` in physical
        ones.
    positive : bool
        A scalar that is never negative (a concentration, a density); decoding keeps it so.
    static_scale : {"none", "zscore", "log"}
        How a static scalar reaches the models: as stored (a mask), with zero mean and unit variance, or with zero mean
        and unit variance of its logarithm (a permeability over decades).
    optional : bool
        Some regimes do not have it; the models see which.
    """

    name: str
    kind: Kind = "scalar"
    units: str = "1"
    placement: Placement = "center"
    solenoidal: bool = False
    static: bool = False
    masked_by: str | None = None
    positive: bool = False
    static_scale: StaticScale = "none"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.masked_by is not None and self.kind != "scalar":
            raise ConfigError(f"field {self.name!r}: only a scalar can be masked_by another field")
        if self.kind == "scalar" and (self.placement != "center" or self.solenoidal):
            raise ConfigError(f"field {self.name!r}: a scalar lives at the cell centre and cannot be solenoidal")
        if self.positive and (self.kind != "scalar" or self.static):
            raise ConfigError(f"field {self.name!r}: only a scalar that changes in time can be positive")
        if self.static_scale != "none" and (self.kind != "scalar" or not self.static):
            raise ConfigError(f"field {self.name!r}: static_scale={self.static_scale!r} is for static scalars alone")

    def num_components(self, ndim: int) -> int:
        """Channels this field takes in ``ndim`` space dimensions."""
        return ndim if self.kind == "vector" else 1


def mask_names(fields: Iterable[Field]) -> set[str]:
    """Names of the static fields that must be 0 or 1: those that mask others, and the one called ``solid``."""
    fields = list(fields)
    masking = {f.masked_by for f in fields}
    return {
        f.name for f in fields if f.static and (f.name in masking or (f.name == "solid" and f.static_scale == "none"))
    }


def field_slices(fields: Iterable[Field], ndim: int = 3) -> dict[str, slice]:
    """Channels of each of the fields in ``ndim`` dimensions; they follow each other."""
    slices, start = {}, 0
    for f in fields:
        slices[f.name] = slice(start, start + f.num_components(ndim))
        start = slices[f.name].stop
    return slices


@dataclass(frozen=True)
class RegimeSchema:
    """What one physical regime provides: its fields and the boundary of each axis."""

    name: str
    fields: tuple[Field, ...]
    boundary: tuple[Boundary, ...]

    def __post_init__(self) -> None:
        names = [f.name for f in self.fields]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ConfigError(f"regime {self.name!r}: repeated field names {repeated}")
        if "open" in self.boundary and any(f.solenoidal for f in self.fields):
            names = [f.name for f in self.fields if f.solenoidal]
            raise ConfigError(
                f"regime {self.name!r}: a solenoidal field needs axes that are periodic or walled, and the boundary is "
                f"{list(self.boundary)}; map the vector of {', '.join(names)} to a field that is not solenoidal"
            )

    @property
    def ndim(self) -> int:
        return len(self.boundary)

    @property
    def dynamic(self) -> tuple[Field, ...]:
        """Fields that change in time, in order."""
        return tuple(f for f in self.fields if not f.static)

    @property
    def static(self) -> tuple[Field, ...]:
        """Fields constant in time, in order."""
        return tuple(f for f in self.fields if f.static)

    def __getitem__(self, name: str) -> Field:
        for f in self.fields:
            if f.name == name:
                return f
        raise KeyError(f"regime {self.name!r} has no field {name!r}; it has {[f.name for f in self.fields]}")


@dataclass
class Trajectories:
    """``B`` simulated trajectories of one regime: what a solver returns and a writer stores.

    Attributes
    ----------
    schema : RegimeSchema
    lengths : tuple of float
        Box size along each axis; cell ``i`` has its centre at ``(i + 1/2) * length / cells``.
    time : ndarray [T], float64
    values : dict
        Scalar ``[B, T, *grid]``, vector ``[B, T, *grid, ndim]``, static scalar ``[B, *grid]``; float32, and
        bool or uint8 for masks.
    parameters : dict
        Physical parameters: a float common to all trajectories, or an array ``[B]``.
    diagnostics : dict
        Measured quality per trajectory, arrays ``[B]`` (for example a convergence residual).
    """

    schema: RegimeSchema
    lengths: tuple[float, ...]
    time: np.ndarray
    values: dict[str, np.ndarray]
    parameters: Mapping[str, float | np.ndarray] = field(default_factory=dict)
    diagnostics: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells along each axis."""
        dynamic = self.schema.dynamic[0]
        return self.values[dynamic.name].shape[2 : 2 + self.schema.ndim]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Cell size along each axis."""
        return tuple(length / cells for length, cells in zip(self.lengths, self.grid, strict=True))

    def __len__(self) -> int:
        return self.values[self.schema.dynamic[0].name].shape[0]
