"""Fields for other programs: VTK image data with a time series for ParaView, and NetCDF for xarray.

VTK files are XML with the values appended raw (VTK file format, "ImageData", cell data, header of 64-bit sizes); NetCDF
is the classic 64-bit offset form that SciPy writes and every NetCDF library reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from shodh.core.errors import DataError
from shodh.schema.fields import AXES
from shodh.core.files import atomic_path, write_atomically

# Classic NetCDF holds no variable of 2^32 bytes or more a record.
MAX_NETCDF_BYTES = (1 << 32) - 4


def write_vti(
    path: Path, fields: Mapping[str, np.ndarray], spacing: Sequence[float], origin: Sequence[float] = (0.0, 0.0, 0.0)
) -> None:
    """Write one snapshot as VTK image data, whole or not at all.

    Parameters
    ----------
    path : Path
        ``*.vti``.
    fields : mapping
        ``{name: [C, *grid]}`` in one to three dimensions; float32 cell data. A vector of two components gets a third,
        zero, as VTK wants.
    spacing, origin : numbers
        Size of a cell and corner of the box, by axis.
    """
    grid = next(iter(fields.values())).shape[1:]
    cells = (*grid, 1, 1)[:3]
    steps = (*spacing, 1.0, 1.0)[:3]
    extent = " ".join(f"0 {n}" for n in cells)
    blocks, arrays, offset = [], [], 0
    for name, values in fields.items():
        if values.shape[1:] != grid:
            raise DataError(f"{path}: field {name!r} has the shape {values.shape[1:]}, others have {grid}")
        block = _vtk_order(values)
        components = block.shape[-1]
        arrays.append(
            f'<DataArray type="Float32" Name={quoteattr(name)} NumberOfComponents="{components}" format="appended" '
            f'offset="{offset}"/>'
        )
        blocks.append(block)
        offset += 8 + block.nbytes
    order = "LittleEndian" if sys.byteorder == "little" else "BigEndian"
    geometry = (
        f'WholeExtent="{extent}" Origin="{" ".join(map(str, (*origin, 0.0, 0.0)[:3]))}" '
        f'Spacing="{" ".join(map(str, steps))}"'
    )
    head = (
        f'<?xml version="1.0"?>\n<VTKFile type="ImageData" version="1.0" byte_order="{order}" header_type="UInt64">\n'
        f'<ImageData {geometry}>\n<Piece Extent="{extent}">\n<CellData>\n'
        + "\n".join(arrays)
        + '\n</CellData>\n</Piece>\n</ImageData>\n<AppendedData encoding="raw">\n_'
    )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head.encode())
        for block in blocks:
            file.write(np.uint64(block.nbytes).tobytes())
            file.write(block.tobytes())
        file.write(b"\n</AppendedData>\n</VTKFile>\n")


def write_pvd(path: Path, snapshots: Sequence[tuple[float, str]]) -> None:
    """Write a ParaView time series: ``(time, file name beside it)`` of each snapshot."""
    entries = "\n".join(f'<DataSet timestep="{time!r}" file={quoteattr(name)}/>' for time, name in snapshots)
    write_atomically(
        path, f'<?xml version="1.0"?>\n<VTKFile type="Collection" version="1.0">\n<Collection>\n{entries}\n'
        "</Collection>\n</VTKFile>\n",
    )  # fmt: skip


def write_netcdf(
    path: Path,
    fields: Mapping[str, np.ndarray],
    time: np.ndarray,
    spacing: Sequence[float],
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Write frames as NetCDF, whole or not at all.

    Parameters
    ----------
    path : Path
        ``*.nc``.
    fields : mapping
        ``{name: [T, C, *grid]}``; a vector becomes one variable a component, ``velocity_x`` and so on.
    time : ndarray [T]
    spacing : numbers
        Size of a cell by axis; coordinates are cell centres.
    """
    from scipy.io import netcdf_file

    first = next(iter(fields.values()))
    grid = first.shape[2:]
    if 4 * first[:, 0].size > MAX_NETCDF_BYTES:
        raise DataError(f"{path}: {first.shape} is too large for one NetCDF variable; export fewer frames")
    axes = AXES[: len(grid)]
    with atomic_path(path) as temporary, netcdf_file(temporary, "w", version=2) as file:
        for name, value in (attributes or {}).items():
            setattr(file, name, value)
        file.createDimension("time", len(time))
        file.createVariable("time", "d", ("time",))[:] = time
        for axis, cells, step in zip(axes, grid, spacing):
            file.createDimension(axis, cells)
            file.createVariable(axis, "d", (axis,))[:] = (np.arange(cells) + 0.5) * step
        for name, values in fields.items():
            for component in range(values.shape[1]):
                label = name if values.shape[1] == 1 else f"{name}_{AXES[component]}"
                file.createVariable(label, "f", ("time", *axes))[:] = values[:, component]


def _vtk_order(values: np.ndarray) -> np.ndarray:
    """``[C, X, Y, Z]`` as VTK stores it: x fastest, components together; ``[Z, Y, X, C]`` contiguous."""
    components, *grid = values.shape
    block = values.reshape(components, *(*grid, 1, 1)[:3])
    if components == 2:
        block = np.concatenate((block, np.zeros_like(block[:1])))
    return np.ascontiguousarray(block.transpose(3, 2, 1, 0), dtype=np.float32)
