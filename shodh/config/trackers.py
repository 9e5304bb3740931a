"""Where metrics go beside ``metrics.jsonl``, which every run has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shodh.config.base import Section


class WandbConfig(Section):
    """Weights & Biases, an extra: ``pip install 'shodh[wandb]'``."""

    project: str = Field("shodh", min_length=1)
    entity: str | None = Field(None, description="team or user; null: that of the login")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline needs no network: files in RUN/wandb, for 'wandb sync'"
    )


class MlflowConfig(Section):
    """MLflow, an extra: ``pip install 'shodh[mlflow]'``."""

    uri: str | None = Field(
        None, description="server, or file:FOLDER, which needs none; null: MLFLOW_TRACKING_URI, else file:RUN/mlflow"
    )
    experiment: str = Field("shodh", min_length=1)


class TrackersConfig(Section):
    """Trackers of a run; rank 0 writes to them. One that fails is switched off, and the run goes on."""

    tensorboard: bool = Field(True, description="event files in RUN/tensorboard")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; {}: with defaults; null: none")
    mlflow: MlflowConfig | None = Field(None, description="MLflow; {}: with defaults; null: none")
