"""Settings of the tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, model_validator

from shodh.config.base import Layers, Section, Weight, Width
from shodh.config.training import TrainConfig


class TokenizerLoss(Section):
    """Weights of the reconstruction loss terms, each squared and relative to the target's own size."""

    vrmse: Weight = Field(1.0, description="relative to the variance of each component in space")
    relative_l2: Weight = Field(0.0, description="relative to the mean square of all components, a mean flow included")
    gradient: Weight = 0.2
    spectral: Weight = 0.0

    @model_validator(mode="after")
    def _some(self) -> TokenizerLoss:
        if not any((self.vrmse, self.relative_l2, self.gradient, self.spectral)):
            raise ValueError("all weights are 0; nothing would be learned")
        return self


class TokenizerConfig(Section):
    """Convolutional autoencoder, 8x per axis, with a divergence-free velocity decoder."""

    run: Path | None = Field(None, description="run folder of the tokenizer; null: runs/<name>-tokenizer")
    unseen_regimes: bool = Field(
        False,
        description="use a trained tokenizer for regimes that it did not learn, too: they are normalised by their own "
        "training statistics, and need a set of fields that it knows",
    )
    latent_channels: Width = 32
    strides: tuple[Width, ...] = Field((2, 2, 2), description="downsampling of each stage; their product is 8")
    widths: tuple[Width, ...] = Field((32, 64, 128), description="channels of each stage, after its downsampling")
    depth: Layers = Field(1, description="residual blocks of each stage")
    head_channels: Width = Field(12, description="channels at full resolution, before the last convolution")
    loss: TokenizerLoss = TokenizerLoss()
    train: TrainConfig = TrainConfig(steps=300)

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if math.prod(self.strides) != 8:
            raise ValueError(f"strides {list(self.strides)} multiply to {math.prod(self.strides)}, and must to 8")
        if len(self.widths) != len(self.strides):
            raise ValueError(f"{len(self.widths)} widths for {len(self.strides)} strides; one for each")
        return self
