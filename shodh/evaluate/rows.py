"""What windows measured, as one tidy table, and its means over trajectories with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from shodh.report.statistics import mean_intervals

#: Columns that name a value beside its window.
NAMES = ["measure", "field", "of", "shell", "step"]
ORDER = ["regime", "trajectory", "start", "horizon", *NAMES]
VALID = 0.5  # VRMSE up to which a rollout counts as valid


class Key(NamedTuple):
    """What is measured; ``field`` is empty where it is no single one."""

    measure: str
    field: str
    of: str


class Place(NamedTuple):
    """Where a window begins: a trajectory of its split and a frame."""

    trajectory: int
    start: int


class Rows:
    """Values of the windows of one regime, kept on the device until they are asked for: nothing waits for it."""

    def __init__(self, regime: str) -> None:
        self.regime = regime
        self._parts: list[tuple[Sequence[Place], int, int, list[Key], Tensor]] = []

    def add(self, places: Sequence[Place], horizon: int, step: int, values: Mapping[Key, Tensor]) -> None:
        """Values ``[B]``, or ``[B, shells]``, of a batch of windows at one of their ``horizon`` steps."""
        for ndim in (1, 2):
            chosen = {key: v.float() for key, v in values.items() if v.ndim == ndim}
            if chosen:
                self._parts.append((places, horizon, step, list(chosen), torch.stack(list(chosen.values()))))

    def frame(self) -> pd.DataFrame:
        """Columns regime, trajectory, start, horizon, measure, field, of, shell (-1: none), step, value."""
        parts = []
        for places, horizon, step, keys, values in self._parts:
            found = values.cpu().double().numpy().reshape(len(keys), len(places), -1)
            by_key, by_place, shell = (index.ravel() for index in np.indices(found.shape))
            parts.append(
                pd.DataFrame(
                    {
                        "regime": self.regime,
                        "trajectory": np.array([p.trajectory for p in places])[by_place],
                        "start": np.array([p.start for p in places])[by_place],
                        "horizon": horizon,
                        **{name: np.array([getattr(k, name) for k in keys], object)[by_key] for name in Key._fields},
                        "shell": shell if values.ndim == 3 else -1,
                        "step": step,
                        "value": found.ravel(),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*ORDER, "value"])


def valid_times(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``valid_time``: the first step of each rollout with a VRMSE above `VALID`.

    A rollout that stays below it to its end, the horizon H, is *censored*: it counts as H + 1, and its row of
    ``censored`` is 1.
    """
    chosen = frame[(frame["measure"] == "vrmse") & (frame["horizon"] > 1) & (frame["of"] != "tokenizer")]
    if chosen.empty:
        return chosen
    places = ["regime", "trajectory", "start", "horizon", "field", "of"]
    late = chosen[chosen["value"] > VALID].groupby(places)["step"].min()
    known = chosen.groupby(places)["value"].count()
    first = late.reindex(known[known > 0].index).reset_index()
    censored = first["step"].isna()
    value = first.pop("step").fillna(first["horizon"] + 1).astype(float)
    rows = [first.assign(measure=name, value=v) for name, v in (("valid_time", value), ("censored", censored * 1.0))]
    return pd.concat(rows, ignore_index=True).assign(shell=-1, step=1)


def by_trajectory(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the windows of each trajectory, the same whatever ranks and batches measured them.

    Columns as `Rows.frame` with ``windows``, their number, for ``start``. Undefined values (NaN) are left out.
    """
    ordered = frame.sort_values(ORDER, kind="stable")
    keys = [key for key in ORDER if key != "start"]
    found = ordered.groupby(keys, sort=False)["value"].agg(value="mean", windows="size")
    return found.reset_index()


def over_trajectories(means: pd.DataFrame, *, intervals: bool = True) -> pd.DataFrame:
    """Means over the trajectories of one regime, with 95 % intervals: columns mean, low and high, trajectories.

    Indexed by horizon and `NAMES`; every trajectory counts alike.
    """
    wide = means.pivot_table(index="trajectory", columns=["horizon", *NAMES], values="value", dropna=False, sort=False)
    wide = wide.loc[:, wide.notna().any()]
    values = wide.to_numpy(float)
    known = ~np.isnan(values)
    found = {"mean": np.where(known, values, 0.0).sum(0) / known.sum(0), "trajectories": known.sum(0)}
    if intervals:
        found["low"], found["high"] = mean_intervals(values[None])
    return pd.DataFrame(found, index=wide.columns)


def trajectory_errors(means: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """The model's VRMSE of each trajectory of one regime, by measure and field: ``{"vrmse": {field: [N]}}``.

    ``vrmse`` of one step; ``rollout``, where there were any, the mean over their steps.
    """
    chosen = means[(means["measure"] == "vrmse") & (means["of"] == "model") & (means["shell"] < 0)]
    parts = {"vrmse": chosen[chosen["step"] == 1]}
    if (longest := chosen["horizon"].max()) > 1:
        parts["rollout"] = chosen[chosen["horizon"] == longest]
    return {
        measure: {str(field): rows.groupby("trajectory")["value"].mean().tolist() for field, rows in by_field}
        for measure, by_field in ((name, part.groupby("field", sort=False)) for name, part in parts.items())
    }
