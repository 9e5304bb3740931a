"""Constants of normalisation from the training statistics of regimes."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from shodh.core.distributed import Share, each
from shodh.core.errors import DataError
from shodh.data.source import Kept, RegimeSource
from shodh.data.stats import Moments, Statistics
from shodh.schema.fields import Field, field_slices
from shodh.schema.normalize import FieldNormalizer, require_positive

log = logging.getLogger(__name__)

# A field whose standard deviation is at most this part of its mean, two to four steps of float32, is constant.
_RELATIVE_ZERO = 2.0**-22


def normalizer_from_statistics(
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
    return FieldNormalizer(fields, ndim, constants)


def fit_normalizer(
    sources: Sequence[RegimeSource], share: Share = each, kept: Kept | None = None
) -> FieldNormalizer:
    """From the training statistics of sources with the same vocabulary; see `RegimeSource.statistics`."""
    fields, ndim = sources[0].fields, len(sources[0].grid)
    for source in sources:
        if source.fields != fields:
            raise DataError(
                f"regimes {sources[0].name!r} and {source.name!r} have different vocabularies of fields"
            )
    statistics = {s.name: s.statistics(share, kept) for s in sources}
    dynamic = normalizer_from_statistics(
        fields, ndim, statistics, {s.name: [f.name for f in s.present] for s in sources}
    ).constants
    constants = {s.name: {**dynamic[s.name], **_static_constants(s, share)} for s in sources}
    units = {s.name: component_units(fields, ndim, statistics[s.name]["std"], dynamic[s.name]) for s in sources}
    return FieldNormalizer(fields, ndim, constants, units)


def component_units(
    fields: Sequence[Field], ndim: int, std: Mapping[str, Any], constants: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, ...]]:
    """Standard deviation of each component of each field in normalised units.

    What errors are relative to where each component counts alike: those of a channel flow differ by a factor of six, and
    all are small beside its mean. A component has at least a thirtieth of what its vector has in the mean, so that one
    of nothing but rounding does not count. Constant fields have none.
    """
    units = {}
    for field in fields:
        if field.name not in constants or constants[field.name][1] == 0:
            continue
        values = np.asarray(std[field.name], dtype=float).reshape(-1) / constants[field.name][1]
        values = np.pad(values, (0, field.num_components(ndim) - len(values)))  # Two dimensions, read with a third.
        least = math.sqrt(np.square(values).mean()) / 30
        if least > 0:
            units[field.name] = tuple(float(v) for v in np.maximum(values, least))
    return units


def power_of_two(value: float) -> float:
    """The power of two nearest to a positive ``value`` on a logarithmic scale."""
    return 2.0 ** round(math.log2(value))


def _static_constants(source: RegimeSource, share: Share) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each scaled static field, or of its logarithm, over the training trajectories."""
    scaled = {f.name: n for n, f in enumerate(source.static) if f.static_scale != "none" and f in source.present}
    if not scaled:
        return {}
    ranges = field_slices(source.static, len(source.grid))

    def measure(trajectory: int) -> dict[str, Moments]:
        channels = np.empty((source.num_static_channels, *source.grid), dtype=np.float32)
        source.read_static("train", trajectory, channels)
        moments = {name: Moments(1) for name in scaled}
        for name, number in scaled.items():
            values = channels[ranges[name]].astype(np.float64)
            if source.static[number].static_scale == "log":
                require_positive(bool((values > 0).all()), source.name, source.static[number])
                values = np.log(values)
            moments[name].add(values)
        return moments

    moments = {name: Moments(1) for name in scaled}
    for part in share(range(source.num_trajectories("train")), measure):
        for name in scaled:
            moments[name].merge(part[name])
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
