"""Weights of a tokenizer beside its training: the basis that is fitted before, the statistics and the file after."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shodh.checkpoint.folder import best_checkpoint, find_checkpoint, read_manifest
from shodh.checkpoint.run_files import write_tokenizer
from shodh.checkpoint.weights import read_weights
from shodh.config import RunConfig
from shodh.core.distributed import connected, rank
from shodh.core.weights import AVERAGED, load_into
from shodh.data import WindowDataset
from shodh.models.basis import PATCH, PatchBasis
from shodh.models.factory import build_tokenizer
from shodh.models.tokenizer import Tokenizer
from shodh.schema.domain import add_walls
from shodh.train.datasets import Regimes
from shodh.train.run_folder import RunFolder

log = logging.getLogger("shodh")


def training_frames(regimes: Regimes, count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """``(regime, item)`` of ``count`` frames of each regime, evenly over its training data; fewer if it has less."""
    for number, source in enumerate(regimes.sources):
        data = WindowDataset(source, "train", history=1, horizon=0, normalizer=regimes.space.normalizer)
        share = min(count, len(data))
        for index in torch.linspace(0, len(data) - 1, share).long().tolist():
            yield number, data[index]


def fit_basis(model: Tokenizer, regimes: Regimes, frames: int = 64, patches: int = 8192) -> None:
    """Set the tokenizer's linear part from training frames; rank 0 decides, so that all ranks have the same bits
    (another machine, or a GPU, finds the same to rounding).

    ``frames`` and ``patches`` are those of a regime. Each set of fields has a basis of its own, from the regimes that
    have these fields.
    """
    if rank() == 0:
        chosen: dict[int, list[Tensor]] = {}
        step = max(1, frames * math.prod(n // PATCH for n in regimes.sources[0].grid) // patches)
        for index, (number, item) in enumerate(training_frames(regimes, frames)):
            geometry = add_walls(item["static"][None], regimes.space.domains[number])
            (head,) = model.head(geometry)
            unit = model.units(regimes.space.domains, [number], geometry.device)
            fields = (model.fill(item["fields"], geometry) / unit)[:, model.basis.channels[head]]
            rows = PatchBasis.patches(fields).flatten(2)[0].T
            # Each frame begins elsewhere: the step divides the grid, and would meet the same places in all of them.
            chosen.setdefault(head, []).append(rows[index % step :: step])
        for head, basis in enumerate(model.basis.heads.values()):
            basis.fit(torch.cat(chosen[head]))  # type: ignore[operator]
    if connected() > 1:
        for buffer in model.basis.buffers():
            value = buffer.to("cuda") if dist.get_backend() == "nccl" else buffer
            dist.broadcast(value, 0)
            buffer.copy_(value)


@torch.no_grad()
def _with_latent_statistics(
    config: RunConfig, regimes: Regimes, checkpoint: Path, device: torch.device
) -> dict[str, Tensor]:
    """Weights with mean and standard deviation of each latent channel put in, over training frames of each head."""
    model = build_tokenizer(config)
    state = read_weights(checkpoint)
    load_into(model, state, checkpoint)
    model.to(device).eval()
    parts: dict[int, list[Tensor]] = {}
    for number, item in training_frames(regimes, 128):
        geometry = add_walls(item["static"][None].to(device), regimes.space.domains[number])
        latent = model.encode(item["fields"].to(device), geometry, model.units(regimes.space.domains, [number], device))
        parts.setdefault(model.head(geometry)[0], []).append(latent[0].flatten(1).cpu())
    values = [torch.cat(parts[head], 1).double() for head in range(len(parts))]
    mean, std = (torch.stack(rows).float() for rows in ([v.mean(1) for v in values], [v.std(1) for v in values]))
    return {**state, "latent_mean": mean, "latent_std": std.clamp(min=1e-6)}


def publish_tokenizer(config: RunConfig, regimes: Regimes, folder: RunFolder, device: torch.device) -> None:
    """Make a run folder a pretrained tokenizer: from its best checkpoint, if it has one, or else from the newest.

    The average of the weights is taken where the run keeps one.
    """
    checkpoint = best_checkpoint(folder.path) or find_checkpoint(folder.path, None)
    state, manifest = _with_latent_statistics(config, regimes, checkpoint, device), read_manifest(checkpoint)
    step, ema = int(manifest["state"]["step"]), AVERAGED in manifest["files"]
    written = write_tokenizer(folder.path, config, regimes.space, state, step, ema)
    log.info("tokenizer of %s written to %s", checkpoint.name, written)
