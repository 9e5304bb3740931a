"""What files say of conditions reaches each window: parameters by trajectory, the time step by stride."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from shodh.core.errors import DataError
from shodh.data import MixtureLoader, MixtureSampler, RegimeSource, WindowDataset
from shodh.data.conditions import condition_table, fit_conditions, trajectory_values
from shodh.data.formats import FileHints
from shodh.data.windows import JoinedWindows
from shodh.schema.fields import Field

NAMES = ("time_step", "porosity")


def stored(folder: Path, split: str) -> np.ndarray:
    """The porosities that the files hold, in the order of the trajectories."""
    parts = []
    for path in sorted((folder / "data" / split).glob("*.hdf5")):
        with h5py.File(path) as file:
            parts.append(file["scalars/porosity"][()])
    return np.concatenate(parts)


def test_tables_hold_each_trajectory_in_training_units(make_folder: Callable[..., Path], fields: tuple[Field, ...]) -> None:
    folder = make_folder()
    source = RegimeSource("open_channel", folder, fields)
    step, porosity = fitted = fit_conditions([source], NAMES, (1, 2))
    train = stored(folder, "train")
    assert step.range_of("open_channel") == (0.25, 0.5) and porosity.mean == pytest.approx(train.mean())
    for split, stride in (("train", 1), ("train", 2), ("test", 1)):
        table = condition_table(source, split, fitted, stride)  # type: ignore[arg-type]
        assert table is not None and table.dtype == torch.float32
        back = table.double().numpy() * [c.scale for c in fitted] + [c.mean for c in fitted]
        np.testing.assert_allclose(back[:, 0], 0.25 * stride, rtol=1e-6)
        np.testing.assert_allclose(back[:, 1], stored(folder, split), rtol=1e-5)
    assert condition_table(source, "train", ()) is None
    some = RegimeSource("open_channel", folder, fields, trajectories=[1, 4])
    np.testing.assert_allclose(trajectory_values(some, "train", "porosity"), train[[1, 4]])  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_several_strides_carry_the_conditions_of_their_samples(
    make_folder: Callable[..., Path], fields: tuple[Field, ...], workers: int
) -> None:
    source = RegimeSource("open_channel", make_folder(), fields)
    fitted = fit_conditions([source], NAMES, (1, 2))
    tables = {stride: condition_table(source, "train", fitted, stride) for stride in (1, 2)}
    parts = [
        WindowDataset(source, "train", history=1, horizon=1, stride=s, conditions=table) for s, table in tables.items()
    ]
    joined = JoinedWindows(parts)
    assert len(joined) == 5 * 4 + 5 * 3
    rows = [joined[n] for n in range(len(joined))]
    plain = [*(parts[0][n] for n in range(20)), *(parts[1][n] for n in range(15))]
    assert all(torch.equal(a["fields"], b["fields"]) and a["frame"] == b["frame"] for a, b in zip(rows, plain))
    loader = MixtureLoader([joined], MixtureSampler(0, [len(joined)], [1.0], 35), num_workers=workers)
    (batch,) = loader.iterate(0, 1)
    loader.close()
    seen = set()
    for values, trajectory, frame, pair in zip(
        batch["conditions"], batch["trajectory"].tolist(), batch["frame"].tolist(), batch["fields"], strict=True
    ):
        stride = next(s for s, table in tables.items() if torch.equal(table[trajectory], values))  # type: ignore[index]
        expected = torch.empty(2, *pair.shape[1:])
        source.read("train", trajectory, range(frame, frame + stride + 1, stride), expected.numpy())
        assert torch.equal(pair, expected)
        seen.add((stride, trajectory, frame))
    assert len(seen) == 35


def test_absence_and_other_names_are_said_by_regime(
    make_folder: Callable[..., Path], fields: tuple[Field, ...], foreign_folder: Path
) -> None:
    folder = make_folder()
    own = RegimeSource("own", folder, fields, parameters={"phi": "porosity", "re": 90.0, "re_tau": None})
    assert trajectory_values(own, "train", "phi").tolist() == stored(folder, "train").tolist()  # type: ignore[union-attr]
    assert trajectory_values(own, "test", "re").tolist() == [90.0]  # type: ignore[union-attr]
    assert trajectory_values(own, "train", "re_tau") is None
    (phi,) = fit_conditions([own, RegimeSource("other", folder, fields)], ("phi",))
    assert [regime for regime, *_ in phi.ranges] == ["own"]
    table = condition_table(RegimeSource("other", folder, fields), "train", (phi,))
    assert table is not None and bool(table.isnan().all())


@pytest.mark.parametrize(
    ("name", "parameters", "named"),
    [
        ("viscosity", {}, "no regime has a parameter 'viscosity': a has porosity, re_tau, residual"),
        ("phi", {"phi": "pores"}, r"no parameter 'pores'; there are .*porosity"),
        ("porosity", {"porosity": None}, "no regime has"),
    ],
)
def test_data_without_a_parameter_are_refused_with_what_they_have(
    make_folder: Callable[..., Path], fields: tuple[Field, ...], name: str, parameters: dict[str, Any], named: str
) -> None:
    source = RegimeSource("a", make_folder(), fields, parameters=parameters)
    with pytest.raises(DataError, match=named):
        fit_conditions([source], (name,))


def test_a_parameter_that_is_not_finite_is_refused(make_folder: Callable[..., Path], fields: tuple[Field, ...]) -> None:
    folder = make_folder()
    path = sorted((folder / "data" / "train").glob("*.hdf5"))[1]
    with h5py.File(path, "r+") as file:
        file["scalars/porosity"][1] = np.nan
    with pytest.raises(DataError, match=f"{path.name}.*'porosity' is not finite"):
        fit_conditions([RegimeSource("a", folder, fields)], ("porosity",))


def test_frames_that_are_only_counted_have_no_time_step(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "dye.h5", "w") as file:
        file["dye"] = np.random.default_rng(0).random((5, 6, 8, 8), dtype=np.float32)
    opened = [
        RegimeSource("a", tmp_path / "dye.h5", [Field("dye")], format="arrays", hints=FileHints(time_step=dt, axes="ntxy"))
        for dt in (None, 0.5)
    ]
    with pytest.raises(DataError, match="no times"):
        fit_conditions(opened[:1], ("time_step",))
    (step,) = fit_conditions(opened[1:], ("time_step",), (1, 3))
    assert step.range_of("a") == (0.5, 1.5)
