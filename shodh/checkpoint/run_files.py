"""What a run keeps beside its checkpoints, and links into each of them: a checkpoint is then a whole model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shodh.checkpoint.description import (
    CONFIG,
    Kind,
    ModelDescription,
    Part,
    Source,
    describe_folder,
    describe_run,
    read_description,
    read_pretrained,
)
from shodh.checkpoint.folder import MANIFEST, write_manifest
from shodh.config import RunConfig, load_config
from shodh.config.base import FieldSets
from shodh.core.errors import CheckpointError
from shodh.core.files import atomic_path, link_or_copy, sync_to_disk
from shodh.core.reading import read_object
from shodh.core.weights import WEIGHTS, Weights, check_kinds, open_file
from shodh.schema.space import SPACE_FILE, Space

TOKENIZER_WEIGHTS = "tokenizer.safetensors"
FORMER_TOKENIZER = "tokenizer.json"  # of version 0.2.0, in the place of config.json and the manifest


START = "init_from.json"


def started_from(run: Path) -> str | None:
    """Checksum of the weights that a run started from; None for freshly drawn ones, or a run of an older version."""
    path = run / START
    return str(read_object(path).get("init_from")) if path.exists() else None


@dataclass(frozen=True)
class StoredTokenizer:
    """A trained tokenizer in its run folder; weights are mapped, and were verified."""

    path: Path
    config: RunConfig
    space: Space
    weights: Weights
    step: int | None
    ema: bool = False

    @property
    def file(self) -> Path:
        return self.path / TOKENIZER_WEIGHTS


def write_tokenizer(
    folder: Path,
    config: RunConfig,
    space: Space,
    state: Mapping[str, Tensor],
    step: int | None = None,
    ema: bool = False,
) -> Path:
    """Make the run folder of a tokenizer one that `shodh.from_pretrained` loads; returns the file of weights.

    ``step`` of the training, by default the last one, and whether the weights are averages.
    """
    final = folder / TOKENIZER_WEIGHTS
    with atomic_path(final) as partial:
        save_file({name: tensor.float().contiguous() for name, tensor in state.items()}, str(partial))
    source = Source(name=folder.name, sha256="", step=config.tokenizer.train.steps if step is None else step, ema=ema)
    description = describe_run(config, space, ("tokenizer",), source, {"tokenizer": final.name})
    write_manifest(folder, [final, *describe_folder(folder, description)])
    (folder / FORMER_TOKENIZER).unlink(missing_ok=True)
    return final


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder is the run of a trained tokenizer."""
    if (folder / MANIFEST).is_file() and (folder / CONFIG).is_file():
        description = read_description(folder)
        return description.parts == ("tokenizer",) and description.weights is not None
    return (folder / FORMER_TOKENIZER).is_file()


def open_tokenizer(folder: Path, kind: Kind | None = None) -> StoredTokenizer:
    """The tokenizer of a run folder, of this version or of 0.2.0; ``kind`` as `read_pretrained`.

    Raises
    ------
    CheckpointError
        It is missing or damaged; the file is named.
    """
    if not is_tokenizer(folder):
        raise CheckpointError(f"no trained tokenizer in {folder}")
    if (folder / MANIFEST).is_file():
        description, tensors = read_pretrained(folder, kind)
        plain = {name.removeprefix("tokenizer."): tensor for name, tensor in tensors.items()}
        source = description.source
        return StoredTokenizer(folder, description.config, description.space, plain, source.step, source.ema)
    path = folder / FORMER_TOKENIZER
    content = read_object(path)
    if content.get("weights") != TOKENIZER_WEIGHTS:
        raise CheckpointError(f"{path} is damaged: it names no weights beside it")
    config = load_config(folder / "config.yaml")
    fields = [f.build() for f in config.data.fields]
    tensors = open_file(folder / TOKENIZER_WEIGHTS)
    check_kinds(tensors, folder / TOKENIZER_WEIGHTS)
    space = Space.from_former(content, fields, None, str(path))
    return StoredTokenizer(folder, config, space, tensors, config.tokenizer.train.steps)


def describe_operator_run(
    run: Path,
    config: RunConfig,
    space: Space,
    tokenizer: Path | None,
    field_sets: FieldSets | None,
    started_from: str | None,
) -> ModelDescription:
    """Write into the run folder of an operator what its checkpoints will need: `link_description`.

    Parameters
    ----------
    tokenizer : Path, optional
        Weights of the tokenizer, which are linked.
    field_sets : tuple of tuples of str, optional
        Of the tokenizer: those of its own run.
    started_from : str, optional
        Checksum of the weights that the run started from.
    """
    files: dict[Part, str] = {"operator": WEIGHTS}
    if tokenizer is not None:
        if not (run / TOKENIZER_WEIGHTS).exists() or not tokenizer.samefile(run / TOKENIZER_WEIGHTS):
            link_or_copy(tokenizer, run / TOKENIZER_WEIGHTS)
        files = {"tokenizer": TOKENIZER_WEIGHTS, **files}
    source = Source(name=config.name, sha256="", init_from=started_from)
    description = describe_run(config, space, tuple(files), source, files, field_sets)
    describe_folder(run, description)
    return description


def link_description(run: Path, checkpoint: Path) -> list[str]:
    """Put the description of a run's model, and its tokenizer, into a checkpoint; returns the names of the files."""
    names = [name for name in (CONFIG, SPACE_FILE, TOKENIZER_WEIGHTS) if (run / name).is_file()]
    if CONFIG not in names:  # The run of a tokenizer that is not trained yet: its weights lack the latent statistics.
        names = [name for name in names if name == SPACE_FILE]
    for name in names:  # Only what is large is linked: a file that somebody edits in place would change in all.
        (link_or_copy if name == TOKENIZER_WEIGHTS else shutil.copyfile)(run / name, checkpoint / name)
        sync_to_disk(checkpoint / name)
    return names
