"""Settings of the operator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shodh.config.base import Layers, Many, PositiveInt, Section, Weight, Width
from shodh.config.experts import ExpertsConfig
from shodh.config.training import TrainConfig


class FieldSpaceConfig(Section):
    """Operators that work on the fields themselves, without a tokenizer."""

    mlp: Width = Field(
        512, description="dpot: hidden width of the feed-forward; moe_pot: width of the features that experts share"
    )
    decoder: Width = Field(32, description="dpot, moe_pot: channels at full resolution")
    classes: Many = Field(
        0,
        description="dpot, moe_pot: outputs of the published classification head, which no loss uses; 0: none",
    )
    residual: bool = Field(False, description="predict the change since the last frame; published models do not")


class UnrollConfig(Section):
    """Training steps through the model's own forecasts: windows hold ``steps`` frames to be predicted, not one."""

    steps: Annotated[int, Field(gt=0, le=64)] = Field(
        1, description="forecasts in a row, each from the last ones; the loss is the mean of their errors"
    )
    gradient: Literal["full", "pushforward"] = Field(
        "full",
        description="through all forecasts, or of each by itself, its input taken as given (Brandstetter et al. 2022)",
    )


class OperatorConfig(Section):
    """What predicts the next frame: of latents (latent_transformer), or of the fields themselves (all other kinds)."""

    kind: Literal["latent_transformer", "dpot", "moe_pot", "fno", "unet"] = "latent_transformer"
    dim: Width = Field(128, description="width; unet: of the finest level")
    depth: Layers = Field(3, description="blocks; unet: levels")
    heads: Width = Field(4, description="heads of attention, or of the Fourier mixing")
    patch: Width = Field(1, description="latent cells (dpot, moe_pot: cells) per token and axis")
    position: Literal["rotary", "learned"] = "rotary"
    mixer: Literal["attention", "fourier"] = Field("attention", description="latent_transformer: what mixes tokens")
    modes: Width | None = Field(None, description="Fourier modes kept along an axis; null: all")
    conditions: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="numbers that the model is told of each sample: time_step, from one frame it sees to the next, and "
        "physical parameters by their names in the files; a regime may lack some",
    )
    field: FieldSpaceConfig = FieldSpaceConfig()
    experts: ExpertsConfig = ExpertsConfig()
    loss: Literal["mse", "over_persistence", "relative_l2"] = Field(
        "mse",
        description="error of a sample as it is, over the mean change of its regime in one step, or its norm over that "
        "of the target, by channel (of fields alone)",
    )
    metric: Literal["variance", "whitened", "decoded"] = Field(
        "variance",
        description="what an error of latents is measured by: each channel weighted by its variance before whitening, "
        "close to the error of the decoded fields; whitened: all channels alike; decoded: the fields themselves, in "
        "every decoded_every-th step, and variance in the others; fields have no other metric than their own",
    )
    decoded_every: PositiveInt = Field(
        4, description="metric decoded: steps from one whose loss goes through the decoder to the next; 1: all do"
    )
    unroll: UnrollConfig = UnrollConfig()
    input_noise: Weight = Field(
        0.0, description="standard deviation added to the normalised history; of fields: times each channel's rms"
    )
    noise_relative_to: Literal["state", "error"] = Field(
        "state",
        description="what input_noise multiplies: the state as above, or the rms of the model's own error in one step, "
        "by sample and channel, for which it runs once more, without a gradient",
    )
    patch_jitter: bool = Field(
        False, description="dpot, moe_pot: shift training samples against the grid of patches along periodic axes"
    )
    random_shifts: bool = Field(True, description="shift training samples by whole latent cells along periodic axes")
    activation_checkpointing: bool | Literal["auto"] = Field(
        False, description="compute blocks again in the backward pass; auto: where the step would not fit otherwise"
    )
    train: TrainConfig = TrainConfig(steps=400)

    @model_validator(mode="after")
    def _check(self) -> OperatorConfig:
        if self.kind != "latent_transformer":
            self._check_field_space()
        elif self.loss == "relative_l2":
            raise ValueError("loss relative_l2 is of fields; a latent transformer has mse or over_persistence")
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions {list(self.conditions)} are repeated; name each once")
        if self.noise_relative_to == "error" and not self.input_noise:
            raise ValueError("noise_relative_to error needs input_noise, a multiple of that error: for example 1")
        if self.patch_jitter and (self.kind not in ("dpot", "moe_pot") or self.patch == 1):
            raise ValueError(
                "patch_jitter is of dpot and moe_pot with a patch of several cells"
                + ("; latents have random_shifts" if self.kind == "latent_transformer" else "")
            )
        if self.kind not in ("fno", "unet") and self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        rotary = self.position == "rotary" and self.kind == "latent_transformer" and self.mixer == "attention"
        if rotary and (self.dim // self.heads) % 2:
            raise ValueError(f"rotary positions need an even head size, not dim/heads={self.dim // self.heads}")
        hidden = self.experts.hidden if self.experts.num_experts else 8  # A dense layer may have any.
        for name, value in (("dim", self.dim), ("experts.hidden", hidden)):
            if value % 8:
                raise ValueError(f"{name}={value} must be a multiple of 8: the grouped GEMM wants 16-byte rows")
        return self

    def _check_field_space(self) -> None:
        experts = self.experts
        # The defaults are those of latents: of fields they are refused, not run unseen.
        example = "moe_pot_tiny" if self.kind == "moe_pot" else "dpot_tiny"
        if missing := [name for name in ("loss", "random_shifts", "experts") if name not in self.model_fields_set]:
            raise ValueError(
                f"kind {self.kind} needs {', '.join(missing)}, which have no default of fields; published models have "
                f"loss relative_l2, random_shifts false and experts as in launch/configs/{example}.yaml"
            )
        if self.kind != "moe_pot" and experts.num_experts:
            raise ValueError(f"kind {self.kind} is dense: use experts.num_experts 0, or kind moe_pot")
        if self.kind == "moe_pot" and experts.form == "linear" and experts.hidden != self.dim:
            raise ValueError(
                f"experts.hidden={experts.hidden}: linear experts give features of the operator's dim={self.dim}"
            )
        if experts.num_experts and self.field.mlp % 16:
            raise ValueError(f"field.mlp={self.field.mlp} must be a multiple of 16")
        if self.random_shifts:
            raise ValueError("random_shifts are of latents: a force fixed in space would not move with the fields")
        if self.metric != "variance":
            raise ValueError(
                f"metric {self.metric} is of latents; kind {self.kind} has that of its fields: leave it out"
            )
        if self.loss == "over_persistence":
            raise ValueError("loss over_persistence is of latents; fields have mse or relative_l2")
        if self.kind == "fno" and self.modes is None:
            raise ValueError("kind fno needs modes, for example 12")
