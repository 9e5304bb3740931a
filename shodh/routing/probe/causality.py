"""What the error does when routing is changed: each expert removed, each regime forced, the choices shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.data import Split
from shodh.evaluate.evaluation import Evaluator
from shodh.routing.probe.interventions import (
    Override,
    at_layer,
    force,
    override_routing,
    remove,
    reroute,
    shuffle_tokens,
    transplant,
)
from shodh.routing.probe.record import Recording
from shodh.routing.probe.windows import ProbeBatch, batches
from shodh.schema.measures import mean_over

KINDS = {
    "remove": "one expert's routed output is taken away",
    "reroute": "one expert's tokens go to the next best expert",
    "force": "all tokens go to one expert",
    "remove all": "no routed expert at all, only what is shared",
    "shuffle tokens": "choices permuted among the tokens of each sample",
    "shuffle samples": "choices taken from another sample of any regime",
}
INTACT = "intact"
DECODE_EVERY = 4  # decoding a window costs far more than the operator


@dataclass(frozen=True)
class Intervention:
    """One change of routing: ``layer`` None is all layers; ``expert`` and ``seed`` where the kind has one."""

    kind: str
    layer: int | None
    expert: int | None = None
    seed: int | None = None


@dataclass
class Effect:
    """Error over the intact one: ``latent`` and ``decoded`` (None: not decoded), a value a seed."""

    latent: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)


Key = tuple[str, int | None, int | None, str]  # kind, layer, expert, regime
Effects = dict[Key, Effect]


def interventions(num_layers: int, num_experts: int, seeds: int) -> list[Intervention]:
    """Every intervention, at each layer and at all of them."""
    found = []
    for layer in (*range(num_layers), None):
        found += [Intervention(k, layer, e) for k in ("remove", "reroute", "force") for e in range(num_experts)]
        found.append(Intervention("remove all", layer))
        found += [Intervention(k, layer, seed=s) for k in ("shuffle tokens", "shuffle samples") for s in range(seeds)]
    return found


def changes_nothing(intervention: Intervention, selected: np.ndarray) -> bool:
    """Whether the choices ``[layers, N, S, K]`` of intact routing prove it: a dead expert, or one that has all tokens.

    Inputs of the first layer that is touched are the intact ones, so that what its router chose is known.
    """
    touched = selected if intervention.layer is None else selected[intervention.layer : intervention.layer + 1]
    if intervention.kind in ("remove", "reroute"):
        return not (touched == intervention.expert).any()
    return intervention.kind == "force" and bool((touched == intervention.expert).all())


def _override(
    intervention: Intervention, num_experts: int, batch: ProbeBatch, regime: str, donors: Sequence[Recording]
) -> Override:
    expert, key = intervention.expert, ("probe", intervention.kind, intervention.seed or 0, regime)
    if intervention.kind == "remove all":
        change = remove(*range(num_experts))
    elif intervention.kind == "shuffle tokens":
        change = shuffle_tokens(*key, batch.trajectory[0], batch.frame[0])
    elif intervention.kind == "shuffle samples":
        change = transplant(_donated(donors, len(batch.past), generator(*key, batch.trajectory[0], batch.frame[0])))
    else:
        assert expert is not None
        by_kind: dict[str, Callable[[int], Override]] = {"remove": remove, "reroute": reroute, "force": force}
        change = by_kind[intervention.kind](expert)
    return change if intervention.layer is None else at_layer(intervention.layer, change)


def _donated(donors: Sequence[Recording], samples: int, draw: torch.Generator) -> list[Tensor]:
    """Choices ``[B, S, K]``, a tensor a layer, of samples drawn from regimes that are drawn first, all alike."""
    chosen = []
    for _ in range(samples):
        donor = donors[int(torch.randint(len(donors), (), generator=draw))]
        row = int(torch.randint(donor.selected.shape[1], (), generator=draw))
        chosen.append(torch.from_numpy(donor.selected[:, row]))
    return list(torch.stack(chosen, 1))


class Means:
    """Running means of named per-sample values."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add per-sample values ``[B]``."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def result(self) -> dict[str, float]:
        return {name: self._sums[name] / self._counts[name] for name in self._sums}


class _RegimeEffects:
    """Errors of one regime under every intervention, batch by batch."""

    def __init__(self, evaluator: Evaluator, recording: Recording, donors: Sequence[Recording], decode: bool) -> None:
        self.e, self.recording, self.decode = evaluator, recording, decode
        self.space, self.number = recording.regime.regimes.space, recording.regime.number
        self.channels = self.space.channel_numbers(self.number)
        self.forecaster = recording.regime.forecaster(evaluator)
        tokens = recording.selected.shape[2]
        self.donors = [d for d in donors if d.selected.shape[2] == tokens]
        self.means = Means()

    def add(self, batch: ProbeBatch, todo: Sequence[Intervention]) -> None:
        self._measure(INTACT, batch)
        for number, intervention in enumerate(todo):
            change = _override(intervention, self.recording.num_experts, batch, self.recording.name, self.donors)
            with override_routing(self.e.operator, change):
                self._measure(str(number), batch)

    @torch.no_grad()
    def _measure(self, name: str, batch: ProbeBatch) -> None:
        labels = self.forecaster.labels(self.number, batch.past)
        output = self.forecaster.step(batch.past, batch.features, labels, conditions=batch.conditions).latent
        error = output - batch.target
        self.means.add(
            f"{name}/latent", mean_over(error.square()) if self.e.trained else self._field_error(error, batch.static)
        )
        if self.decode:
            some = slice(None, None, DECODE_EVERY)
            decoded = self.forecaster.decode(output[some].unsqueeze(1), batch.static[some], self.number)[:, 0]
            error = decoded - batch.fields[some, -1]
            self.means.add(f"{name}/decoded", self._field_error(error, batch.static[some]))

    def _field_error(self, error: Tensor, static: Tensor) -> Tensor:
        """Mean square of each sample over the fields, and the cells, that exist."""
        cells = self.space.cells(static, self.forecaster.labels(self.number, error))
        return mean_over(error[:, self.channels].square(), None if cells is None else cells[:, self.channels])

    def ratios(self, number: int) -> tuple[float, float | None]:
        values = self.means.result()
        latent = values[f"{number}/latent"] / values[f"{INTACT}/latent"]
        decoded = values[f"{number}/decoded"] / values[f"{INTACT}/decoded"] if self.decode else None
        return latent, decoded


def measure_effects(
    evaluator: Evaluator,
    recordings: Sequence[Recording],
    split: Split,
    limit: int,
    *,
    seeds: int = 3,
    decode: bool = True,
) -> Effects:
    """One-step error under every intervention over that of the intact model, by regime.

    Parameters
    ----------
    recordings : sequence of Recording
        Of the intact model on the regimes to measure; also what "shuffle samples" draws from.
    limit : int
        Windows a regime.
    seeds : int
        Draws of each random intervention.
    decode : bool
        Also the error of decoded fields, normalised, of every fourth window. Operators on fields decode nothing: what
        is called their latent error is that of the normalised fields.
    """
    decode = decode and evaluator.trained is not None
    effects: Effects = {}
    for recording in recordings:
        layers = recording.selected.shape[0]
        every = interventions(layers, recording.num_experts, seeds)
        idle = [changes_nothing(i, recording.selected) for i in every]
        todo = [i for i, nothing in zip(every, idle, strict=True) if not nothing]
        part = _RegimeEffects(evaluator, recording, recordings, decode)
        for batch in batches(evaluator, recording.regime, split, limit, "interventions"):
            part.add(batch, todo)
        for intervention, ratios in _in_order(every, idle, part):
            key = (intervention.kind, intervention.layer, intervention.expert, recording.name)
            effect = effects.setdefault(key, Effect())
            latent, decoded = ratios
            effect.latent.append(latent)
            if decoded is not None:
                effect.decoded.append(decoded)
    return effects


def _in_order(
    every: Sequence[Intervention], idle: Sequence[bool], part: _RegimeEffects
) -> Iterator[tuple[Intervention, tuple[float, float | None]]]:
    number = 0
    for intervention, nothing in zip(every, idle, strict=True):
        if nothing:
            yield intervention, (1.0, 1.0 if part.decode else None)
        else:
            yield intervention, part.ratios(number)
            number += 1
