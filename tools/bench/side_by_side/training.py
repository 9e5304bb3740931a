"""One training and one evaluation for every model: the same batches in the same order, loss, optimiser and schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shodh.core.seeding import generator
from shodh.schema.measures import MEASURES, Truth, mean_square_error

from .models import Entry
from .sets import Data

WARM_UP = 0.1  # of the steps
CLIP = 1.0  # norm of the gradient
CAP = 100.0  # an error above it, or one that is not finite, counts as this: worse than useless
LEAST = 1e-6  # mean square of a field over its training variance, below which it has no relative error
MEASURED = ("vrmse", "nrmse")


def batch_of(data: Tensor, key: Sequence[Any], size: int, history: int) -> tuple[Tensor, Tensor]:
    """Windows drawn by a key: ``[B, T, C, n, n]`` and the frames that follow, ``[B, C, n, n]``."""
    draw = generator(0, "peers batch", *key)
    trajectories = torch.randint(len(data), (size,), generator=draw)
    starts = torch.randint(data.shape[1] - history, (size,), generator=draw)
    windows = torch.stack([data[t, s : s + history + 1] for t, s in zip(trajectories.tolist(), starts.tolist())])
    return windows[:, :history], windows[:, history]


def schedule(share: float) -> float:
    """Factor of the learning rate after a share of the steps: a linear rise, and half a cosine down to 0."""
    if share < WARM_UP:
        return share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def adam(model: nn.Module, entry: Entry, rate: float) -> torch.optim.Optimizer:
    """AdamW with the published decay and betas of a model."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=entry.betas, weight_decay=entry.decay)


def step(model: nn.Module, optimiser: torch.optim.Optimizer, history: Tensor, target: Tensor) -> Tensor:
    """One step on the mean square error of normalised fields; returns it, detached."""
    error = (model(history) - target).square().mean()
    added = getattr(model, "added", None)
    optimiser.zero_grad(set_to_none=True)
    (error if added is None else error + added).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimiser.step()
    if hasattr(model, "finish_step"):
        model.finish_step()
    return error.detach()


def train(
    model: nn.Module,
    entry: Entry,
    data: Tensor,
    *,
    steps: int,
    rate: float,
    batch: int,
    history: int,
    key: Sequence[Any],
    device: str,
) -> float:
    """Train for so many steps; mean loss of the last tenth. The batch of a step depends on ``key`` and its number."""
    optimiser = adam(model, entry, rate)
    model.train()
    losses = []
    for number in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * schedule((number + 1) / (steps + 1))
        given, target = (x.to(device) for x in batch_of(data, (*key, number), batch, history))
        losses.append(step(model, optimiser, given, target))
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def errors(prediction: Tensor, truth: Tensor, data: Data) -> dict[str, Tensor]:
    """Mean over fields of each measure, ``[B]``: VRMSE of normalised fields, nRMSE of those in physical units."""
    mean, scale = (x.view(-1, 1, 1) for x in (data.mean, data.scale))
    found: dict[str, Tensor] = {}
    for name in MEASURED:
        u, v = (prediction, truth) if name == "vrmse" else (prediction * scale + mean, truth * scale + mean)
        parts = []
        for channels in data.fields.values():
            a, b = u[:, channels].double(), v[:, channels].double()
            of_truth = Truth.of(b)
            value = MEASURES[name].of(mean_square_error(a, b), of_truth, 0.0)
            if name == "nrmse":  # Nothing is relative to a field that is as good as zero.
                zero = of_truth.square().sum(1) < LEAST * data.scale[channels].double().square().sum()
                value = torch.where(zero, torch.nan, value)
            parts.append(value)
        found[name] = torch.stack(parts).nanmean(0).clamp(max=CAP)
    return found


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    data: Data,
    split: str,
    *,
    history: int,
    rollout: int,
    starts: Sequence[int],
    batch: int,
    device: str,
) -> dict[str, Any]:
    """Errors of each trajectory: of one step, the mean over its windows; of rollouts, by step, the mean over starts.

    ``{"one_step": {measure: [N]}, "rollout": {measure: [N][steps]}}``
    """
    frames = data.splits[split]
    windows = frames.unfold(1, history + 1, 1).movedim(-1, 2)  # [N, W, T + 1, C, n, n]
    flat = windows.flatten(0, 1)
    ahead = torch.cat([model(part[:, :history].to(device)).cpu() for part in flat.split(batch)])
    by_window = errors(ahead, flat[:, history], data)
    one = {name: values.unflatten(0, windows.shape[:2]).nanmean(1).tolist() for name, values in by_window.items()}
    state = torch.cat([frames[:, start : start + history] for start in starts])
    by_step: dict[str, list[Tensor]] = {name: [] for name in MEASURED}
    for number in range(rollout):
        following = torch.cat([model(part.to(device)).cpu() for part in state.split(batch)])
        truth = torch.cat([frames[:, start + history + number] for start in starts])
        for name, values in errors(following, truth, data).items():
            by_step[name].append(values.unflatten(0, (len(starts), len(frames))).nanmean(0))
        state = torch.cat((state[:, 1:], following[:, None]), 1)
    long = {name: torch.stack(values, 1).tolist() for name, values in by_step.items()}
    return {"one_step": one, "rollout": long}


def step_costs(
    models: Mapping[str, tuple[Entry, nn.Module]], given: Tensor, target: Tensor, *, rounds: int, device: str
) -> dict[str, float]:
    """Seconds of one step of each model, the least of ``rounds`` that take turns: of the process, of a card's clock.

    On a shared machine the time of a step rises with what runs beside it; the least of many does so least, and turns
    spread the disturbance over all models alike.
    """

    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    optimisers = {name: adam(model, entry, 1e-4) for name, (entry, model) in models.items()}
    found = dict.fromkeys(models, math.inf)
    given, target = given.to(device), target.to(device)
    for number in range(rounds + 1):
        for name, (_, model) in models.items():
            model.train()
            start = clock()
            step(model, optimisers[name], given, target)
            if number:  # The first one pays for what is made once.
                found[name] = min(found[name], clock() - start)
    return found


def peak_memory(device: str) -> float:
    """The most memory this process (or its card) has held, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def parameter_count(model: nn.Module) -> int:
    """Real numbers that are trained; a complex one is two."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters() if p.requires_grad)
