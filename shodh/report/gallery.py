"""A contact sheet: one slice of each regime, for a first look at data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from shodh.core.errors import ConfigError, DataError
from shodh.data.formats import SUFFIXES, TrajectoryFile, open_file
from shodh.data.formats.names import stated_split
from shodh.report.figures import panel_grid

COLUMNS = 5


@dataclass(frozen=True)
class Slice:
    """A plane of one snapshot: values ``[A, B]`` (masked where solid), drawn with A to the right and B upward."""

    label: str
    values: np.ndarray
    aspect: float


def find_files(paths: Sequence[Path]) -> list[Path]:
    """One file for each regime: ``paths`` are files, folders of a regime, or folders of such folders.

    Raises
    ------
    DataError
        If there is no file of trajectories below a path.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            found[path] = None
            continue
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise DataError(
                f"{path}: no file of trajectories there; expected a file, or a folder with {SUFFIXES} files"
            )
        # In a folder of regimes each subfolder is one; test files tell of what no model has seen.
        inside = not any((path / name).is_dir() for name in ("data", "train", "test"))
        groups: dict[str, list[Path]] = {}
        for file in files:
            groups.setdefault(file.relative_to(path).parts[0] if inside else "", []).append(file)
        for group in groups.values():
            found[next((f for f in group if f.parent.name == "test"), group[0])] = None
    return list(found)


def middle_slice(file: TrajectoryFile, label: str, field: str | None, trajectory: int, frame: int) -> Slice:
    """A field of one snapshot; of three-dimensional data the plane in the middle of the second axis.

    Parameters
    ----------
    field : str, optional
        Default: the first that changes in time. A vector is shown by its length.
    frame : int
        Negative ones count from the end.
    """
    names = [name for name, kind in file.fields.items() if not kind.static]
    if field is None and not names:
        raise DataError(f"{file.path}: no field changes in time")
    name = field if field is not None else names[0]
    kind = file.field(name)
    if len(file.grid) < 2:
        raise DataError(f"{file.path}: has one space dimension; a slice needs two or three")
    if not (0 <= trajectory < file.num_trajectories and -file.num_frames <= frame < file.num_frames):
        raise ConfigError(
            f"{file.path}: has {file.num_trajectories} trajectories of {file.num_frames} frames; "
            f"trajectory {trajectory}, frame {frame} was asked for"
        )
    values = _snapshot(file, name, trajectory, frame % file.num_frames)
    plane = np.linalg.norm(values, axis=0) if kind.kind == "vector" else values[0]
    if "solid" in file.fields and name != "solid":
        plane = np.ma.masked_where(_snapshot(file, "solid", trajectory, 0)[0] > 0.5, plane)
    lengths, time = file.lengths, np.atleast_2d(file.time)
    if len(file.grid) == 3:
        plane, lengths = plane[:, file.grid[1] // 2], (file.lengths[0], file.lengths[2])
    shown = f"|{name}|" if kind.kind == "vector" else name
    moment = time[min(trajectory, len(time) - 1), frame]
    aspect = (lengths[1] / plane.shape[1]) / (lengths[0] / plane.shape[0])
    return Slice(f"{label}\n{shown}, t = {moment:.4g}", plane, aspect)


def _snapshot(file: TrajectoryFile, name: str, trajectory: int, frame: int) -> np.ndarray:
    """Values ``[C, *grid]``."""
    field = file.field(name)
    values = np.empty((field.num_components(len(file.grid)), *file.grid), dtype=np.float32)
    file.read(name, trajectory, range(frame, frame + 1), values if field.static else values[None])
    return values


def contact_sheet(path: Path, slices: Sequence[Slice], columns: int = COLUMNS) -> None:
    """Draw ``slices`` side by side with colour scales of their own; diverging colours where values have both signs."""
    columns = min(columns, len(slices))
    rows = math.ceil(len(slices) / columns)
    figure = Figure(figsize=(2.5 * columns, 2.75 * rows), layout="constrained")
    for panel, piece in zip(panel_grid(figure, len(slices), columns), slices, strict=True):
        low, high = float(piece.values.min()), float(piece.values.max())
        both = low < 0 < high and min(-low, high) > 0.2 * max(-low, high)
        extent = max(-low, high)
        image = panel.imshow(
            piece.values.T,
            origin="lower",
            aspect=piece.aspect,
            cmap="RdBu_r" if both else "viridis",
            vmin=-extent if both else low,
            vmax=extent if both else high,
        )
        panel.set_facecolor("#9aa0a6")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(piece.label, fontsize=8)
        figure.colorbar(image, ax=panel, shrink=0.75).ax.tick_params(labelsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_contact_sheet(
    data: Sequence[Path],
    out: Path,
    *,
    fields: Sequence[str] = (),
    trajectory: int = 0,
    frame: int = -1,
    columns: int = COLUMNS,
) -> list[str]:
    """Contact sheet of files or folders; the labels of its slices.

    Parameters
    ----------
    fields : sequence of str
        Of these the first that a file has is shown; else its first field that changes in time.
    """
    slices = []
    for path in find_files(data):
        file = open_file(path)
        try:
            wanted = next((name for name in fields if name in file.fields), None)
            slices.append(middle_slice(file, regime_of(path), wanted, trajectory, frame))
        finally:
            file.close()
    contact_sheet(out, slices, columns)
    return [piece.label.replace("\n", ": ") for piece in slices]


def regime_of(path: Path) -> str:
    """Name of the folder that holds the splits, or of the file."""
    if stated_split(Path(path.parent.name, "x")) is None:
        return path.stem
    folder = path.parent.parent
    return (folder.parent if folder.name == "data" else folder).name or path.stem
