"""A control: the group of experts by the regime label."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from shodh.moe.routers.base import GroupedRouter
from shodh.moe.routing import Routing


class OracleRouter(GroupedRouter):
    """As two_level, with the group given by the regime: the one kind that is given a label."""

    def route(self, x: Tensor, regime: Tensor) -> Routing:
        if not bool(((regime >= 0) & (regime < self.num_groups)).all()):
            raise ValueError(f"regime labels {regime.tolist()} do not fit router.groups={self.num_groups}")
        tokens = x.float()
        groups = F.one_hot(regime, self.num_groups).float().unsqueeze(1)
        return self.route_in_groups(tokens, groups)
