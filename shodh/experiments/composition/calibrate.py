"""What is chosen once for a seed, on validation trajectories: factors, the map of the parameter, a learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from shodh.checkpoint.pretrained import ShodhModel
from shodh.core.weights import LazyWeights
from shodh.experiments.composition.bench import Bench, Line
from shodh.experiments.composition.members import Case, Family
from shodh.merge import calibrate as calibrate_line
from shodh.merge import dare, difference, from_memory, task_arithmetic, ties, to_memory
from shodh.merge.coordinates import ParameterMap
from shodh.merge.readout import Calibration
from shodh.merge.span import Update

#: Factors of an update that task arithmetic, TIES and DARE may choose; the recommended ones are among them.
SCALINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
#: Learning rates of fine-tuning on the prefix, over that of the experts.
RATES = (0.1, 0.3, 1.0, 3.0)
#: Steps of fine-tuning for which the rate is chosen: as many as `read_gradient` takes by default.
STEPS = 12


class TaskVectors:
    """Updates of the anchor that task arithmetic, TIES and DARE make of both experts, to be scaled."""

    def __init__(self, family: Family, names: Sequence[str], seed: int) -> None:
        anchor, experts = family.anchor, family.experts
        makers: dict[str, Callable[[], LazyWeights]] = {
            "task_arithmetic": lambda: task_arithmetic(anchor, experts, scaling=1.0),
            "ties": lambda: ties(anchor, experts, scaling=1.0),
            "dare": lambda: dare(anchor, experts, scaling=1.0, seed=seed),
        }
        self.anchor = anchor
        self._updates = {n: difference(anchor, from_memory(to_memory(makers[n]()))) for n in names if n in makers}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._updates)

    def at(self, name: str, scaling: float) -> LazyWeights:
        """``anchor + scaling update``."""
        return (Update(((self.anchor, 1.0),)) + scaling * self._updates[name]).weights()


@dataclass(frozen=True)
class Chosen:
    """What validation chose.

    Attributes
    ----------
    line : Calibration
        Factor and map of `shodh.merge.read_coord`.
    scalings : dict
        Method -> factor of its update.
    rate : float, optional
        Learning rate of fine-tuning on the prefix; None where that is not asked for.
    losses : dict
        Mean validation error of every candidate.
    """

    line: Calibration
    scalings: dict[str, float] = field(default_factory=dict)
    rate: float | None = None
    losses: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(
    bench: Bench,
    cases: Sequence[Case],
    vectors: TaskVectors,
    maps: Sequence[ParameterMap],
    expert_rate: float | None,
) -> Chosen:
    """Choose everything with the least mean error on the counted steps of validation trajectories.

    Parameters
    ----------
    cases : sequence of Case
        Validation trajectories, one case a validation value.
    maps : sequence of {"linear", "log"}
        Maps to choose from.
    expert_rate : float, optional
        Learning rate of the experts, of which `RATES` are multiples; None: no fine-tuning on the prefix.
    """
    lines = {case.value: Line(bench, case) for case in cases}
    family = bench.family.range
    evaluate = {value: line.later_mean for value, line in lines.items()}
    line = calibrate_line(evaluate, family.low, family.high, maps)
    losses: dict[str, dict[str, float]] = {}
    scalings = {}
    for name in vectors.names:
        found = {s: _mean_error(bench, cases, vectors.at(name, s)) for s in SCALINGS}
        scalings[name] = min(found, key=lambda s: found[s])
        losses[name] = {str(s): loss for s, loss in found.items()}
    rate = None
    if expert_rate is not None:
        tried = {r * expert_rate: _mean_tuned(bench, cases, r * expert_rate) for r in RATES}
        rate = min(tried, key=lambda r: tried[r])
        losses["prefix_finetune"] = {f"{r:g}": loss for r, loss in tried.items()}
    return Chosen(line, scalings, rate, losses)


def _mean_error(bench: Bench, cases: Sequence[Case], weights: LazyWeights) -> float:
    model = bench.model_of(weights)
    return sum(float(bench.later(model, case).mean()) for case in cases) / len(cases)


def _mean_tuned(bench: Bench, cases: Sequence[Case], rate: float) -> float:
    errors = [bench.later(fine_tune(bench, case, rate, STEPS).forecaster, case) for case in cases]
    return sum(float(e.mean()) for e in errors) / len(errors)


def fine_tune(bench: Bench, case: Case, rate: float, steps: int) -> ShodhModel:
    """The anchor after ``steps`` steps of Adam on the observed steps of all trajectories of a case together.

    Each step is one forward and one backward pass over them, as one evaluation of `shodh.merge.read_gradient` is. The
    network is the family's: it is changed until it is given other weights.
    """
    model = bench.family.put(bench.family.anchor)
    parameters = list(model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=rate)
    model.requires_grad_(True)
    try:
        for _ in range(steps):
            optimiser.zero_grad()
            for part in case.chunks(bench.batch):
                share = len(part.frames) / len(case.frames)
                (share * bench.observed_loss(model.forecaster, part).mean()).backward()
            optimiser.step()
    finally:
        model.requires_grad_(False)
        optimiser.zero_grad()
    return model
