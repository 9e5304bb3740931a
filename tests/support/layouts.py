"""Small files written by hand as other groups publish theirs; each writer returns the fields it wrote, as we name them.

Fields are [N, T, *grid] (scalars) or [N, T, *grid, D] (vectors), static ones without T.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

Fields = dict[str, np.ndarray]


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def centres(cells: int, length: float = 1.0) -> np.ndarray:
    return ((np.arange(cells) + 0.5) * length / cells).astype(np.float32)


def pdebench_cfd(
    path: Path, seed: int = 0, count: int = 3, frames: int = 4, grid: tuple[int, ...] = (6, 5, 4)
) -> Fields:
    """Compressible flow; the list of times has one entry more than there are frames."""
    components = [random(seed + i, count, frames, *grid) for i in range(len(grid))]
    density, pressure = 2 + random(seed + 7, count, frames, *grid), 3 + random(seed + 8, count, frames, *grid)
    with h5py.File(path, "w") as file:
        for name, values in zip(("Vx", "Vy", "Vz"), components):
            file[name] = values
        file["density"], file["pressure"] = density, pressure
        for axis, cells, length in zip("xyz", grid, (1.0, 2.0, 0.5)):
            file[f"{axis}-coordinate"] = centres(cells, length)
        file["t-coordinate"] = 0.05 * np.arange(frames + 1, dtype=np.float32)
    return {"velocity": np.stack(components, -1), "density": density, "pressure": pressure}


def pdebench_groups(path: Path, channels: int, seed: int = 0, count: int = 3) -> Fields:
    """Shallow water (one channel) and diffusion-reaction (two): a group for every trajectory."""
    values = random(seed, count, 5, 6, 7, channels)
    with h5py.File(path, "w") as file:
        for number, trajectory in enumerate(values):
            group = file.create_group(f"{number:04d}")
            group["data"] = trajectory
            group["grid/x"], group["grid/y"] = centres(6, 5.0) - 2.5, centres(7, 5.0) - 2.5
            group["grid/t"] = np.linspace(0, 1, 5, dtype=np.float32)
            group.attrs["config"] = "sim: {T_end: 1.0}"
    names = ("height",) if channels == 1 else ("activator", "inhibitor")
    return {name: values[..., i] for i, name in enumerate(names)}


def pdebench_darcy(path: Path, seed: int = 0) -> Fields:
    nu, solution = np.abs(random(seed, 3, 6, 7)), random(seed + 1, 3, 1, 6, 7)
    with h5py.File(path, "w") as file:
        file["nu"], file["tensor"] = nu, solution
        file["x-coordinate"], file["y-coordinate"] = centres(6), centres(7)
        file.attrs["beta"] = 0.1
    return {"nu": nu, "tensor": solution}


def pdebench_incompressible(path: Path, seed: int = 0) -> Fields:
    velocity, particles, force = random(seed, 2, 4, 6, 7, 2), random(seed + 1, 2, 4, 6, 7, 1), random(seed, 2, 6, 7, 2)
    with h5py.File(path, "w") as file:
        for name, values in (("velocity", velocity), ("particles", particles)):
            file.create_dataset(name, data=values, chunks=(1, 1, *values.shape[2:]), compression="lzf", shuffle=True)
        file["force"] = force
        file["t"] = np.tile(0.005 * np.arange(4, dtype=np.float32), (2, 1))
    return {"velocity": velocity, "particles": particles[..., 0], "force": force}


def pdebench_1d(path: Path, seed: int = 0) -> Fields:
    values = random(seed, 3, 4, 16)
    with h5py.File(path, "w") as file:
        file["tensor"] = values
        file["x-coordinate"], file["t-coordinate"] = centres(16), 0.1 * np.arange(5)
    return {"tensor": values}


def dpot_single(path: Path, channels: int = 4, seed: int = 0, count: int = 3) -> Fields:
    """One file (N, X, Y, T[, C]); with one channel that axis is missing."""
    values = random(seed, count, 6, 7, 5, channels)
    with h5py.File(path, "w") as file:
        file["data"] = values if channels > 1 else values[..., 0]
    moved = np.moveaxis(values, 3, 1)
    if channels == 1:
        return {"vorticity": moved[..., 0]}
    return {"velocity": moved[..., :2], "density": moved[..., 2], "pressure": moved[..., 3]}


def dpot_scattered(path: Path, seed: int = 0, grid: tuple[int, ...] = (4, 5, 6), frames: int = 5) -> Fields:
    """One trajectory of 3-D flow (X, Y, Z, T, C) in data_<i>.hdf5; pressure comes before density."""
    values = random(seed, *grid, frames, 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = values
    moved = np.moveaxis(values, 3, 0)[None]
    return {"velocity": moved[..., :3], "pressure": moved[..., 3], "density": moved[..., 4]}


def fno_hdf5(path: Path, seed: int = 0) -> Fields:
    """MATLAB 7.3: the axes of u [N, X, Y, T] reversed."""
    values = random(seed, 3, 6, 7, 5)
    with h5py.File(path, "w", userblock_size=512) as file:
        file["u"] = values.transpose()
        file["a"], file["t"] = values[..., 0].transpose(), np.arange(1.0, 6.0)[None]
    return {"vorticity": np.moveaxis(values, 3, 1)}


def fno_matlab5(path: Path, seed: int = 0) -> Fields:
    from scipy.io import savemat

    values = random(seed, 3, 6, 7, 5)
    savemat(path, {"u": values, "a": values[..., 0]}, do_compression=True)
    return {"vorticity": np.moveaxis(values, 3, 1)}


def jhtdb(path: Path, seed: int = 0, old: bool = False, swapped: bool = False) -> Fields:
    """Frames 3, 5 and 11 of a cutout 7 x 6 x 5; ``old``: the web service, ``swapped``: written as x, y, z."""
    velocity, pressure = random(seed, 3, 7, 6, 5, 3), random(seed + 1, 3, 7, 6, 5, 1)
    names = ("Velocity", "Pressure") if old else ("velocity", "pressure")
    with h5py.File(path, "w") as file:
        for number, index in enumerate((3, 5, 11)):
            for name, values in zip(names, (velocity[number], pressure[number])):
                file[f"{name}_{index:04d}"] = values if swapped else values.transpose(2, 1, 0, 3)
        for axis, cells in zip("xyz", (7, 6, 5)):
            file[f"{axis}coor"] = (0.01 * np.arange(cells)).astype(np.float32 if old else np.float64)
    return {"velocity": velocity[None], "pressure": pressure[None, ..., 0]}


def rock_raw(path: Path, seed: int = 0) -> Fields:
    image = (np.random.default_rng(seed).random((6, 5, 4)) < 0.7).astype(np.uint8) * 255
    image.tofile(path)
    return {"image": image[None].astype(np.float32)}


def rock_tif(path: Path, seed: int = 0) -> Fields:
    import tifffile

    image = (np.random.default_rng(seed).random((6, 5, 4)) < 0.7).astype(np.uint8) * 255
    tifffile.imwrite(path, image, photometric="minisblack", compression="zlib")
    return {"image": image[None].astype(np.float32)}


# Name of the format, name of a file, its writer: one of everything that can be read, besides The Well.
def own_arrays(path: Path, seed: int = 0) -> Fields:
    """One dataset a field, and attributes of the file; components last, solids of each trajectory."""
    velocity, heat = random(seed, 3, 5, 6, 7, 8, 3), random(seed + 1, 3, 5, 6, 7, 8)
    solid = (random(seed + 2, 3, 6, 7, 8) > 0).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["velocity"], file["heat"], file["solid"] = velocity, heat, solid
        file["time"], file["viscosity"] = 0.1 * np.arange(5), np.array([1.0, 2.0, 3.0])
        file.attrs.update(axes="ntxyz", lengths=(1.0, 2.0, 3.0))
    return {"velocity": velocity, "heat": heat, "solid": solid}


LAYOUTS = {
    "cfd_3d": ("pdebench", "3D_CFD_Rand_M1.0_periodic_Train.hdf5", pdebench_cfd),
    "cfd_2d": ("pdebench", "2D_CFD_Turb_periodic.hdf5", lambda p, seed=0: pdebench_cfd(p, seed, grid=(6, 7))),
    "cfd_1d": ("pdebench", "1D_CFD_Shock_trans_Train.hdf5", lambda p, seed=0: pdebench_cfd(p, seed, grid=(9,))),
    "shallow_water": ("pdebench", "2D_rdb_NA_NA.h5", lambda p, seed=0: pdebench_groups(p, 1, seed)),
    "reaction": ("pdebench", "2D_diff-react_NA_NA.h5", lambda p, seed=0: pdebench_groups(p, 2, seed)),
    "darcy": ("pdebench", "2D_DarcyFlow_beta0.1_Train.hdf5", pdebench_darcy),
    "incompressible": ("pdebench", "ns_incom_inhom_2d_512-0.h5", pdebench_incompressible),
    "advection": ("pdebench", "1D_Advection_Sols_beta0.1.hdf5", pdebench_1d),
    "dpot_single": ("dpot", "ns2d_pdb_train.hdf5", dpot_single),
    "dpot_vorticity": ("dpot", "ns2d_fno_1e-5_train.hdf5", lambda p, seed=0: dpot_single(p, 1, seed)),
    "dpot_scattered": ("dpot", "data_0.hdf5", dpot_scattered),
    "fno_hdf5": ("fno", "ns_V1e-3_N5000_T50.mat", fno_hdf5),
    "fno_matlab5": ("fno", "ns_old.mat", fno_matlab5),
    "jhtdb": ("jhtdb", "isotropic1024coarse.h5", jhtdb),
    "jhtdb_old": ("jhtdb", "isotropic_old.h5", lambda p, seed=0: jhtdb(p, seed, old=True)),
    "arrays": ("arrays", "mine.hdf5", own_arrays),
    "rock_raw": ("rock", "berea_6x5x4_uint8.raw", rock_raw),
    "rock_tif": ("rock", "cement.tif", rock_tif),
}
