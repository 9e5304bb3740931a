"""What ranks of an engine hold and send, counted: bytes of its tensors, and bytes given to collectives."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
DIM, LAYERS, BUCKET = 256, 8, 150_000  # parameters of a layer are fewer than those of a bucket


def held() -> dict[int, int]:
    """Bytes by storage of all tensors that live in this process."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def count_sent(counts: Counter[str], least: int = 0) -> None:
    """Count from here on, in this process, the bytes of the larger tensor of each call of a collective."""

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
            size = max((t.nbytes for t in tensors), default=0)
            counts[name] += size if size >= least else 0
            return original(*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))


def engines(cases: list[tuple[Path, str, int]]) -> list[dict[str, Any]]:
    """For each (DeepSpeed JSON, precision, accumulation): most bytes held in a step, bytes sent in it, and sizes.

    ``early`` of what was sent when the last backward pass came to the first layer.
    """
    from shodh.core.distributed import world_size
    from shodh.train.runtime import start_distributed

    warnings.simplefilter("ignore")
    sent: Counter[str] = Counter()
    count_sent(sent, least=DIM * DIM)
    start_distributed()
    return [_engine(sent, world_size(), *case) for case in cases]


def _engine(sent: Counter[str], world: int, path: Path, precision: Any, accumulation: int) -> dict[str, Any]:
    from torch import nn

    from shodh.config import TrainConfig
    from shodh.core.topology import Topology
    from shodh.moe.groups import decay_groups
    from shodh.train.engine import build_engine, load_deepspeed_config

    gc.collect()
    before = held()
    train = TrainConfig(steps=1, lr=1e-3, precision=precision)
    settings = load_deepspeed_config(path, train, Topology(world, 1, 5, accumulation))
    sizes = {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
    settings["zero_optimization"] |= sizes | {"stage3_param_persistence_threshold": 0}
    model = nn.Sequential(*(nn.Linear(DIM, DIM, bias=False) for _ in range(LAYERS)))
    engine = build_engine(model, decay_groups(model, 0.0), train, settings, "torch")
    x = torch.randn(5, DIM, dtype=next(engine.module.parameters()).dtype)
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(size for place, size in held().items() if place not in before))

    for layer in (engine.module[0], engine.module[-1]):
        layer.register_full_backward_hook(look)
    early: Counter[str] = Counter()
    engine.module[0].register_full_backward_hook(lambda *_: early.update(sent - early))
    for step in range(2):  # The optimiser has its moments after the first.
        if step == 1:
            sent.clear()
            early.clear()
            most = 0
        for _ in range(accumulation):
            engine.backward(engine(x).float().square().mean())
            look()
            engine.step()
    found = {"held": most, "sent": dict(sent), "early": dict(early)}
    return {**found, "zero": settings["zero_optimization"], "size": LAYERS * DIM * DIM}


def rows_sent(config: Path, changes: list[str]) -> int:
    """Bytes of rows that a rank gives to all-to-alls in a training and its validation, also those that stay."""
    from shodh.config import load_config
    from shodh.train.jobs import pretrain

    sent: Counter[str] = Counter()
    run = load_config(config, changes)
    original = dist.all_to_all_single

    def counted(out: torch.Tensor, given: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sent["rows"] += given.nbytes if given.ndim == 2 and given.shape[1] == run.operator.dim else 0
        return original(out, given, *arguments, **options)

    dist.all_to_all_single = counted
    assert pretrain(run)
    return sent["rows"]
