"""Files of a few bytes that would make much of themselves, or that are no plain tensors, are refused by name."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh.checkpoint.foreign.pickles import flat_values, read_pt, refuse_foreign_globals
from shodh.core.errors import CheckpointError

START, CALL, END = b"\x80\x02", b"R", b"."


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def archive(path: Path, *programs: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for place, program in zip(("archive", "archive/other"), programs, strict=False):
            file.writestr(f"{place}/data.pkl", program)
        file.writestr("archive/version", "3\n")
    return path


DOUBLINGS = 22  # of a thousand letters: 4 GB
EXPANDING = {
    "builtins.bytearray": named("builtins.bytearray") + number(10**12) + b"\x85" + CALL,
    "_codecs.encode": named("_codecs.encode") * (DOUBLINGS + 1)
    + text("A" * 1000)
    + (text("latin1") + b"\x86" + CALL)
    + (text("hex") + b"\x86" + CALL) * DOUBLINGS,
}


@pytest.mark.parametrize("read", [refuse_foreign_globals, read_pt])
@pytest.mark.parametrize("name", EXPANDING)
def test_what_makes_much_memory_of_a_few_bytes_is_refused(
    name: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = archive(tmp_path / "bomb.pt", START + EXPANDING[name] + END)
    with pytest.raises(CheckpointError, match=f"bomb.pt is refused: it would call {name},"):
        read(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(10, device="meta"),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_values_are_refused(make: Callable[[], torch.Tensor], tmp_path: Path) -> None:
    torch.save({"a": make()}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="odd.pt is refused: it would call"):
        read_pt(tmp_path / "odd.pt")


def test_values_that_no_file_holds_are_refused(tmp_path: Path) -> None:
    program = START + named("torch.Tensor") + number(2**20) + b"\x85" + CALL + END
    path = archive(tmp_path / "empty.pt", program)
    with pytest.raises(CheckpointError, match="empty.pt is damaged: x claims"):
        flat_values(read_pt(path), "x", path)


def test_two_programs_in_one_archive_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "two.pt", START + b"N" + END, START + named("os.system") + END)
    with pytest.raises(CheckpointError, match="expected one data.pkl, got 2"):
        read_pt(path)


GETATTR = named("__builtin__.getattr")
STAGE = named("deepspeed.runtime.zero.config.ZeroStageEnum")
PUT, GET, PAIR = b"q\x07", b"h\x07", b"\x86"
MEMBER = GETATTR + b"q\x00" + STAGE + b"q\x01" + text("weights") + b"q\x02" + PAIR + b"q\x03" + CALL + b"q\x04"


def test_enumeration_as_older_pythons_write_it_is_read(tmp_path: Path) -> None:
    """Python before 3.11.4 writes ``getattr(ZeroStageEnum, "weights")``, later ones ``ZeroStageEnum(3)``."""
    path = archive(tmp_path / "old.pt", START + MEMBER + END)
    refuse_foreign_globals(path)
    assert read_pt(path) == 3


@pytest.mark.parametrize(
    "program",
    [
        GETATTR + named("torch.Tensor") + text("tolist") + PAIR + CALL,
        GETATTR + STAGE + text("__class__") + PAIR + CALL,
        GETATTR + b"q\x05" + PUT + STAGE + text("weights") + PAIR + CALL + GET + STAGE + text("mro") + PAIR + CALL,
        GETATTR,
    ],
    ids=["other class", "other attribute", "remembered", "not called"],
)
def test_getattr_of_anything_else_is_refused(program: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "get.pt", START + program + END)
    with pytest.raises(CheckpointError, match="get.pt is refused: it would call __builtin__.getattr"):
        refuse_foreign_globals(path)


def test_every_plain_kind_of_content_is_read(tmp_path: Path) -> None:
    values = [torch.ones(2).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)]
    content = {
        "t": values,
        "s": torch.Size([2]),
        "d": [torch.float32, torch.bool],
        "set": {1},
        "p": torch.nn.Parameter(torch.ones(1)),
    }
    torch.save(content, tmp_path / "plain.pt")
    found = read_pt(tmp_path / "plain.pt")
    assert all(torch.equal(a, b) for a, b in zip(found["t"], values, strict=True))
    assert found["s"] == content["s"] and found["d"] == content["d"] and found["set"] == {1}


def two_directories(path: Path, shown: bytes, loaded: bytes) -> Path:
    """An archive in which Python's reader finds the program ``shown``, and torch's reader ``loaded``."""
    content, place = b"", 0
    for program in (loaded, shown):
        raw = archive(path, program).read_bytes()
        start, stop = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
        entries = [b"PK\1\2" + entry for entry in raw[start:stop].split(b"PK\1\2")[1:]]
        moved = [e[:42] + struct.pack("<I", struct.unpack("<I", e[42:46])[0] + len(content)) + e[46:] for e in entries]
        first = len(content) + start
        content += raw[:start] + b"".join(moved)
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, stop - start, first)
        place = place or len(content)
        content += record
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
    path.write_bytes(
        content + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[2**16 - 1] * 2, *[2**32 - 1] * 2, 0)
    )
    return path


@pytest.mark.parametrize("read", [refuse_foreign_globals, read_pt])
def test_archive_that_two_readers_read_differently_is_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = two_directories(tmp_path / "two.pt", START + b"N" + END, START + GETATTR + END)
    with zipfile.ZipFile(path) as file:
        assert file.read("archive/data.pkl") == START + b"N" + END
    assert torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") == START + GETATTR + END
    with pytest.raises(CheckpointError, match="two.pt is refused: its zip directory"):
        read(path)


@pytest.mark.parametrize("tail", [b"x", b"PK", bytes(200), b"PK\5\6" + bytes(18)])
def test_bytes_after_an_archive_are_refused(tail: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "tail.pt", START + b"N" + END)
    refuse_foreign_globals(path)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(CheckpointError, match="tail.pt is"):
        refuse_foreign_globals(path)
