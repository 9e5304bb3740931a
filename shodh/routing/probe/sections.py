"""All sections of a probe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from shodh.core.errors import ConfigError
from shodh.core.precision import ieee_float32
from shodh.data import Split
from shodh.evaluate.evaluation import Evaluator
from shodh.report.page import Section
from shodh.routing.probe.causality import measure_effects
from shodh.routing.probe.causality_section import causality_section
from shodh.routing.probe.expert_sections import match_section, similarity_section
from shodh.routing.probe.fingerprint_section import fingerprint_section
from shodh.routing.probe.interventions import sparse_layers
from shodh.routing.probe.local_section import local_section
from shodh.routing.probe.map_section import map_section
from shodh.routing.probe.record import Recording, record
from shodh.routing.probe.windows import ProbeRegime, held_out_splits, left_out_regimes, trained_regimes

#: What a probe makes of one run; with another run, experts are matched too.
SECTIONS = ("causality", "local", "maps", "fingerprint", "similarity")


@ieee_float32()
def probe_model(
    evaluator: Evaluator,
    other: Evaluator | None = None,
    *,
    split: Split = "test",
    left_out: Mapping[str, Path] | None = None,
    maps: Mapping[str, Mapping[str, str]] | None = None,
    limit: int = 24,
    seeds: int = 3,
    chosen: Collection[str] = SECTIONS,
) -> list[Section]:
    """Probe an opened run; a dense model gives one section that says what is left out.

    Parameters
    ----------
    other : Evaluator, optional
        Another run on the same regimes, to match experts with.
    split : {"test", "valid"}
        What is probed. Fingerprints are fitted on another held-out split.
    left_out : mapping, optional
        ``{name: folder}`` of regimes that the run was not trained on; normalised with their own statistics.
    maps : mapping, optional
        ``{name: {our field: field of the files}}`` of left-out regimes.
    limit : int
        Windows a regime; time is proportional to it.
    seeds : int
        Draws of each random intervention.
    chosen : collection of str
        Of `SECTIONS`. Causality takes most of the time, which grows with regimes, layers and experts.

    Raises
    ------
    ConfigError
        The other run cannot be matched, or a left-out regime was trained on.
    DataError
        Data of a regime are missing, or held out in one split only.
    """
    if not sparse_layers(evaluator.operator):
        return [_nothing_to_probe(evaluator.folder.path.name)]
    known, unseen = trained_regimes(evaluator), left_out_regimes(evaluator, left_out or {}, maps)
    splits = [held_out_splits(regime, split) for regime in (*known, *unseen)]
    if other is not None:
        _check_other(evaluator, other)
    grid = evaluator.operator.token_grid
    recordings = [record(evaluator, regime, split, limit) for regime in known]
    makers: dict[str, Callable[[], Section]] = {
        "causality": lambda: causality_section(
            measure_effects(evaluator, recordings, split, limit, seeds=seeds), recordings
        ),
        "local": lambda: local_section(recordings, grid),
        "maps": lambda: map_section(recordings, grid),
        "fingerprint": lambda: _fingerprints(evaluator, recordings, [*known, *unseen], splits, limit),
        "similarity": lambda: similarity_section(evaluator.operator, recordings),
    }
    sections = [make() for name, make in makers.items() if name in chosen]
    if other is not None:
        others = [record(other, regime, split, limit) for regime in _in_order_of(known, trained_regimes(other))]
        sections.append(match_section(evaluator.operator, recordings, other.operator, others, other.folder.path.name))
    return sections


def _nothing_to_probe(name: str) -> Section:
    text = (
        f"{name} has a dense feed-forward in every layer: there are no routed experts to knock out, compare, match "
        "or map, and no routing to read a regime from. All sections on experts are left out."
    )
    return Section("probe", "Probe of the experts", text, {"sparse_layers": 0})


def _fingerprints(
    evaluator: Evaluator,
    recordings: Sequence[Recording],
    regimes: Sequence[ProbeRegime],
    splits: Sequence[tuple[Split, Split]],
    limit: int,
) -> Section:
    """The section; ``recordings`` are those of the first, trained regimes on their test split."""
    fit = [record(evaluator, r, s[0], limit, details=False) for r, s in zip(regimes, splits, strict=True)]
    rest = list(zip(regimes, splits, strict=True))[len(recordings) :]
    unseen = [record(evaluator, regime, s[1], limit, details=False) for regime, s in rest]
    return fingerprint_section(fit, [*recordings, *unseen])


def _check_other(evaluator: Evaluator, other: Evaluator) -> None:
    """The other run must see the same windows as ours, in tokens of the same size."""
    path = other.folder.path
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


def _data(evaluator: Evaluator) -> dict[str, str]:
    return {regime.name: str(regime.path) for regime in sorted(evaluator.config.data.regimes, key=lambda r: r.name)}


def _in_order_of(known: Sequence[ProbeRegime], regimes: Sequence[ProbeRegime]) -> list[ProbeRegime]:
    by_name = {regime.name: regime for regime in regimes}
    return [by_name[regime.name] for regime in known]
