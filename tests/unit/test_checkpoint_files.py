"""Checkpoint files: damage is found and named before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shodh.errors import CheckpointError, ConfigError
from shodh.files import write_atomically
from shodh.train.checkpoint import (
    MANIFEST,
    checksum,
    exchange_state,
    load_into,
    load_weights,
    read_manifest,
    verify_checkpoint,
)
from shodh.train.jobs import find_start
from shodh.train.run_folder import RunFolder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of three files and their manifest, as `save_checkpoint` lays it out."""
    folder = tmp_path / "run" / "checkpoints" / "step_00000005"
    (folder / "deep").mkdir(parents=True)
    files = {}
    for number, name in enumerate(("a.pt", "b.safetensors", "deep/c.pt")):
        (folder / name).write_bytes(bytes([number]) * (1000 + number))
        files[name] = {"size": 1000 + number, "sha256": checksum(folder / name)}
    (folder / MANIFEST).write_text(json.dumps({"tag": folder.name, "state": {}, "topology": {}, "files": files}))
    return folder


def test_whole_checkpoint_passes_and_ranks_can_share_the_work(checkpoint: Path) -> None:
    assert verify_checkpoint(checkpoint)["tag"] == "step_00000005"
    (checkpoint / "b.safetensors").write_bytes(b"x")
    found = []
    for rank in range(2):
        try:
            verify_checkpoint(checkpoint, (rank, 2))
        except CheckpointError:
            found.append(rank)
    assert len(found) == 1


@pytest.mark.parametrize("name", ["a.pt", "b.safetensors", "deep/c.pt"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
def test_damaged_file_is_named(checkpoint: Path, name: str, damage: str) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "grow":
        path.write_bytes(content + b"0")
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(checkpoint)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": {}}', '{"files": 3}', '{"files": {}, "state": {}}'])
def test_damaged_manifest_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        read_manifest(checkpoint)


def test_folder_without_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_manifest(checkpoint)


def test_start_of_a_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert find_start(folder, None) is None and find_start(folder, "auto") is None, "no latest: nothing was published"
    (folder.path / "latest").write_text("step_00000005\n")
    assert find_start(folder, "auto") == checkpoint
    assert find_start(folder, str(checkpoint)) == checkpoint
    with pytest.raises(ConfigError, match="already holds a run .*--resume auto"):
        find_start(folder, None)
    with pytest.raises(CheckpointError, match="elsewhere is not a complete checkpoint"):
        find_start(folder, str(tmp_path / "elsewhere"))


def test_latest_that_names_an_incomplete_checkpoint_is_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "latest").write_text("step_00000005\n")
    (checkpoint / MANIFEST).unlink()
    assert folder.latest() is None


class Model(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, width)
        self.register_buffer("bias", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_exchange_state_is_what_a_model_loads(tmp_path: Path) -> None:
    model, other = Model(), Model()
    with torch.no_grad():
        model.bias += 3
    state = exchange_state(model)
    assert set(state) == {"linear.weight", "linear.bias", "bias"}
    save_file(state, str(tmp_path / "w.safetensors"))
    load_into(other, load_weights(tmp_path / "w.safetensors"), tmp_path)
    for name, tensor in exchange_state(other).items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("linear.bias"), "lacks linear.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda s: s.update(bias=torch.zeros(5)), r"bias is \[5\], the model's \[2\]"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_difference(change: object, message: str, tmp_path: Path) -> None:
    model = Model()
    before = exchange_state(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_into(model, state, tmp_path / "source")
    assert "source does not fit the model" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in exchange_state(model).items()), "nothing may be half loaded"


def test_unreadable_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="no weights at .*w.safetensors"):
        load_weights(path)
    save_file({"a": torch.zeros(100)}, str(path))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="w.safetensors is not a readable"):
        load_weights(path)


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    write_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shodh.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
