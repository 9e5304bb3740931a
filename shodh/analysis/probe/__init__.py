"""Probing a trained operator: what its experts do, where, and whether they matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shodh.analysis.page import Section
from shodh.analysis.probe.causality import measure_effects
from shodh.analysis.probe.causality_section import causality_section
from shodh.analysis.probe.expert_sections import match_section, similarity_section
from shodh.analysis.probe.fingerprint_section import fingerprint_section
from shodh.analysis.probe.interventions import sparse_layers
from shodh.analysis.probe.local_section import local_section
from shodh.analysis.probe.map_section import map_section
from shodh.analysis.probe.record import Recording, record
from shodh.analysis.probe.windows import ProbeRegime, held_out_splits, left_out_regimes, trained_regimes
from shodh.data import Split
from shodh.errors import ConfigError
from shodh.train.evaluation import Evaluator, open_run

__all__ = ["probe_sections"]


def probe_sections(
    run: Path,
    checkpoint: str | None,
    other_run: Path | None,
    device: torch.device,
    *,
    split: Split = "test",
    left_out: Mapping[str, Path] | None = None,
    limit: int = 24,
    seeds: int = 3,
) -> list[Section]:
    """Probe a run's checkpoint with held-out windows; a dense model gives one section that says what is left out.

    Parameters
    ----------
    run : Path
        Run folder.
    checkpoint : str, optional
        Tag; the newest by default.
    other_run : Path, optional
        Another run on the same regimes, whose experts are matched with this one's (its newest checkpoint).
    split : {"test", "valid"}
        What is probed. Fingerprints are fitted on another held-out split.
    left_out : mapping, optional
        ``{name: folder}`` of regimes that the run was not trained on; normalised with their own statistics.
    limit : int
        Windows a regime; time is proportional to it.
    seeds : int
        Draws of each random intervention.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        One line that names what is missing or does not fit.
    """
    evaluator = open_run(run, checkpoint, device)
    if not sparse_layers(evaluator.operator):
        return [_nothing_to_probe(run)]
    known, unseen = trained_regimes(evaluator), left_out_regimes(evaluator, left_out or {})
    other = None if other_run is None else _open_other(evaluator, other_run, device)
    grid = evaluator.operator.token_grid
    recordings = [record(evaluator, regime, split, limit) for regime in known]
    effects = measure_effects(evaluator, recordings, split, limit, seeds=seeds)
    sections = [
        causality_section(effects, recordings),
        local_section(recordings, grid),
        map_section(recordings, grid),
        _fingerprints(evaluator, recordings, known, unseen, split, limit),
        similarity_section(evaluator.operator, recordings),
    ]
    if other is not None:
        others = [record(other, regime, split, limit) for regime in _in_order_of(known, trained_regimes(other))]
        sections.append(match_section(evaluator.operator, recordings, other.operator, others, other.folder.path.name))
    return sections


def _nothing_to_probe(run: Path) -> Section:
    text = (
        f"{run.name} has a dense feed-forward in every layer: there are no routed experts to knock out, compare, match "
        "or map, and no routing to read a regime from. All sections on experts are left out."
    )
    return Section("probe", "Probe of the experts", text, {"sparse_layers": 0})


def _fingerprints(
    evaluator: Evaluator,
    recordings: Sequence[Recording],
    known: Sequence[ProbeRegime],
    unseen: Sequence[ProbeRegime],
    split: Split,
    limit: int,
) -> Section:
    test = list(recordings)
    test += [record(evaluator, regime, split, limit, details=False) for regime in unseen]
    fit = [
        record(evaluator, regime, held_out_splits(regime, split)[0], limit, details=False)
        for regime in (*known, *unseen)
    ]
    return fingerprint_section(fit, test)


def _open_other(evaluator: Evaluator, path: Path, device: torch.device) -> Evaluator:
    """The other run, checked to see the same windows as ours in tokens of the same size."""
    other = open_run(path, None, device)
    if not sparse_layers(other.operator):
        raise ConfigError(f"{path} is a dense run without experts to match; give a run with routed experts")
    for what, ours, theirs in (
        ("regimes", _data(evaluator), _data(other)),
        ("data.history", evaluator.config.data.history, other.config.data.history),
        ("data.stride", evaluator.config.data.stride, other.config.data.stride),
        ("token grid", evaluator.operator.token_grid, other.operator.token_grid),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{path} cannot be matched with {evaluator.folder.path}: its {what} is {theirs}, not {ours}; give a "
                "run on the same data"
            )
    return other


def _data(evaluator: Evaluator) -> dict[str, str]:
    return {regime.name: str(regime.path) for regime in sorted(evaluator.config.data.regimes, key=lambda r: r.name)}


def _in_order_of(known: Sequence[ProbeRegime], regimes: Sequence[ProbeRegime]) -> list[ProbeRegime]:
    by_name = {regime.name: regime for regime in regimes}
    return [by_name[regime.name] for regime in known]
