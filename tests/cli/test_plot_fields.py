"""The contact sheet: which file of a folder, which plane of a field, and bad input."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from shodh.core.cli import run_main
from shodh.data import WellFile, write_trajectories
from shodh.physics import get_regime
from shodh.report.gallery import find_files, middle_slice


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("shodh.commands.plot")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two regimes, one of each dimension, each with a training and a test file."""
    root = tmp_path_factory.mktemp("many")
    for name, grid in (("shallow_water_2d", (8, 6)), ("porous_media", (8, 9, 10))):
        for seed, split in enumerate(("train", "test")):
            solved = get_regime(name).simulate([seed], grid, 2)
            write_trajectories(root / name / "data" / split / f"{name}_{seed}.hdf5", solved)
    return root


def test_a_folder_of_regimes_gives_one_test_file_each(many: Path) -> None:
    names = [path.relative_to(many).parts for path in find_files([many])]
    assert [(parts[0], parts[2]) for parts in names] == [("porous_media", "test"), ("shallow_water_2d", "test")]
    assert find_files([many / "porous_media"]) == find_files([many])[:1]
    assert find_files([many, many / "porous_media"]) == find_files([many])


def test_slices_are_the_planes_they_say(many: Path) -> None:
    flat, deep = (WellFile(path) for path in sorted(find_files([many]), reverse=True))
    values = get_regime("shallow_water_2d").simulate([1], (8, 6), 2).values
    piece = middle_slice(flat, "water", "height", 0, -1)
    np.testing.assert_array_equal(piece.values, values["height"][0, 1])
    assert piece.aspect == pytest.approx(8 / 6) and "t = 0.01" in piece.label
    piece = middle_slice(flat, "water", "discharge", 0, 1)
    np.testing.assert_allclose(piece.values, np.linalg.norm(values["discharge"][0, 1], axis=-1), rtol=1e-6)
    values = get_regime("porous_media").simulate([1], (8, 9, 10), 2).values
    piece = middle_slice(deep, "rock", "tracer", 0, 0)
    solid = values["solid"][0, :, 4].astype(bool)
    assert np.array_equal(np.ma.getmaskarray(piece.values), solid) and solid.any()
    np.testing.assert_array_equal(piece.values[~solid], values["tracer"][0, 0, :, 4][~solid])


def test_sheet_is_written_and_told(
    tool: ModuleType, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "sheet.png"
    assert tool.main([str(many), "--out", str(out), "--field", "tracer", "height"]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("porous_media: tracer, t =") and lines[1].startswith("shallow_water_2d: height")
    assert "2 slices" in lines[2]


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--frame", "7"], "2 frames"), (["--columns", "0"], "--columns"), (["--trajectory", "3"], "1 trajectories")],
)
def test_bad_input_gets_one_line(
    tool: ModuleType, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        run_main(lambda: tool.main([str(many), "--out", str(tmp_path / "x.png"), *options]))
    assert word in capsys.readouterr().err


def test_one_space_dimension_is_refused(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "1D_Burgers.hdf5", "w") as file:
        file["tensor"] = np.zeros((3, 4, 16), dtype=np.float32)
    with pytest.raises(SystemExit):
        run_main(lambda: tool.main([str(tmp_path / "1D_Burgers.hdf5"), "--out", str(tmp_path / "x.png")]))
    assert "one space dimension" in capsys.readouterr().err


def test_empty_folders_and_odd_names_are_refused(
    tool: ModuleType, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, word in (([tmp_path, "--out", "x.png"], "no file"), ([many, "--out", "x.txt"], ".png")):
        with pytest.raises(SystemExit):
            run_main(lambda arguments=arguments: tool.main([str(a) for a in arguments]))  # type: ignore[misc]
        assert word in capsys.readouterr().err
