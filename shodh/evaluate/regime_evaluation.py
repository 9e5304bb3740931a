"""What an evaluation of one run needs and gives: the opened run, running means, and what one regime is measured by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shodh.checkpoint.description import Kind
from shodh.config import RunConfig
from shodh.data import LatentWindowDataset, Split, WindowDataset
from shodh.evaluate.divergence import DivergenceMeter
from shodh.models.forecaster import Forecaster
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.routing import count_by_regime
from shodh.schema.fields import AXES
from shodh.train.datasets import Regimes
from shodh.train.field_task import open_windows
from shodh.train.latents import TrainedTokenizer, open_latents
from shodh.train.losses import mean_over, physical_relative_l2, relative_l2, vrmse
from shodh.train.run_folder import RunFolder


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


@dataclass
class Example:
    """One window for the figures: normalised fields ``[C, *grid]``, those that exist, and the static ones."""

    regime: str
    labels: list[str]
    truth: Tensor
    prediction: Tensor
    static: Tensor
    solid: Tensor | None


@dataclass
class Evaluation:
    """What `evaluate` found; `metrics` is JSON-able, the rest serves the figures."""

    metrics: dict[str, Any]
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation of one run needs, opened and checked; ``trained`` is None for operators on fields.

    ``weights`` says whether they are the average over the training (``ema``) or as its optimiser left them (``raw``).
    """

    config: RunConfig
    folder: RunFolder
    checkpoint: str
    regimes: Regimes
    trained: TrainedTokenizer | None
    operator: LatentTransformer | FieldOperator
    device: torch.device
    weights: Kind = "raw"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of a run on latents."""
        return None if self.trained is None else self.trained.model

    @property
    def forecaster(self) -> Forecaster:
        """The model on the regimes of the run."""
        return Forecaster.of(self.config, self.regimes.space, self.operator, self.tokenizer)


class Windows(NamedTuple):
    """Windows of one regime: history and the frames that follow.

    ``states [B, T, ...]`` and ``features [B, ...]`` of the operator (`Forecaster.encode`); ``fields [B, T, C, *grid]``
    and ``static [B, S, *grid]`` in model units.
    """

    states: Tensor
    features: Tensor
    fields: Tensor
    static: Tensor


class RegimeEvaluation:
    """One-step and rollout errors and routing of one regime; of decoded fields also what a tokenizer alone loses, and
    their divergence.

    Parameters
    ----------
    cache : Path, optional
        Of latents (`prepare_latents`); without one, states are made of the fields as they are read.
    """

    def __init__(self, evaluator: Evaluator, number: int, split: Split, cache: Path | None = None) -> None:
        self.e, self.number, self.split, self.cache = evaluator, number, split, cache
        self.forecaster, space = evaluator.forecaster, evaluator.regimes.space
        self.history = self.forecaster.history
        self.name, self.domain = space.names[number], space.domains[number]
        self.slices, self.channels = space.channels(number), space.channel_numbers(number)
        self.solid = space.solid_channel(number)
        self.masks, self.constants = space.masks(number), space.constants(number)
        self.means = Means()
        tokenizer = self.forecaster.tokenizer
        self.divergence = None if tokenizer is None else DivergenceMeter(space, number, evaluator.config.cells)
        self.table: Tensor | None = None
        self.example: Example | None = None

    def _open(self, horizon: int) -> tuple[WindowDataset, LatentWindowDataset | None]:
        """Windows of fields, and of cached latents."""
        config, regimes = self.e.config, self.e.regimes
        fields = open_windows(config, regimes, self.split, horizon)[self.number]
        if self.cache is None:
            return fields, None
        return fields, open_latents(config, regimes, self.cache, self.split, horizon)[self.number]

    @cached_property
    def _one_step(self) -> tuple[WindowDataset, LatentWindowDataset | None]:
        return self._open(1)

    @property
    def num_windows(self) -> int:
        """Windows of history and one frame in the split."""
        return len(self._one_step[0])

    def windows(self) -> Iterator[Windows]:
        """Batches of all windows: arguments of `add`."""
        yield from self._batches(*self._one_step, range(self.num_windows))

    def rollouts(self) -> Iterator[Windows]:
        """Batches of the first frames of every trajectory: arguments of `rollout`."""
        steps = self.rollout_steps()
        if steps >= 1:
            fields, latents = self._open(steps)
            yield from self._batches(fields, latents, [i for i in range(len(fields)) if fields.index[i][1] == 0])

    def _batches(
        self, fields: WindowDataset, latents: LatentWindowDataset | None, rows: Sequence[int]
    ) -> Iterator[Windows]:
        assert latents is None or len(latents) == len(fields)
        for chosen in chunks(rows, self.e.config.evaluation.batch):
            frames, static = self._stacked([fields[i] for i in chosen], "fields", "static")
            if latents is None:
                yield Windows(*self.forecaster.encode(frames, static, self.number), frames, static)
            else:
                states, features = self._stacked([latents[i] for i in chosen], "latents", "static")
                yield Windows(states, features, frames, static)

    def _stacked(self, items: Sequence[Mapping[str, Any]], *names: str) -> Iterator[Tensor]:
        return (torch.stack([item[name] for item in items]).to(self.e.device) for name in names)

    def add(self, batch: Windows) -> None:
        """One batch of windows: history and the frame that follows."""
        labels = self.forecaster.labels(self.number, batch.states)
        past, target = batch.states[:, : self.history], batch.states[:, self.history]
        output = self.forecaster.step(past, batch.features, labels)
        emitted = self.forecaster.emit(output.latent, batch.static, self.number)
        prediction, truth = self.forecaster.assemble(emitted, self.number), batch.fields[:, self.history]
        if self.divergence is not None:
            self.means.add("latent_mse/model", mean_over((output.latent - target).square()))
            self.means.add("latent_mse/persistence", mean_over((past[:, -1] - target).square()))
        self._add_errors("model", prediction, truth, batch.static)
        self._add_errors("persistence", batch.fields[:, self.history - 1], truth, batch.static)
        if self.divergence is not None:
            self._add_errors("tokenizer", self._decode(target, batch), truth, batch.static)
            self.divergence.add(self.forecaster.potentials(emitted, self.number))
            if self.solid is not None:
                self._add_solid_speed(prediction, batch.static[:, self.solid])
        self._add_routing(output)
        self._keep_example(truth, prediction, batch.static)

    def _decode(self, state: Tensor, batch: Windows) -> Tensor:
        return self.forecaster.decode(state.unsqueeze(1), batch.static, self.number)[:, 0]

    def rollout(self, batch: Windows) -> None:
        """Autoregressive errors by step, from the first frames of trajectories."""
        labels = self.forecaster.labels(self.number, batch.states)
        last = batch.fields[:, self.history - 1]
        predicted = self.forecaster.unroll(batch.states[:, : self.history], batch.features, labels)
        for step, truth in enumerate(batch.fields[:, self.history :].unbind(1), 1):
            self._add_rollout(step, "model", self._decode(next(predicted).latent, batch), truth, batch.static)
            self._add_rollout(step, "persistence", last, truth, batch.static)

    def _add_solid_speed(self, prediction: Tensor, solid: Tensor) -> None:
        """Speed inside solids over the mean speed in the fluid: the decode conserves mass, it does not know no-slip."""
        for f in self.e.regimes.fields_of(self.number):
            if f.solenoidal:
                speed = prediction[:, self.slices[f.name]].square().sum(1)
                inside = (speed * solid).flatten(1).sum(1) / solid.flatten(1).sum(1).clamp(min=1)
                outside = (speed * (1 - solid)).flatten(1).sum(1) / (1 - solid).flatten(1).sum(1).clamp(min=1)
                self.means.add(f"speed_in_solid/{f.name}", (inside / outside).sqrt())

    def rollout_steps(self) -> int:
        """As many as the configuration asks for and the longest trajectory allows; below 1: none.

        Shorter trajectories are left out of the rollouts, and named in the log.
        """
        data, source = self.e.config.data, self.e.regimes.sources[self.number]
        longest = max(source.num_frames(self.split), default=0)
        steps = min(self.e.config.evaluation.rollout, (longest - 1) // data.stride + 1 - data.history)
        if steps >= 1:
            source.name_short(self.split, (data.history + steps - 1) * data.stride + 1, f"rollouts of {steps} steps")
        return steps

    def _pairs(
        self, prediction: Tensor, target: Tensor, static: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
        """Name, prediction, truth of each field that exists, and in which cells it does (None: all).

        A field that is constant in the training data is decoded as its value, whatever is predicted for it.
        """
        for name, channels in self.slices.items():
            u, v = prediction[:, channels], target[:, channels]
            exists = static[:, self.masks[name], None] == 0 if name in self.masks else None
            yield name, torch.zeros_like(u) if self.constants[name][1] == 0 else u, v, exists

    def _add_errors(self, kind: str, prediction: Tensor, target: Tensor, static: Tensor) -> None:
        """Errors of one step over the cells where fields exist; ``static [B, S, *grid]`` holds their masks.

        ``decoded_mse`` is the mean over channels of each one's mean square, as in `FieldTask`.
        """
        squares: list[Tensor] = []
        for name, u, v, exists in self._pairs(prediction, target, static):
            squares.append(mean_over((u - v).square(), exists, 2))
            self.means.add(f"l2re/{name}/{kind}", relative_l2(u, v, exists=exists))
            self.means.add(f"vrmse/{name}/{kind}", vrmse(u, v, exists=exists))
            if self.divergence is None:  # As it is published, of operators on fields.
                published = physical_relative_l2(u, v, self.constants[name], exists=exists)
                self.means.add(f"l2re_physical/{name}/{kind}", published)
        self.means.add(f"decoded_mse/{kind}", torch.cat(squares, 1).mean(1))

    def _add_rollout(self, step: int, kind: str, prediction: Tensor, target: Tensor, static: Tensor) -> None:
        """Errors of one autoregressive step, counted from 1."""
        for name, u, v, exists in self._pairs(prediction, target, static):
            self.means.add(f"rollout/{name}/{kind}/{step}", vrmse(u, v, exists=exists))
            self.means.add(f"rollout_l2re/{name}/{kind}/{step}", relative_l2(u, v, exists=exists))

    def _add_routing(self, output: OperatorOutput) -> None:
        if not output.routing:
            return
        count = len(self.e.regimes.names)
        label = torch.full((len(output.latent),), self.number, device=output.latent.device)
        counts = [count_by_regime(r.selected, label, count, r.num_experts) for r in output.routing]
        table = torch.stack(counts).cpu()
        self.table = table if self.table is None else self.table + table

    def _keep_example(self, truth: Tensor, prediction: Tensor, static: Tensor) -> None:
        """The first sample of the first batch."""
        if self.example is None:
            solid = None if self.solid is None else static[0, self.solid].cpu()
            shown = [values[0, self.channels].cpu() for values in (truth, prediction)]
            self.example = Example(self.name, self._labels(), shown[0], shown[1], static[0].cpu(), solid)

    def _labels(self) -> list[str]:
        """A name for each existing channel."""
        kinds = {f.name: f.kind for f in self.e.regimes.dynamic}
        return [
            f"{name} {axis}" if kinds[name] == "vector" else name
            for name, s in self.slices.items()
            for axis in AXES[: s.stop - s.start]
        ]

    def result(self) -> dict[str, Any]:
        """Nested metrics of the regime."""
        tree: dict[str, Any] = {}
        for path, value in self.means.result().items():
            node = tree
            *parents, last = path.split("/")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        for measure in ("rollout", "rollout_l2re"):
            for name, kinds in tree.get(measure, {}).items():
                tree[measure][name] = {
                    kind: [steps[str(i + 1)] for i in range(len(steps))] for kind, steps in kinds.items()
                }
        return tree if self.divergence is None else {**tree, "divergence": self.divergence.result()}


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``rows`` in parts of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
