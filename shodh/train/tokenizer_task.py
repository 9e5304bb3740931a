"""What the tokenizer learns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.config import RunConfig
from shodh.data import Split, WindowDataset
from shodh.schema.domain import Domain, describe_domain
from shodh.train.datasets import Regimes
from shodh.train.decoded import DECODED, defined, frame_errors
from shodh.train.losses import reconstruction_loss, reconstruction_terms, weigh_fields, weighted_kinds
from shodh.train.metrics import Metrics
from shodh.train.trainer import Batch, Measured, Outcome


class Geometry:
    """`add_walls`, sample by sample: ``[B, S, X, Y, Z] -> [B, S + 3 + P, X, Y, Z]``; made once a domain and device."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        self._domains = domains
        self._described: dict[tuple[int, torch.device, torch.Size], Tensor] = {}

    def __call__(self, static: Tensor, index: Tensor) -> Tensor:
        """Of samples in the domains ``index [B]``, on the host."""
        rows = [self._of(static, domain) for domain in index.tolist()]
        return torch.cat((static, torch.stack(rows)), 1)

    def _of(self, static: Tensor, domain: int) -> Tensor:
        key = (domain, static.device, static.shape[2:])
        if key not in self._described:
            self._described[key] = describe_domain(static, self._domains[domain])
        return self._described[key]


def open_frames(regimes: Regimes, split: Split) -> list[WindowDataset]:
    """Single frames, a dataset a regime."""
    return [WindowDataset(s, split, history=1, horizon=0, normalizer=regimes.space.normalizer) for s in regimes.sources]


class TokenizerTask:
    """Reconstruct single frames of all regimes."""

    def __init__(self, config: RunConfig, regimes: Regimes) -> None:
        self.regimes = regimes
        self.loss_config = config.tokenizer.loss
        self._geometry = Geometry(regimes.space.domains)

    def start_step(self) -> None:
        """Nothing is carried from one micro-batch to the next."""

    def _reconstruct(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The fields ``[B, C, *grid]`` of a batch, what comes back of them, and their latents."""
        fields, index = batch["fields"][:, 0], batch["sample"][:, 0]
        geometry = self._geometry(batch["static"], index)
        return (fields, *model(fields, geometry, self.regimes.space.domains, index))

    @property
    def measures(self) -> list[str]:
        """Names of `measured`."""
        return [*(f"vrmse_square/{field.name}" for field in self.regimes.space.dynamic), DECODED]

    def _terms(self, prediction: Tensor, fields: Tensor, batch: Batch, kinds: Collection[str]) -> dict[str, Tensor]:
        """`reconstruction_terms`, each component in its unit."""
        unit = self.regimes.space.units(batch["regime"])
        return reconstruction_terms(prediction / unit, fields / unit, self.regimes.space.dynamic, kinds)

    def loss(self, model: Any, batch: Batch, step: int) -> Outcome:
        fields, prediction, latent = self._reconstruct(model, batch)
        terms = self._terms(prediction, fields, batch, weighted_kinds(self.loss_config))
        terms = weigh_fields(terms, self.regimes.space.presence(batch["regime"]), self.regimes.space.dynamic)
        metrics: Metrics = {f"train/{k}": (v.detach().mean(), "mean") for k, v in terms.items()}
        metrics["latent/std"] = (latent.detach().float().std(), "mean")
        errors = torch.stack(list(terms.values())).sum(0).detach()
        return Outcome(reconstruction_loss(terms, self.loss_config), errors, metrics)

    def measured(self, model: Any, batch: Batch) -> Measured:
        """Held-out errors by field, of the samples that have it; and the VRMSE of a sample's fields."""
        fields, prediction, _ = self._reconstruct(model, batch)
        terms = self._terms(prediction, fields, batch, ["vrmse"])
        presence, regime = self.regimes.space.presence(batch["regime"]) > 0, batch["regime"]
        errors = {}
        for number, field in enumerate(self.regimes.space.dynamic):
            there, values = presence[:, number], terms[f"vrmse/{field.name}"]
            errors[f"vrmse_square/{field.name}"] = (values[there], regime[there])
        decoded = frame_errors(self.regimes.space, batch, prediction, fields, batch["static"])
        errors[DECODED] = defined(decoded, regime)
        return Measured(errors)
