"""Evaluation of operators on the fields themselves, beside persistence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from shodh.data import Split, WindowDataset
from shodh.evaluate.regime_evaluation import Evaluator, RegimeEvaluation, Windows, chunks
from shodh.train.field_task import Presence, open_windows


class FieldEvaluation(RegimeEvaluation):
    """Errors and routing of one regime: of normalised fields, and L2RE in physical units, as it is published."""

    physical = True

    def __init__(self, evaluator: Evaluator, number: int, split: Split) -> None:
        super().__init__(evaluator, number, split)
        self._presence = Presence(evaluator.regimes)

    @cached_property
    def _one_step(self) -> WindowDataset:
        return self._open(1)

    def _open(self, horizon: int) -> WindowDataset:
        return open_windows(self.e.config, self.e.regimes, self.split, horizon)[self.number]

    @property
    def num_windows(self) -> int:
        return len(self._one_step)

    def windows(self) -> Iterator[Windows]:
        yield from self._batches(self._one_step, range(self.num_windows))

    def rollouts(self) -> Iterator[Windows]:
        steps = self.rollout_steps()
        if steps >= 1:
            data = self._open(steps)
            yield from self._batches(data, [i for i in range(len(data)) if data.index[i][1] == 0])

    def _batches(self, data: WindowDataset, rows: Sequence[int]) -> Iterator[Windows]:
        """Frames ``[B, T, C, *grid]`` and static fields ``[B, S, *grid]``, padded; masks that exist are as stored."""
        for chosen in chunks(rows, self.e.config.evaluation.batch):
            items = [data[i] for i in chosen]
            frames, static = (torch.stack([item[name] for item in items]) for name in ("fields", "static"))
            yield self._presence.pad(frames.to(self.e.device), static.to(self.e.device), self._label(len(items)))

    def _label(self, samples: int) -> Tensor:
        return torch.full((samples,), self.number, device=self.e.device)

    def add(self, *batch: Tensor) -> None:
        frames, static = batch
        history = self.e.config.data.history
        past, truth = frames[:, :history], frames[:, history]
        output = self.predict(past, static)
        for kind, prediction in (("model", output.latent), ("persistence", past[:, -1])):
            self._add_errors(kind, prediction, truth, static)
        self._add_routing(output)
        self._keep_example(truth, output.latent, static)

    def rollout(self, *batch: Tensor) -> None:
        frames, static = batch
        history = self.e.config.data.history
        window = frames[:, :history]
        for step in range(frames.shape[1] - history):
            truth = frames[:, history + step]
            predicted = self.predict(window, static).latent
            self._add_rollout(step + 1, "model", predicted, truth, static)
            self._add_rollout(step + 1, "persistence", frames[:, history - 1], truth, static)
            following = self._presence.pad(predicted.unsqueeze(1), static, self._label(len(frames)))[0]
            window = torch.cat((window[:, 1:], following), 1)
