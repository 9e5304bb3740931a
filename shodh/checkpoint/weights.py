"""Reading ``model.safetensors`` of a checkpoint: float32, plain names, all experts stacked."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shodh.checkpoint.description import (
    Kind,
    find_pretrained,
    read_description,
    read_part,
    says_its_model,
)
from shodh.checkpoint.folder import MANIFEST, checksum, read_manifest, verify_file
from shodh.core.errors import CheckpointError
from shodh.core.weights import (
    AVERAGED,
    INDEX,
    WEIGHTS,
    StoredTensor,
    open_file,
    open_weights,
)


def open_verified(checkpoint: Path, kind: Kind | None = None) -> dict[str, StoredTensor]:
    """The weights of a checkpoint folder, mapped, after a comparison with its manifest; ``kind`` as `read_pretrained`.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged.
    """
    manifest = read_manifest(checkpoint)
    if kind == "ema" and AVERAGED not in manifest["files"]:
        raise CheckpointError(f"{checkpoint} holds no average of the weights; leave out the choice of weights")
    name = AVERAGED if AVERAGED in manifest["files"] and kind != "raw" else WEIGHTS
    verify_file(checkpoint, name, manifest)
    return open_file(checkpoint / name)


def read_weights(checkpoint: Path, kind: Kind | None = None) -> dict[str, Tensor]:
    """`open_verified` as tensors, still mapped."""
    return {name: stored.read() for name, stored in open_verified(checkpoint, kind).items()}


def read_initial_weights(path: Path, kind: Kind | None = None) -> dict[str, Tensor]:
    """Weights of an operator for a new run: from a run, a checkpoint, a converted folder, or a safetensors file.

    ``kind`` is as in `read_pretrained`.

    Raises
    ------
    CheckpointError
        Names the file that is missing or damaged; DeepSpeed's own folders are to be converted first.
    """
    path = find_pretrained(path)
    if says_its_model(path):
        chosen = {name: stored.read() for name, stored in read_part(path, "operator", kind).items()}
        if not chosen:
            raise CheckpointError(f"{path} holds a tokenizer alone; expected the weights of an operator")
        return chosen
    if path.is_dir() and (path / MANIFEST).exists():
        weights = read_weights(path, kind)
    elif kind == "ema":
        raise CheckpointError(f"{path} does not say that it holds an average of the weights; leave out the choice")
    elif path.is_dir() and next(path.glob("*_model_states.pt"), None) is not None:
        raise CheckpointError(f"{path} is DeepSpeed's own; convert it first: tools/convert_checkpoint.py {path} OUT")
    elif path.is_dir() and not (path / WEIGHTS).exists() and not (path / INDEX).exists():
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}; nor a converted folder: it has no {WEIGHTS}"
        )
    else:
        weights = {name: stored.read() for name, stored in open_weights(path).items()}
    prefix = "operator."
    chosen = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)} or weights
    if any(name.startswith("tokenizer.") for name in chosen):
        raise CheckpointError(f"{path} holds a tokenizer alone; expected the weights of an operator")
    return chosen


def kind_of(path: Path, kind: Kind | None = None) -> Kind:
    """Which weights `read_initial_weights` gives."""
    path = find_pretrained(path)
    if says_its_model(path):
        return "ema" if read_description(path, kind).source.ema else "raw"
    averaged = (path / MANIFEST).is_file() and AVERAGED in read_manifest(path)["files"]
    return "ema" if averaged and kind != "raw" else "raw"


def source_checksum(path: Path, kind: Kind | None = None) -> str:
    """What names the weights at ``path``, also after a conversion: SHA-256 of the manifest of their checkpoint.

    Of a converted folder it is the one of the checkpoint that it was made of; of weights without either, the one of
    the file, or of the index of shards.
    """
    path = find_pretrained(path)
    if says_its_model(path):
        return read_description(path, kind).source.sha256
    if path.is_dir():
        path = next(file for name in (MANIFEST, WEIGHTS, INDEX) if (file := path / name).exists())
    return checksum(path)
