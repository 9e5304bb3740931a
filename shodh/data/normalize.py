"""Normalisation by training statistics that keeps a divergence-free field divergence-free, to the last bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh.data.checks import channel_ranges
from shodh.data.source import RegimeSource
from shodh.data.stats import Moments, Statistics
from shodh.core.errors import DataError
from shodh.schema.fields import OUTSIDE, Field

log = logging.getLogger(__name__)

# A field whose standard deviation is at most this part of its mean, two to four steps of float32, is constant.
_RELATIVE_ZERO = 2.0**-22
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
    """

    def __init__(
        self, fields: Sequence[Field], ndim: int, constants: Mapping[str, Mapping[str, tuple[float, float]]]
    ) -> None:
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
        ranges, static = channel_ranges(self.fields, ndim), channel_ranges(self.static, ndim)
        #: (channel of a masked scalar, static channel of its mask)
        self.masked = [(ranges[f.name].start, static[f.masked_by].start) for f in self.fields if f.masked_by in static]

    @classmethod
    def from_statistics(
        cls,
        fields: Sequence[Field],
        ndim: int,
        statistics: Mapping[str, Statistics],
        present: Mapping[str, Collection[str]] | None = None,
    ) -> FieldNormalizer:
        """From ``{regime: statistics}`` by our field names, as `RegimeSource.statistics` gives them.

        ``present`` names the fields that each regime has; all of them if omitted. Static fields are left as they are.
        """
        constants: dict[str, dict[str, tuple[float, float]]] = {}
        for regime, values in statistics.items():
            constants[regime] = {}
            for field in (f for f in fields if not f.static):
                if present is not None and field.name not in present[regime]:
                    continue
                if field.name not in values["mean"] or field.name not in values["std"]:
                    raise DataError(f"regime {regime!r}: the statistics lack the field {field.name!r}")
                constants[regime][field.name] = _mean_and_scale(
                    regime, field, ndim, values["mean"][field.name], values["std"][field.name]
                )
        return cls(fields, ndim, constants)

    @classmethod
    def from_sources(cls, sources: Sequence[RegimeSource]) -> FieldNormalizer:
        """From the training statistics of sources with the same vocabulary."""
        fields, ndim = sources[0].fields, len(sources[0].grid)
        for source in sources:
            if source.fields != fields:
                raise DataError(
                    f"regimes {sources[0].name!r} and {source.name!r} have different vocabularies of fields"
                )
        statistics = {s.name: s.statistics() for s in sources}
        dynamic = cls.from_statistics(
            fields, ndim, statistics, {s.name: [f.name for f in s.present] for s in sources}
        ).constants
        return cls(fields, ndim, {s.name: {**dynamic[s.name], **_static_constants(s)} for s in sources})

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
            solid = solid.reshape(*solid.shape[: -self.ndim], *(1,) * (target.ndim - solid.ndim), *target.shape[axis + 1 :])
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
                    _require_positive(bool((channels > 0).all()), regime, f)
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


def power_of_two(value: float) -> float:
    """The power of two nearest to a positive ``value`` on a logarithmic scale."""
    return 2.0 ** round(math.log2(value))


def _constant(regime: str, name: str, constant: tuple[float, float]) -> tuple[float, float]:
    mean, scale = constant
    if not (math.isfinite(mean) and math.isfinite(scale) and scale >= 0):
        raise DataError(f"regime {regime!r}: field {name!r} has mean={mean}, scale={scale}; must be finite, not below 0")
    return float(mean), float(scale)


def _require_positive(holds: bool, regime: str, field: Field) -> None:
    if not holds:
        raise DataError(
            f"regime {regime!r}: static_scale 'log' needs positive values, and {field.name!r} has some that are not; "
            "use 'zscore' or correct the data"
        )


def _static_constants(source: RegimeSource) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each scaled static field, or of its logarithm, over the training trajectories."""
    scaled = {f.name: n for n, f in enumerate(source.static) if f.static_scale != "none" and f in source.present}
    if not scaled:
        return {}
    channels = np.empty((source.num_static_channels, *source.grid), dtype=np.float32)
    ranges = channel_ranges(source.static, len(source.grid))
    moments = {name: Moments(1) for name in scaled}
    for trajectory in range(source.num_trajectories("train")):
        source.read_static("train", trajectory, channels)
        for name, number in scaled.items():
            values = channels[ranges[name]].astype(np.float64)
            if source.static[number].static_scale == "log":
                _require_positive(bool((values > 0).all()), source.name, source.static[number])
                values = np.log(values)
            moments[name].add(values)
    source.close()
    # A relative change of the values is an absolute one of their logarithm.
    unit = {f.name: 1.0 if f.static_scale == "log" else 0.0 for f in source.static}
    return {
        name: (mean, 0.0 if std <= _RELATIVE_ZERO * max(abs(mean), unit[name]) else std)
        for name, mean, std in ((name, float(m.mean[0]), float(m.std[0])) for name, m in moments.items())
    }


def _mean_and_scale(regime: str, field: Field, ndim: int, mean: Any, std: Any) -> tuple[float, float]:
    means, stds = (list(v) if isinstance(v, list | tuple) else [v] for v in (mean, std))
    components = field.num_components(ndim)
    if field.kind == "vector" and len(means) == len(stds) == ndim - 1:  # Two dimensions, read with a third.
        means, stds, components = [*means, 0.0], [*stds, 0.0], ndim
    if len(means) != components or len(stds) != components:
        raise DataError(f"regime {regime!r}: statistics of {field.name!r} must have {components} components")
    if field.kind == "vector":
        rms = math.sqrt(sum(m * m + s * s for m, s in zip(means, stds)) / components)
        return 0.0, power_of_two(rms) if rms > 0 else 1.0
    if stds[0] <= _RELATIVE_ZERO * abs(means[0]):
        log.warning("regime %s: field %s is constant (%g) in the training data; nothing is learned of it", regime, field.name, means[0])
        return means[0], 0.0
    return means[0], stds[0]
