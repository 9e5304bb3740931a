"""The expert layer of a training run: experts spread over ranks, as DeepSpeed's ZeRO 1, 2 and 3 need them.

The computation is that of `shodh.moe.experts.ExpertLayerReference`. Of DeepSpeed the layer has what the engine goes
by: its class, marks of parameters, groups of ranks and places in checkpoints. All contact with DeepSpeed's AutoEP is
in this file; tests/unit/test_deepspeed_contract.py names each. Importing it imports DeepSpeed; the rest of the package
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.groups import decay_groups


class _Recognised(AutoEPMoELayer):
    """What DeepSpeed's engine looks for with ``isinstance``, and how it gives a layer its group; nothing more of it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # Not that of AutoEPMoELayer, which makes a router and experts of its own.
        self.folding_group_handles = None


class ExpertLayer(ExpertLayerReference, _Recognised):
    """`ExpertLayerReference` with its routed experts spread over ``ep_size`` ranks, under the same names.

    ``experts.w*`` hold this rank's experts only. On one rank it is the same computation; on more, an expert also gets
    the rows of other ranks, and a matrix product of more rows may round otherwise.

    Parameters
    ----------
    ep_size, ep_rank : int
        Ranks that share one set of experts, and this rank's place among them. On more than one, DeepSpeed's engine
        calls `set_deepspeed_parallelism` before the first forward pass.
    """

    def __init__(self, config: ExpertsConfig, dim: int, ep_size: int, ep_rank: int) -> None:
        super().__init__(config, dim, ep_size, ep_rank)
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.num_experts, self.num_local_experts = config.num_experts, config.num_experts // ep_size
        self.ep_group_name = f"ep_size_{ep_size}"
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, ep_size
        )
        for parameter in self.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]
        for parameter in self.experts.parameters():
            self._mark_spread(parameter)

    def _mark_spread(self, parameter: nn.Parameter) -> None:
        """Say that other ranks of the group hold other experts, and which these are."""
        placement, shape = self.expert_placement_descriptor, [self.num_experts, *parameter.shape[1:]]
        marks = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            DS_AUTOEP_UC_META: {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            },
        }
        for name, value in marks.items():
            setattr(parameter, name, value)

    @property
    def first_expert(self) -> int:
        """Global id of this rank's first expert."""
        return self.experts.first_expert

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Make the groups of ranks, or find them made. Collective; DeepSpeed's engine calls it."""
        super().set_deepspeed_parallelism(*args, **kwargs)
        if self.ep_size == 1:
            self.ep_group = None


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
