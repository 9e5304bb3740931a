"""What values must be like: masks are 0 or 1, and what is constant in the training data is so elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from shodh.core.errors import DataError
from shodh.schema.fields import Field, field_slices, mask_names

if TYPE_CHECKING:
    from shodh.data.source import RegimeSource

log = logging.getLogger(__name__)

# A root mean square speed in solids above this many times that in the fluid: the mask is upside down.
_INVERTED = 1e3
# What a network is given unscaled should not be much larger than one.
_LARGE = 10.0
# Relative deviation of a field that is constant in the training data up to which it is constant elsewhere too.
_NEAR = 1e-3


def mask_problem(values: np.ndarray) -> str | None:
    """What is wrong with the values of a mask, and what to do; None if they are 0 and 1 and not all 1."""
    found = np.unique(values)
    other = found[(found != 0) & (found != 1)]
    if other.size:
        shown = ", ".join(f"{v + 0.0:g}" for v in found[:3]) + (", ..." if len(found) > 3 else "")
        counts = set(found.tolist()) <= {0.0, float(other[0])} and abs(other[0]) >= 1
        cure = f"divide it by {other[0]:g}" if counts else "correct it"
        return f"holds {shown}; a mask is 0 where fields exist and 1 in solids: {cure}, or do not use it as a mask"
    if found.size and found[0] == 1:
        return "is 1 in every cell, so nothing exists; a mask is 1 in solids: write 1 - mask if it marks the fluid"
    return None


def require_mask(values: np.ndarray, name: str, where: str) -> None:
    """Raise DataError in one line unless ``values`` are those of a mask."""
    if problem := mask_problem(values):
        raise DataError(f"{where}: mask {name!r} {problem}")


def require_constant(values: np.ndarray, field: Field, value: float, where: str) -> None:
    """Raise DataError where a field that is constant in the training data is far from its value.

    Cells of a mask are not known here, so masked fields pass.
    """
    if field.masked_by is None and (far := float(np.abs(values - value).max(initial=0.0))) > _NEAR * abs(value):
        raise DataError(
            f"{where}: field {field.name!r} is {value:g} in all training data and differs by {far:g} here; leave it "
            "out, or train on data in which it varies"
        )


def looks_inverted(solid: np.ndarray, field: Field, values: np.ndarray) -> bool:
    """Whether ``values [C, *grid]`` are those of a field whose solids are where the mask is 0.

    A vector is at rest there and moves where the mask is 1; a masked scalar is exactly zero there and not in the mask.
    """
    inside, outside = values[:, solid != 0], values[:, solid == 0]
    if not inside.size or not outside.size:
        return False
    if field.kind == "scalar":
        return field.masked_by is not None and not outside.any() and bool(inside.any())
    speeds = (float(np.sqrt(np.square(part, dtype=np.float64).mean())) for part in (inside, outside))
    return next(speeds) > _INVERTED * next(speeds)


def check_masks(source: RegimeSource) -> None:
    """Check the masks of the first trajectory of each split, and whether they look inverted.

    Every other trajectory is checked by `RegimeSource.read_static` when it is read.

    Raises
    ------
    DataError
        In one line.
    """
    ndim = len(source.grid)
    present = {f.name for f in source.present}
    masks = mask_names(source.fields) & present
    ranges = field_slices(source.static, ndim)
    for split in ("train", "valid", "test"):
        if not source.files[split]:
            continue
        static = np.empty((source.num_static_channels, *source.grid), dtype=np.float32)
        source.read_static(split, 0, static)
        for f in source.static:
            largest = float(np.abs(static[ranges[f.name]]).max(initial=0.0))
            if f.name not in masks and f.static_scale == "none" and largest > _LARGE:
                log.warning(
                    "regime %s: static field %s reaches the models as it is stored, up to %g; set its static_scale",
                    source.name,
                    f.name,
                    largest,
                )
        if masks and split == "train":
            _require_upright(source, {name: static[ranges[name]][0] for name in masks})
    source.close()


def _require_upright(source: RegimeSource, masks: dict[str, np.ndarray]) -> None:
    """Compare masks with the fields of the last frame of the first training trajectory."""
    ndim = len(source.grid)
    last = source.num_frames("train")[0] - 1
    fields = np.empty((1, source.num_channels, *source.grid), dtype=np.float32)
    source.read("train", 0, range(last, last + 1), fields)
    for f in source.schema.dynamic:
        values = fields[0, field_slices(source.dynamic, ndim)[f.name]]
        for name in masks if f.kind == "vector" else masks.keys() & {f.masked_by}:
            if looks_inverted(masks[name], f, values):
                raise DataError(
                    f"{source.files['train'][0].path}: mask {name!r} looks inverted: {f.name!r} is zero where it is 0 "
                    f"and not where it is 1, and 1 means solid; write 1 - {name}"
                )
