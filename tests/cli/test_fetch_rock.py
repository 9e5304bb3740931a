"""tools/fetch_rock.py on a package made by hand; nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shodh.commands import fetch_rock
from shodh.core.errors import DataError
from shodh.physics import get_regime
from shodh.physics.geometry import blobs

SHAPE = (24, 24, 24)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that holds the same blobs as .npz, .zip and .npy, at the place where pip would put it."""
    solid = blobs(3, SHAPE, 0.5, 0.3)
    npz, npy, raw = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, ~solid)
    np.save(npy, (~solid).astype(np.int8))
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr("rock.raw", (solid * np.uint8(255)).tobytes())
    archive = tmp_path / "package" / "porespy-3.2.0.tar.gz"
    archive.parent.mkdir()
    rocks = {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("bentheimer", npz), ("berea", raw), ("leopard", npy)):
            rock, data = fetch_rock.ROCKS[name], content.getvalue()
            info = tarfile.TarInfo(f"porespy-3.2.0/{rock.member}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            rocks[name] = fetch_rock.Rock(rock.member, hashlib.sha256(data).hexdigest(), SHAPE, rock.pore_value)
    monkeypatch.setattr(fetch_rock, "ROCKS", rocks)
    return archive


def test_all_rocks_are_read_alike(package: Path) -> None:
    for name in fetch_rock.ROCKS:
        assert np.array_equal(fetch_rock.read_rock(package, name), blobs(3, SHAPE, 0.5, 0.3))


def test_cubes_are_written_described_and_usable_as_geometry(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = package.parents[1]
    monkeypatch.setattr(
        sys, "argv", ["fetch_rock", "--rock", "berea", "--size", "16", "--count", "1", "--out", str(out)]
    )
    assert fetch_rock.main() == 0
    ((name, description),) = json.loads((out / "rocks.json").read_text()).items()
    assert description["values"] == {"pore": 0, "solid": 1} and description["join"] == "mirror"
    cube = np.load(out / name)
    assert cube.shape == (16, 16, 16) and set(np.unique(cube)) == {0, 1}
    regime = get_regime("porous_media", image=str(out / name), pore_value=0.0)
    assert np.array_equal(regime.make_solid(1, (16, 16, 16)), cube.astype(bool))  # type: ignore[attr-defined]


def test_damaged_packages_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rock = fetch_rock.ROCKS["berea"]
    other = fetch_rock.Rock(rock.member, "0" * 64, rock.shape, rock.pore_value)
    with pytest.raises(DataError, match="sha256"):
        fetch_rock.read_member(package, other)
    larger = fetch_rock.Rock(rock.member, rock.sha256, (25, 24, 24), rock.pore_value)
    monkeypatch.setitem(fetch_rock.ROCKS, "berea", larger)
    with pytest.raises(DataError, match="bytes"):
        fetch_rock.read_rock(package, "berea")
    package.write_bytes(package.read_bytes()[:200])
    with pytest.raises(DataError, match="delete"):
        fetch_rock.read_member(package, rock)
