"""The numbers of one regime for ``metrics.json``: means over trajectories, with intervals, as nested plain values."""

from __future__ import annotations

from typing import Any

import pandas as pd

from shodh.evaluate.rows import NAMES, over_trajectories
from shodh.evaluate.spectra import octaves
from shodh.schema.measures import MEASURES

#: One-step values by measure: ``{measure: {field: {of: value}}}``, without the level of a field where it is empty.
ONE_STEP = (*MEASURES, "vrmse_component", "latent_mse", "decoded_mse", "speed_in_solid", "valid_time", "censored")
#: By step: ``{name: {field: {of: [value of each step]}}}``.
BY_STEP = {
    "rollout": "vrmse",
    "rollout_l2re": "l2re",
    "rollout_nrmse": "nrmse",
    "drift_mean": "drift_mean",
    "drift_square": "drift_square",
}


def summarise(means: pd.DataFrame, steps: int) -> dict[str, Any]:
    """Nested values of one regime.

    Parameters
    ----------
    means : DataFrame
        `by_trajectory` of one regime.
    steps : int
        Of the rollouts; 0: none were asked for.

    Returns
    -------
    dict
        ``trajectories``, `ONE_STEP`, `BY_STEP`; ``spectra`` by shell and ``bands`` by octave, ``{step: {measure:
        {field: {of: [...]}}}}``; ``intervals``: ends in the place of the values of the others, but spectra.
    """
    pooled = means.groupby([c for c in means.columns if c not in ("horizon", "value", "windows")], sort=False)
    # One step: of all windows, also those of trajectories that are too short for a rollout.
    first = over_trajectories(pooled["value"].mean().reset_index().query("step == 1 and shell < 0").assign(horizon=1))
    rolled = means[means["horizon"] == max(steps, 1)]
    tree: dict[str, Any] = {"trajectories": int(means["trajectory"].nunique())}
    ends: dict[str, Any] = {}
    for measure in ONE_STEP:
        for (_, _, name, of, *_), row in first[first.index.get_level_values("measure") == measure].iterrows():
            _put(tree, (measure, name, of), float(row["mean"]))
            _put(ends, (measure, name, of), [float(row["low"]), float(row["high"])])
    if "speed_in_solid" in tree:
        tree["speed_in_solid"] = {name: of["model"] for name, of in tree["speed_in_solid"].items()}
    if steps:
        found = over_trajectories(rolled[rolled["shell"] < 0])
        for name, measure in BY_STEP.items():
            chosen = found[found.index.get_level_values("measure") == measure]
            for (field, of), rows in chosen.groupby(level=["field", "of"], sort=False):
                # The tokenizer alone is measured at the first and the last step: NaN between.
                ordered = rows.droplevel(["horizon", *(k for k in NAMES if k != "step")]).reindex(range(1, steps + 1))
                _put(tree, (name, field, of), ordered["mean"].tolist())
                _put(ends, (name, field, of), ordered[["low", "high"]].to_numpy().tolist())
    spectra = over_trajectories(rolled[rolled["shell"] >= 0], intervals=False)
    for (step, measure, field, of), rows in spectra.groupby(level=["step", "measure", "field", "of"], sort=False):
        shells = rows.sort_index(level="shell")["mean"].tolist()
        _put(tree, ("spectra", str(step), measure, field, of), shells)
        bands = {label: sum(shells[part]) for label, part in octaves(len(shells))}
        _put(tree, ("bands", str(step), measure, field, of), bands)
    return {**tree, "intervals": ends}


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value of a nested mapping; empty names are no level."""
    *parents, last = (name for name in path if name)
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value
