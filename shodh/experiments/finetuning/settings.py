"""The fine-tuning file: a trained run, unseen regimes, numbers of trajectories, and the ways of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from shodh.config import RegimeConfig, Section, to_dict
from shodh.config.base import Few, PositiveInt, Seeds
from shodh.config.reading import section_from_dict
from shodh.core.reading import read_settings
from shodh.experiments.finetuning.base import open_base, regimes_of

Way = Literal["all", "experts", "new_expert"]


class TuningConfig(Section):
    """A table of errors: ways of fine-tuning a run by numbers of training trajectories of regimes it has not seen.

    Beside the ways stand the run as it is (zero shot), the same model trained from scratch, and persistence.
    """

    run: Path = Field(description="run folder, or folder of tools/convert_checkpoint.py")
    checkpoint: str | None = Field(None, description="tag of a checkpoint of the run; null: the newest")
    out: Path = Field(description="folder of the cells and the report")
    regimes: tuple[RegimeConfig, ...] = Field(min_length=1, description="unseen regimes, as data.regimes of a run")
    trajectories: tuple[PositiveInt, ...] = Field((1, 4, 16), min_length=1, description="training trajectories")
    train: tuple[Way, ...] = Field(("all", "experts", "new_expert"), min_length=1, description="weights that learn")
    router: bool = Field(False, description="way experts: the router learns too")
    num_added: Few = Field(1, ge=1, description="way new_expert: experts added to every layer")
    steps: PositiveInt = Field(200, description="optimiser steps of every way, and of training from scratch")
    lr: dict[Literal["all", "experts", "new_expert", "scratch"], PositiveFloat] = Field(
        {},
        description="highest learning rate by way; else the run's, and for all, which must not forget, a tenth of it",
    )
    seeds: Seeds = 3
    set: tuple[str, ...] = Field((), description="key=value changes of the run's configuration, for all cells")

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

    def rate(self, way: str, of_run: float) -> float:
        """Highest learning rate of a way, where the run had ``of_run``."""
        default = 0.1 * of_run if way == "all" else of_run
        return next((rate for name, rate in self.lr.items() if name == way), default)

    @property
    def name(self) -> str:
        return self.out.name


def load_tuning(path: Path | None, named: Sequence[str] = (), maps: Sequence[str] = (), **changes: Any) -> TuningConfig:
    """Read a fine-tuning file, or none.

    Parameters
    ----------
    named, maps : sequence of str
        In place of the file's regimes: see `shodh.experiments.finetuning.base.regimes_of`.
    changes
        Those that are not None stand in place of the file's settings.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        The file cannot be read, or has unknown, missing or impossible settings; or a regime does not fit the run.
    """
    source = "command line" if path is None else str(path)
    tree = {} if path is None else read_settings(path)
    if isinstance(tree, dict):
        tree = {**tree, **{key: value for key, value in changes.items() if value is not None}}
        if named and "run" in tree:
            base = open_base(Path(tree["run"]), tree.get("checkpoint"))
            tree["regimes"] = [to_dict(regime) for regime in regimes_of(named, maps, base)]
    return section_from_dict(TuningConfig, tree, source)
