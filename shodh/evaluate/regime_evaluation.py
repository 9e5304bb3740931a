"""What an evaluation of one run needs and gives: the opened run, running means, and what one regime is measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.data import Split
from shodh.models.field_space import channel_mask
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.routing import count_by_regime
from shodh.moe.step import regime_arguments
from shodh.schema.domain import Domain
from shodh.schema.fields import AXES
from shodh.train.datasets import Regimes
from shodh.train.latents import TrainedTokenizer
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
    """Everything an evaluation of one run needs, opened and checked; ``trained`` is None for operators on fields."""

    config: RunConfig
    folder: RunFolder
    checkpoint: str
    regimes: Regimes
    trained: TrainedTokenizer | None
    operator: LatentTransformer | FieldOperator
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a run on latents; operators on fields have none."""
        assert self.trained is not None
        return self.trained.model


Windows = tuple[Tensor, ...]


class RegimeEvaluation:
    """One-step and rollout errors and routing of one regime; subclasses say what is predicted and decoded."""

    physical = False  # whether L2RE in physical units is reported too, as it is published

    def __init__(self, evaluator: Evaluator, number: int, split: Split) -> None:
        self.e = evaluator
        self.number = number
        self.split = split
        self.domain: Domain = evaluator.regimes.domains[number]
        self.name = evaluator.regimes.names[number]
        self.slices = evaluator.regimes.channels(number)
        self.channels = evaluator.regimes.channel_numbers(number)
        self.solid = evaluator.regimes.solid_channel(number)
        self.masks, self.constants = evaluator.regimes.masks(number), evaluator.regimes.constants(number)
        self.means = Means()
        self.table: Tensor | None = None
        self.example: Example | None = None

    @property
    def num_windows(self) -> int:
        """Windows of history and one frame in the split."""
        raise NotImplementedError

    def windows(self) -> Iterator[Windows]:
        """Batches of all windows: arguments of `add`."""
        raise NotImplementedError

    def rollouts(self) -> Iterator[Windows]:
        """Batches of the first frames of every trajectory: arguments of `rollout`."""
        raise NotImplementedError

    def add(self, *batch: Tensor) -> None:
        """One batch of windows: history and the frame that follows."""
        raise NotImplementedError

    def rollout(self, *batch: Tensor) -> None:
        """Autoregressive errors by step, from the first frames of trajectories."""
        raise NotImplementedError

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

    def predict(self, past: Tensor, static: Tensor) -> OperatorOutput:
        """The operator's next frame, in the space it works in."""
        told = regime_arguments(self.e.config.operator.experts, self.number, past)
        output: OperatorOutput = self.e.operator(past, static, **told)
        return output

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
            if self.physical:
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
            self.example = Example(self.name, self._labels(), shown[0], shown[1], self._stored(static[0]).cpu(), solid)

    def _stored(self, static: Tensor) -> Tensor:
        """Static fields ``[S, *grid]`` with zeros where the regime lacks one."""
        there = channel_mask(self.e.regimes.sources[self.number].static, self.domain, self.e.regimes.ndim)
        return torch.where(there.to(static.device).view(-1, *(1,) * self.e.regimes.ndim), static, 0.0)

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
        return tree


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``rows`` in parts of at most ``size``."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
