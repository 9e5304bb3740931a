"""What the loop trains second: the operator on cached latents; `FieldTask` puts fields in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.config import RunConfig
from shodh.core.distributed import rank
from shodh.core.errors import DataError
from shodh.core.seeding import generator
from shodh.core.topology import Topology
from shodh.data import Split
from shodh.data.loader import SampleDataset
from shodh.models.forecaster import Forecaster
from shodh.models.operator import OperatorOutput
from shodh.moe.balance import GlobalBalance, entropy
from shodh.moe.routing import Routing, count_by_regime, regime_information
from shodh.moe.step import finish_step, router_arguments
from shodh.moe.trace import TraceWriter, cut_traces_of_others, thinning
from shodh.train.datasets import Regimes, mixture_loader, training_splits
from shodh.train.loop import Batch
from shodh.train.metrics import Metrics, MetricWriter, RegimeMeans, nonfinite_regimes
from shodh.train.pictures import share_picture

SAMPLE_KEY = ("regime", "trajectory", "frame")
_STILL = 1e-13  # mean square of changes over that of values that float32 makes of equal frames


def sample_names(batch: Batch) -> Iterator[tuple[int, ...]]:
    """What names each sample: regime, trajectory, frame. Nothing is read from a device before the first is asked."""
    yield from zip(*(batch[k].tolist() for k in SAMPLE_KEY), strict=True)


OpenSplit = Callable[[Split], Sequence[SampleDataset]]


class OperatorTask:
    """Predict the next latent; balance the experts over the global batch; trace the routing.

    Regime labels are used for metrics and the trace alone; the model gets latents and static features.

    Parameters
    ----------
    open_split : callable
        Gives the windows of a split, a dataset a regime.
    traces : Path
        Folder of the routing traces.
    """

    space, measure = "latent", "mse"

    def __init__(
        self,
        config: RunConfig,
        regimes: Regimes,
        open_split: OpenSplit,
        topology: Topology,
        traces: Path,
        resume_step: int,
    ) -> None:
        self.config, self.regimes, self.topology = config, regimes, topology
        self.operator = config.operator
        self.history = config.data.history
        self.sparse = config.operator.experts.num_experts > 0
        relative = config.operator.loss == "over_persistence"
        self._loaders = {
            split: mixture_loader(open_split(split), config, topology, seed) for split, seed in training_splits(config)
        }
        self._change = mean_changes(open_split("train"), self._labels()) if relative else None
        self._balance = GlobalBalance()
        path = traces / f"rank{rank()}.jsonl"
        limit = config.routing_trace if self.sparse else 0
        self._trace = TraceWriter(path, rank(), regimes.names, limit, resume_step)
        if rank() == 0:
            cut_traces_of_others(traces, topology.world_size, resume_step)
        self._trace_every, self._trace_valid_every = self._thinning(limit)
        self._table: Tensor | None = None

    def _labels(self) -> list[str]:
        """Each regime with its fields, for messages."""
        fields = (", ".join(f.name for f in self.regimes.fields_of(n)) for n in range(len(self.regimes.names)))
        return [f"regime {name!r} (fields {of})" for name, of in zip(self.regimes.names, fields, strict=True)]

    def _thinning(self, limit: int) -> tuple[int, int]:
        """Steps and validations between traced ones: training may fill a third of the trace, validation the rest."""
        train, depth = self.operator.train, self.operator.depth
        batches = self.topology.accumulation * train.steps
        validations = train.steps // train.valid_every + 1 if train.valid_every else 1
        lines = train.valid_batches * self.topology.accumulation + self._samples_of_rank()
        return thinning(batches * depth, limit // 3), thinning(validations * lines * depth, limit - limit // 3)

    def _samples_of_rank(self) -> int:
        """Samples of a validation that this rank traces one by one."""
        world = self.topology.world_size
        return self.config.routing_samples // world + (rank() < self.config.routing_samples % world)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return self._loaders["train"].iterate(start, stop)

    def _windows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frames ``[B, T + 1, C, ...]``, the last one to be predicted, and static inputs of a batch."""
        return batch["latents"], batch["static"]

    def _errors(self, prediction: Tensor, target: Tensor, regime: Tensor, static: Tensor) -> Tensor:
        """Error of each sample, ``[B]``; ``static`` as the model is given it."""
        return (prediction - target).square().flatten(1).mean(1)

    def _noise_scale(self, history: Tensor) -> Tensor | float:
        """What the standard deviation of the input noise is relative to."""
        return 1.0

    def _noise(self, history: Tensor, batch: Batch, step: int) -> Tensor:
        """Input noise drawn by (seed, step, sample): the same on any number of ranks, and in a resumed run."""
        std = self.operator.input_noise
        if std == 0:
            return history
        shape, seed = history.shape[1:], self.config.seed
        drawn = [torch.randn(shape, generator=generator(seed, "noise", step, *name)) for name in sample_names(batch)]
        return history + std * self._noise_scale(history) * torch.stack(drawn).to(history)

    def _shift(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Latents and static features, each sample rolled along the periodic axes of its domain.

        The tokenizer commutes with shifts by whole latent cells, so a shifted sample is as true as the stored one.
        """
        latents, static = self._windows(batch)
        if not self.operator.random_shifts:
            return latents, static
        rolled: list[tuple[Tensor, Tensor]] = []
        for row, key in enumerate(sample_names(batch)):
            draw = torch.rand(3, generator=generator(self.config.seed, "shift", step, *key)).tolist()
            boundary = self.regimes.domains[key[0]].boundary
            sizes = latents.shape[-3:]
            shifts = [int(u * n) if b == "periodic" else 0 for u, n, b in zip(draw, sizes, boundary, strict=True)]
            rolled.append((latents[row].roll(shifts, (-3, -2, -1)), static[row].roll(shifts, (-3, -2, -1))))
        return torch.stack([a for a, _ in rolled]), torch.stack([b for _, b in rolled])

    def predict(self, model: Any, batch: Batch) -> tuple[OperatorOutput, Tensor, Tensor]:
        """Output without noise or shifts, and the errors ``[B]`` of it and of persistence."""
        frames, static = self._windows(batch)
        history, target = frames[:, : self.history], frames[:, self.history]
        output = Forecaster.of(self.config, self.regimes.space, model).step(history, static, batch["regime"])
        errors = (self._errors(frame, target, batch["regime"], static) for frame in (output.latent, history[:, -1]))
        error, persistence = errors
        return output, error, persistence

    def start_step(self, step: int) -> None:
        self._balance.start_step()
        self._table = None
        self._errors_of_step: list[tuple[Tensor, Tensor]] = []

    def loss(self, engine: Any, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        regime = batch["regime"]
        latents, static = self._shift(batch, step)
        history, target = latents[:, : self.history], latents[:, self.history]
        told = router_arguments(self.operator.experts, regime, sample_names(batch), self.config.seed, step)
        output = engine(self._noise(history, batch, step), static, **told)
        error = self._errors(output.latent, target, regime, static)
        persistence = self._errors(history[:, -1], target, regime, static)
        self._errors_of_step.append((regime, error.detach()))
        mean = error.mean()
        metrics: Metrics = {
            f"train/{self.space}_{self.measure}": (mean.detach(), "mean"),
            "train/over_persistence": (mean.detach() / persistence.mean(), "mean"),
        }
        loss = mean if self._change is None else (error / self._change.to(error.device)[regime]).mean()
        if output.routing:
            loss = loss + self._account(output.routing, regime, step, metrics)
        return loss, metrics

    def _account(self, routings: list[Routing], regime: Tensor, step: int, metrics: Metrics) -> Tensor:
        """Balance loss of a forward pass; keeps counts for the trace, the metrics and the selection bias."""
        terms = self._balance(routings)
        balance = terms.weighted(self.operator.experts.balance)
        metrics["train/balance_loss"] = (balance.detach(), "mean")
        for name, value in terms.reported(self.operator.experts.balance).items():
            metrics[f"moe/{name}"] = (value.detach(), "mean")
        if step % self._trace_every == 0:
            self._trace.add(step, "train", routings, regime)
        table = self._counts(routings, regime)
        self._table = table if self._table is None else self._table + table
        return balance

    def _counts(self, routings: list[Routing], regime: Tensor) -> Tensor:
        """Assignments of this rank, ``[layers, regimes, experts]``."""
        num_regimes = len(self.regimes.names)
        return torch.stack([count_by_regime(r.selected, regime, num_regimes, r.num_experts) for r in routings])

    def nonfinite_regimes(self) -> list[str]:
        return nonfinite_regimes(self._errors_of_step, self.regimes.names)

    def finish_step(self, engine: Any, step: int) -> None:
        if self._table is None:
            return
        finish_step(engine.module, self.operator.experts, lambda: self._global_table().sum(1))

    def _global_table(self) -> Tensor:
        """Assignments ``[layers, regimes, experts]`` of the last step's global batch."""
        assert self._table is not None
        table = self._table.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(table)
        return table

    def report(self, step: int, writer: MetricWriter | None) -> Metrics:
        if self._table is None:
            return {}
        self._trace.flush()
        table = self._global_table().cpu()
        if writer is not None:
            picture = share_picture(table, self.regimes.names)
            writer.image(step, "moe/expert_shares", picture)
        return routing_metrics(table)

    def validate(self, engine: Any, step: int) -> Metrics:
        means = RegimeMeans(self.regimes.names)
        tables: Tensor | None = None
        train = self.operator.train
        number = (step + 1) // train.valid_every if train.valid_every else 0
        traced = number % self._trace_valid_every == 0 or step + 1 == train.steps
        samples = self._samples_of_rank() if traced else 0
        for batch in self._loaders["valid"].iterate(0, self.operator.train.valid_batches):
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
            regime = batch["regime"]
            output, error, persistence = self.predict(engine, batch)
            means.add(f"{self.space}_{self.measure}", error, regime)
            means.add(f"persistence_{self.measure}", persistence, regime)
            if output.routing:
                if traced:
                    self._trace.add(step, "valid", output.routing, regime, with_pairs=True)
                    keys = torch.stack([batch[k] for k in SAMPLE_KEY], 1)
                    grid = engine.module.token_grid
                    samples -= self._trace.add_samples(step, "valid", output.routing, keys, grid, samples)
                table = self._counts(output.routing, regime)
                tables = table if tables is None else tables + table
        metrics = means.reduce("valid")
        if tables is not None:
            self._trace.flush()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(tables)
            metrics.update({f"valid/{k}": v for k, v in routing_metrics(tables.cpu()).items()})
        return metrics

    def close(self) -> None:
        self._trace.close()
        for loader in self._loaders.values():
            loader.close()
        for source in self.regimes.sources:
            source.close()


def mean_changes(datasets: Sequence[SampleDataset], labels: Sequence[str], windows: int = 64) -> Tensor:
    """Mean square of the last change in windows of each dataset, ``[R]``: what persistence would lose.

    From at most ``windows`` windows of each, spread evenly; at least a hundredth of the largest, so that a regime that
    hardly moves does not decide alone.

    Raises
    ------
    DataError
        A dataset does not change at all, to rounding; ``labels`` name them.
    """
    changes = []
    for data, label in zip(datasets, labels, strict=True):
        rows = torch.linspace(0, len(data) - 1, min(windows, len(data))).long().tolist()
        latents = [data[row]["latents"][-2:] for row in rows]
        changes.append(torch.stack([(z[-1] - z[-2]).square().mean() for z in latents]).mean())
        if changes[-1] <= _STILL * torch.stack(latents).square().mean():
            raise DataError(
                f"{label}: nothing changes from one frame to the next in the training data, so persistence makes no "
                "error and operator.loss=over_persistence has nothing to divide by; use operator.loss=mse, a larger "
                "data.stride, or leave it out"
            )
    change = torch.stack(changes)
    return change.clamp(min=0.01 * float(change.max()))


def routing_metrics(table: Tensor) -> Metrics:
    """Load and specialisation of a global table ``[layers, regimes, experts]``; the same on every rank."""
    load = table.sum(1).double()
    share = load / load.sum(-1, keepdim=True)
    experts = table.shape[-1]
    information = [regime_information(layer) for layer in table]
    metrics: Metrics = {
        "moe/load_max_over_mean": (float((share.max(-1).values * experts).mean()), "max"),
        "moe/entropy": (float(entropy(share).mean() / math.log(experts)) if experts > 1 else 0.0, "max"),
        "moe/dead_experts": (float((share < 0.01 / experts).sum(-1).double().mean()), "max"),
        "moe/regime_information": (sum(u for u, _ in information) / len(information), "max"),
        "moe/nmi_regime": (sum(n for _, n in information) / len(information), "max"),
    }
    return metrics
