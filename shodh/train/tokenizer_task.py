"""What the loop trains first: the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.core.topology import Topology
from shodh.data import WindowDataset
from shodh.schema.domain import Domain, add_walls
from shodh.train.datasets import Regimes, mixture_loader, training_splits
from shodh.train.loop import Batch
from shodh.train.losses import reconstruction_loss, reconstruction_terms, weigh_fields
from shodh.train.metrics import Metrics, MetricWriter, RegimeMeans, nonfinite_regimes


def sample_geometry(static: Tensor, domains: Sequence[Domain], index: Tensor) -> Tensor:
    """`add_walls`, sample by sample: ``[B, S, X, Y, Z] -> [B, S + 3 + P, X, Y, Z]``."""
    return torch.cat([add_walls(static[b : b + 1], domains[i]) for b, i in enumerate(index.tolist())])


class TokenizerTask:
    """Reconstruct single frames of all regimes."""

    def __init__(self, config: RunConfig, regimes: Regimes, topology: Topology) -> None:
        self.regimes = regimes
        self.loss_config = config.tokenizer.loss
        self.valid_batches = config.tokenizer.train.valid_batches
        self._loaders = {
            split: mixture_loader(
                [WindowDataset(s, split, history=1, horizon=0, normalizer=regimes.normalizer) for s in regimes.sources],
                config,
                topology,
                seed,
            )
            for split, seed in training_splits(config)
        }

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return self._loaders["train"].iterate(start, stop)

    def _terms(self, engine: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        fields, index = batch["fields"][:, 0], batch["regime"]
        geometry = sample_geometry(batch["static"], self.regimes.domains, index)
        prediction, latent = engine(fields, geometry, self.regimes.domains, index)
        return reconstruction_terms(prediction, fields, self.regimes.dynamic), latent

    def loss(self, engine: Any, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        terms, latent = self._terms(engine, batch)
        terms = weigh_fields(terms, self.regimes.presence(batch["regime"]), self.regimes.dynamic)
        self._errors_of_step.append((batch["regime"], torch.stack(list(terms.values())).sum(0).detach()))
        metrics: Metrics = {f"train/{k}": (v.detach().mean(), "mean") for k, v in terms.items()}
        metrics["latent/std"] = (latent.detach().float().std(), "mean")
        return reconstruction_loss(terms, self.loss_config), metrics

    def start_step(self, step: int) -> None:
        self._errors_of_step: list[tuple[Tensor, Tensor]] = []

    def nonfinite_regimes(self) -> list[str]:
        return nonfinite_regimes(self._errors_of_step, self.regimes.names)

    def finish_step(self, engine: Any, step: int) -> None:
        pass

    def report(self, step: int, writer: MetricWriter | None) -> Metrics:
        return {}

    def validate(self, engine: Any, step: int) -> Metrics:
        means = RegimeMeans(self.regimes.names)
        columns = {f.name: number for number, f in enumerate(self.regimes.dynamic)}
        for batch in self._loaders["valid"].iterate(0, self.valid_batches):
            batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
            terms, _ = self._terms(engine, batch)
            presence = self.regimes.presence(batch["regime"])
            for name, values in terms.items():
                kind, field = name.split("/", 1)
                if kind == "relative_l2":
                    there = presence[:, columns[field]] > 0
                    means.add(f"relative_square/{field}", values[there], batch["regime"][there])
        return means.reduce("valid")

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
        for source in self.regimes.sources:
            source.close()
