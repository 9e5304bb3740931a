"""A folder of a whole model: ``config.json``, weights in safetensors, and a model card.

Tokenizer and operator travel together (prefixes ``tokenizer.`` and ``operator.``), with what their numbers mean:
normalisation constants, the domain of each regime, the fields, and the whole configuration of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator

from shodh.checkpoint.card import model_card
from shodh.config import RunConfig, Section, config_from_dict
from shodh.core.errors import CheckpointError, ConfigError, DataError
from shodh.core.reading import parse_json
from shodh.core.strict_json import dumps
from shodh.core.weights import (
    MAX_SHARD_SIZE,
    LazyWeights,
    Progress,
    Weights,
    check_fit,
    check_kinds,
    expected_shapes,
    ignore,
    open_weights,
    persistent_buffers,
    read_json,
    read_metadata,
    target_dtypes,
    write_weights,
)
from shodh.data import FieldNormalizer
from shodh.models.factory import build_operator, build_tokenizer
from shodh.moe.groups import is_routed_expert
from shodh.schema.domain import Domain

CONFIG = "config.json"
CARD = "README.md"
METADATA_KEY = "shodh"

Dtypes = dict[str, torch.dtype]
Part = Literal["tokenizer", "operator"]


class Source(Section):
    """Where the weights came from."""

    name: str = Field(description="folder or file, without the path that leads to it")
    sha256: str = Field(description="of the manifest, or of the files where there is none")
    step: int | None = None
    masters: bool = Field(False, description="float32 master weights of a run in lower precision")
    init_from: str | None = Field(None, description="sha256 of the source whose weights the run started from")


class ModelDescription(Section):
    """What ``config.json`` says; every value is checked when it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["shodh"] = "shodh"
    format_version: Literal[1] = 1
    parts: tuple[Part, ...] = Field(min_length=1)
    dtype: Literal["fp32", "bf16", "fp16"]
    regimes: tuple[str, ...] = Field(min_length=1)
    fields: tuple[dict[str, Any], ...]
    domains: dict[str, dict[str, Any]]
    normalizer: dict[str, Any]
    run: dict[str, Any]
    parameters: dict[str, int]
    versions: dict[str, str]
    source: Source
    merge: dict[str, Any] | None = Field(None, description="how it was made of experts; null: it was trained")

    @model_validator(mode="after")
    def _check(self) -> ModelDescription:
        if missing := sorted(set(self.regimes) - set(self.domains)):
            raise ValueError(f"domains lacks the regimes {missing}")
        return self

    @property
    def config(self) -> RunConfig:
        """The run's configuration, validated."""
        return config_from_dict(self.run, f"'run' of {CONFIG}")

    def build_normalizer(self) -> FieldNormalizer:
        read = FieldNormalizer.from_dict(self.normalizer)
        # Constants of a former version do not say which fields are masked.
        return FieldNormalizer([f.build() for f in self.config.data.fields], read.ndim, read.constants)

    def build_domains(self) -> dict[str, Domain]:
        """The domain of each regime."""
        try:
            return {name: Domain.from_dict(self.domains[name]) for name in self.regimes}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"a domain of {CONFIG} is malformed: {error!r}") from error


def parse_description(content: Mapping[str, Any], source: Path) -> ModelDescription:
    """Check the content of a ``config.json``; raises `CheckpointError` that names the file and the key."""
    if content.get("format") != "shodh":
        raise CheckpointError(
            f"{source} is not of this project: expected format 'shodh', got {content.get('format')!r}"
        )
    try:
        description = ModelDescription.model_validate(content)
        description.config  # noqa: B018
        description.build_normalizer()
        description.build_domains()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    return description


def is_pretrained(path: Path) -> bool:
    """Whether a folder looks like one that `write_pretrained` wrote."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return read_json(path / CONFIG).get("format") == "shodh"
    except CheckpointError:
        return True  # A damaged one is to be named, not taken for something else.


def read_description(path: Path) -> ModelDescription:
    """Description of a folder, or of a lone file that was written by this project. Errors as `read_pretrained`."""
    if not path.is_file():
        return parse_description(read_json(path / CONFIG), path / CONFIG)
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path} says nothing about its model; use the folder it came with")
    content = parse_json(text, f"{path} is damaged: its description", CheckpointError)
    return parse_description(content if isinstance(content, dict) else {}, path)


def read_pretrained(path: Path) -> tuple[ModelDescription, Weights]:
    """Description and stored tensors of a folder, or of a lone file that was written by this project.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged, or the tensor that does not fit.
    """
    description = read_description(path)
    tensors = open_weights(path)
    check_weights(description, tensors, path)
    return description, tensors


def build_parts(config: RunConfig, parts: tuple[Part, ...]) -> torch.nn.ModuleDict:
    """Tokenizer and operator on the current default device; weights are not drawn."""
    builders: dict[Part, Callable[[RunConfig], torch.nn.Module]] = {
        "tokenizer": build_tokenizer,
        "operator": build_operator,
    }
    return torch.nn.ModuleDict({part: builders[part](config) for part in parts})


def check_weights(description: ModelDescription, tensors: Weights, source: Path) -> None:
    """Compare names, shapes and kinds of tensors with the model that the description builds."""
    with torch.device("meta"):
        model = build_parts(description.config, description.parts)
    check_fit(expected_shapes(model), {name: t.shape for name, t in tensors.items()}, source)
    check_kinds(tensors, source)


def written_dtypes(config: RunConfig, parts: tuple[Part, ...], tensors: LazyWeights, dtype: torch.dtype) -> Dtypes:
    """What each tensor is written as: buffers (statistics, bases, selection biases) stay float32, as in training."""
    with torch.device("meta"):
        keep = {name for name, _ in persistent_buffers(build_parts(config, parts))}
    return target_dtypes(tensors, dtype, keep)


def count_parameters(config: RunConfig, parts: tuple[Part, ...]) -> dict[str, int]:
    """``total``, and ``active``: what one token uses, ``top_k`` of the routed experts. Buffers do not count."""
    with torch.device("meta"):
        model = build_parts(config, parts)
    experts = config.operator.experts
    total = active = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        total += count
        active += count * experts.top_k // experts.num_experts if is_routed_expert(name) else count
    return {"total": total, "active": active}


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
    metadata = {METADATA_KEY: dumps(content, separators=(",", ":"))}
    files = write_weights(folder, tensors, dtypes, max_shard_size, metadata, progress)
    (folder / CONFIG).write_text(dumps(content, indent=2) + "\n")
    (folder / CARD).write_text(model_card(content, numbers))
    return files
