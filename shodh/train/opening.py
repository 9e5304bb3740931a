"""The data of an operator's run, and what its numbers mean: of a new run, and of one that goes on or is measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from shodh.checkpoint.description import find_pretrained, is_pretrained, read_description
from shodh.checkpoint.folder import run_of
from shodh.checkpoint.run_files import TOKENIZER_WEIGHTS
from shodh.config import RunConfig
from shodh.core.distributed import together
from shodh.core.errors import CheckpointError
from shodh.core.files import checksum
from shodh.data import Split
from shodh.data.identity import Choose
from shodh.data.loader import SampleDataset
from shodh.data.windows import JoinedWindows
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import SPACE_FILE, Space
from shodh.train.data_identity import kept_choice, new_choice
from shodh.train.datasets import (
    OpenSplit,
    Regimes,
    open_regimes,
    require_history,
    training_horizon,
    training_strides,
)
from shodh.train.field_task import open_windows
from shodh.train.latents import TrainedTokenizer, load_tokenizer, normalizer_for, open_latents, prepare_latents
from shodh.train.run_folder import RunFolder

log = logging.getLogger("shodh")


def kept_space(config: RunConfig, *folders: Path) -> Space | None:
    """What the numbers of a run mean, of the first of its folders that says it; None of one of old that did not.

    Raises
    ------
    CheckpointError
        The file is damaged.
    """
    folder = next((folder for folder in folders if (folder / SPACE_FILE).is_file()), None)
    return None if folder is None else Space.load(folder, [f.build() for f in config.data.fields])


def inherited_normalizer(config: RunConfig, init_from: Path) -> FieldNormalizer:
    """The normalisation that an expert of a family takes from its anchor, so that their weights mean the same.

    Raises
    ------
    CheckpointError
        The anchor's space does not lie beside its weights, or lacks a regime of the expert or its fields.
    """
    space = _space_of_weights(config, init_from)
    if space is None:
        raise CheckpointError(
            f"{init_from} does not say its normalisation, which a run with a `family` takes from its anchor; start "
            "from a checkpoint folder of the anchor's run, or from a converted folder"
        )
    names = [r.name for r in config.data.regimes]
    if unknown := [name for name in names if name not in space.names]:
        raise CheckpointError(f"{init_from} was not trained on {unknown}; an anchor has all regimes of its experts")
    ours, theirs = [f.name for f in config.data.fields if not f.static], [f.name for f in space.dynamic]
    if ours != theirs:
        raise CheckpointError(f"{init_from} was trained on the fields {theirs}, and this run has {ours}")
    constants = {name: space.constants(space.number(name)) for name in names}
    return FieldNormalizer([f.build() for f in config.data.fields], space.ndim, constants, space.normalizer.units)


def _space_of_weights(config: RunConfig, weights: Path) -> Space | None:
    """Of a pretrained folder or file, or of the run folder around a checkpoint of version 0.2.0."""
    weights = find_pretrained(weights)
    if is_pretrained(weights) or weights.is_file():
        return read_description(weights).space
    run = run_of(weights)
    return None if run is None else kept_space(config, run)


def open_run_data(
    config: RunConfig,
    space: Space | FieldNormalizer | None = None,
    choose: Choose | None = None,
    run: Path | None = None,
    weights: Path | None = None,
    shared: bool = False,
) -> tuple[Regimes, TrainedTokenizer | None]:
    """Data of an operator's run and its tokenizer, checked against each other; None for an operator on fields.

    Parameters
    ----------
    space : Space or FieldNormalizer, optional
        As `open_regimes`; by default a tokenizer's constants.
    run : Path, optional
        The folder of a run that was begun, with the tokenizer that it was begun with.
    weights : Path, optional
        What a new run starts from: its conditions keep their constants, as the weights know them in these units.
    shared : bool
        As `open_regimes`.

    Raises
    ------
    CheckpointError
        The tokenizer is missing, damaged, or another one than the run was begun with; a run that was begun without one
        does not say what its numbers mean.
    """
    with together(shared):
        if isinstance(space, Space) and space.condition_names != config.operator.conditions:
            raise CheckpointError(
                f"{run}: operator.conditions are {list(config.operator.conditions)} in its configuration and "
                f"{list(space.condition_names)} in its {SPACE_FILE}; one of them was changed"
            )
        conditions = None
        if weights is not None and config.operator.conditions and (theirs := _space_of_weights(config, weights)):
            conditions = theirs.conditions
    if not config.has_tokenizer:
        with together(shared):
            if run is not None and space is None:
                raise CheckpointError(f"{run} is no run of an operator on fields: it has no {SPACE_FILE}")
        return open_regimes(config, space, choose=choose, conditions=conditions, shared=shared), None
    with together(shared):
        trained = _tokenizer_of(config, run)
    constants = space or normalizer_for(config, trained, choose, shared)
    return open_regimes(config, constants, choose=choose, conditions=conditions, shared=shared), trained


def _tokenizer_of(config: RunConfig, run: Path | None) -> TrainedTokenizer:
    """The tokenizer of a run; CheckpointError where it is not the one that the run was begun with."""
    trained = load_tokenizer(config)
    kept = None if run is None else run / TOKENIZER_WEIGHTS
    if kept is not None and kept.is_file() and not kept.samefile(trained.weights):
        if checksum(kept) != trained.checksum:
            raise CheckpointError(
                f"{trained.weights} is not the tokenizer that {run} was begun with ({kept}): latents would mean "
                "something else; start a new run with --set name=..., or put the old tokenizer back"
            )
    return trained


def open_data(
    config: RunConfig, resumed: RunFolder | None, device: torch.device, init_from: Path | None = None
) -> tuple[Regimes, TrainedTokenizer | None, OpenSplit]:
    """The regimes of a run, its tokenizer, and the windows that its operator learns from.

    A ``resumed`` one keeps its files, their split and its space; a new one takes over the splits of the runs it starts
    from, and one of a family the normalisation of its anchor. Collective.
    """
    with together():
        run = None if resumed is None else resumed.path
        space: Space | FieldNormalizer | None = None
        if run is not None:
            choose, space = kept_choice(run), kept_space(config, run)
        else:
            choose = new_choice(config, init_from)
            if config.family is not None and init_from is not None and not config.has_tokenizer:
                space = inherited_normalizer(config, init_from)
    regimes, trained = open_run_data(config, space, choose, run, init_from, shared=True)
    with together():
        require_history(config, regimes)
    if trained is None:
        windows: Callable[..., Sequence[SampleDataset]] = partial(open_windows, config, regimes)
    else:
        windows = partial(open_latents, config, regimes, prepare_latents(config, regimes, trained, device))

    def opened(split: Split) -> Sequence[SampleDataset]:
        horizon = training_horizon(config, split)
        parts = [windows(split, horizon=horizon, stride=stride) for stride in training_strides(config, split)]
        return parts[0] if len(parts) == 1 else [JoinedWindows(regime) for regime in zip(*parts, strict=True)]

    return regimes, trained, opened
