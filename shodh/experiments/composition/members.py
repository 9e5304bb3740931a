"""The three models of one seed, opened and checked to be of one family, and the trajectories of a parameter's value."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shodh.checkpoint.pretrained import ShodhModel, from_pretrained
from shodh.core.errors import CheckpointError, DataError
from shodh.core.weights import LazyWeights, load_into
from shodh.data import Split
from shodh.experiments.composition.settings import CCMConfig
from shodh.merge import Range, Slider, Update, decompose, from_memory, to_memory
from shodh.merge.experts import Expert, family_range
from shodh.merge.folders import open_family
from shodh.merge.slider import Grouping
from shodh.train.datasets import open_regimes
from shodh.train.field_task import open_windows


@dataclass(frozen=True)
class Case:
    """Trajectories of one value of the family's parameter, normalised.

    Attributes
    ----------
    frames : Tensor [N, T, C, *grid]
    static : Tensor [N, S, *grid]
    """

    value: float
    frames: Tensor
    static: Tensor

    def chunks(self, size: int) -> Iterator[Case]:
        """Parts of at most ``size`` trajectories."""
        for start in range(0, len(self.frames), size):
            rows = slice(start, start + size)
            yield Case(self.value, self.frames[rows], self.static[rows])


class Family:
    """Anchor, low and high expert of one regime, and one network that takes the weights of any of them.

    Parameters
    ----------
    anchor, low, high : Path
        Converted folders.
    parameter : str
        Physical parameter of the family; its range is that of the experts' configurations.

    Raises
    ------
    CheckpointError
        A folder is missing or damaged; or the experts are not of one family with the anchor, or work on latents.
    ConfigError
        An expert's configuration does not say at which value of the parameter it was trained.
    """

    def __init__(self, anchor: Path, low: Path, high: Path, parameter: str, device: torch.device) -> None:
        opened, experts = open_family(anchor, [low, high])
        self.range: Range = family_range(experts[0], experts[1], parameter)
        self.anchor, self.low, self.high = (_in_memory(e) for e in (opened, *experts))
        model = from_pretrained(anchor, device=device)
        if model.tokenizer is not None or len(model.regimes) != 1:
            raise CheckpointError(
                f"{anchor}: a study of composition needs an operator on the fields of one regime; this one is on "
                f"{'the fields' if model.tokenizer is None else 'the latents'} of {list(model.regimes)}"
            )
        self.model, self.device = model, device
        self.regime = model.regimes[0]
        self._sliders: dict[Grouping, Slider] = {}

    @property
    def experts(self) -> tuple[LazyWeights, LazyWeights]:
        """Low and high."""
        return self.low, self.high

    @property
    def sparse(self) -> bool:
        """Whether the models have routed experts."""
        return self.model.config.operator.experts.num_experts > 0

    @property
    def channels(self) -> Mapping[str, slice]:
        """Channels of the regime's fields."""
        return self.model.space.channels(0)

    def decompose(self) -> tuple[Update, Update]:
        """What the experts share, and the direction between them."""
        return decompose(self.anchor, self.low, self.high)

    def put(self, weights: LazyWeights) -> ShodhModel:
        """The network with these weights."""
        load_into(self.model, to_memory(weights), Path("composed weights"), finite=False)
        return self.model

    def copy_of(self, weights: LazyWeights) -> ShodhModel:
        """Another network, with these weights."""
        model = copy.deepcopy(self.model)
        load_into(model, to_memory(weights), Path("composed weights"), finite=False)
        return model

    def slider(self, by: Grouping = "all") -> Slider:
        """The network on the line between the experts, with one coordinate, or one a layer or expert."""
        if by not in self._sliders:
            self._sliders[by] = Slider(self.model, self.anchor, *self.decompose(), by)
        return self._sliders[by]

    def read(self, value: float, folder: Path, split: Split, frames: int) -> Case:
        """The first ``frames`` frames of every trajectory of a split, as the anchor was trained on them.

        Raises
        ------
        DataError
            Files are missing or do not fit the model, or every trajectory is shorter.
        """
        config = self.model.config
        regime = config.data.regimes[0].model_copy(update={"path": folder})
        data = config.data.model_copy(update={"regimes": (regime,)})
        config = config.model_copy(update={"data": data})
        regimes = open_regimes(config, self.model.space.normalizer)
        try:
            windows = open_windows(config, regimes, split, frames - data.history)[0]
            items = [windows[i] for i in range(len(windows)) if windows.index[i][1] == 0]
        finally:
            regimes.close()
        fields, static = (torch.stack([item[name] for item in items]).to(self.device) for name in ("fields", "static"))
        return Case(value, fields, static)


def _in_memory(expert: Expert) -> LazyWeights:
    return from_memory(to_memory(expert.weights), str(expert.path))


def open_members(study: CCMConfig, seed: int, device: torch.device) -> Family:
    """The converted models of a seed, checked against each other and against the study.

    Raises
    ------
    CheckpointError, ConfigError
        As `Family`; or the experts were trained at other values than the study's.
    """
    folders = [study.folder_of(seed, member) for member in ("anchor", "low", "high")]
    family = Family(folders[0], folders[1], folders[2], study.family.parameter, device)
    for name, folder in zip(("low", "high"), folders[1:], strict=True):
        found, wanted = getattr(family.range, name), getattr(study.family, name)
        if not math.isclose(found, wanted):
            raise CheckpointError(
                f"{folder} was trained at {study.family.parameter} = {found:g}, and the study's {name} expert is of "
                f"{wanted:g}; remove the folder, or choose another --name"
            )
    return family


def read_case(study: CCMConfig, family: Family, value: float, split: Split) -> Case:
    """The trajectories of one value, as long as history, prefix and rollout together. Errors as `Family.read`."""
    needed = family.model.history + study.prefix + study.rollout
    try:
        return family.read(value, study.value_folder(value), split, needed)
    except DataError as error:
        raise DataError(f"{study.family.parameter} = {value:g}: {error}") from error
