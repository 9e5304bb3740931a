"""Floating-point work of an operator, as routed: what a token really passes through.

Counted by `torch.utils.flop_counter` on the meta device, of the dense model of equal active size: it does the work of a
sparse one but for the router, whose matrices are added. Fourier transforms, norms and activations are not counted; they
are the same in all models of a study.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shodh.config import RunConfig
from shodh.models.factory import operator_shapes, operator_space
from shodh.moe.grouped import product_flops
from shodh.moe.routers import Router

_COUNTED: dict[str, int] = {}
BACKWARD = 2  # a backward pass costs twice the forward's products: gradients of inputs and of weights


def flop_counter() -> FlopCounterMode:
    """torch's counter, with the grouped GEMM that it does not know."""
    grouped = {torch.ops.aten._grouped_mm: lambda left, right, *_, **__: product_flops(left, right)}
    return FlopCounterMode(display=False, custom_mapping=grouped)


def forward_flops(config: RunConfig) -> int:
    """Multiplications and additions of one sample's forward pass through the operator."""
    sparse = config.operator.experts.num_experts > 0
    experts = config.operator.experts.model_copy(update={"num_experts": 0})
    active = config.model_copy(update={"operator": config.operator.model_copy(update={"experts": experts})})
    return _counted(active if sparse else config) + (_router_flops(config) if sparse else 0)


def _counted(config: RunConfig) -> int:
    """Products of a forward pass; runs that differ in what a pass does not see are counted once."""
    unseen: dict[str, Any] = {"train": True}
    if config.operator.experts.num_experts == 0:  # Then there is no router.
        unseen["experts"] = {"router", "balance"}
    key = config.model_dump_json(include={"data", "tokenizer", "operator"}, exclude={"operator": unseen})
    if key not in _COUNTED:
        model = operator_shapes(config)
        inputs, names = sample_inputs(config, "meta"), config.operator.conditions
        told = {"conditions": torch.empty(1, len(names), device="meta")} if names else {}
        with flop_counter() as counter, torch.no_grad():
            model(*inputs, **told)
        _COUNTED[key] = int(counter.get_total_flops())
    return _COUNTED[key]


def step_flops(config: RunConfig) -> int:
    """Work of one optimiser step over all ranks: forward and backward of the global batch, in every unrolled step.

    With the pass that measures the error where noise is relative to it. Not that of a decoder that the loss passes
    through (`OperatorConfig.metric`): `shodh.train.rehearsal` counts it.
    """
    operator = config.operator
    passes = (1 + BACKWARD) * operator.unroll.steps + (operator.noise_relative_to == "error")
    return passes * operator.train.global_batch * forward_flops(config)


def sample_inputs(config: RunConfig, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample's history and static input as the operator of a run is given them; their values are arbitrary."""
    space = operator_space(config)
    history = torch.empty(1, space.history, space.channels, *space.grid, device=device)
    return history, torch.empty(1, space.static, *space.grid, device=device)


def _router_flops(config: RunConfig) -> int:
    """Two a weight and decision, for a token or a sample; a gate of the model decides once a sample for all layers."""
    model = operator_shapes(config)
    routers = [m for m in model.modules() if isinstance(m, Router)]
    gates = sum(t.numel() for r in routers for t in (*r.parameters(), *_frozen(r)) if t.ndim == 2)
    decisions = 1 if config.operator.experts.router.granularity == "sample" else math.prod(model.token_grid)
    shared = sum(p.numel() for name, p in model.named_parameters() if name.startswith("router.") and p.ndim == 2)
    return 2 * (gates * decisions + shared)


def _frozen(router: Router) -> list[torch.Tensor]:
    """Weights of a gate that is not trained, which are buffers."""
    return [] if router.traits.trained else list(router.buffers())
