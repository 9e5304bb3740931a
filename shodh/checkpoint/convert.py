"""Write any checkpoint of the project as a folder of safetensors; whole or not at all."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from shodh.checkpoint.description import Dtypes, Kind, is_converted, read_pretrained, write_pretrained, written_dtypes
from shodh.checkpoint.sources import Model, open_source
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.files import PARTIAL_SUFFIX, sync_to_disk
from shodh.core.weights import DTYPES, MAX_SHARD_SIZE, Progress, differences

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    out: str
    files: list[str]
    dtype: str
    tensors: int
    parameters: dict[str, int]
    bytes: int
    masters: bool
    ema: bool
    verified: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def parse_size(text: str) -> int:
    """Bytes of ``"5GB"``, ``"500 MB"``, ``"2GiB"`` or a plain number; raises `ConfigError`."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?i?b?)", text.strip().lower())
    unit = "" if match is None else match.group(2).upper()
    if match is None or unit not in _UNITS or not 1 <= float(match.group(1)) * _UNITS[unit] < 2**63:
        raise ConfigError(f"a size must be like 5GB, 500MB or 2GiB, got {text!r}")
    return int(float(match.group(1)) * _UNITS[unit])


def convert(
    source: Path,
    out: Path,
    dtype: str = "fp32",
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    tokenizer: Path | None = None,
    tag: str | None = None,
    config_path: Path | None = None,
    weights: Kind | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write ``source`` as ``out``; see `open_source` for what a source may be.

    Raises
    ------
    CheckpointError
        The source cannot be used, ``out`` exists, or what was written is not what was read.
    """
    check_target(out, overwrite)
    model = open_source(source, dtype, tokenizer=tokenizer, tag=tag, config_path=config_path, weights=weights)
    description = model.description
    dtypes = written_dtypes(description, model.tensors, DTYPES[dtype])
    size = sum(t.numel * dtypes[name].itemsize for name, t in model.tensors.items())
    with whole_or_absent(out) as partial:
        with progress_bar("write", size) as progress:
            files = write_pretrained(
                partial, description, model.tensors, dtypes, max_shard_size, model.numbers, progress
            )
        if verify:
            with progress_bar("verify", size) as progress:
                _verify(partial, model, dtypes, progress)
    names = [file.name for file in files]
    parameters = description.parameters
    source_of = description.source
    kinds = source_of.masters, source_of.ema
    return Conversion(str(out), names, dtype, len(dtypes), parameters, size, *kinds, verify)


def check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if not is_converted(out):
        raise CheckpointError(f"{out} was not written by this command, and --overwrite replaces nothing else")


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its place when the block succeeds, and is removed when it fails."""
    out = out.absolute()
    partial, old = (out.with_name(f".{out.name}{suffix}") for suffix in (PARTIAL_SUFFIX, ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_to_disk(partial)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        sync_to_disk(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def progress_bar(what: str, size: int) -> Iterator[Progress]:
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _verify(folder: Path, model: Model, dtypes: Dtypes, progress: Progress) -> None:
    """Read what was written and compare every tensor with the source, bit by bit after the cast."""
    _, written = read_pretrained(folder)
    wrong = differences(written, model.tensors, dtypes, progress)
    if wrong:
        raise CheckpointError(
            f"what was written differs from the source in {len(wrong)} tensors: {', '.join(wrong[:3])}"
        )


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a converted folder to the hub; returns the address of the commit.

    Raises
    ------
    CheckpointError
        The hub cannot be reached, or does not let this user write there.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a Shodh model"))
    except Exception as error:  # the hub's errors have no common base
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder} is written, and was not pushed to {repository}: {reason}; log in with 'hf auth login', or check "
            "the network and the name"
        ) from error
