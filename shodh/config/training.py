"""Settings of one training stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from shodh.config.base import Batch, Count, Fraction, PositiveInt, Section, Weight


class BestConfig(Section):
    """Which checkpoint is the best one, and when a run ends because there is no better one."""

    measure: str = Field(
        "valid/decoded_vrmse",
        description="a measure of the validation, lower is better: valid/<name>, the mean over regimes, or "
        "valid/<name>/<regime>",
    )
    patience: Count = Field(0, description="validations in a row without a better one at which the run ends; 0: none")


class SpikeConfig(Section):
    """Which steps are spikes: loss or gradient norm above what the last steps had; the optimiser does not take them."""

    sigma: PositiveFloat = Field(6.0, description="standard deviations above the mean of the window")
    window: Annotated[int, Field(ge=8, le=4096)] = Field(
        128, description="steps, taken by the optimiser, that are compared with; until there are as many, none is one"
    )


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
        10,
        description="steps in a row, skipped because loss or gradients were not finite or a spike, at which the run "
        "goes back to its last checkpoint",
    )
    max_rollbacks: Count = Field(
        1, description="times in a row it goes back, with other batches, before it stops; a new checkpoint ends the row"
    )
    spikes: SpikeConfig | None = Field(None, description="skip steps that are spikes; null: those not finite alone")
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="decay of the exponential moving average of the weights, for example 0.999; 0: none is kept"
    )
    log_every: PositiveInt = 10
    valid_every: Count = Field(0, description="steps between validations; 0: only at the end")
    valid_batches: PositiveInt = 4
    checkpoint_every: Count = Field(0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints that are kept, and the best one")
    failed_save: Literal["stop", "continue"] = Field(
        "stop",
        description="what a run does that cannot write a checkpoint, metrics or a trace: end with exit code 2; or go "
        "on, and try again at the next one, the last excepted",
    )
    best: BestConfig | None = Field(None, description="keep the best checkpoint by a validation; null: newest alone")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.best is not None and self.best.patience and not self.valid_every:
            raise ValueError("best.patience counts validations, and valid_every=0 has one alone, at the end")
        return self
