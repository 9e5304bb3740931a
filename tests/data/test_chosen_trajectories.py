"""Learning from some training trajectories: their windows, their statistics, and nothing of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shodh.data.normalize import fit_normalizer
from shodh.data import RegimeSource, WindowDataset, write_trajectories
from shodh.data.latents import data_identity
from shodh.core.errors import DataError
from shodh.schema.fields import Field, RegimeSchema, Trajectories

FIELDS = (Field("heat"),)
LEVELS = {"train": (10.0, 20.0, 30.0, 40.0, 50.0), "valid": (1e3,), "test": (1e4, 2e4)}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Trajectories about a level of their own, the training ones in two files of 2 and 3."""
    schema = RegimeSchema("warm", FIELDS, ("periodic", "periodic"))
    draw = np.random.default_rng(0)
    for split, levels in LEVELS.items():
        for first, chosen in ((0, levels[:2]), (2, levels[2:])):
            if chosen:
                values = np.asarray(chosen)[:, None, None, None] + draw.standard_normal((len(chosen), 4, 8, 8))
                path = tmp_path / "warm" / "data" / split / f"part{first}.hdf5"
                trajectories = Trajectories(schema, (1.0, 1.0), np.arange(4.0), {"heat": values.astype("f4")})
                write_trajectories(path, trajectories)
    return tmp_path / "warm"


def opened(path: Path, chosen: tuple[int, ...] | None) -> RegimeSource:
    return RegimeSource("warm", path, FIELDS, trajectories=chosen)


@pytest.mark.parametrize("chosen", [(1,), (4, 0), (2, 3, 4)])
def test_windows_and_statistics_are_of_the_chosen_trajectories_alone(stored: Path, chosen: tuple[int, ...]) -> None:
    source = opened(stored, chosen)
    data = WindowDataset(source, "train", history=2, horizon=1)
    levels = {round(float(data[i]["fields"].mean()), -1) for i in range(len(data))}
    assert levels == {LEVELS["train"][n] for n in chosen}
    assert source.num_trajectories("test") == 2, "held-out splits stay whole"
    mean, scale = fit_normalizer([source]).constants["warm"]["heat"]
    frames = np.empty((4, 1, 8, 8), dtype=np.float32)
    whole = opened(stored, None)
    expected = []
    for number in chosen:
        whole.read("train", number, range(4), frames)
        expected.append(frames.copy())
    assert mean == pytest.approx(np.mean(expected, dtype=np.float64), rel=1e-6)
    assert scale == pytest.approx(np.std(expected, dtype=np.float64), rel=1e-6)


def test_statistics_beside_the_data_are_not_used_for_some_of_it(stored: Path) -> None:
    (stored / "stats.yaml").write_text("mean: {heat: 7.0}\nstd: {heat: 3.0}\n")
    assert fit_normalizer([opened(stored, None)]).constants["warm"]["heat"] == (7.0, 3.0)
    assert fit_normalizer([opened(stored, (0,))]).constants["warm"]["heat"][0] == pytest.approx(10, abs=1)


def test_latents_of_other_trajectories_are_another_cache(stored: Path) -> None:
    found = {data_identity([opened(stored, chosen)]) for chosen in (None, (0,), (1,), (0, 1))}
    assert len(found) == 4
    assert data_identity([opened(stored, (0, 1))]) == data_identity([opened(stored, (1, 0))])


def test_trajectories_that_are_not_there_are_named(stored: Path) -> None:
    with pytest.raises(DataError, match=r"\[5, 9\].* 5,"):
        opened(stored, (0, 5, 9))


def test_chosen_items_are_those_of_the_whole_split(stored: Path) -> None:
    some, whole = (WindowDataset(opened(stored, c), "train", history=2, horizon=1) for c in ((1, 3), None))
    theirs = {round(float(whole[i]["fields"].sum()), 3): whole[i]["fields"] for i in range(len(whole))}
    for i in range(len(some)):
        fields = some[i]["fields"]
        assert torch.equal(fields, theirs[round(float(fields.sum()), 3)])
