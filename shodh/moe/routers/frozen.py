"""A control: a random gate that is never trained."""

from __future__ import annotations

from shodh.config import ExpertsConfig
from shodh.moe.gates import freeze
from shodh.moe.routers.token import TokenRouter


class FrozenRouter(TokenRouter):
    """As token, with the gate as it was drawn. What balance terms push on then is the features."""

    def build(self, config: ExpertsConfig, dim: int) -> None:
        super().build(config, dim)
        freeze(self.expert_gate)
