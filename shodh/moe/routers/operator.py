"""Experts by the operator that moves the sample: its fingerprint, which forgets the state."""

from __future__ import annotations

from torch import Tensor, nn

from shodh.config import ExpertsConfig
from shodh.moe.clusters import Clusters
from shodh.moe.fingerprint import fingerprint_size
from shodh.moe.gates import Linear32
from shodh.moe.routers.base import GroupedRouter
from shodh.moe.routing import Routing

HIDDEN = 64


def make_operator_gate(config: ExpertsConfig, channels: int, ndim: int) -> nn.Module | None:
    """From the fingerprints of frames ``[B, F]`` to logits of the groups ``[B, G]``: one for all layers of a model.

    Parameters
    ----------
    channels, ndim : int
        Of the frames that the model is given.
    """
    router = config.router
    if not (config.num_experts and router.traits.observes):
        return None
    features = fingerprint_size(channels, ndim)
    if router.clustered:
        return Clusters(features, config.groups, router.cluster_samples)
    # Features have one scale by construction, so that they need not be standardised.
    return nn.Sequential(Linear32(features, HIDDEN), nn.SiLU(), Linear32(HIDDEN, config.groups))


class OperatorRouter(GroupedRouter):
    """A group of experts by the operator, an expert of it by the token.

    ``p(e) = p(group | fingerprint) * p(e | group, token)``; with as many groups as experts, the group is the expert.
    """

    def build(self, config: ExpertsConfig, dim: int) -> None:
        self.alone = self.num_groups == self.num_experts
        if not self.alone:
            super().build(config, dim)

    def route(self, x: Tensor, view: Tensor) -> Routing:
        """``view [B, G]``: logits of the groups of each sample."""
        tokens = x.float()
        logits = view.float().unsqueeze(1)
        if self.alone:
            logits = self.cooled(logits, tokens)
            probs = logits.softmax(-1)
            return self.choose(logits, probs, group_probs=probs)
        group_bias = self.selection_bias.float().view(self.num_groups, -1).mean(1)
        return self.route_in_groups(tokens, logits.softmax(-1), group_bias)
