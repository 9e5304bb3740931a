"""Settings of one training stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from shodh.config.base import Batch, Count, Fraction, PositiveInt, Section, Weight


class TrainConfig(Section):
    """One training stage."""

    steps: PositiveInt
    global_batch: Batch = Field(16, description="samples of one optimiser step, over all ranks")
    micro_batch: Batch | None = Field(None, description="samples a rank holds at once; null: no accumulation")
    lr: PositiveFloat = 1e-3
    min_lr: Fraction = Field(0.05, description="last learning rate over the highest")
    schedule: Literal["cosine", "one_cycle"] = Field(
        "cosine", description="linear warm-up then cosine; or the one-cycle policy, cosine up and cosine down"
    )
    warmup: Count = Field(50, description="steps until the highest learning rate")
    weight_decay: Weight = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: PositiveFloat = Field(1.0, description="largest global gradient norm")
    max_skipped_steps: PositiveInt = Field(
        10, description="steps in a row, skipped because loss or gradients were not finite, at which the run stops"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: PositiveInt = 10
    valid_every: Count = Field(0, description="steps between validations; 0: only at the end")
    valid_batches: PositiveInt = 4
    checkpoint_every: Count = Field(0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints that are kept")
