"""Activation checkpointing keeps the inputs of blocks, and nothing that it computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shodh.config import ExpertsConfig, FieldSpaceConfig, OperatorConfig
from shodh.models.dpot import PotOperator
from shodh.models.field_space import FieldSpace
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer

Build = Callable[[int, bool], tuple[nn.Module, tuple[Tensor, Tensor]]]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made within the block, not views of ``given``, that are alive: now, and at most."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._given:
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out


def experts(**settings: Any) -> ExpertsConfig:
    return ExpertsConfig(**{"num_experts": 4, "top_k": 2, "hidden": 64, **settings})


def latent(layer: str) -> Build:
    def build(depth: int, checkpointing: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        config = OperatorConfig(dim=32, heads=4, depth=depth, experts=experts(), activation_checkpointing=checkpointing)
        arguments = {}
        if layer == "engine":
            pytest.importorskip("deepspeed")
            from shodh.moe.layer import expert_layer_factory

            arguments["expert_layer"] = expert_layer_factory(1, 0)
        model = LatentTransformer(config, 4, 1, (8, 8, 8), 2, **arguments)
        return model, (torch.randn(2, 2, 4, 8, 8, 8), torch.randn(2, 1, 8, 8, 8))

    return build


def fields(depth: int, checkpointing: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    config = OperatorConfig(
        kind="moe_pot",
        loss="relative_l2",
        random_shifts=False,
        dim=32,
        heads=4,
        depth=depth,
        patch=2,
        field=FieldSpaceConfig(mlp=64),
        experts=experts(form="linear", hidden=32),
        activation_checkpointing=checkpointing,
    )
    space = FieldSpace(2, 0, (32, 32), 2)
    return PotOperator(config, space), (torch.randn(2, 2, 2, 32, 32), torch.randn(2, 0, 32, 32))


def peak_and_rest(build: Build, depth: int, checkpointing: bool) -> tuple[int, int]:
    """Peak bytes of forward and backward, and those alive behind it that are no gradients of parameters."""
    model, inputs = build(depth, checkpointing)
    initialise(model, 0)
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs]) as live:
        output = model(*inputs)
        (output.latent.square().mean() + sum(r.probs.square().mean() for r in output.routing)).backward()
        del output
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        return live.peak, live.now() - gradients


@pytest.mark.parametrize("build", [latent("twin"), latent("engine"), fields], ids=["twin", "engine", "moe_pot"])
def test_memory_grows_by_the_input_of_a_block(build: Build) -> None:
    growth = {}
    for checkpointing in (False, True):
        (few, _), (many, rest) = (peak_and_rest(build, depth, checkpointing) for depth in (1, 3))
        growth[checkpointing] = (many - few) / 2
        # Angles of positions, and the like.
        assert rest < 0.01 * growth[False], f"{rest} bytes outlive the step"
    assert growth[True] < 0.2 * growth[False]
