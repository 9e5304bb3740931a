"""Voxel geometries of porous media: random packs and blobs, and images from a file.

A geometry is a bool array ``solid [X, Y, Z]`` of cubic voxels, True in the solid, on a periodic box. Before flow is
solved the pore space is reduced to its largest connected cluster (6 neighbours, periodic), and that cluster must
percolate: along every axis it must connect to its own periodic image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy
import torch

from shodh.core.errors import DataError
from shodh.core.seeding import generator
from shodh.physics.images import Solid, load_image
from shodh.physics.regime import smooth_noise

__all__ = [
    "GENERATORS",
    "Solid",
    "blobs",
    "crop_image",
    "label_pores",
    "largest_cluster",
    "load_image",
    "percolates",
    "pore_space",
    "sphere_pack",
]


def sphere_pack(seed: int, grid: Sequence[int], porosity: float, diameter: float) -> Solid:
    """Overlapping spheres at random places of the periodic box, added until the porosity falls to ``porosity``.

    ``diameter`` is in units of the longest edge of the box; each sphere's varies by +-25 %.
    """
    draw = generator(seed, "sphere pack")
    spacing = 1.0 / max(grid)
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) * spacing for n in grid]
    solid = torch.zeros(*grid, dtype=torch.bool)
    while 1.0 - solid.double().mean() > porosity:
        place = torch.rand(3, generator=draw, dtype=torch.float64)
        radius = 0.5 * diameter * (0.75 + 0.5 * float(torch.rand(1, generator=draw, dtype=torch.float64)))
        squared = []
        for axis, n in enumerate(grid):
            length = n * spacing
            distance = (centres[axis] - place[axis] * length).abs()
            squared.append(torch.minimum(distance, length - distance) ** 2)
        solid |= squared[0][:, None, None] + squared[1][:, None] + squared[2] < radius**2
    return solid.numpy()


def blobs(seed: int, grid: Sequence[int], porosity: float, diameter: float) -> Solid:
    """Smooth noise above the threshold that leaves ``porosity``; grains of about ``diameter`` longest edges."""
    lengths = [n / max(grid) for n in grid]
    noise = smooth_noise(seed, "blobs", grid, lengths, [diameter / 4.0] * 3)
    return (noise > torch.quantile(noise.flatten()[:: max(1, noise.numel() // 10_000_000)], porosity)).numpy()


GENERATORS = {"spheres": sphere_pack, "blobs": blobs}


def crop_image(solid: Solid, seed: int, grid: Sequence[int]) -> Solid:
    """A sub-volume of shape ``grid`` at a random place of the image."""
    if any(n > size for n, size in zip(grid, solid.shape)):
        raise DataError(f"the image {solid.shape} is smaller than the grid {tuple(grid)}; ask for a smaller grid")
    draw = generator(seed, "crop")
    starts = [int(torch.randint(size - n + 1, (1,), generator=draw)) for n, size in zip(grid, solid.shape)]
    return solid[tuple(slice(start, start + n) for start, n in zip(starts, grid))].copy()


def _pieces(solid: Solid) -> tuple[np.ndarray, int, list[np.ndarray]]:
    """Pieces of the pores in the box alone: labels 1..n (0 in the solid), n, and the pairs that touch across each axis.

    Of a pair ``[2, m]`` of an axis the first lies at its lower end, the second at its upper.
    """
    labels, count = scipy.ndimage.label(~solid)
    pairs = []
    for axis in range(3):
        ends = np.stack([labels.take(end, axis=axis).ravel() for end in (0, -1)])
        pairs.append(np.unique(ends[:, ends.all(0)], axis=1))
    return labels, count, pairs


def _connected(nodes: int, pairs: Sequence[np.ndarray]) -> np.ndarray:
    """The number of the component of each node of a graph, by its edges ``[2, m]``."""
    rows, columns = np.concatenate(pairs, axis=1)
    graph = scipy.sparse.coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(nodes, nodes))
    return np.asarray(scipy.sparse.csgraph.connected_components(graph, directed=False)[1])


def label_pores(solid: Solid) -> np.ndarray:
    """Labels of the pore clusters (6 neighbours, periodic): 0 in the solid, else 1..n."""
    labels, count, pairs = _pieces(solid)
    if count == 0:
        return labels
    # Node 0 is the solid and touches nothing; number the clusters of pores from 1.
    _, renumbered = np.unique(_connected(count + 1, pairs)[1:], return_inverse=True)
    return np.concatenate(([0], renumbered + 1))[labels]


def largest_cluster(solid: Solid) -> Solid:
    """The solid with all pores filled but those of the largest cluster."""
    labels = label_pores(solid)
    if not labels.any():
        return np.ones_like(solid)
    return labels != np.bincount(labels[labels > 0]).argmax()


def percolates(solid: Solid, axis: int) -> bool:
    """Whether the pores, a single cluster, connect to their own periodic image along ``axis``."""
    return _winds(_pieces(solid), axis)


def _winds(pieces: tuple[np.ndarray, int, list[np.ndarray]], axis: int) -> bool:
    """Whether a cluster winds around the box along ``axis``, of its pieces.

    The box is repeated three times, periodically: copies of one piece share a cluster exactly if some path winds
    around the box (a number of times that is no multiple of three).
    """
    _, count, pairs = pieces
    if count == 0:
        return False
    edges = [
        np.stack((lower + count * ((copy + (across == axis)) % 3), upper + count * copy)) - 1
        for across, (lower, upper) in enumerate(pairs)
        for copy in range(3)
    ]
    cluster = _connected(3 * count, edges)
    return bool(cluster[0] == cluster[count])


def pore_space(solid: Solid) -> Solid | None:
    """The solid around the largest pore cluster, or None if that does not percolate along every axis."""
    filled = largest_cluster(solid)
    pieces = _pieces(filled)
    return filled if all(_winds(pieces, axis) for axis in range(3)) else None
