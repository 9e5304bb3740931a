"""A folder of a whole model: ``config.json``, ``space.json``, weights in safetensors, and their manifest.

Checkpoints are such folders, with each part's weights in a file of its own. In converted ones tokenizer and operator
travel together (prefixes ``tokenizer.`` and ``operator.``), with a model card.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator

from shodh.checkpoint.card import model_card
from shodh.checkpoint.folder import (
    MANIFEST,
    checksum,
    find_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    read_manifest,
    verify_model,
    write_manifest,
)
from shodh.config import RunConfig, Section, config_from_dict, to_dict
from shodh.config.base import FieldSets
from shodh.core.environment import describe_environment
from shodh.core.errors import CheckpointError, ConfigError, DataError
from shodh.core.reading import parse_json, read_object
from shodh.core.strict_json import dumps, write_json
from shodh.core.weights import (
    AVERAGED,
    INDEX,
    MAX_SHARD_SIZE,
    WEIGHTS,
    LazyWeights,
    Progress,
    Weights,
    check_fit,
    check_kinds,
    expected_shapes,
    ignore,
    open_file,
    open_weights,
    persistent_buffers,
    read_metadata,
    target_dtypes,
    write_weights,
)
from shodh.models.factory import build_operator, build_tokenizer, count_parameters
from shodh.schema.space import SPACE_FILE, Space

CONFIG = "config.json"
CARD = "README.md"
METADATA_KEY = "shodh"

Dtypes = dict[str, torch.dtype]
Part = Literal["tokenizer", "operator"]
#: Which weights of a checkpoint are meant: their average over the training, or those of its last step.
Kind = Literal["ema", "raw"]


class Source(Section):
    """Where the weights came from."""

    name: str = Field(description="folder or file, without the path that leads to it")
    sha256: str = Field(description="of the manifest, or of the files where there is none")
    step: int | None = None
    masters: bool = Field(False, description="float32 master weights of a run in lower precision")
    init_from: str | None = Field(None, description="sha256 of the source whose weights the run started from")
    ema: bool = Field(False, description="the exponential moving average of the weights over the training")


class ModelDescription(Section):
    """What ``config.json`` and ``space.json`` say; every value is checked when it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    format: Literal["shodh"] = "shodh"
    format_version: Literal[2] = 2
    parts: tuple[Part, ...] = Field(min_length=1)
    dtype: Literal["fp32", "bf16", "fp16"]
    run: dict[str, Any]
    parameters: dict[str, int]
    versions: dict[str, str]
    source: Source
    merge: dict[str, Any] | None = Field(None, description="how it was made of experts; null: it was trained")
    weights: dict[Part, str] | None = Field(
        None, description="file of each part, with its plain names; null: all of them together, with prefixes"
    )
    field_sets: FieldSets | None = Field(
        None,
        description="what the tokenizer has heads for, in its order; null: what the run's regimes have, in theirs",
    )
    space: Space = Field(exclude=True, description="of space.json")

    @model_validator(mode="after")
    def _check(self) -> ModelDescription:
        if self.weights is not None and set(self.weights) != set(self.parts):
            raise ValueError(f"weights are of {sorted(self.weights)}, and the parts are {sorted(self.parts)}")
        for name in (self.weights or {}).values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"weights in {name!r}; expected a .safetensors file beside it")
        return self

    @property
    def config(self) -> RunConfig:
        """The run's configuration, validated."""
        return config_from_dict(self.run, f"'run' of {CONFIG}")

    @property
    def regimes(self) -> tuple[str, ...]:
        """Names of the regimes the model was trained on."""
        return self.space.names


def parse_description(content: Mapping[str, Any], source: Path, space: Space | None) -> ModelDescription:
    """Check the content of a ``config.json``; without ``space``, of one that version 0.2.0 wrote, which has its own.

    Raises
    ------
    CheckpointError
        Names the file and the key.
    """
    if content.get("format") != "shodh":
        raise CheckpointError(
            f"{source} is not of this project: expected format 'shodh', got {content.get('format')!r}"
        )
    try:
        if space is None:
            content, space = _former(content, source)
        description = ModelDescription.model_validate({**content, "space": space})
        fields = tuple(f.build() for f in description.config.data.fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    if fields != space.fields:
        raise CheckpointError(f"{source} and its {SPACE_FILE} are of different fields")
    if "operator" in description.parts and description.config.operator.conditions != space.condition_names:
        raise CheckpointError(f"{source} and its {SPACE_FILE} are of different conditions")
    return description


def _former(content: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], Space]:
    """Content of a ``config.json`` of version 1, without its fields, domains and constants, and the space of these."""
    if content.get("format_version") != 1:
        raise CheckpointError(
            f"{source}: format_version {content.get('format_version')!r} without a {SPACE_FILE} beside it; versions up "
            "to 2 are read"
        )
    rest = {k: v for k, v in content.items() if k not in ("regimes", "fields", "domains", "normalizer")}
    config = config_from_dict(rest.get("run", {}), f"'run' of {CONFIG}")
    fields = [f.build() for f in config.data.fields]
    space = Space.from_former(content, fields, content.get("regimes"), str(source))
    return {**rest, "format_version": 2}, space


def is_pretrained(path: Path) -> bool:
    """Whether a folder describes a model: a converted folder, a checkpoint, or the run of a trained tokenizer."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return read_object(path / CONFIG).get("format") == "shodh"
    except CheckpointError:
        return True  # A damaged one is to be named, not taken for something else.


def says_its_model(path: Path) -> bool:
    """Whether a folder describes a model, or a lone file of weights does."""
    return METADATA_KEY in read_metadata(path) if path.is_file() else is_pretrained(path)


def is_converted(path: Path) -> bool:
    """Whether a folder was written by a conversion: it describes a model, and is neither a run nor a checkpoint."""
    return is_pretrained(path) and not (path / "config.yaml").exists() and not is_checkpoint(path)


def find_pretrained(path: Path, checkpoint: str | None = None) -> Path:
    """The folder of weights that a path means: of a run, its newest checkpoint; anything else is itself.

    ``checkpoint`` names one of a run: `find_checkpoint`. Errors as there.
    """
    if checkpoint is not None:
        if not path.is_dir() or (path / MANIFEST).is_file():
            raise CheckpointError(f"{path} is no run folder, and has no checkpoint {checkpoint!r}")
        return find_checkpoint(path, checkpoint)
    if path.is_dir() and not (path / MANIFEST).is_file() and (newest := latest_checkpoint(path)) is not None:
        return newest
    return path


def read_description(path: Path, kind: Kind | None = None) -> ModelDescription:
    """Description of a folder, or of a lone file that was written by this project. Errors as `read_pretrained`."""
    description = _read_description(path, kind)
    if kind is not None and description.source.ema != (kind == "ema"):
        held = "the average of the weights alone" if description.source.ema else "no average of the weights"
        raise CheckpointError(f"{path} holds {held}, and {kind} ones were asked for; leave out the choice of weights")
    return description


def _read_description(path: Path, kind: Kind | None) -> ModelDescription:
    if path.is_file():
        text = read_metadata(path).get(METADATA_KEY)
        if text is None:
            raise CheckpointError(f"{path} says nothing about its model; use the folder it came with")
        content = parse_json(text, f"{path} is damaged: its description", CheckpointError)
        content = dict(content) if isinstance(content, dict) else {}
        space = content.pop("space", None)
        return parse_description(content, path, None if space is None else Space.from_document(space, str(path)))
    content = read_object(path / CONFIG)
    space = Space.load(path) if (path / SPACE_FILE).is_file() else None
    description = parse_description(content, path / CONFIG, space)
    if is_checkpoint(path):
        manifest = read_manifest(path)
        digest, ema = checkpoint_checksum(path, manifest, kind)
        source = {"name": path.name, "sha256": digest, "step": manifest["state"].get("step"), "ema": ema}
        update: dict[str, Any] = {"source": description.source.model_copy(update=source)}
        if ema and description.weights is not None:
            files = {part: AVERAGED if name == WEIGHTS else name for part, name in description.weights.items()}
            update["weights"] = files
        return description.model_copy(update=update)
    return description


def checkpoint_checksum(path: Path, manifest: Mapping[str, Any], kind: Kind | None) -> tuple[str, bool]:
    """What names the chosen weights of a checkpoint, and whether they are averages."""
    digest, averaged = checksum(path / MANIFEST), AVERAGED in manifest["files"]
    if averaged and kind == "raw":  # Other weights than those that the folder is known by.
        digest = hashlib.sha256(f"{digest} raw".encode()).hexdigest()
    return digest, averaged and kind != "raw"


def read_pretrained(path: Path, kind: Kind | None = None) -> tuple[ModelDescription, Weights]:
    """Description and stored tensors of a folder, or of a lone file that was written by this project.

    Files are compared with the manifest of their folder; converted folders of version 0.2.0 have none.

    Parameters
    ----------
    kind : {"ema", "raw"}, optional
        Weights of a checkpoint whose run averaged them: the average, which is the default, or those of the last step.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged, or the tensor that does not fit; or such weights are not there.
    """
    description = read_description(path, kind)
    if description.weights is None:
        tensors: Weights = open_weights(path)
    else:
        parts = {part: open_file(path / name) for part, name in description.weights.items()}
        tensors = {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}
    check_weights(description, tensors, path)
    if (path / MANIFEST).is_file():  # Last: what is wrong in itself can be named better.
        verify_model(path, {WEIGHTS, AVERAGED} - set((description.weights or {}).values()))
    return description, tensors


def read_part(path: Path, part: Part, kind: Kind | None = None) -> Weights:
    """The tensors of one part of a pretrained folder, verified, by their plain names. Errors as `read_pretrained`."""
    _, tensors = read_pretrained(path, kind)
    prefix = f"{part}."
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def build_parts(config: RunConfig, parts: tuple[Part, ...], field_sets: FieldSets | None = None) -> torch.nn.ModuleDict:
    """Tokenizer and operator on the current default device; weights are not drawn."""
    builders: dict[Part, Callable[[], torch.nn.Module]] = {
        "tokenizer": partial(build_tokenizer, config, field_sets),
        "operator": partial(build_operator, config),
    }
    return torch.nn.ModuleDict({part: builders[part]() for part in parts})


def build_described(description: ModelDescription) -> torch.nn.ModuleDict:
    """`build_parts` of a description."""
    return build_parts(description.config, description.parts, description.field_sets)


def check_weights(description: ModelDescription, tensors: Weights, source: Path) -> None:
    """Compare names, shapes and kinds of tensors with the model that the description builds."""
    with torch.device("meta"):
        model = build_described(description)
    check_fit(expected_shapes(model), {name: t.shape for name, t in tensors.items()}, source)
    check_kinds(tensors, source)


def written_dtypes(description: ModelDescription, tensors: LazyWeights, dtype: torch.dtype) -> Dtypes:
    """What each tensor is written as: buffers (statistics, bases, selection biases) stay float32, as in training."""
    with torch.device("meta"):
        keep = {name for name, _ in persistent_buffers(build_described(description))}
    return target_dtypes(tensors, dtype, keep)


def describe_size(config: RunConfig, parts: tuple[Part, ...]) -> dict[str, int]:
    """Parameters of a model's parts: ``total``, and ``active``, what one token uses (`count_parameters`)."""
    with torch.device("meta"):
        counts = count_parameters(build_parts(config, parts), config.operator.experts)
    return {"total": counts.total, "active": counts.active}


def write_pretrained(
    folder: Path,
    description: ModelDescription,
    tensors: LazyWeights,
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int = MAX_SHARD_SIZE,
    numbers: Mapping[str, Any] | None = None,
    progress: Progress = ignore,
) -> list[Path]:
    """Write config, weights and card into an existing folder; returns the weight files.

    Parameters
    ----------
    numbers : mapping, optional
        An evaluation's ``metrics.json``, for the card.
    """
    content = description.model_dump(mode="json")
    metadata = {METADATA_KEY: dumps({**content, "space": description.space.document()}, separators=(",", ":"))}
    files = write_weights(folder, tensors, dtypes, max_shard_size, metadata, progress)
    described = describe_folder(folder, description)
    (folder / CARD).write_text(model_card(content, description.space, numbers))  # To be edited: not in the manifest.
    index = [folder / INDEX] if (folder / INDEX).exists() else []
    write_manifest(folder, [*files, *index, *described])
    return files


def describe_folder(folder: Path, description: ModelDescription) -> list[Path]:
    """Write ``config.json`` and ``space.json`` of a model into a folder; returns them."""
    write_json(folder / CONFIG, description.model_dump(mode="json"), indent=2)
    return [folder / CONFIG, description.space.save(folder)]


def describe_run(
    config: RunConfig,
    space: Space,
    parts: tuple[Part, ...],
    source: Source,
    weights: dict[Part, str] | None = None,
    field_sets: FieldSets | None = None,
) -> ModelDescription:
    """The description of a float32 model that this installation made."""
    environment = describe_environment()
    return ModelDescription(
        parts=parts,
        dtype="fp32",
        run=to_dict(config),
        parameters=describe_size(config, parts),
        versions={"shodh": environment["shodh"], "python": environment["python"], **environment["packages"]},
        source=source,
        weights=weights,
        field_sets=field_sets,
        space=space,
    )
