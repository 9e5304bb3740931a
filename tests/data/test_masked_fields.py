"""Masked and constant fields: statistics of the cells that exist, exact zeros elsewhere, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from shodh.data.normalize import fit_normalizer
from shodh.schema.normalize import FieldNormalizer
from shodh.data import (
    RegimeSource,
    WindowDataset,
    compute_statistics,
    write_stats,
    write_trajectories,
)
from shodh.data.formats.inspection import inspect_file
from shodh.data.checks import check_masks, looks_inverted, mask_problem
from shodh.core.errors import DataError
from shodh.schema.fields import OUTSIDE, Field, Trajectories

VELOCITY = Field("velocity", "vector", placement="face", solenoidal=True)
TRACER, SOLID = Field("tracer", masked_by="solid"), Field("solid", static=True)
FIELDS = (VELOCITY, TRACER, SOLID)
EPS = float(np.finfo(np.float32).eps)
Make = Callable[..., Trajectories]


def write(root: Path, make: Make, tracer: Callable[[np.ndarray], np.ndarray], outside: float = 0.0) -> Path:
    """Two training files and one of each other split; ``tracer`` maps standard normal numbers to values."""
    for number, split in enumerate(("train", "train", "valid", "test")):
        trajectories = make(seed=number)
        values = tracer(trajectories.values["tracer"].astype(np.float64) - 5).astype(np.float32)
        solid = trajectories.values["solid"][:, None]
        trajectories.values["tracer"] = np.where(solid, np.float32(outside), values)
        trajectories.values["velocity"] *= ~solid[..., None]
        write_trajectories(root / "data" / split / f"{number}.hdf5", trajectories)
    return root


def normalised(source: RegimeSource) -> tuple[FieldNormalizer, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normaliser, all normalised training frames of the tracer, what is stored, and where it exists, ``[N, *grid]``."""
    normalizer = fit_normalizer([source])
    windows = {n: WindowDataset(source, "train", history=1, horizon=0, normalizer=n) for n in (normalizer, None)}
    scaled, stored = ([w[i] for i in range(len(w))] for w in windows.values())
    tracer, raw = (torch.stack([item["fields"][0, 3] for item in items]) for items in (scaled, stored))
    back = torch.stack([normalizer.denormalize(i["fields"], "r", i["static"])[0, 3] for i in scaled])
    exists = torch.stack([item["static"][0] == 0 for item in scaled])
    assert bool((back[~exists] == OUTSIDE).all()) and bool((tracer[~exists] == 0).all())
    tensor = stored[0]["fields"].clone()
    assert torch.equal(normalizer.normalize(tensor, "r", stored[0]["static"]), scaled[0]["fields"])
    return normalizer, tracer[exists], raw[exists], back[exists]


@pytest.mark.parametrize("mapping", [{}, {"solid": None}])
@pytest.mark.parametrize(
    ("offset", "spread", "outside"),
    [(300.0, 5.0, 0.0), (300.0, 5.0, 1e6), (101325.0, 50.0, 0.0), (1e30, 1e28, -1e30), (-1e-30, 1e-30, 1.0), (0, 1e30, 0)],
)
def test_existing_cells_get_unit_variance_and_come_back(
    tmp_path: Path, make_trajectories: Make, offset: float, spread: float, outside: float, mapping: dict[str, None]
) -> None:
    if mapping:
        outside = 0.0  # Without the mask all cells count.
    root = write(tmp_path, make_trajectories, lambda z: offset + spread * z, outside)
    if mapping:  # No solids: every cell exists.
        root = write(tmp_path / "b", lambda seed: without_solid(make_trajectories(seed=seed)), lambda z: offset + spread * z)
    _, tracer, stored, back = normalised(RegimeSource("r", root, FIELDS, mapping=mapping))
    assert abs(float(tracer.double().mean())) < 1e-3 and float(tracer.double().std()) == pytest.approx(1, abs=1e-3)
    error = (back.double() - stored.double()).abs().max()
    assert float(error) <= 2 * EPS * float(stored.double().abs().max())


def test_what_files_hold_where_a_field_does_not_exist_changes_nothing(tmp_path: Path, make_trajectories: Make) -> None:
    items = []
    for outside in (0.0, -1e30):
        source = RegimeSource("r", write(tmp_path / str(outside), make_trajectories, lambda z: 300 + z, outside), FIELDS)
        data = WindowDataset(source, "test", history=2, horizon=1, normalizer=fit_normalizer([source]))
        items.append(torch.stack([data[i]["fields"] for i in range(len(data))]))
    assert torch.equal(*items)


def without_solid(trajectories: Trajectories) -> Trajectories:
    trajectories.values["solid"][...] = False
    return trajectories


@pytest.mark.parametrize("value", [0.0, 7.3, 1e8, -101325.0, 1e30, 1e-30])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_constant_is_zero_in_training_and_its_value_on_the_way_back(
    tmp_path: Path, make_trajectories: Make, value: float, noise: float
) -> None:
    root = write(tmp_path, make_trajectories, lambda z: value * (1 + noise * EPS * np.sign(z)))
    normalizer, tracer, stored, back = normalised(RegimeSource("r", root, FIELDS))
    assert not tracer.any() and normalizer.constants["r"]["tracer"][1] == 0
    assert float((back - stored).abs().max()) <= EPS * abs(value)
    wild = torch.full((1, 4, 2, 2, 2), 1e3)
    mean = normalizer.denormalize(wild, "r", torch.zeros(1, 1, 2, 2, 2))[0, 3]
    assert bool((mean == np.float32(normalizer.constants["r"]["tracer"][0])).all())
    if not noise:
        assert bool((mean == np.float32(value)).all())


def test_a_field_that_is_constant_in_training_alone_is_refused(tmp_path: Path, make_trajectories: Make) -> None:
    root = write(tmp_path, make_trajectories, lambda z: 300 + 0 * z, outside=300.0)
    with h5py.File(root / "data" / "test" / "3.hdf5", "a") as file:
        file["t0_fields/tracer"][0, 0, 0, 0, 0] = 310
    source = RegimeSource("r", root, (VELOCITY, Field("tracer"), SOLID))
    data = WindowDataset(source, "test", history=1, horizon=0, normalizer=fit_normalizer([source]))
    with pytest.raises(DataError, match="'tracer' is 300 in all training data"):
        data[0]


def test_statistics_of_existing_cells_are_kept_in_the_file_and_recomputed_for_an_older_one(
    tmp_path: Path, make_trajectories: Make, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path, make_trajectories, lambda z: 300 + 5 * z, outside=-1e9)
    source = RegimeSource("r", root, FIELDS)
    computed = source.statistics()
    assert computed["mean"]["tracer"] == pytest.approx(300, abs=1)
    whole = compute_statistics(sorted((root / "data" / "train").iterdir()))
    assert whole["mean"]["tracer"] < -1e8  # as The Well means it
    write_stats(root / "stats.yaml", whole)
    caplog.clear()
    assert source.statistics() == computed and not caplog.text
    write_stats(root / "stats.yaml", {key: value for key, value in whole.items() if key != "where_not"})
    assert source.statistics() == computed and "where ['tracer'] exist" in caplog.text


@pytest.mark.parametrize("where", ["3", "{solid: 3}", "{solid: {mean: {tracer: 1}}}", "{solid: {mean: {a: .nan}, std: {}}}"])
def test_malformed_statistics_of_existing_cells_are_refused(tmp_path: Path, where: str) -> None:
    from shodh.data import read_stats

    (tmp_path / "stats.yaml").write_text(f"mean: {{}}\nstd: {{}}\nwhere_not: {where}\n")
    with pytest.raises(DataError, match="where_not"):
        read_stats(tmp_path / "stats.yaml")


def test_constants_of_a_former_version_keep_their_meaning() -> None:
    former = {
        "ndim": 3,
        "fields": [{"name": "velocity", "kind": "vector"}, {"name": "tracer", "kind": "scalar"}],
        "regimes": {"r": {"velocity": {"mean": 0.0, "scale": 2.0}, "tracer": {"mean": 0.0, "scale": 60.0}}},
    }
    read = FieldNormalizer.from_dict(former)
    values, solid = torch.randn(2, 4, 3, 3, 3) + 300, torch.zeros(2, 1, 3, 3, 3)
    solid[:, 0, 0] = 1
    values[:, 3, 0] = 0  # as it was stored
    expected = torch.cat((values[:, :3] / 2, values[:, 3:] / 60), 1)
    assert torch.equal(read.normalize(values, "r"), expected)
    again = FieldNormalizer(FIELDS, 3, read.constants)  # what a run makes of a former tokenizer's
    assert torch.equal(again.normalize(values, "r", solid), expected)
    torch.testing.assert_close(again.denormalize(expected, "r", solid), values)
    assert FieldNormalizer.from_dict(yaml.safe_load(yaml.safe_dump(again.to_dict()))).masked == [(3, 0)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 255], "divide it by 255"),
        ([0, -1], "divide it by -1"),
        ([0, 0.25, 1], "0, 0.25, 1"),
        ([0, 0.37], "correct it"),
        ([1, 2], "1, 2"),
        ([1, 1], "every cell"),
        ([0, 1], None),
        ([0, 0], None),
    ],
)
def test_masks_are_zero_or_one(values: list[float], words: str | None) -> None:
    problem = mask_problem(np.array(values, dtype=np.float32))
    assert problem is None if words is None else problem is not None and words in problem


def test_a_mask_in_any_trajectory_is_checked_when_it_is_read(tmp_path: Path, make_trajectories: Make) -> None:
    root = write(tmp_path, make_trajectories, lambda z: 5 + z)
    with h5py.File(root / "data" / "valid" / "2.hdf5", "a") as file:
        file["t0_fields/solid"][2, 0, 0, 0] = 255
    source = RegimeSource("r", root, FIELDS)
    check_masks(source)
    out = np.empty((1, 5, 6, 7), dtype=np.float32)
    source.read_static("valid", 1, out)
    with pytest.raises(DataError, match="2.hdf5.*trajectory 2.*'solid'.* 0, 1, 255"):
        source.read_static("valid", 2, out)


def test_an_inverted_mask_is_refused(tmp_path: Path, make_trajectories: Make) -> None:
    root = write(tmp_path, make_trajectories, lambda z: 5 + z)
    check_masks(RegimeSource("r", root, FIELDS))
    for path in (root / "data").glob("*/*.hdf5"):
        with h5py.File(path, "a") as file:
            file["t0_fields/solid"][...] = 1 - file["t0_fields/solid"][...]
    with pytest.raises(DataError, match="0.hdf5: mask 'solid' looks inverted"):
        check_masks(RegimeSource("r", root, FIELDS))


def test_what_looks_inverted() -> None:
    solid = np.zeros((4, 4), dtype=np.float32)
    solid[:2] = 1
    moves = np.ones((2, 4, 4)) * (solid == 0)
    assert not looks_inverted(solid, Field("u", "vector"), moves)
    assert looks_inverted(1 - solid, Field("u", "vector"), moves)
    assert not looks_inverted(solid, Field("u", "vector"), 0 * moves)  # at rest
    assert looks_inverted(1 - solid, TRACER, moves[:1]) and not looks_inverted(solid, TRACER, moves[:1])
    assert not looks_inverted(1 - solid, Field("tracer"), moves[:1])


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda m: 255 * m, "divide it by 255"), (lambda m: 1 - m, "looks inverted"), (lambda m: m, None)],
)
def test_inspection_says_what_is_wrong_with_a_mask(
    tmp_path: Path, make_trajectories: Make, change: Callable[[np.ndarray], np.ndarray], words: str | None
) -> None:
    path = write(tmp_path, make_trajectories, lambda z: 5 + z) / "data" / "train" / "0.hdf5"
    with h5py.File(path, "a") as file:
        file["t0_fields/solid"][...] = change(file["t0_fields/solid"][...].astype(np.float32))
    problems = [p for p in inspect_file(path).problems if "'solid'" in p]
    assert (len(problems), words is not None and words in problems[0]) == ((0, False) if words is None else (1, True))
