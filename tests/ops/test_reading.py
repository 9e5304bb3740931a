"""The compiled reader of snapshots gives the bits that numpy gives, and every failure a name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from shodh.ops import extension
from shodh.ops.reading import can_read_into, read_snapshot

pytestmark = pytest.mark.skipif(extension.unavailable_reason("cpp") is not None, reason="compiled kernels not built")

OFFSET = 12


def write(path: Path, values: np.ndarray) -> int:
    path.write_bytes(bytes(OFFSET) + values.tobytes())
    return os.open(path, os.O_RDONLY)


def stored(cells: int, components: int) -> np.ndarray:
    """Values of all magnitudes, down to subnormals and negative zero."""
    rng = np.random.default_rng(cells + components)
    values = rng.standard_normal((cells, components)) * 10.0 ** rng.integers(-44, 30, (cells, components))
    values[::7] = -0.0
    return values.astype(np.float32)


def place(cells: int, components: int, lead: int, gap: int) -> np.ndarray:
    """A view [C, cells] whose components start ``lead`` values into memory and lie ``gap`` apart."""
    memory = np.full(lead + components * (cells + gap), 7.0, dtype=np.float32)
    return np.lib.stride_tricks.as_strided(memory[lead:], (components, cells), ((cells + gap) * 4, 4))


# Less than a block, a block, ragged ends, more than a slab, and enough to be written past the caches.
@pytest.mark.parametrize("cells", [1, 127, 128, 1000, 70001, 300000])
@pytest.mark.parametrize("components", [1, 2, 3])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 0.7), (0.0, 0.25), (-1.5, 3e-30), (0.0, 2.0**-126)])
def test_bits_are_those_of_numpy(tmp_path, cells, components, shift, scale):
    values = stored(cells, components)
    descriptor = write(tmp_path / "a", values)
    with np.errstate(all="ignore"):
        expected = (values.T - np.float32(shift)) / np.float32(scale)
    for lead, gap in ((0, 0), (1, 3), (4, 12)):
        out = place(cells, components, lead, gap)
        assert can_read_into(out)
        assert read_snapshot(descriptor, OFFSET, out, shift=shift, scale=scale)
        np.testing.assert_array_equal(out.view(np.int32), expected.view(np.int32))
        if gap and components > 1:
            between = np.lib.stride_tricks.as_strided(out[0, -1:], (components - 1, gap + 1), (out.strides[0], 4))
            assert (between[:, 1:] == 7.0).all()  # nothing is written between the components
    os.close(descriptor)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("components", [1, 3])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(tmp_path, bad, components):
    cells = 100_003
    for position in (0, 128 * components - 1, 65536, cells * components - 1):
        values = stored(cells, components)
        values.reshape(-1)[position] = bad
        descriptor = write(tmp_path / "a", values)
        out = np.empty((components, cells), dtype=np.float32)
        assert not read_snapshot(descriptor, OFFSET, out)
        assert read_snapshot(descriptor, OFFSET, out, finite=False)
        np.testing.assert_array_equal(out, values.T)
        os.close(descriptor)


def test_a_file_that_ends_early_or_cannot_be_read_is_an_error(tmp_path):
    values = stored(100_000, 1)
    descriptor = write(tmp_path / "a", values)
    os.truncate(tmp_path / "a", OFFSET + 4 * 99_999)
    with pytest.raises(OSError, match=f"ends before byte {OFFSET + 400_000}"):
        read_snapshot(descriptor, OFFSET, np.empty((1, 100_000), dtype=np.float32))
    os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_snapshot(descriptor, OFFSET, np.empty((1, 100_000), dtype=np.float32))


def test_places_that_do_not_fit_are_declined():
    good = np.empty((3, 4, 5), dtype=np.float32)
    assert can_read_into(good)
    assert not can_read_into(good.transpose(0, 2, 1))
    assert not can_read_into(good.astype(np.float64))
    assert not can_read_into(np.empty((4, 4), dtype=np.float32))
    good.flags.writeable = False
    assert not can_read_into(good)
