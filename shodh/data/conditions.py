"""What the files of a regime say of the conditions that a model is told: a value of each trajectory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import DataError
from shodh.data.source import RegimeSource, Split
from shodh.schema.conditions import TIME_STEP, Condition

log = logging.getLogger("shodh")


def trajectory_values(source: RegimeSource, split: Split, name: str) -> np.ndarray | None:
    """A condition of each trajectory of a split in physical units, float64; None where the regime has no such thing.

    The time step is that from frame to frame.

    Raises
    ------
    DataError
        A value is not finite, or the files lack a parameter that `RegimeSource.parameters` names.
    """
    count = source.num_trajectories(split)
    stored = source.parameters.get(name, name)
    if stored is None:
        return None
    if not isinstance(stored, str):
        return np.full(count, float(stored))
    if name == TIME_STEP and stored == name:
        step = source.known_time_step
        return None if step is None else np.full(count, step)
    values = []
    for file in source.files[split]:
        if stored not in file.parameters:
            if name in source.parameters:
                raise DataError(f"{file.path}: no parameter {stored!r}; there are {sorted(file.parameters)}")
            return None
        values.append(np.broadcast_to(np.asarray(file.parameters[stored], np.float64), file.num_trajectories))
        if not np.isfinite(values[-1]).all():
            raise DataError(f"{file.path}: the parameter {stored!r} is not finite in every trajectory")
    return np.concatenate(values) if values else np.empty(0)


def fit_conditions(
    sources: Sequence[RegimeSource],
    names: Sequence[str],
    strides: Sequence[int] = (1,),
    known: Sequence[Condition] = (),
) -> tuple[Condition, ...]:
    """Conditions by name with the constants of the training data, whose windows have these strides.

    Parameters
    ----------
    known : sequence of Condition, optional
        Those of weights that are learned on: where they have the names, they keep their constants.

    Raises
    ------
    DataError
        No regime has a condition of a name that is not known; says what the files have.
    """
    kept = {c.name: c for c in known} if tuple(c.name for c in known) == tuple(names) else {}
    fitted = []
    for name in names:
        found = {source.name: trajectory_values(source, "train", name) for source in sources}
        there = {regime: values for regime, values in found.items() if values is not None}
        if not there and name not in kept:
            raise DataError(_nowhere(sources, name))
        if name == TIME_STEP:
            there = {regime: np.outer(strides, values) for regime, values in there.items()}
        for source in (s for s in sources if s.name not in there):
            log.info("regime %s: %s is absent; its parameters are %s", source.name, name, _parameters(source))
        condition = kept[name].over(there) if name in kept else Condition.fit(name, there)
        if name not in kept and len({end for _, *ends in condition.ranges for end in ends}) == 1:
            log.warning("%s is %g in all training data: nothing is learned of it", name, condition.ranges[0][1])
        fitted.append(condition)
    return tuple(fitted)


def condition_table(
    source: RegimeSource, split: Split, conditions: Sequence[Condition], stride: int = 1
) -> Tensor | None:
    """What a model is told of each trajectory at a stride, ``[trajectories, N]`` in model units, NaN where a condition
    is absent; None without conditions.
    """
    if not conditions:
        return None
    columns = []
    for condition in conditions:
        values = trajectory_values(source, split, condition.name)
        if values is None:
            values = np.full(source.num_trajectories(split), np.nan)
        factor = stride if condition.name == TIME_STEP else 1
        columns.append(condition.to_model(factor * values, f"regime {source.name!r}, split {split!r}"))
    return torch.from_numpy(np.stack(columns, 1))


def _nowhere(sources: Sequence[RegimeSource], name: str) -> str:
    if name == TIME_STEP:
        return (
            f"operator.conditions: the files of {', '.join(s.name for s in sources)} have no times, or unequal ones; "
            "say data.regimes[..].time_step, or leave out time_step"
        )
    have = "; ".join(f"{s.name} has {_parameters(s)}" for s in sources)
    return (
        f"operator.conditions: no regime has a parameter {name!r}: {have}; use one of these, map it with "
        "data.regimes[..].parameters, or leave it out"
    )


def _parameters(source: RegimeSource) -> str:
    return ", ".join(sorted(source.files["train"][0].parameters)) or "none"
