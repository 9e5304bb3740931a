"""DPOT and MoE-POT folders (Hao et al. 2024): every file has one dataset ``data`` without names or coordinates.

Scattered, one trajectory a file, ``data_<i>.hdf5``: ``[X, Y(, Z), T, C]``. Or all in one, ``..._train.hdf5``:
``[N, X, Y, T]`` or ``[N, X, Y(, Z), T, C]``. A name like ``data_<i>`` tells one from the other; `FileHints.axes`
overrides it. Channels of the published sets are named from the file's path and their number.
"""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np

from shodh.data import hdf5
from shodh.data.formats.arrays import ArrayField, ArrayHeader
from shodh.data.formats.base import FileHints
from shodh.core.errors import ConfigError, DataError
from shodh.schema.fields import AXES, Boundary, Field

# Word in the path, space axes, channels -> names (a vector repeats its name), boundary. The first that fits is taken.
KNOWN: tuple[tuple[str, int, int, tuple[str, ...], Boundary], ...] = (
    ("cfdbench", 2, 3, ("velocity", "velocity", "mask"), "open"),
    ("cond_pda", 2, 3, ("tracer", "velocity", "velocity"), "wall"),
    ("ns2d_pda", 2, 3, ("tracer", "velocity", "velocity"), "wall"),
    ("swe", 2, 1, ("height",), "open"),
    ("dr_pdb", 2, 2, ("activator", "inhibitor"), "wall"),
    ("", 2, 1, ("vorticity",), "periodic"),
    ("", 2, 4, ("velocity", "velocity", "density", "pressure"), "periodic"),
    ("", 3, 5, ("velocity", "velocity", "velocity", "pressure", "density"), "periodic"),
)

# Parts of the names of published sets.
PUBLISHED = re.compile(r"(?<![a-z])(ns2d|ns3d|cfdbench|cond|dr|swe|pdb|pda|fno|dpot)(?![a-z])")


def is_dpot(file: h5py.File) -> bool:
    return set(file) == {"data"} and isinstance(file.get("data", getlink=True), h5py.HardLink)


def describe(file: h5py.File, path: Path, hints: FileHints) -> ArrayHeader:
    """Header of one file."""
    shape = tuple(int(n) for n in hdf5.dataset(file, "data", str(path)).shape)
    axes = hints.axes or guess_axes(shape, path)
    sizes = array_sizes(axes, shape, path)
    grid = tuple(sizes[a] for a in AXES if a in sizes)
    channels = sizes.get("c", 1)
    names, kind, notes = _names(path, len(grid), channels, hints)
    fields = named_fields(names, axes, ("data",), len(grid), path)
    notes += [
        f"boundary: {kind} is assumed; the file does not say",
        "lengths: 1 is assumed; the file does not say",
        "time_step: 1 is assumed; the file does not say",
    ]
    doubts = []
    if hints.axes is None:
        notes.append(f"axes: {axes} is assumed from the shape {shape} and the file's name")
        doubts = _doubts(axes, shape, path)
    return ArrayHeader(
        grid, (1.0,) * len(grid), (kind,) * len(grid), sizes.get("n", 1), np.arange(float(sizes["t"])), fields, {},
        tuple(notes), doubts=tuple(doubts), timeless=True,
    )  # fmt: skip


def guess_axes(shape: tuple[int, ...], path: Path) -> str:
    """Letters of the axes of ``data``, from their number and the file's name."""
    scattered = re.fullmatch(r"data_\d+", path.stem) is not None
    known = {(4, True): "xytc", (5, True): "xyztc", (4, False): "nxyt", (5, False): "nxytc", (6, False): "nxyztc"}
    if (len(shape), scattered) not in known:
        if scattered and len(shape) == 3:
            return "xyt"
        raise DataError(f"{path}: 'data' has the shape {shape}; state its axes, for example axes: nxytc")
    return known[len(shape), scattered]


def _doubts(axes: str, shape: tuple[int, ...], path: Path) -> list[str]:
    """What speaks against guessed axes: time may come first as well, where no published name says otherwise.

    Raises
    ------
    DataError
        With time first the grid is one of equal axes, and as guessed it is not.
    """
    other = ("n" if "n" in axes else "") + "t" + axes.replace("n", "").replace("t", "")
    readings = [dict(zip(letters, shape)) for letters in (axes, other)]
    grids = [tuple(sizes[a] for a in AXES if a in sizes) for sizes in readings]
    equal = [len(set(grid)) == 1 for grid in grids]
    said = [f"axes: {letters} ({sizes['t']} frames of {' x '.join(map(str, grid))})"
            for letters, sizes, grid in zip((axes, other), readings, grids)]  # fmt: skip
    doubt = f"{path}: the shape {shape} of 'data' does not tell its axes; state {said[0]} or {said[1]}"
    if equal == [False, True]:
        raise DataError(doubt)
    published = PUBLISHED.search("/".join(path.parts[-4:]).lower()) or path.stem.startswith("data_")
    return [] if equal == [True, False] or published else [doubt]


def named_fields(
    names: tuple[str, ...], axes: str, arrays: tuple[str, ...], ndim: int, path: Path
) -> dict[str, ArrayField]:
    """Fields of the channels ``names`` of one array; a repeated name is a vector."""
    fields = {}
    for name in dict.fromkeys(names):
        channels = tuple(i for i, n in enumerate(names) if n == name)
        if len(channels) not in (1, ndim):
            raise ConfigError(
                f"{path}: channel {name!r} is named {len(channels)} times; a vector has {ndim} components"
            )
        vector = len(channels) > 1
        fields[name] = ArrayField(
            Field(name, "vector" if vector else "scalar"), axes, (arrays,), "", channels if "c" in axes else None
        )
    return fields


def array_sizes(axes: str, shape: tuple[int, ...], path: Path) -> dict[str, int]:
    """Sizes by letter; errors if the letters are none of axes or do not go with the shape."""
    space = "".join(a for a in axes if a in AXES)
    if len(set(axes)) != len(axes) or set(axes) - set("ntxyzc") or sorted(space) != list(AXES[: len(space)]):
        raise ConfigError(f"{path}: axes {axes!r}; expected letters of n, t, x, y, z, c, each once, for example nxytc")
    if len(axes) != len(shape) or "t" not in axes or not space:
        raise DataError(f"{path}: the shape {shape} does not fit the axes {axes!r} (t and x are needed)")
    return dict(zip(axes, shape))


def _names_set(place: str, name: str) -> bool:
    """Whether a path names a published set: "swe" as a word, and not as a part of "answers"."""
    return re.search(rf"(?<![a-z]){name}(?![a-z])", place) is not None if name else True


def _names(path: Path, ndim: int, channels: int, hints: FileHints) -> tuple[tuple[str, ...], Boundary, list[str]]:
    place = "/".join(path.parts[-4:]).lower()
    fit = next((k for k in KNOWN if k[1:3] == (ndim, channels) and _names_set(place, k[0])), None)
    kind: Boundary = fit[4] if fit else "periodic"
    if hints.channels is not None:
        if len(hints.channels) != channels:
            raise ConfigError(f"{path}: {len(hints.channels)} channels are named, the file has {channels}")
        return hints.channels, kind, []
    if fit is None:
        names = tuple(f"channel_{i}" for i in range(channels)) if channels > 1 else ("data",)
        return names, kind, [f"channels: {list(names)}; name them with channels: [...]"]
    return fit[3], kind, [f"channels: {list(fit[3])}, as in the published set with {channels} of them"]
