"""A group of experts by the sample, an expert of it by the token."""

from __future__ import annotations

from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.moe.gates import make_gate
from shodh.moe.routers.base import GroupedRouter, sample_mean
from shodh.moe.routing import Routing


class TwoLevelRouter(GroupedRouter):
    """``p(e) = p(group | sample mean) * p(e | group, token)``; the selection bias of a group is its experts' mean."""

    def build(self, config: ExpertsConfig, dim: int) -> None:
        super().build(config, dim)
        self.group_gate = make_gate(config.router, dim, self.num_groups, self.num_groups)

    def route(self, x: Tensor) -> Routing:
        tokens = x.float()
        group_bias = self.selection_bias.float().view(self.num_groups, -1).mean(1)
        group_probs = self.group_gate(sample_mean(tokens))[0].softmax(-1)
        return self.route_in_groups(tokens, group_probs, group_bias)
