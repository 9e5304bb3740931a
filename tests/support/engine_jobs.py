"""What ranks run on an engine alone: a small network, whose gradients are known by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3))


def micro_batch(rank: int, number: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * rank + number)).bfloat16()


def loss_of(model: Any, rank: int, number: int) -> Tensor:
    # Losses of very different size, so that small gradients are added to large ones.
    return 10.0 ** (1 - number) * model(micro_batch(rank, number)).float().square().mean()


def expected_gradient(world: int, accumulation: int) -> dict[str, Tensor]:
    """Mean over ranks and micro-batches, in float64, of the gradients in bf16 that each of them has."""
    model = network().bfloat16()
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for rank in range(world):
        for number in range(accumulation):
            model.zero_grad()
            (loss_of(model, rank, number) / accumulation).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                total[name] += p.grad.double() / world
    return total


def error_of_gradient(deepspeed_json: Path, accumulation: int) -> float:
    """Largest error of what the optimiser was given in one step of an engine in bf16, over the largest gradient.

    Of the elements that this rank keeps.
    """
    from shodh.config import TrainConfig
    from shodh.core.distributed import rank, world_size
    from shodh.core.topology import Topology
    from shodh.moe.groups import decay_groups
    from shodh.train.engine import _moments, build_engine, load_deepspeed_config
    from shodh.train.runtime import start_distributed

    start_distributed()
    train = TrainConfig(steps=1, lr=1e-3, precision="bf16", clip=1e9, betas=(0.5, 0.5))
    topology = Topology(world_size=world_size(), ep_size=1, micro_batch=5, accumulation=accumulation)
    settings = load_deepspeed_config(deepspeed_json, train, topology)
    model = network()
    engine = build_engine(model, decay_groups(model, 0.0), train, settings, "torch")
    for number in range(accumulation):
        engine.backward(loss_of(engine, rank(), number))
        engine.step()
    expected, worst, compared = expected_gradient(world_size(), accumulation), 0.0, 0
    for name, parameter in engine.module.named_parameters():
        if not hasattr(parameter, "ds_id") and parameter._hp_mapping is None:
            continue
        moments = _moments(engine, parameter)
        assert moments is not None
        given = 2 * moments[0].double().flatten()
        if hasattr(parameter, "ds_id"):
            start = rank() * parameter.ds_tensor.numel()
        else:
            start = parameter._hp_mapping.lp_fragment_address.start
        true = expected[name].flatten()[start : start + len(given)]
        worst = max(worst, float((given[: len(true)] - true).abs().max() / expected[name].abs().max()))
        compared += len(true)
    assert compared
    return worst
