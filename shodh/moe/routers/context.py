"""Experts by the token and its sample."""

from __future__ import annotations

from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.moe.routers.base import sample_mean
from shodh.moe.routers.token import TokenRouter


class ContextRouter(TokenRouter):
    """``p(e | token + w * sample mean)``, with ``w = router.context_weight``."""

    def build(self, config: ExpertsConfig, dim: int) -> None:
        super().build(config, dim)
        self.context_weight = config.router.context_weight

    def query(self, tokens: Tensor) -> Tensor:
        mean = sample_mean(tokens)
        return mean if self.of_sample else tokens + self.context_weight * mean
