"""Voxel images of porous rocks, as in the Digital Rocks Portal: a static ``solid``, or grey values, and nothing else.

With `FileHints.pore_value` the field is ``solid`` (1 in the rock); without it the values are given as ``image``. A
``.raw`` file has no header: shape and dtype come from the hints, or from a name like ``berea_200x200x200_uint8.raw``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from shodh.data.formats.arrays import ArrayField, ArrayHeader, Store
from shodh.data.formats.base import FileHints
from shodh.core.errors import DataError
from shodh.schema.fields import Field
from shodh.physics.images import read_image, solid_mask

# Words of a name.
DTYPES = {"uint8": "uint8", "uint16": "<u2", "8bit": "uint8", "16bit": "<u2", "u8": "uint8", "u16": "<u2"}


def load(path: Path, hints: FileHints) -> Store:
    """``{"solid": ...}`` or ``{"image": ...}``."""
    said = from_name(path, hints)
    if hints.pore_value is None:
        return {"image": read_image(path, said.image_shape, said.image_dtype)}
    image = read_image(path, said.image_shape, said.image_dtype)
    return {"solid": solid_mask(path, image, hints.pore_value)}


def describe(store: Store, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of one image."""
    ((name, image),) = store.items()
    if image.dtype.kind not in "buif":
        raise DataError(f"{path}: the image has the type {image.dtype}; expected numbers")
    grid = tuple(int(n) for n in image.shape)
    notes = [
        "lengths: one unit a voxel is assumed",
        "boundary: open is assumed",
        "fields: a geometry alone; it makes data through tools/generate_data.py --regime porous_media --image",
    ]
    if name == "image":
        notes.append(f"pore_value: not stated; the image holds {np.unique(np.ravel(image)[:100_000])[:8].tolist()}")
    said = from_name(path, hints)
    if hints.image_shape is None and said.image_shape is not None:
        notes.append(f"image_shape: {list(said.image_shape)} and dtype {said.image_dtype}, from the file's name")
    fields = {name: ArrayField(Field(name, static=True), "xyz", ((name,),))}
    return ArrayHeader(
        grid, tuple(map(float, grid)), ("open",) * 3, 1, np.zeros(1), fields, {}, tuple(notes), with_units=frozenset(fields)
    )


def from_name(path: Path, hints: FileHints) -> FileHints:
    """The hints, completed for a ``.raw`` file by its name."""
    if path.suffix.lower() != ".raw":
        return hints
    shape, dtype = hints.image_shape, hints.image_dtype
    stem = path.stem.lower()
    if shape is None and (match := re.search(r"(?<![0-9.x])(\d+)x(\d+)x(\d+)(?![0-9.]|x\d)", stem)):
        shape = tuple(int(n) for n in match.groups())
    if dtype is None:
        dtype = next((DTYPES[word] for word in re.split(r"[^a-z0-9]+", stem) if word in DTYPES), None)
    return replace(hints, image_shape=shape, image_dtype=dtype)
