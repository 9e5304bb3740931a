"""What ranks run on an engine alone: a small network, whose gradients are known by other means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def compiled_by_engine(deepspeed_json: Path) -> list[str]:
    """Functions of Muon, which every engine imports, that are compiled after a step: they need torch's compiler."""
    error_of_gradient(deepspeed_json, 1)
    from deepspeed.runtime.zero.muon import original_muon

    return [name for name, value in vars(original_muon).items() if hasattr(value, "_torchdynamo_orig_callable")]


def still_after(deepspeed_json: Path, cases: list[dict[str, Any]]) -> list[list[str]]:
    """Names that the check after the first step finds in an engine of one rank, for each of ``cases``.

    Parameters of a case
    --------------------
    lr, clip : float
        Of the step.
    lost, put_back, zero : str
        Parameters, by the beginning of their names, that the optimiser does not step and has no state of, whose old
        value it puts back, or all of which have a gradient of zero (``all``).
    """
    from shodh.config import TrainConfig
    from shodh.core.topology import Topology
    from shodh.train.engine import MovementCheck, build_engine, load_deepspeed_config
    from shodh.train.runtime import start_distributed

    start_distributed()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def case(lr: float, clip: float = 1.0, lost: str = "", put_back: str = "", zero: str = "") -> list[str]:
        train = TrainConfig(steps=1, clip=clip, betas=(0.9, 0.999))
        settings = load_deepspeed_config(deepspeed_json, train, Topology(1, 1, micro_batch=3, accumulation=1))
        layers = {"norm": nn.LayerNorm(4), "map": nn.Linear(4, 4), "more": nn.Linear(4, 4)}
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
        groups = [{"params": list(layer.parameters()), "name": n, "weight_decay": 0.0} for n, layer in layers.items()]
        engine = build_engine(model, groups, train, settings, "torch")
        optimizer = engine.optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step = partial(_faulty_step, optimizer.step, engine, lost, put_back)
        check = MovementCheck(engine)
        engine.backward(engine(x).square().sum() * (0.0 if zero == "all" else 1.0))
        engine.step()
        return check.finish(lr)

    return [case(**settings) for settings in cases]


def _faulty_step(step: Callable[[], Any], engine: Any, lost: str, put_back: str) -> None:
    """A step of the optimiser that loses a group of parameters, and whose change of some is taken back."""
    groups = engine.optimizer.optimizer.param_groups
    for group in groups:
        if lost and group["name"] == lost:
            for flat in group["params"]:
                flat.grad = None
    fragments = {n: p._hp_mapping.hp_fragment for n, p in engine.module.named_parameters() if n == put_back}
    before = {name: fragment.detach().clone() for name, fragment in fragments.items()}
    step()
    for name, fragment in fragments.items():
        fragment.data.copy_(before[name])
