"""Voxel geometries: generators, percolation, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shodh.core.errors import DataError
from shodh.physics.geometry import (
    GENERATORS,
    crop_image,
    label_pores,
    largest_cluster,
    load_image,
    percolates,
    pore_space,
)


def tube(grid: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    """A straight pore along the first axis."""
    solid = np.ones(grid, dtype=bool)
    solid[:, 3, 4] = False
    return solid


def test_tube_percolates_along_its_own_axis_only() -> None:
    assert [percolates(tube(), axis) for axis in range(3)] == [True, False, False]
    blocked = tube()
    blocked[2, 3, 4] = True
    assert not percolates(blocked, 0)


def test_pore_that_touches_both_sides_but_not_its_image_does_not_percolate() -> None:
    solid = np.ones((4, 6, 5), dtype=bool)
    solid[:, 1, 1] = False
    solid[3, 1:4, 1] = False
    solid[0, 1, 1] = True  # the pore now ends at x = 3 and, beside, nothing opens at x = 0
    solid[0, 3, 3] = False
    assert not percolates(solid, 0)


def test_winding_pore_percolates_through_the_periodic_edge() -> None:
    """A staircase that leaves through one side and comes back displaced joins its image after it closes."""
    n = 6
    solid = np.ones((n, n, 3), dtype=bool)
    for i in range(n):
        solid[i, i, 1] = False
        solid[(i + 1) % n, i, 1] = False
    assert percolates(solid, 0) and percolates(solid, 1) and not percolates(solid, 2)


def percolates_reference(solid: np.ndarray, axis: int) -> bool:
    """Whether two copies of a voxel of a single cluster are one cluster in the box repeated three times."""
    if solid.all():
        return False
    labels = label_pores(np.concatenate([solid] * 3, axis=axis))
    voxel = np.argwhere(~solid)[0]
    copy = voxel.copy()
    copy[axis] += solid.shape[axis]
    return bool(labels[tuple(voxel)] == labels[tuple(copy)])


def test_pieces_tell_what_the_repeated_box_tells() -> None:
    draw, found = np.random.default_rng(0), []
    for _ in range(150):
        solid = largest_cluster(draw.random(draw.integers(1, 7, 3)) < draw.uniform(0.1, 0.95))
        found += [(percolates(solid, axis), percolates_reference(solid, axis)) for axis in range(3)]
    assert all(ours == theirs for ours, theirs in found)
    assert {ours for ours, _ in found} == {True, False}


def test_labels_join_across_the_periodic_edge() -> None:
    solid = np.ones((5, 4, 4), dtype=bool)
    solid[0, 1, 1] = solid[4, 1, 1] = solid[2, 3, 3] = False
    labels = label_pores(solid)
    assert labels[0, 1, 1] == labels[4, 1, 1] != labels[2, 3, 3] > 0
    assert labels[solid].max() == 0


def test_isolated_pores_are_filled() -> None:
    solid = tube()
    solid[1, 0, 0] = False
    filled = largest_cluster(solid)
    assert np.array_equal(filled, tube())
    assert pore_space(solid) is None


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_generators_meet_the_porosity_and_depend_on_the_seed_alone(kind: str) -> None:
    grid = (25, 24, 31)
    make = GENERATORS[kind]
    solid = make(1, grid, 0.65, 0.25)
    assert solid.shape == grid and solid.dtype == bool
    assert 0.65 - 0.06 < 1 - solid.mean() <= 0.651
    assert np.array_equal(solid, make(1, grid, 0.65, 0.25))
    assert not np.array_equal(solid, make(2, grid, 0.65, 0.25))


def test_images_are_read_from_npy_and_raw(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(">u2")
    np.save(tmp_path / "a.npy", image)
    image.tofile(tmp_path / "a.raw")
    for name in ("a.npy", "a.raw"):
        solid = load_image(tmp_path / name, (5, 6, 7), ">u2", 1)
        assert np.array_equal(solid, image != 1)


def test_tif_images_are_read(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    image = np.random.default_rng(0).integers(0, 2, (5, 6, 7)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image)
    assert np.array_equal(load_image(tmp_path / "a.tif", (5, 6, 7), "uint8", 0), image != 0)


def bad_images(folder: Path) -> dict[str, tuple]:
    """Arguments of load_image, by a word of the message they deserve."""
    np.save(folder / "good.npy", np.eye(4, dtype=np.uint8)[None].repeat(3, 0))
    np.save(folder / "flat.npy", np.eye(4, dtype=np.uint8))
    (folder / "short.raw").write_bytes(b"\0" * 100)
    (folder / "broken.npy").write_bytes(b"\x93NUMPY broken")
    (folder / "a.txt").write_text("1")
    return {
        "no such image": ("none.npy", None, None, 0),
        "needs 125": ("short.raw", (5, 5, 5), "uint8", 0),
        "no header": ("short.raw", None, "uint8", 0),
        "unknown image dtype": ("short.raw", (5, 5, 4), "byte8", 0),
        "unknown image format": ("a.txt", None, None, 0),
        "not a readable": ("broken.npy", None, None, 0),
        "expected three axes": ("flat.npy", None, None, 0),
        "expected (4, 4, 4)": ("good.npy", (4, 4, 4), None, 0),
        "expected float32": ("good.npy", None, "float32", 0),
        "no voxel": ("good.npy", None, None, 7),
        "pore_value": ("good.npy", None, None, None),
    }


def test_bad_images_are_refused_with_the_reason(tmp_path: Path) -> None:
    for word, (name, shape, dtype, pore) in bad_images(tmp_path).items():
        with pytest.raises(DataError) as error:
            load_image(tmp_path / name, shape, dtype, pore)
        assert word in str(error.value) and name in str(error.value)
        assert "\n" not in str(error.value)


def test_crops_lie_inside_the_image() -> None:
    image = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    crop = crop_image(image, 5, (6, 3, 4))
    start = np.argwhere(image == crop[0, 0, 0])[0]
    assert start[0] == 0
    assert np.array_equal(crop, image[:, start[1] : start[1] + 3, start[2] : start[2] + 4])
    with pytest.raises(DataError, match="smaller"):
        crop_image(image, 5, (6, 9, 4))
