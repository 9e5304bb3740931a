"""Cubes of rock: cuts, joints, percolation."""

from __future__ import annotations

import numpy as np
import pytest

from shodh.core.errors import ConfigError, DataError
from shodh.physics.geometry import blobs, percolates
from shodh.physics.rock import connects, cut_shape, join, mirrored, rock_cubes, with_buffer


def oblique_pore(n: int = 6) -> np.ndarray:
    """A pore that enters at one place and leaves at another: it connects the ends but meets no periodic image."""
    solid = np.ones((n, n, n), dtype=bool)
    solid[: n // 2, 1, 1] = False
    solid[n // 2, 1:5, 1] = False
    solid[n // 2 :, 4, 1] = False
    return solid


def test_pores_that_connect_the_ends_are_found_and_dead_ends_are_not() -> None:
    solid = oblique_pore()
    solid[:2, 1, 4] = False
    found = connects(solid, 0)
    assert np.array_equal(found, ~oblique_pore())
    assert not connects(solid, 1).any()
    assert not connects(np.ones((3, 3, 3), dtype=bool), 0).any()


def test_mirrored_cut_is_periodic_and_symmetric() -> None:
    solid = oblique_pore()
    assert not percolates(solid, 0)
    cube = mirrored(solid)
    assert cube.shape == (12, 12, 12) and np.array_equal(cube[:6, :6, :6], solid)
    for axis in range(3):
        assert np.array_equal(cube, np.flip(cube, axis))
        assert np.array_equal(cube.take(0, axis=axis), cube.take(-1, axis=axis))


def test_buffer_opens_the_ends_of_its_axis() -> None:
    cube = with_buffer(oblique_pore(), 2, 0)
    assert cube.shape == (8, 6, 6) and not cube[:2].any() and np.array_equal(cube[2:], oblique_pore())
    joined = join(oblique_pore(), "buffer", 2, 0)
    assert joined is not None and all(percolates(joined, axis) for axis in range(3))
    assert join(oblique_pore(), "buffer", 2, 1) is None
    assert join(oblique_pore(), "mirror", 0, 0) is None


@pytest.mark.parametrize("kind", ["mirror", "buffer"])
def test_cubes_of_an_image_percolate_and_say_where_they_come_from(kind: str) -> None:
    image = blobs(3, (40, 44, 40), 0.45, 0.2)
    size, layers, axis = 20, 3, 1
    cubes = list(rock_cubes(image, size, kind, layers, axis))
    assert len(cubes) >= 2 and len({cube.corner for cube in cubes}) == len(cubes)
    shape = cut_shape(size, kind, layers, axis)
    for cube in cubes:
        assert cube.solid.shape == (size,) * 3
        assert all(percolates(cube.solid, a) for a in range(3))
        cut = image[tuple(slice(c, c + n) for c, n in zip(cube.corner, shape))]
        inside = cube.solid[:10, :10, :10] if kind == "mirror" else cube.solid[:, layers:]
        assert not (cut & ~inside).any()  # pores are only ever filled
        assert cube.porosity == pytest.approx(1 - inside.mean(), abs=1e-12)
        assert 0.2 < cube.porosity <= 1 - cut.mean()


@pytest.mark.parametrize("arguments", [(21, "mirror", 4, 0), (8, "buffer", 8, 0), (8, "glue", 2, 0)])
def test_impossible_cubes_are_refused(arguments: tuple[int, str, int, int]) -> None:
    with pytest.raises(ConfigError):
        cut_shape(*arguments)
    with pytest.raises(DataError, match="smaller"):
        next(rock_cubes(np.ones((4, 9, 9), dtype=bool), 10))
