"""The fine-tuning file: a trained run, unseen regimes, numbers of trajectories, and the methods of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from shodh.checkpoint.description import Kind
from shodh.config import RegimeConfig, to_dict
from shodh.config.base import Few, PositiveInt, RunName
from shodh.core.reading import read_settings
from shodh.experiments.finetuning.base import open_base, regimes_of
from shodh.experiments.harness.settings import StudySettings, load_settings

Method = Literal["all", "experts", "new_expert"]


class TuningConfig(StudySettings):
    """A table of errors: methods of fine-tuning a run by numbers of training trajectories of regimes it has not seen.

    Beside the methods stand the run as it is (zero shot), the same model trained from scratch, and persistence.
    """

    run: Path = Field(description="run folder, or folder of tools/convert_checkpoint.py")
    checkpoint: str | None = Field(None, description="tag of a checkpoint of the run, or best; null: the newest")
    weights: Kind | None = Field(None, description="ema or raw weights of the checkpoint; null: ema where there are")
    name: RunName = "finetune"
    question: str = Field("Does it pay to start from the trained run?", min_length=1)
    regimes: tuple[RegimeConfig, ...] = Field(min_length=1, description="unseen regimes, as data.regimes of a run")
    trajectories: tuple[PositiveInt, ...] = Field((1, 4, 16), min_length=1, description="training trajectories")
    train: tuple[Method, ...] = Field(("all", "experts", "new_expert"), min_length=1, description="weights that learn")
    router: bool = Field(False, description="method experts: the router learns too")
    num_added: Few = Field(1, ge=1, description="method new_expert: experts added to every layer")
    steps: PositiveInt = Field(200, description="optimiser steps of every method, and of training from scratch")
    lr: dict[Literal["all", "experts", "new_expert", "scratch"], PositiveFloat] = Field(
        {},
        description="highest learning rate by method; else the run's; for all, which must not forget, a tenth of it",
    )

    @model_validator(mode="after")
    def _check(self) -> TuningConfig:
        names = [r.name for r in self.regimes]
        lists: tuple[tuple[str, list[Any]], ...] = (
            ("regimes", names),
            ("trajectories", list(self.trajectories)),
            ("train", list(self.train)),
        )
        for what, values in lists:
            if len(set(values)) < len(values):
                raise ValueError(f"{what} are repeated: {values}")
        if chosen := [r.name for r in self.regimes if r.trajectories is not None]:
            raise ValueError(f"regimes {chosen}: trajectories are drawn here; leave out those of the regime")
        return self

    def rate(self, method: str, of_run: float) -> float:
        """Highest learning rate of a method, where the run had ``of_run``."""
        default = 0.1 * of_run if method == "all" else of_run
        return next((rate for name, rate in self.lr.items() if name == method), default)


def load_tuning(path: Path | None, named: Sequence[str] = (), maps: Sequence[str] = (), **changes: Any) -> TuningConfig:
    """Read a fine-tuning file, or none.

    Parameters
    ----------
    named, maps : sequence of str
        In place of the file's regimes: see `shodh.experiments.finetuning.base.regimes_of`.
    changes
        Of `load_settings`.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        The file cannot be read, or has unknown, missing or impossible settings; or a regime does not fit the run.
    """
    if named:
        tree = {} if path is None else read_settings(path)
        settings = {**(tree if isinstance(tree, dict) else {}), **{k: v for k, v in changes.items() if v is not None}}
        if "run" in settings:
            base = open_base(Path(str(settings["run"])), settings.get("checkpoint"))
            changes["regimes"] = [to_dict(regime) for regime in regimes_of(named, maps, base)]
    return load_settings(TuningConfig, path, **changes)
