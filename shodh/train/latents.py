"""Encode the data of a run once with its tokenizer; operator training then never touches full fields."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.checkpoint.run_files import is_tokenizer, open_tokenizer
from shodh.config import RunConfig
from shodh.config.base import FieldSets
from shodh.core.distributed import divide, from_first, rank, together
from shodh.core.errors import CheckpointError
from shodh.core.files import checksum
from shodh.core.precision import ieee_float32
from shodh.core.weights import load_into
from shodh.data import LatentWindowDataset, Split, file_stems, latent_key, split_folder, write_latents
from shodh.data.identity import Choose
from shodh.data.latents import LatentShapes, read_manifest
from shodh.models.factory import build_tokenizer
from shodh.models.forecaster import Forecaster
from shodh.models.tokenizer import Tokenizer
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import SPACE_FILE, Space
from shodh.train.datasets import Regimes, name_short, open_regimes, training_horizon

log = logging.getLogger("shodh")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer with what it was trained on."""

    model: Tokenizer
    space: Space
    field_sets: FieldSets
    weights: Path
    checksum: str


def load_tokenizer(config: RunConfig) -> TrainedTokenizer:
    """The tokenizer of a run, from ``config.tokenizer_dir``.

    Raises
    ------
    CheckpointError
        It was not trained yet, or with other fields, another size or other regimes.
    """
    folder = config.tokenizer_dir
    if not is_tokenizer(folder):
        raise CheckpointError(
            f"no trained tokenizer in {folder}; train one first with 'deepspeed launch/train_tokenizer.py --config "
            f"...' and the same configuration, or name a trained one: --set tokenizer.run={config.out}/OLD-tokenizer"
        )
    stored = open_tokenizer(folder)
    trained, space = stored.config, stored.space
    ours = [f.model_dump() for f in config.data.fields]
    theirs = [f.model_dump() for f in trained.data.fields]
    if ours != theirs:
        raise CheckpointError(
            f"the tokenizer in {folder} was trained on the fields {[f['name'] for f in theirs]} (kinds "
            f"{[f['kind'] for f in theirs]}), and this run has {[f['name'] for f in ours]} (kinds "
            f"{[f['kind'] for f in ours]}); use --set tokenizer.run=... of a fitting one, or train it anew"
        )
    same = ("latent_channels", "strides", "widths", "depth", "head_channels")
    differ = [k for k in same if getattr(config.tokenizer, k) != getattr(trained.tokenizer, k)]
    if differ:
        raise CheckpointError(
            f"the tokenizer in {folder} has other settings of {', '.join(f'tokenizer.{k}' for k in differ)}; "
            "use its values, or train another one"
        )
    unknown = [r for r in config.data.regimes if r.name not in space.names]
    if unknown and not config.tokenizer.unseen_regimes:
        raise CheckpointError(
            f"the tokenizer in {folder} was trained on the regimes {list(space.names)}, without "
            f"{[r.name for r in unknown]}"
        )
    known = trained.data.field_sets
    for regime in unknown:
        if (present := config.data.present(regime)) not in known:
            raise CheckpointError(
                f"regime {regime.name!r} has the fields {list(present)}, a set that the tokenizer in {folder} was "
                f"not trained on; it knows {sorted(map(list, known))}"
            )
    model = build_tokenizer(trained)
    load_into(model, {name: tensor.read() for name, tensor in stored.weights.items()}, stored.file)
    return TrainedTokenizer(model.eval().requires_grad_(False), space, known, stored.file, checksum(stored.file))


def normalizer_for(
    config: RunConfig, trained: TrainedTokenizer, choose: Choose | None = None, shared: bool = False
) -> FieldNormalizer:
    """The tokenizer's constants, with the regimes of this run in their order; of unseen regimes, their own."""
    theirs = trained.space.normalizer
    known, units = theirs.constants, theirs.units
    unseen = tuple(r for r in config.data.regimes if r.name not in known)
    if unseen:
        data = config.data.model_copy(update={"regimes": unseen})
        plain = config.operator.model_copy(update={"conditions": ()})
        changed = config.model_copy(update={"data": data, "operator": plain})
        own = open_regimes(changed, choose=choose, shared=shared)
        known, units = {**known, **own.space.normalizer.constants}, {**units, **own.space.normalizer.units}
    constants = {r.name: known[r.name] for r in config.data.regimes}
    return FieldNormalizer([f.build() for f in config.data.fields], 3, constants, units)


@dataclass(frozen=True)
class LatentCache:
    """A complete latent cache: its folder, and what the manifests of its chunks say, by regime and split."""

    folder: Path
    shapes: Mapping[tuple[str, Split], Sequence[LatentShapes]]


@ieee_float32()
def prepare_latents(
    config: RunConfig, regimes: Regimes, trained: TrainedTokenizer, device: torch.device
) -> LatentCache:
    """Write the latent cache of all regimes and splits, each chunk once, by any of the ranks. Collective.

    Its folder is named by the tokenizer's checksum, the data and the normalisation, so a stale cache is never read.
    """
    space = regimes.space.unconditioned()  # Latents are those of any conditions.
    key = from_first(lambda: latent_key(trained.checksum, regimes.sources, {"space": space.checksum}))
    root = config.tokenizer_dir / "latents"
    forecaster = Forecaster.of(config, regimes.space, None, trained.model.to(device))

    @torch.no_grad()
    def encode(fields: Tensor, static: Tensor, regime: int) -> tuple[Tensor, Tensor]:
        states, features = forecaster.encode(fields.unsqueeze(1).to(device), static.to(device), regime)
        return states[:, 0], features

    jobs: list[tuple[int, Split]] = [
        (i, s) for i, source in enumerate(regimes.sources) for s in ("train", "valid", "test") if source.files[s]
    ]
    hidden = rank() != 0 or not sys.stderr.isatty()
    with together():
        if rank() == 0 and not (root / key / SPACE_FILE).exists():
            space.save(root / key)
    encoded = 0
    shapes: dict[tuple[str, Split], list[LatentShapes]] = {}
    for i, split in tqdm(jobs, desc="latents", unit="split", disable=hidden):
        source = regimes.sources[i]
        folder = split_folder(root, key, source.name, split)
        normalizer = regimes.space.normalizer
        encoded += write_latents(folder, source, split, partial(encode, regime=i), normalizer=normalizer, share=divide)
        shapes[source.name, split] = divide(file_stems(source, split), partial(read_manifest, folder))
    if encoded:
        log.info("latent cache %s: encoded %d chunks", root / key, encoded)
    return LatentCache(root / key, shapes)


def open_latents(
    config: RunConfig, regimes: Regimes, cache: LatentCache, split: Split, horizon: int = 1, stride: int | None = None
) -> list[LatentWindowDataset]:
    """Windows of ``history`` latents and the ``horizon`` next ones, a dataset a regime, at a stride."""
    stride = stride or config.data.stride
    if horizon == training_horizon(config, split):  # Of longer ones the rollouts tell.
        name_short(config, regimes, split, horizon, stride)
    return [
        LatentWindowDataset(
            split_folder(cache.folder.parent, cache.folder.name, source.name, split),
            file_stems(source, split),
            history=config.data.history,
            horizon=horizon,
            stride=stride,
            regime=i,
            conditions=told,
            shapes=cache.shapes.get((source.name, split)),
        )
        for i, (source, told) in enumerate(zip(regimes.sources, regimes.told(split, stride), strict=True))
    ]
