"""The expert-parallel layer: experts spread over ranks. All contact with DeepSpeed's AutoEP internals is in this file.

Dropless: tokens are sorted by expert, exchanged with uneven all-to-all, run through a grouped GEMM and gathered back,
so a batch that goes to one expert costs no padding. Of DeepSpeed's layer it has the marks of parameters, the groups of
ranks and the place in checkpoints that ZeRO 1, 2 and 3 need; the forward pass is that of the plain-torch twin, with an
exchange of rows around the experts. Built by the model itself before ``deepspeed.initialize``; no ``expert_parallel``
section is needed in the DeepSpeed JSON.

Importing this module imports DeepSpeed; the rest of the package does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, _AllToAllV, _split_plan_from_expert_counts
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.moe.experts import build_added, build_dense, build_stack, output_width
from shodh.moe.grouped import Order, mix_experts
from shodh.moe.groups import decay_groups
from shodh.moe.routers import make_router
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing


def _spec(config: ExpertsConfig, dim: int) -> MoELayerSpec:
    return MoELayerSpec(
        moe_module_name="",
        model_family="custom",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="w1",
        expert_w2_name="w2",
        expert_w3_name="w3",
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden_size=dim,
        ffn_hidden_size=config.hidden,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=config.num_shared > 0,
        shared_experts_name="shared",
        shared_experts_gate_name="",
        expert_activation="swiglu",  # Of its own forward pass, which never runs.
    )


class _Source(nn.Module):
    """What AutoEP copies its shapes from; the weights are drawn later, by `seeded_reset`."""

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = nn.Module()
        for name, parameter in build_stack(config, dim, 1).named_parameters():
            # Expanded, so that a rank never allocates more than the experts it keeps.
            stacked = torch.zeros_like(parameter).expand(config.num_experts, -1, -1)
            self.experts.register_parameter(name, nn.Parameter(stacked))
        if config.num_shared:
            self.shared = build_dense(config, dim, config.num_shared)


def _mark_replicated(module: nn.Module) -> None:
    """Say that every rank holds these parameters, so that their gradients are averaged over all ranks."""
    for parameter in module.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]


class ExpertLayer(AutoEPMoELayer):
    """Shared and added experts plus top-k routed experts spread over ``ep_size`` ranks.

    ``forward(x [B, S, D], inputs) -> (output [B, S, O], Routing)``, as `shodh.moe.experts.ExpertLayerReference`, with
    the same parameter names; ``experts.w*`` hold this rank's experts only. On one rank it is the same computation; on
    more, an expert also gets the rows of other ranks, and a matrix product of more rows may round otherwise.

    Parameters
    ----------
    ep_size, ep_rank : int
        Ranks that share one set of experts, and this rank's place among them.
    """

    def __init__(self, config: ExpertsConfig, dim: int, ep_size: int, ep_rank: int) -> None:
        super().__init__(_spec(config, dim), _Source(config, dim), ep_size, ep_rank, AutoEPConfig())
        self.width = output_width(config, dim)
        self.router = make_router(config, dim)
        _mark_replicated(self.router)
        with torch.device("meta"):
            stack = build_stack(config, dim, self.num_local_experts, self.first_expert)
        for name in ("w1", "w2", "w3"):  # The parameters that DeepSpeed has marked.
            setattr(stack, name, getattr(self.experts, name))
        self.experts: nn.Module = stack
        self.added_experts = build_added(config, dim)
        if self.added_experts is not None:
            _mark_replicated(self.added_experts)

    @property
    def first_expert(self) -> int:
        """Global id of this rank's first expert."""
        return int(self.ep_rank * self.num_local_experts)

    def forward(self, hidden_states: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing]:
        x = hidden_states
        routing: Routing = self.router(x, inputs)
        run = self.experts if self.ep_size == 1 else self._run_on_owners
        output = mix_experts(x.reshape(-1, x.shape[-1]), routing, run).view(*x.shape[:-1], self.width)
        if self.shared_experts is not None:
            output = output + self.shared_experts(x)
        if self.added_experts is not None:
            output = output + self.added_experts(x)
        return output, routing

    def _run_on_owners(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Send rows sorted by expert to the ranks that hold these, and their outputs back: ``[N, D] -> [N, O]``.

        Collective over the ranks of the expert-parallel group.
        """
        plan = _split_plan_from_expert_counts(counts, self.ep_size, self.num_local_experts, self.ep_group)
        received = _AllToAllV.apply(self.ep_group, rows, plan.input_splits, plan.output_splits)
        # They come by rank, and of each rank by expert.
        by_rank = plan.local_counts_by_source
        expert = torch.arange(self.num_local_experts, device=rows.device).repeat(self.ep_size)
        order = Order(expert.repeat_interleave(by_rank.flatten(), output_size=len(received)))
        out = order.restore(self.experts(order.sort(received), by_rank.sum(0)))
        back: Tensor = _AllToAllV.apply(self.ep_group, out, plan.output_splits, plan.input_splits)
        return back


def expert_layer_factory(ep_size: int, ep_rank: int) -> Callable[[ExpertsConfig, int], ExpertLayer]:
    """What a model calls to build its expert layers on this rank."""
    return lambda config, dim: ExpertLayer(config, dim, ep_size, ep_rank)


def local_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of an exchange-format state: of stacked experts, the rows this rank keeps."""
    local = dict(state)
    for path, layer in model.named_modules():
        if isinstance(layer, ExpertLayer):
            for name, parameter in layer.experts.named_parameters():
                key = f"{path}.experts.{name}"
                if key in local and local[key].shape[0] == layer.num_experts:
                    local[key] = local[key][layer.first_expert : layer.first_expert + parameter.shape[0]]
    return local


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """`decay_groups`, with experts apart as DeepSpeed needs them.

    Every trainable parameter is in exactly one group; group names are unique.
    """
    groups = split_params_into_different_moe_groups_for_optimizer(decay_groups(model, weight_decay))
    return [group for group in groups if group["params"]]
