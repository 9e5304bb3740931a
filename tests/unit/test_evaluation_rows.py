"""From windows to rows, valid times, means over trajectories and their intervals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from shodh.evaluate.regime_evaluation import RegimeEvaluation
from shodh.evaluate.rows import Key, Place, Rows, by_trajectory, over_trajectories, valid_times
from shodh.evaluate.spectra import Shells
from shodh.evaluate.summary import summarise
from shodh.evaluate.windows import Schedule, starts_of
from shodh.generation.plan import split_sizes


def rows_of(values: dict[tuple[int, int], list[float]], of: str = "model") -> pd.DataFrame:
    """VRMSE by (trajectory, start), step by step."""
    rows = Rows("a")
    for place, errors in values.items():
        for step, error in enumerate(errors, 1):
            rows.add([Place(*place)], len(errors), step, {Key("vrmse", "u", of): torch.tensor([error])})
    return rows.frame()


def test_valid_time_is_the_first_step_above_one_half_and_censored_at_the_horizon() -> None:
    nan, inf = float("nan"), float("inf")
    errors = {
        (0, 0): [0.1, 0.6, 0.2],  # falls again: 2
        (0, 3): [0.5, 0.5, 0.5],  # never above: censored, 4
        (1, 0): [0.7, 0.8, 0.9],  # 1
        (2, 0): [nan, 0.4, inf],  # undefined, then diverged: 3
        (3, 0): [nan, nan, nan],  # undefined: no value
    }
    found = valid_times(rows_of(errors)).set_index(["measure", "trajectory", "start"])["value"]
    assert found["valid_time"].to_dict() == {(0, 0): 2, (0, 3): 4, (1, 0): 1, (2, 0): 3}
    assert found["censored"].to_dict() == {(0, 0): 0, (0, 3): 1, (1, 0): 0, (2, 0): 0}


def test_every_trajectory_counts_alike_and_undefined_values_do_not() -> None:
    frame = rows_of({(0, 0): [1.0], (0, 1): [2.0], (0, 2): [3.0], (1, 0): [6.0], (2, 0): [float("nan")]})
    means = by_trajectory(frame.sample(frac=1, random_state=0))
    assert means["value"].tolist()[:2] == [2.0, 6.0] and means["windows"].tolist() == [3, 1, 1]
    (total,) = over_trajectories(means).to_dict("records")
    assert total["mean"] == 4.0 and total["trajectories"] == 2 and 2 <= total["low"] < total["high"] <= 6
    diverged = over_trajectories(by_trajectory(rows_of({(0, 0): [1.0], (1, 0): [float("inf")]})))
    assert diverged["mean"].item() == np.inf and diverged["high"].item() == np.inf


def test_starts_are_spread_evenly_from_first_to_last() -> None:
    assert starts_of(16, 6, 1, 4) == [0, 3, 7, 10]
    assert starts_of(16, 6, 1, 0) == list(range(11)) == starts_of(16, 6, 1, 99)
    assert starts_of(16, 6, 3, 4) == [0] and starts_of(16, 6, 4, 4) == []
    assert starts_of(16, 6, 1, 1) == [0]


def schedule(frames: list[int], **evaluation: int) -> Schedule:
    data = SimpleNamespace(history=2, stride=1)
    settings = SimpleNamespace(**{"rollout": 4, "starts": 2, **evaluation})
    return Schedule.of(SimpleNamespace(data=data, evaluation=settings), frames)  # type: ignore[arg-type]


def test_short_trajectories_give_single_steps_and_long_ones_rollouts() -> None:
    found = schedule([10, 4, 2])
    assert found.steps == 4 and found.places == {4: [(0, 0), (0, 4)], 1: [(1, 0), (1, 1)]} and found.count == 4
    assert schedule([5, 4]).steps == 3, "as far as the longest goes"
    assert schedule([10], rollout=0).places == {1: [(0, 0), (0, 7)]}


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_share_the_windows(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = schedule([10] * 5, starts=0)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen: list[Any] = []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank in range(world):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(rank))
        seen += [place for _, part in whole.batches(3) for place in part]
    assert sorted(seen) == sorted(whole.places[4])


class Two(RegimeEvaluation):
    """Two scalars, the first masked by static channel 0, the second constant."""

    divergence = None

    def __init__(self) -> None:
        self.slices, self.masks = {"heat": slice(0, 1), "level": slice(1, 2)}, {"heat": 0}
        self.constants = {"heat": (300.0, 5.0), "level": (7.0, 0.0)}
        self.shells = Shells((4, 5, 6), ("periodic",) * 3, (1.0, 1.0, 1.0))


def test_garbage_in_solids_changes_no_number_and_a_constant_has_no_error() -> None:
    draw = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, 2, 4, 5, 6, generator=draw)
    exists = torch.rand(3, 1, 4, 5, 6, generator=draw) < 0.6
    v[:, 1] = 0  # a constant, normalised
    part, found = Two(), []
    for junk in (0.0, 1e6):
        spoiled = u.clone()
        spoiled[:, :1] += torch.where(exists, 0.0, junk)
        compared, static = {"model": spoiled}, 1 - exists.float()
        found.append(
            part._errors(compared, v, static)
            | part._drifts(compared, v, v, static)
            | part._spectra(compared, v, static)
        )
    assert all(torch.equal(value.nan_to_num(-1), found[1][key].nan_to_num(-1)) for key, value in found[0].items())
    expected = [float((u - v)[b, :1][exists[b]].square().mean()) / 2 for b in range(3)]
    assert found[0][Key("decoded_mse", "", "model")].tolist() == pytest.approx(expected, rel=1e-5)
    assert [found[0][Key(m, "level", "model")].tolist() for m in ("l2re", "nrmse")] == [[0, 0, 0]] * 2
    assert found[0][Key("vrmse", "level", "model")].isnan().all()
    rows = Rows("a")
    rows.add([Place(b, 0) for b in range(3)], 1, 1, {k: v for k, v in found[0].items() if v.ndim == 1})
    assert set(summarise(by_trajectory(rows.frame()), 0)["vrmse"]) == {"heat"}, "undefined everywhere: left out"


@pytest.mark.parametrize(
    ("trajectories", "split", "expected"),
    [
        (3, None, (1, 1, 1)),
        (5, None, (3, 1, 1)),
        (24, None, (13, 3, 8)),
        (100, None, (76, 12, 12)),
        (22, (12, 2, 8), (12, 2, 8)),
        (16, (0.75, 0.125, 0.125), (12, 2, 2)),
    ],
)
def test_test_splits_are_large_enough_for_intervals(trajectories: int, split: Any, expected: tuple[int, ...]) -> None:
    assert tuple(split_sizes(trajectories, split).values()) == expected
