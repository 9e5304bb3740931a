"""From a path that a user names to the weights of a whole model and what is known about them."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shodh.checkpoint.description import (
    METADATA_KEY,
    Kind,
    ModelDescription,
    Part,
    Source,
    check_weights,
    checkpoint_checksum,
    describe_run,
    is_converted,
    is_pretrained,
    read_pretrained,
)
from shodh.checkpoint.folder import (
    BEST,
    LATEST,
    MANIFEST,
    checksum,
    find_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    read_manifest,
    run_of,
    verify_checkpoint,
)
from shodh.checkpoint.foreign.deepspeed_folder import is_deepspeed_folder, read_deepspeed_folder
from shodh.checkpoint.run_files import is_tokenizer, open_tokenizer, started_from
from shodh.checkpoint.weights import open_verified
from shodh.config import RunConfig, load_config
from shodh.config.base import FieldSets
from shodh.core.errors import CheckpointError
from shodh.core.reading import read_object, read_text
from shodh.core.strict_json import dumps
from shodh.core.weights import StoredTensor, Weights, open_file, open_weights, read_metadata
from shodh.schema.space import SPACE_FILE, Space

KINDS = (
    "a run folder, a checkpoint folder of one, a folder that DeepSpeed wrote (ZeRO 1, 2, 3 or universal), "
    "a safetensors file, or a converted folder"
)
_DEPTH = 3  # RUN/checkpoints/TAG: how far above the weights a run's config.yaml may lie


@dataclass(frozen=True)
class Model:
    """A whole model: description, and weights by full name, not yet read."""

    description: ModelDescription
    tensors: Weights
    numbers: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Operator:
    """Weights of an operator, and where they came from."""

    tensors: dict[str, StoredTensor]
    source: Source


def open_source(
    path: Path,
    dtype: str,
    *,
    tokenizer: Path | None = None,
    tag: str | None = None,
    config_path: Path | None = None,
    weights: Kind | None = None,
) -> Model:
    """Find out what ``path`` is, and map its weights.

    Parameters
    ----------
    dtype : {"fp32", "bf16", "fp16"}
        What is to be written: float32 is taken from the master weights of a run in lower precision.
    tokenizer : Path, optional
        Run folder of the tokenizer; by default the one that the run's configuration names.
    tag : str, optional
        Checkpoint of a run folder, or ``best``; by default the newest.
    config_path : Path, optional
        ``config.yaml`` of the run, where it does not lie at or above ``path``.
    weights : {"ema", "raw"}, optional
        As `read_pretrained`.

    Raises
    ------
    CheckpointError, ConfigError
        One line that names the file, and what is wrong with it.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected {KINDS}")
    if path.suffix == ".safetensors" and path.is_file() and METADATA_KEY in read_metadata(path):
        return _described(path, dtype, weights)
    if is_tokenizer(path):
        return _tokenizer_alone(path, dtype, weights)
    if not (path / MANIFEST).is_file() or tag is not None:
        path = path if is_converted(path) and tag is None else _checkpoint_of(path, tag)
    if is_pretrained(path) and tokenizer is None and config_path is None:
        return _described(path, dtype, weights)
    config, run = _run_config(path, config_path)
    if run is not None and is_tokenizer(run):
        raise CheckpointError(f"{path} is a checkpoint of a tokenizer; convert its run folder {run}")
    operator = _open_operator(path, dtype, weights)
    tensors: Weights = {f"operator.{name}": t for name, t in operator.tensors.items()}
    parts: tuple[Part, ...] = ("operator",)
    field_sets: FieldSets | None = None
    started = None if run is None else started_from(run)
    source = operator.source.model_copy(update={"init_from": started})
    if config.has_tokenizer:
        stored = open_tokenizer(_tokenizer_folder(config, run, tokenizer))
        tensors = {f"tokenizer.{name}": t for name, t in stored.weights.items()} | dict(tensors)
        parts, field_sets = ("tokenizer", "operator"), stored.config.data.field_sets
        # A run on regimes that its tokenizer did not learn has its own normalisation and domains.
        space = stored.space if run is None or not (run / SPACE_FILE).is_file() else _space(config, run)
    else:
        space = _space_of_fields(path, config, run, tokenizer)
    names = [regime.name for regime in config.data.regimes]
    if unknown := [name for name in names if name not in space.names]:
        raise CheckpointError(f"the tokenizer of {path} was not trained on the regimes {unknown}; use --tokenizer")
    description = describe_run(config, space.only(names), parts, source, field_sets=field_sets)
    description = description.model_copy(update={"dtype": dtype})
    check_weights(description, tensors, path)
    return Model(description, tensors, _numbers(run, path.name, source.ema))


def _described(path: Path, dtype: str, weights: Kind | None) -> Model:
    """A folder or file that says what it is: a checkpoint of this version, or a converted one."""
    description, tensors = read_pretrained(path, weights)
    source, numbers = description.source, None
    if path.is_dir() and is_checkpoint(path):
        masters = dtype == "fp32" and read_manifest(path).get("precision", "fp32") != "fp32"
        source = source.model_copy(update={"masters": masters})
        numbers = _numbers(run_of(path), path.name, source.ema)
    changes = {"dtype": dtype, "weights": None, "source": source}
    return Model(description.model_copy(update=changes), tensors, numbers)


def _checkpoint_of(path: Path, tag: str | None) -> Path:
    """The folder or file with the weights."""
    if path.is_file() or (path / MANIFEST).is_file() or is_deepspeed_folder(path):
        if tag is not None:
            raise CheckpointError(f"--tag chooses a checkpoint of a run folder, and {path} is one already")
        return path
    if tag == BEST:
        return find_checkpoint(path, tag)
    newest, latest = latest_checkpoint(path), path / LATEST
    if tag is None and newest is not None:
        return newest
    if tag is None and (path / "config.yaml").is_file() and not latest.is_file():
        raise CheckpointError(f"{path} is a run without a complete checkpoint; name one with --tag, or train on")
    base = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if tag is None and latest.is_file():  # DeepSpeed's own folder of folders
        tag = read_text(latest, "name of a checkpoint", CheckpointError).strip()
    if not tag or Path(tag).name != tag or not (base / tag).is_dir():
        known = sorted(p.name for p in base.iterdir() if p.is_dir() and p.name[0] != ".") if tag else []
        what = f"has no checkpoint {tag!r} (there are {known})" if tag else f"is not {KINDS}"
        raise CheckpointError(f"{path} {what}")
    return base / tag


def _run_config(path: Path, given: Path | None) -> tuple[RunConfig, Path | None]:
    """The configuration of the run that wrote ``path``, and its folder if it was found there."""
    if given is not None:
        return load_config(given), None
    for folder in [path, *path.absolute().parents[:_DEPTH]]:
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml"), folder
    raise CheckpointError(f"no config.yaml at or above {path}; name the one of its run with --config")


def _open_operator(path: Path, dtype: str, weights: Kind | None) -> _Operator:
    ours = path.is_dir() and (path / MANIFEST).is_file() and "format" in read_manifest(path)
    if weights == "ema" and not ours:
        raise CheckpointError(f"{path} does not say that it holds an average of the weights; leave out the choice")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not {KINDS}")
        return _Operator(open_file(path), Source(name=path.name, sha256=checksum(path)))
    if ours:
        return _open_checkpoint(path, dtype, weights)
    if is_deepspeed_folder(path):
        return _open_deepspeed(path)
    return _Operator(open_weights(path), Source(name=path.name, sha256=_digest(path)))


def _open_deepspeed(path: Path) -> _Operator:
    """Somebody's folder of DeepSpeed, or a checkpoint of an older version of this project, which has a manifest."""
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
    state = read_deepspeed_folder(path)
    masters = state.lower_precision and not _in_lower_precision(state.tensors)
    return _Operator(state.tensors, Source(name=path.name, sha256=_digest(path), step=state.step, masters=masters))


def _open_checkpoint(path: Path, dtype: str, weights: Kind | None) -> _Operator:
    """Our own checkpoint, its weights compared with its manifest: float32, whatever the run computed in."""
    tensors, manifest = open_verified(path, weights), read_manifest(path)
    step, masters = manifest["state"].get("step"), dtype == "fp32" and manifest.get("precision", "fp32") != "fp32"
    digest, ema = checkpoint_checksum(path, manifest, weights)
    return _Operator(tensors, Source(name=path.name, sha256=digest, step=step, masters=masters, ema=ema))


def _in_lower_precision(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors.values())


def _digest(folder: Path) -> str:
    """Of a folder without manifest: names, sizes and the checksums that its archives keep of their parts."""
    parts: list[Any] = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts.append((str(file.relative_to(folder)), file.stat().st_size))
        if file.suffix == ".pt":
            with zipfile.ZipFile(file) as archive:
                parts.append([(part.filename, part.file_size, part.CRC) for part in archive.infolist()])
    return hashlib.sha256(dumps(parts).encode()).hexdigest()


def _tokenizer_folder(config: RunConfig, run: Path | None, given: Path | None) -> Path:
    """The run folder of the tokenizer: as given, as configured, or beside a run that was moved."""
    configured = config.tokenizer_dir
    candidates = [given] if given is not None else [configured, *([run.parent / configured.name] if run else [])]
    for folder in candidates:
        if is_tokenizer(folder):
            return folder
    raise CheckpointError(f"no trained tokenizer in {' or '.join(map(str, candidates))}; name its run with --tokenizer")


def _space(config: RunConfig, run: Path) -> Space:
    return Space.load(run, [f.build() for f in config.data.fields])


def _space_of_fields(path: Path, config: RunConfig, run: Path | None, tokenizer: Path | None) -> Space:
    """What the numbers of a run of an operator on fields mean."""
    if tokenizer is not None:
        raise CheckpointError(f"{path} holds an operator on fields, which has no tokenizer; leave out --tokenizer")
    if run is None or not (run / SPACE_FILE).is_file():
        raise CheckpointError(
            f"{path} holds an operator on fields; convert it within its run folder, with {SPACE_FILE}"
        )
    return _space(config, run)


def _tokenizer_alone(folder: Path, dtype: str, weights: Kind | None) -> Model:
    stored = open_tokenizer(folder, weights)
    tensors = {f"tokenizer.{name}": t for name, t in stored.weights.items()}
    source = Source(name=folder.name, sha256=checksum(stored.file), step=stored.step, ema=stored.ema)
    described = describe_run(stored.config, stored.space, ("tokenizer",), source)
    check_weights(described, tensors, folder)
    return Model(described.model_copy(update={"dtype": dtype}), tensors)


def _numbers(run: Path | None, tag: str, ema: bool) -> dict[str, Any] | None:
    """What an evaluation of these very weights measured."""
    path = None if run is None else run / "report" / "metrics.json"
    if path is None or not path.is_file():
        return None
    numbers = read_object(path)
    same = numbers.get("checkpoint") == tag and numbers.get("weights", "raw") == ("ema" if ema else "raw")
    return numbers if same else None
