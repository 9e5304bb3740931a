"""A run's data and losses for models in plain torch: error curves, gradients by regime, learning a fresh regime."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import RunConfig
from shodh.core.topology import plan_topology
from shodh.data import Split
from shodh.data.loader import SampleDataset
from shodh.experiments.harness.learning import gradients_of, take_step
from shodh.moe.groups import is_routed_expert, is_router
from shodh.train.datasets import mixture_loader
from shodh.train.field_task import operator_task
from shodh.train.opening import open_data
from shodh.train.run_folder import RunFolder
from shodh.train.trainer import Batch, to_device

GROUPS = ("router", "experts", "feed_forward", "rest")
Gradients = dict[str, Tensor]


class Probe:
    """The windows of a run, and its task as a judge of any model of its shape, on one device without DeepSpeed.

    Parameters
    ----------
    normalised_by : RunFolder, optional
        A run on fields whose normalisation is kept; by default that of the training data.
    """

    def __init__(self, config: RunConfig, device: torch.device, normalised_by: RunFolder | None = None) -> None:
        self.config, self.device = config, device
        self.regimes, trained, self._open = open_data(config, normalised_by, device)
        train, experts = config.operator.train, config.operator.experts
        training, topology = self._open("train"), plan_topology(1, 1, experts.num_experts, train.global_batch)
        self.task = operator_task(config, self.regimes, training, None if trained is None else trained.model)
        self._loader = mixture_loader(training, config, topology, config.seed)

    @property
    def measure(self) -> str:
        """Name of the error, as in ``metrics.jsonl``: latent_nmse (or latent_mse), field_l2re or field_mse."""
        return f"{self.task.space}_{self.task.measure}"

    def batch(self, data: SampleDataset, rows: Sequence[int]) -> Batch:
        collated: Batch = torch.utils.data.default_collate([data[row] for row in rows])
        return {name: tensor.to(self.device) for name, tensor in collated.items()}

    def windows(self, split: Split) -> Iterator[tuple[str, Batch]]:
        """Every window of a split, regime by regime."""
        size = self.config.evaluation.batch
        for name, data in zip(self.regimes.names, self._open(split), strict=True):
            for start in range(0, len(data), size):
                yield name, self.batch(data, range(start, min(len(data), start + size)))

    @torch.no_grad()
    def errors(self, model: nn.Module, split: Split = "valid") -> dict[str, dict[str, Any]]:
        """Mean one-step error of the model and of persistence, by regime, over *all* windows of a split.

        ``by_trajectory`` is the model's error in each trajectory, in their order.
        """
        model.eval()
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for name, batch in self.windows(split):
            _, error, persistence = self.task.predict(model, batch)
            values = (error.double().cpu(), persistence.double().cpu(), batch["trajectory"].cpu())
            found.setdefault(name, []).append(values)
        errors: dict[str, dict[str, Any]] = {}
        for name, parts in found.items():
            error, persistence, trajectory = (torch.cat(part) for part in zip(*parts, strict=True))
            means = [error[trajectory == t].mean().item() for t in trajectory.unique()]
            persists = persistence.mean().item()
            errors[name] = {"model": error.mean().item(), "persistence": persists, "by_trajectory": means}
        return errors

    def fixed_batches(self, samples: int) -> dict[str, Batch]:
        """The same training windows by regime, evenly spread, for every model and checkpoint."""
        batches = {}
        for name, data in zip(self.regimes.names, self._open("train"), strict=True):
            rows = torch.linspace(0, len(data) - 1, min(samples, len(data))).long().tolist()
            batches[name] = self.batch(data, rows)
        return batches

    def training_batches(self, steps: int) -> Iterator[Batch]:
        """The first batches that the run itself learns from."""
        for batch in self._loader.iterate(0, steps):
            yield to_device(batch, self.device)

    def close(self) -> None:
        self._loader.close()
        self.regimes.close()


def group_of(name: str) -> str:
    """Which kind of weights a parameter is, by its exchange-format name."""
    if is_router(name):
        return "router"
    if is_routed_expert(name):
        return "experts"
    return "feed_forward" if ".feed_forward." in name else "rest"


Cosines = dict[str, dict[str, float]]


def gradient_cosines(probe: Probe, model: nn.Module, batches: dict[str, Batch]) -> tuple[Cosines, Cosines]:
    """Cosine between the gradients of two regimes' errors, and of one regime's on two halves of its windows.

    ``({group of weights: {"a ~ b": cosine}}, {group: {"a": cosine}})``. The second says how much of a low cosine is the
    noise of few windows; the halves are of different trajectories, if windows are ordered by trajectory. Of the error
    alone, without balance terms, which know no regime. Left out where a gradient is zero: experts that two regimes do
    not share have a cosine of exactly zero, and are in.
    """
    between: Cosines = {}
    within: Cosines = {}
    whole: dict[str, Gradients] = {}
    for name, batch in batches.items():
        halves = _halves(batch)
        parts = [_gradients(probe, model, half) for half in halves]
        if len(parts) == 2:
            _add_cosines(within, name, *parts)
        sums = [[len(half["regime"]) * part[group] for group in part] for half, part in zip(halves, parts, strict=True)]
        whole[name] = {group: sum(terms[1:], terms[0]) for group, *terms in zip(parts[0], *sums, strict=True)}
    for a, b in itertools.combinations(whole, 2):
        _add_cosines(between, f"{a} ~ {b}", whole[a], whole[b])
    return between, within


def _halves(batch: Batch) -> list[Batch]:
    """The first and the second half; a batch of one is not divided."""
    size = len(batch["regime"]) // 2
    if size == 0:
        return [batch]
    return [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(size), slice(size, None))]


def _add_cosines(found: Cosines, name: str, first: Gradients, second: Gradients) -> None:
    for group in first:
        u, v = first[group], second[group]
        if u.any() and v.any():
            found.setdefault(group, {})[name] = float(F.cosine_similarity(u, v, dim=0))


def _gradients(probe: Probe, model: nn.Module, batch: Batch) -> Gradients:
    """Gradient of the mean error by group of weights, flat, in float64."""
    model.eval()
    _, error, _ = probe.task.predict(model, batch)
    flat: dict[str, list[Tensor]] = {}
    for name, gradient in gradients_of(model, error.mean()).items():
        flat.setdefault(group_of(name), []).append(gradient)
    return {group: torch.cat(flat[group]) for group in GROUPS if group in flat}


def learning_curve(probe: Probe, model: nn.Module, steps: int, lr: float) -> list[float]:
    """Training error over persistence by step of a copy of ``model`` that learns the probe's regimes.

    AdamW at a constant rate, with the run's loss, batches, clipping and balance terms, biases and temperatures.
    """
    learner = copy.deepcopy(model).train()
    operator, train = probe.config.operator, probe.config.operator.train
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, betas=train.betas, weight_decay=train.weight_decay)
    curve = []
    for step, batch in enumerate(probe.training_batches(steps)):
        probe.task.start_step()
        outcome = probe.task.loss(learner, batch, step)
        seen = None if outcome.fingerprint is None else partial(torch.clone, outcome.fingerprint)
        take_step(learner, optimizer, outcome.loss, operator, outcome.routing, seen)
        curve.append(float(outcome.metrics["train/over_persistence"][0]))
    return curve


def plasticity(trained: Sequence[float], fresh: Sequence[float]) -> dict[str, Any]:
    """Two learning curves of a fresh regime; ``area_ratio`` below 1: what was trained before learns it faster."""
    ratio = sum(trained) / sum(fresh) if sum(fresh) > 0 else float("nan")
    return {"trained": list(trained), "fresh": list(fresh), "area_ratio": ratio}
