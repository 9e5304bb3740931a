"""The expert-parallel layer: DeepSpeed's AutoEP layer with our router. All contact with its internals is in this file.

Dropless: tokens are sorted by expert, exchanged with uneven all-to-all, run through a grouped GEMM and gathered back,
so a batch that goes to one expert costs no padding. Works under ZeRO 1, 2 and 3. Built by the model itself before
``deepspeed.initialize``; no ``expert_parallel`` section is needed in the DeepSpeed JSON.

Importing this module imports DeepSpeed; the rest of the package does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, register_expert_activation
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn
from torch.nn import functional as F

from shodh.config import ExpertsConfig
from shodh.moe.experts import bilinear, build_added, build_dense, gelu, inner_rows, output_width, reset_experts
from shodh.moe.groups import decay_groups
from shodh.moe.router import SemanticRouter
from shodh.moe.routing import NO_INPUTS, RouterInputs, Routing
from shodh.seeding import Key

ROW_ALIGNMENT = 8  # numbers: the grouped GEMM wants rows of 16 bytes, in bf16 too

if "bilinear" not in EXPERT_ACTIVATIONS:
    register_expert_activation("bilinear", lambda gate, up, alpha, limit: bilinear(gate, up))
    register_expert_activation("gelu", lambda first, second, alpha, limit: gelu(first, second))


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
        hidden_size=max(dim, output_width(config, dim)),
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
        expert_activation=config.activation if config.form == "gated" else "gelu",
    )


class _Source(nn.Module):
    """What AutoEP copies its shapes from; the weights are drawn later, by `seeded_reset`."""

    def __init__(self, config: ExpertsConfig, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = nn.Module()
        rows, last = inner_rows(config.hidden, config.activation), (dim, config.hidden)
        if config.form == "linear":
            rows, last = config.hidden // 2, (config.hidden, 1)
        for name, shape in (("w1", (rows, dim)), ("w2", last), ("w3", (rows, dim))):
            # Expanded, so that a rank never allocates more than the experts it keeps.
            stacked = torch.zeros(1, *shape).expand(config.num_experts, -1, -1)
            self.experts.register_parameter(name, nn.Parameter(stacked))
        if config.num_shared:
            self.shared = build_dense(config, dim, config.num_shared)


class _LinearExperts(nn.Module):
    """This rank's experts of form linear, over the parameters that DeepSpeed has marked as spread.

    ``forward(x [N, M], counts [E_local]) -> [N, M]`` of rows sorted by expert; of these ``dim`` are read and
    ``width`` written, the others are zeros. The halves are multiplied apart, so that no weight is copied, which would
    cost the more the more experts there are. The bias is a grouped GEMM with rows of a one, so that its gradient is a
    sum in there: deterministic, unlike a scattered one.
    """

    biases = ("w2",)

    def __init__(self, marked: nn.Module, dim: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (getattr(marked, name) for name in ("w1", "w2", "w3"))
        self.dim = dim

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = torch.cumsum(counts, 0, dtype=torch.int32)

        def multiply(rows: Tensor, weight: Tensor) -> Tensor:
            return torch._grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)

        inputs, padding = x[:, : self.dim], (0, ROW_ALIGNMENT - 1)
        halves = torch.cat((multiply(inputs, self.w1), multiply(inputs, self.w3)), 1)
        bias = multiply(F.pad(x.new_ones(len(x), 1), padding), F.pad(self.w2, padding))
        out = F.gelu(halves + bias)
        return F.pad(out, (0, x.shape[1] - out.shape[1]))


def _mark_replicated(module: nn.Module) -> None:
    """Say that every rank holds these parameters, so that their gradients are averaged over all ranks."""
    for parameter in module.parameters():
        parameter.allreduce = True  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]


class ExpertLayer(AutoEPMoELayer):
    """Shared and added experts plus top-k routed experts spread over ``ep_size`` ranks.

    ``forward(x [B, S, D], inputs) -> (output [B, S, O], Routing)``, as `shodh.moe.experts.ExpertLayerReference`, with
    the same parameter names; ``experts.w*`` hold this rank's experts only. On CUDA the shared experts run on a side
    stream while the dispatch is in flight. float64 is not supported (the grouped GEMM rejects it).

    DeepSpeed dispatches and combines rows of one width: where ``O`` differs from ``D`` rows are padded to the wider.

    Parameters
    ----------
    ep_size, ep_rank : int
        Ranks that share one set of experts, and this rank's place among them.
    """

    def __init__(self, config: ExpertsConfig, dim: int, ep_size: int, ep_rank: int) -> None:
        super().__init__(_spec(config, dim), _Source(config, dim), ep_size, ep_rank, AutoEPConfig())
        self.dim, self.width = dim, output_width(config, dim)
        self.router = SemanticRouter(config, dim)
        _mark_replicated(self.router)
        if config.form == "linear":
            self.experts: nn.Module = _LinearExperts(self.experts, dim)
        self.added_experts = build_added(config, dim)
        if self.added_experts is not None:
            _mark_replicated(self.added_experts)
        self._shared_output: Tensor | None = None
        self._side_stream: torch.cuda.Stream | None = None

    @property
    def first_expert(self) -> int:
        """Global id of this rank's first expert."""
        return int(self.ep_rank * self.num_local_experts)

    def seeded_reset(self, *key: Key) -> None:
        """Draw this rank's experts, each from its global id, exactly as the plain-torch twin draws them."""
        *seed, name = key
        reset_experts(self.experts, self.first_expert, *seed, f"{name}.experts")

    def forward(self, hidden_states: Tensor, inputs: RouterInputs = NO_INPUTS) -> tuple[Tensor, Routing]:
        batch, tokens, _ = hidden_states.shape
        self.router.prepare((batch, tokens), inputs)
        self._start_shared(hidden_states)
        rows = F.pad(hidden_states, (0, self.width - self.dim)) if self.width > self.dim else hidden_states
        output = super().forward(rows)
        if self.added_experts is not None:
            output = output + self.added_experts(hidden_states)
        return output, self.router.take()

    def _start_shared(self, x: Tensor) -> None:
        """On CUDA, start the shared experts beside the dispatch (ZeRO-3 gathers weights by hooks: leave it alone)."""
        if self.shared_experts is None or not x.is_cuda or hasattr(self.shared_experts.w1.weight, "ds_id"):
            return
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(x.device)
        current = torch.cuda.current_stream(x.device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            x.record_stream(self._side_stream)
            self._shared_output = self.shared_experts(x)

    def _finalize_output(self, output: Tensor, x: Tensor, hidden_states: Tensor, hdim: int) -> Any:
        output = output[..., : self.width]
        if self._shared_output is None:
            return super()._finalize_output(output, x, hidden_states[..., : self.dim], hdim)
        shared, self._shared_output = self._shared_output, None
        current = torch.cuda.current_stream(shared.device)
        current.wait_stream(self._side_stream)  # type: ignore[arg-type]
        shared.record_stream(current)
        return output + shared


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
    """Optimiser groups: matrices with decay, the rest without, experts apart as DeepSpeed needs them.

    Every trainable parameter is in exactly one group; group names are unique.
    """
    groups = split_params_into_different_moe_groups_for_optimizer(decay_groups(model, weight_decay))
    return [group for group in groups if group["params"]]
