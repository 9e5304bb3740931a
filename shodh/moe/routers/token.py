"""Experts by the token alone."""

from __future__ import annotations

from torch import Tensor

from shodh.moe.routers.base import GateRouter
from shodh.moe.routing import Routing


class TokenRouter(GateRouter):
    """``p(e | token)``; with granularity sample, ``p(e | sample mean)``."""

    def route(self, x: Tensor) -> Routing:
        tokens = x.float()
        logits, similarity = self.expert_gate(self.query(tokens))
        logits = self.cooled(logits, tokens)
        return self.choose(logits, logits.softmax(-1), similarity=similarity)
