"""Settings of routed experts and of what balances them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shodh.config.base import Few, Many, Section, Weight, Width
from shodh.config.routers import RouterConfig


class BalanceConfig(Section):
    """Terms that keep experts alive and decided; counts and means are over the global batch."""

    switch: Weight = Field(0.01, description="Switch load balance (grouped experts: within the chosen group)")
    information: Weight = Field(0.05, description="H(mean p) - mean H(p), maximised (two_level: of the groups)")
    z_loss: Weight = 1e-4
    bias_rate: Weight = Field(0.0, description="loss-free selection bias, change per step")
    cv2: Weight = Field(0.0, description="CV(importance)^2, summed over layers as MoE-POT publishes it (0.1)")
    importance: Weight = Field(0.0, description="Shazeer's importance loss: CV(importance)^2, mean over layers")
    load: Weight = Field(0.0, description="Shazeer's load loss, CV(smooth load)^2; needs router.kind noisy_topk")
    orthogonality: Weight = Field(0.0, description="mean squared cosine between the router's rows of two experts")


class ExpertsConfig(Section):
    """The feed-forward part of every block: shared experts, and routed ones."""

    num_experts: Many = Field(4, description="routed experts; 0: a dense feed-forward of equal active size")
    top_k: Width = 1
    form: Literal["gated", "linear"] = Field(
        "gated", description="two layers with an activation between; or one affine map and GELU, as MoE-POT's code"
    )
    hidden: Width = Field(256, description="hidden width of one expert; form linear: its output width")
    num_shared: Few = 1
    num_added: Few = Field(
        0,
        description="experts added to a trained model: every token meets them beside its top-k, each weighted by a "
        "gate of its own; they start with zero output",
    )
    shared_combine: Literal["sum", "mean"] = Field("sum", description="of the shared experts' outputs")
    activation: Literal["swiglu", "bilinear", "gelu"] = Field(
        "swiglu", description="form gated: swiglu and bilinear have a gate, gelu has none"
    )
    router: RouterConfig = RouterConfig()
    balance: BalanceConfig = BalanceConfig()

    @property
    def groups(self) -> int:
        """Groups of experts that the router chooses among, of a kind that has them."""
        if self.router.groups is not None or not self.router.traits.observes:
            return self.router.groups or 2
        fitting = (n for n in range(1, self.num_experts // self.top_k + 1) if self.num_experts % n == 0)
        return max(fitting, default=1)

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        halved = self.form == "linear" or self.activation == "gelu"
        if halved and self.hidden % 16:
            raise ValueError(f"hidden={self.hidden} must be a multiple of 16: its rows are kept in two halves")
        if self.num_experts == 0:
            if self.num_added:
                raise ValueError(f"num_added={self.num_added} experts stand beside routed ones; num_experts is 0")
            return self
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        traits = self.router.traits
        learns = traits.trained and (traits.noisy or self.num_experts > 1)
        if self.top_k == 1 and self.router.normalise == "after" and learns:
            remedy = "top_k of at least 2" if traits.noisy else "router.normalise=before, or a larger top_k"
            raise ValueError(
                "top_k=1 with router.normalise after gives every chosen expert the weight 1, and the router would get "
                f"no gradient; use {remedy}"
            )
        if self.balance.load and not traits.noisy:
            raise ValueError(f"balance.load is defined by the noise of router.kind noisy_topk, not {self.router.kind}")
        groups = self.groups
        if traits.observes and groups == 1:
            raise ValueError("kind operator chooses among groups; use router.groups of at least 2")
        if self.router.clustered and self.router.cluster_samples < 4 * groups:
            raise ValueError(
                f"router.cluster_samples={self.router.cluster_samples} are too few to find groups={groups} clusters; "
                f"use at least {4 * groups}"
            )
        if traits.grouped and self.num_experts % groups:
            raise ValueError(f"num_experts={self.num_experts} is not divisible by router.groups={groups}")
        if traits.grouped and self.top_k > self.num_experts // groups:
            raise ValueError(
                f"top_k={self.top_k} is more than the {self.num_experts // groups} experts of a group; "
                "use fewer router.groups"
            )
        return self
