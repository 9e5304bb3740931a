"""Other people's ``.pt`` files, read without running what they hold.

A pickle is a program. `read_pt` runs torch's restricted unpickler with a short list of DeepSpeed's own classes, each
replaced by a plain stand-in, so that DeepSpeed is neither needed nor imported; `refuse_foreign_globals` looks at the
program without running it, for files that DeepSpeed itself is about to load. Of what torch allows, only what DeepSpeed
uses is let through: the rest cannot run code, but makes any amount of memory of a few bytes.
"""

from __future__ import annotations

import itertools
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from shodh.core.errors import CheckpointError


class ZeroStage(IntEnum):
    """Stands for ``deepspeed.runtime.zero.config.ZeroStageEnum``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class Fragment:
    """Stands for ``deepspeed.utils.tensor_fragment.fragment_address``: a place in a flat partition."""

    numel: int
    start: int


class LossScaler:
    """Stands for the loss scaler, whose state nobody needs here."""


#: DeepSpeed's classes that its checkpoints hold, and what is made of them.
STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": LossScaler,
}

PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
GETS = ("GET", "BINGET", "LONG_BINGET")

#: How Python before 3.11.4 writes a member of an enumeration: ``getattr(kind, name)``, spelled for protocol 2 or not.
_GETATTR = ("builtins.getattr", "__builtin__.getattr")
_ENUM = "deepspeed.runtime.zero.config.ZeroStageEnum"

#: What else they hold: tensors and plain containers.
_PLAIN = re.compile(
    r"collections\.OrderedDict|(builtins|__builtin__)\.set|torch\.(Tensor|Size|device|[A-Z]\w*Storage|b?float\d+|u?int\d+|bool)"
    r"|torch\._utils\.(_rebuild_tensor_v2|_rebuild_parameter)|torch\._tensor\._rebuild_from_type_v2"
)


def _member(kind: Any, name: Any) -> ZeroStage:
    """What is called for ``getattr``: a stage by its name, and nothing else."""
    if kind is not ZeroStage or name not in ZeroStage.__members__:
        raise ValueError("getattr of something else than a ZeRO stage")
    return ZeroStage[name]


def _allowed() -> Any:
    functions = [(_member, name) for name in _GETATTR]
    return torch.serialization.safe_globals([*((kind, name) for name, kind in STAND_INS.items()), *functions])


#: Ends of a zip archive: the end record, and before it, in large archives, the locator and the zip64 end record.
_END, _LOCATOR, _END64 = (struct.Struct(f) for f in ("<4s4H2IH", "<4sIQI", "<4sQ2H2I4Q"))


def _check_directory(path: Path) -> None:
    """The one central directory stands directly before its end records, and these at the end of the file.

    Readers search it by different rules (Python's takes the zip64 record before the locator, torch's the one that the
    locator names), so that an archive of two directories shows one content to a guard and another to the loader.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        length = min(size, _END64.size + _LOCATOR.size + _END.size)
        file.seek(size - length)
        tail = file.read(length)
    if len(tail) < _END.size or not tail[-_END.size :].startswith(b"PK\5\6"):
        raise CheckpointError(f"{path} is truncated or no torch.save file: it does not end with a zip directory")
    _, *_, length, start, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    whole = comment == 0
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if len(locator) == _LOCATOR.size and locator.startswith(b"PK\6\7"):
        end -= _LOCATOR.size + _END64.size
        whole = whole and end >= 0 and _LOCATOR.unpack(locator)[2] == end
        if whole:
            signature, record, *_, length, start = _END64.unpack(tail[: _END64.size])
            whole = signature == b"PK\6\6" and record == _END64.size - 12
    if not whole or start + length != end:
        raise CheckpointError(f"{path} is refused: its zip directory does not stand directly before its end")


def _program(path: Path) -> bytes:
    """The pickle of a plain ``torch.save`` archive, as torch's own reader gives it to whoever loads the file.

    The parts are stored, not compressed, lie within the file, and are the same for Python's reader and torch's.
    """
    _check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is truncated or no torch.save file: {error}") from error
    if (
        any(p.compress_type != zipfile.ZIP_STORED for p in parts)
        or sum(p.file_size for p in parts) > path.stat().st_size
    ):
        raise CheckpointError(f"{path} is no plain torch.save file: it is compressed, or its parts overlap")
    programs = [part for part in parts if Path(part.filename).name.lower() == "data.pkl"]
    if len(programs) != 1:
        raise CheckpointError(f"{path} is refused: expected one data.pkl, got {len(programs)}")
    reader: Any = torch._C.PyTorchFileReader(str(path))
    listed = sorted(
        (n, reader.get_record_size(n), reader.get_record_header_offset(n)) for n in reader.get_all_records()
    )
    if listed != sorted((p.filename.partition("/")[2], p.file_size, p.header_offset) for p in parts):
        raise CheckpointError(f"{path} is refused: two readers of zip archives find different parts in it")
    program: bytes = reader.get_record("data.pkl")
    return program


def _named(program: bytes) -> set[str]:
    """Everything that a pickle names, whether torch allows it or not."""
    operations = [(code.name, argument) for code, argument, _ in pickletools.genops(program)]
    named = [(i, str(value).replace(" ", ".", 1)) for i, (code, value) in enumerate(operations) if code == "GLOBAL"]
    members = {i for i, name in named if name in _GETATTR and _is_member(operations, i)}
    return {name for i, name in named if i not in members}


def _is_member(operations: Sequence[tuple[str, Any]], start: int) -> bool:
    """Whether the ``getattr`` named here makes a ZeRO stage, and is not remembered for anything else.

    DeepSpeed's own loader would call the true ``getattr``, with which a pickle could get at anything.
    """
    remembered = {value for _, value in itertools.takewhile(lambda o: o[0] in PUTS, operations[start + 1 :])}
    if any(code in GETS and value in remembered for code, value in operations):
        return False
    following = [o for o in operations[start + 1 : start + 9] if o[0] not in PUTS][:4]
    return [code for code, _ in following] == ["GLOBAL", "BINUNICODE", "TUPLE2", "REDUCE"] and (
        str(following[0][1]).replace(" ", ".", 1) == _ENUM and following[1][1] in ZeroStage.__members__
    )


def refuse_foreign_globals(path: Path) -> None:
    """Look at a ``.pt`` file without running it.

    Only the pickle is read, never the tensors, so that this is cheap for files of any size.

    Raises
    ------
    CheckpointError
        It is damaged, or names something else than tensors, plain containers and `STAND_INS`; the message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        program = _program(path)
        with _allowed():
            foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        foreign |= {name for name in _named(program) if name not in STAND_INS and not _PLAIN.fullmatch(name)}
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hand-made pickle leads to
        raise CheckpointError(f"{path} is refused: its pickle cannot be read safely ({_first_line(error)})") from error
    if foreign:
        raise CheckpointError(
            f"{path} is refused: it would call {', '.join(sorted(foreign))}, which no checkpoint of DeepSpeed does"
        )


def read_pt(path: Path) -> Any:
    """The content of a ``.pt`` file, tensors mapped and not read; nothing in it is run.

    Raises
    ------
    CheckpointError
        As `refuse_foreign_globals`; or a tensor claims more values than the file holds.
    """
    refuse_foreign_globals(path)
    try:
        with _allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hand-made pickle leads to
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    return content


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def flat_values(tensor: Any, what: str, path: Path) -> torch.Tensor:
    """``tensor`` as a flat view, after the check that its values lie in the file: an expanded one claims any size."""
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path} is damaged: {what} is {type(tensor).__name__}, not a tensor")
    # torch.Tensor may be called with a size alone, and has then a storage that no file filled.
    stored = min(tensor.untyped_storage().nbytes(), path.stat().st_size)
    if tensor.numel() * tensor.itemsize > stored or not tensor.is_contiguous():
        raise CheckpointError(f"{path} is damaged: {what} claims {list(tensor.shape)} and does not hold the values")
    return tensor.detach().reshape(-1)
