"""Normalisation by given constants that keeps a divergence-free field divergence-free, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.core.errors import DataError
from shodh.schema.fields import OUTSIDE, Field, field_slices

# Of `FieldNormalizer.to_dict`. Without one (1): masked scalars were not shifted and constants had the scale 1, which
# the same formula reads as it was meant.
_VERSION = 2


class FieldNormalizer:
    """Shift and scale of each dynamic field, by regime.

    A scalar becomes ``(x - mean) / std``. Of one that is masked (`Field.masked_by`) both are of the cells where it
    exists; elsewhere it is 0, whatever it was, and `OUTSIDE` on the way back. A vector has no shift and one scale for
    all its components: the root mean square of its values, **rounded to a power of two**. Dividing float32 by a power
    of two changes the exponent alone, so the normalised field is exactly proportional to the physical one: a field
    whose discrete divergence is zero keeps it exactly, and ``denormalize(normalize(x)) == x`` bitwise (barring
    underflow). A scalar that is constant, to the rounding of float32, has the scale 0: it becomes 0, and whatever is
    predicted for it becomes its value. A field that a regime does not have has no constants, and its channels are left
    as they are. A static scalar with a `Field.static_scale` becomes ``(x - mean) / std``, or the same of ``log x``.

    Where some field is masked, values come with the static fields of their samples, ``[..., S, *grid]`` as
    `RegimeSource.read_static` gives them (zeros where a regime has no such field), with the leading axes of the values
    or the first ones of them.

    Parameters
    ----------
    fields : sequence of Field
        The vocabulary; dynamic fields in the order of the channels, and static ones in the order of theirs.
    ndim : int
        Space dimensions.
    constants : mapping
        ``{regime: {field: (mean, scale)}}``; the order of the regimes is that of their numbers.
    units : mapping, optional
        ``{regime: {field: standard deviation of each component, normalised}}``, for `Domain.units`.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        ndim: int,
        constants: Mapping[str, Mapping[str, tuple[float, float]]],
        units: Mapping[str, Mapping[str, tuple[float, ...]]] | None = None,
    ) -> None:
        self.units = {regime: dict((units or {}).get(regime, {})) for regime in constants}
        self.fields = tuple(f for f in fields if not f.static)
        self.static = tuple(f for f in fields if f.static)
        self.ndim = ndim
        known = [f.name for f in (*self.fields, *self.static)]
        self.constants = {
            regime: {name: _constant(regime, name, by_field[name]) for name in known if name in by_field}
            for regime, by_field in constants.items()
        }
        self.regimes = tuple(self.constants)
        pairs = [
            [by_field.get(f.name, (0.0, 1.0)) for f in self.fields for _ in range(f.num_components(ndim))]
            for by_field in self.constants.values()
        ]
        table = torch.tensor(pairs, dtype=torch.float32)  # [R, C, (mean, scale)]
        self._tables = {table.device: table}
        self._some_constant = bool((table[..., 1] == 0).any())
        ranges, static = field_slices(self.fields, ndim), field_slices(self.static, ndim)
        #: (channel of a masked scalar, static channel of its mask)
        self.masked = [(ranges[f.name].start, static[f.masked_by].start) for f in self.fields if f.masked_by in static]

    def normalize(self, values: Tensor, regime: int | str | Tensor, static: Tensor | None = None) -> Tensor:
        """Normalise ``values [..., C, *grid]``.

        Parameters
        ----------
        values : Tensor
        regime : int, str or Tensor
            Number or name of one regime, or an integer tensor ``[B]`` for ``values [B, ..., C, *grid]``.
        static : Tensor, optional
            Needed where some field is masked; see the class.

        Returns
        -------
        Tensor
            Of the shape, dtype and device of ``values``.
        """
        return self.normalize_(values.clone(), regime, static)

    def normalize_(self, values: Tensor, regime: int | str | Tensor, static: Tensor | None = None) -> Tensor:
        """`normalize` in place."""
        mean, scale = self._constants_like(values, regime)
        if (isinstance(regime, Tensor) and regime.ndim == 1) or not values.is_contiguous():
            values.sub_(mean).div_(scale)
            if self._some_constant:
                values.masked_fill_(scale == 0, 0.0)
            return self.mask_(values, static)
        # A snapshot at a time stays in the cache; most vectors need no shift, and some fields no scale.
        for snapshot in values.view(-1, *values.shape[-1 - self.ndim :]):
            for channel, shift, factor in zip(snapshot, mean.flatten().tolist(), scale.flatten().tolist()):
                if factor == 0.0:
                    channel.zero_()
                    continue
                if shift != 0.0:
                    channel.sub_(shift)
                if factor != 1.0:
                    channel.div_(factor)
        return self.mask_(values, static)

    def mask_(self, values: Tensor, static: Tensor | None, fill: float = 0.0) -> Tensor:
        """Fill masked scalars, in place, where they do not exist."""
        if not self.masked:
            return values
        if static is None:
            raise ValueError("fields that are masked are normalised with the static fields of their samples")
        axis = -1 - self.ndim
        for channel, number in self.masked:
            target, solid = values.select(axis, channel), static.select(axis, number) != 0
            cells = target.shape[axis + 1 :]
            solid = solid.reshape(*solid.shape[: -self.ndim], *(1,) * (target.ndim - solid.ndim), *cells)
            target.masked_fill_(solid, fill)
        return values

    def normalize_static_(self, values: Tensor, regime: str) -> Tensor:
        """Scale static channels ``[S, *grid]`` of one regime in place, as their `Field.static_scale` says."""
        start = 0
        for f in self.static:
            stop = start + f.num_components(self.ndim)
            if f.static_scale != "none" and f.name in self.constants[regime]:
                mean, scale = self.constants[regime][f.name]
                channels = values[start:stop]
                if f.static_scale == "log":
                    require_positive(bool((channels > 0).all()), regime, f)
                    channels.log_()
                channels.sub_(mean).div_(scale) if scale else channels.zero_()
            start = stop
        return values

    def denormalize(self, values: Tensor, regime: int | str | Tensor, static: Tensor | None = None) -> Tensor:
        """Undo `normalize`; where a field does not exist it is `OUTSIDE`."""
        mean, scale = self._constants_like(values, regime)
        return self.mask_(values * scale + mean, static, OUTSIDE)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON, to go into checkpoints."""
        fields = [{"name": f.name, "kind": f.kind, "masked_by": f.masked_by} for f in self.fields]
        static = [{"name": f.name, "kind": f.kind, "static_scale": f.static_scale} for f in self.static]
        constants = {
            regime: {name: {"mean": mean, "scale": scale} for name, (mean, scale) in by_field.items()}
            for regime, by_field in self.constants.items()
        }
        return {"version": _VERSION, "ndim": self.ndim, "fields": fields, "static": static, "regimes": constants}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FieldNormalizer:
        """Undo `to_dict`; what was written before it had a version keeps its meaning.

        Raises
        ------
        DataError
            ``content`` has another form, or is of a later version.
        """
        try:
            if (version := content.get("version", 1)) not in range(1, _VERSION + 1):
                raise DataError(f"normalisation of version {version!r}; this one reads up to {_VERSION}: update Shodh")
            fields = [Field(f["name"], f["kind"], masked_by=f.get("masked_by")) for f in content["fields"]]
            fields += [
                Field(f["name"], f["kind"], static=True, static_scale=f["static_scale"])
                for f in content.get("static", [])
            ]
            constants = {
                str(regime): {name: (float(v["mean"]), float(v["scale"])) for name, v in by_field.items()}
                for regime, by_field in content["regimes"].items()
            }
            return cls(fields, int(content["ndim"]), constants)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"normalisation constants are incomplete or malformed: {error!r}") from error

    def index(self, regime: str) -> int:
        """Number of a regime."""
        if regime not in self.regimes:
            raise DataError(f"no normalisation for the regime {regime!r}; there are {list(self.regimes)}")
        return self.regimes.index(regime)

    def _constants_like(self, values: Tensor, regime: int | str | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale in a shape that broadcasts with ``values``."""
        channels = values.shape[-1 - self.ndim]
        if values.device not in self._tables:
            self._tables[values.device] = self._tables[torch.device("cpu")].to(values.device)
        table = self._tables[values.device]
        if channels != table.shape[1]:
            names = [f.name for f in self.fields]
            raise ValueError(f"values have {channels} channels, the fields {names} have {table.shape[1]}")
        shape: tuple[int, ...] = (channels, *(1,) * self.ndim)
        if isinstance(regime, Tensor) and regime.ndim == 1:
            shape = (len(regime), *(1,) * (values.ndim - 2 - self.ndim), *shape)
        chosen = table[self.index(regime) if isinstance(regime, str) else regime].to(values.dtype)
        return chosen[..., 0].reshape(shape), chosen[..., 1].reshape(shape)


def _constant(regime: str, name: str, constant: tuple[float, float]) -> tuple[float, float]:
    mean, scale = constant
    if not (math.isfinite(mean) and math.isfinite(scale) and scale >= 0):
        raise DataError(f"regime {regime!r}: field {name!r} has {mean=}, {scale=}; must be finite, not below 0")
    return float(mean), float(scale)


def require_positive(holds: bool, regime: str, field: Field) -> None:
    if not holds:
        raise DataError(
            f"regime {regime!r}: static_scale 'log' needs positive values, and {field.name!r} has some that are not; "
            "use 'zscore' or correct the data"
        )
