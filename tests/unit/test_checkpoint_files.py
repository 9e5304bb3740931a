"""Checkpoint files: damage is found and named before anything is loaded."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shodh.checkpoint.folder import (
    MANIFEST,
    best_checkpoint,
    checkpoints_of,
    checksum,
    find_checkpoint,
    latest_checkpoint,
    partial_folder,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
    verify_checkpoint,
)
from shodh.config import dump_config, load_config
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.files import write_atomically
from shodh.core.weights import load_into, load_weights
from shodh.train.run_folder import RunFolder
from shodh.train.start import check_same_run, find_start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of three files and their manifest, as `save_checkpoint` lays it out."""
    folder = tmp_path / "run" / "checkpoints" / "step_00000005"
    (folder / "deep").mkdir(parents=True)
    files = {}
    for number, name in enumerate(("a.json", "b.safetensors", "deep/c.bin")):
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


@pytest.mark.parametrize("name", ["a.json", "b.safetensors", "deep/c.bin"])
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
    with pytest.raises(ConfigError, match="already holds a run .*--resume auto"):
        find_start(folder, None)
    assert find_start(folder, "auto") == find_start(folder, str(checkpoint)) == checkpoint
    with pytest.raises(CheckpointError, match="elsewhere is not a complete checkpoint"):
        find_start(folder, str(tmp_path / "elsewhere"))
    (checkpoint / MANIFEST).unlink()
    for asked in (None, "auto"):
        with pytest.raises(CheckpointError, match="none of the checkpoints in .* is whole .step_00000005."):
            find_start(folder, asked)
    checkpoint.rename(checkpoint.with_name(".step_00000005.partial"))
    assert find_start(folder, None) is None and find_start(folder, "auto") is None, "nothing was published"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four whole checkpoints, and what a person put beside them."""
    for step in (5, 10, 15, 20):
        write_whole(tmp_path / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "latest").write_text("step_00000020\n")
    for name in ("best", "step_00000010_best", "step_5"):
        write_whole(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step_00000003").symlink_to("step_00000010")
    (tmp_path / "checkpoints" / "step_00000004").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("the best was step 10")
    return tmp_path


def write_whole(folder: Path, state: int = 0) -> None:
    folder.mkdir(parents=True)
    (folder / "a").write_text("abc")
    files = {"a": {"size": 3, "sha256": checksum(folder / "a")}}
    (folder / MANIFEST).write_text(json.dumps({"state": {"n": state}, "topology": {}, "files": files}))


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_pruning_drops_the_projects_own_alone(run: Path) -> None:
    before = names(run)
    assert [int(p.name[5:]) for p in checkpoints_of(run)] == [5, 10, 15, 20]
    prune(run, "step_00000010", keep=2)
    assert before - names(run) == {"step_00000005", "step_00000015"}
    assert (run / "checkpoints" / "step_00000003" / MANIFEST).exists()


def test_latest_that_names_no_checkpoint_gives_the_newest_whole_one(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints"
    (folder / "step_00000020" / "a").write_text("ab")  # truncated
    for text in ("step_00000030\n", "../checkpoints/best\n", "\0\udcff", ""):
        caplog.clear()
        (run / "latest").write_text(text, errors="surrogateescape")
        assert latest_checkpoint(run) == folder / "step_00000015"
        assert [r.getMessage().count("step_00000015") for r in caplog.records] == [1]
    (run / "latest").write_text("best\n")
    assert latest_checkpoint(run) == folder / "best"
    (run / "latest").unlink()
    assert latest_checkpoint(run) == folder / "step_00000015"


def test_leftovers_of_killed_saves_go_and_nothing_else(run: Path) -> None:
    before, folder = names(run), run / "checkpoints"
    for name in (".step_00000025.partial", ".step_00000020.old"):
        write_whole(folder / name)
    (folder / ".mine").mkdir()
    (folder / "step_00000015").rename(folder / ".step_00000015.old")  # killed between the two renames
    (run / "routing").mkdir()
    for name in (".latest.17.partial", "routing/.rank0.jsonl.17.partial"):
        (run / name).write_text("half")
    remove_leftovers(run)
    assert names(run) == before | {".mine"}
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("moment", ["manifest", "old", "new", "latest", "remove"])
def test_a_kill_while_publishing_leaves_the_old_or_the_new_one(
    run: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``step_00000020`` is written again; whatever the moment, what follows finds it, whole."""
    from shodh.checkpoint import folder as module

    partial = partial_folder(run, "step_00000020")
    write_whole(partial)
    manifest = json.loads((partial / MANIFEST).read_text()) | {"state": {"n": 1}}
    (partial / MANIFEST).unlink()

    class Killed(BaseException):
        pass

    rename, remove = Path.rename, module._remove
    write, write_json = module.write_atomically, module.write_json

    def killing(at: str, call: object, *arguments: object) -> object:
        if at == moment:
            raise Killed
        return call(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(module, "write_json", lambda p, m, **how: killing("manifest", write_json, p, m))
    monkeypatch.setattr(module, "write_atomically", lambda p, text: killing("latest", write, p, text))
    monkeypatch.setattr(module, "_remove", lambda p: killing("remove", remove, p) if p.exists() else None)
    monkeypatch.setattr(Path, "rename", lambda p, to: killing("new" if p == partial else "old", rename, p, to))
    with pytest.raises(Killed):
        publish(partial, run, "step_00000020", manifest)
    monkeypatch.undo()
    remove_leftovers(run)
    found = latest_checkpoint(run)
    assert found is not None and found.name == "step_00000020"
    assert verify_checkpoint(found)["state"]["n"] == (1 if moment in ("latest", "remove") else 0)
    assert not [name for name in names(run) if name.startswith(".step")]


def test_one_job_owns_a_run_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    first.own()
    with pytest.raises(ConfigError, match=f"run is in use by process {os.getpid()} on .*; wait"):
        RunFolder(tmp_path / "run").own()
    child = subprocess.Popen(["sleep", "60"])
    begun, begins = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(begins, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(begun, 1)
        del first
        RunFolder(tmp_path / "run").own()  # a child does not hold it
    finally:
        child.kill()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        child.wait()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_used_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("shodh.core.files.fcntl.flock", flock)
    folders = [RunFolder(tmp_path / "run") for _ in range(2)]
    for folder in folders:
        folder.own()


class Model(torch.nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, width)
        self.register_buffer("bias", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def state_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_are_what_a_model_loads(tmp_path: Path) -> None:
    model, other = Model(), Model()
    with torch.no_grad():
        model.bias += 3
    state = state_of(model)
    assert set(state) == {"linear.weight", "linear.bias", "bias"}
    save_file(state, str(tmp_path / "w.safetensors"))
    load_into(other, load_weights(tmp_path / "w.safetensors"), tmp_path)
    for name, tensor in state_of(other).items():
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
    before = state_of(model)
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_into(model, state, tmp_path / "source")
    assert "source does not fit the model" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in state_of(model).items()), "nothing may be half loaded"


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

    monkeypatch.setattr("shodh.core.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def call_best(run: Path, newest: int, best: int | None) -> None:
    manifest = run / "checkpoints" / f"step_{newest:08d}" / MANIFEST
    content = json.loads(manifest.read_text())
    content["state"]["best"] = None if best is None else {"step": best, "measure": "valid/x", "value": 1.0}
    manifest.write_text(json.dumps(content))


def test_the_best_checkpoint_is_the_one_that_the_newest_calls_so_and_stays(run: Path) -> None:
    (run / "checkpoints" / "best").rename(run / "checkpoints" / "mine")
    call_best(run, 10, 15)  # What older ones call the best does not count.
    call_best(run, 20, 5)
    before = names(run)
    prune(run, "step_00000020", keep=1)
    assert before - names(run) == {"step_00000010", "step_00000015"}
    assert find_checkpoint(run, "best") == best_checkpoint(run) == run / "checkpoints" / "step_00000005"
    assert find_checkpoint(run, None).name == "step_00000020" and find_checkpoint(run, "mine").name == "mine"
    call_best(run, 20, 10)
    for ask in (best_checkpoint, lambda run: find_checkpoint(run, "best")):
        with pytest.raises(CheckpointError, match="the best checkpoint of .*, step_00000010, is gone"):
            ask(run)


def test_a_folder_that_a_person_called_best_is_read_and_never_taken_for_the_projects(run: Path) -> None:
    assert best_checkpoint(run) is None and find_checkpoint(run, "best") == run / "checkpoints" / "best"
    call_best(run, 20, 15)
    with pytest.raises(CheckpointError, match="'best' is step_00000015, and a folder .*/checkpoints/best of yours"):
        find_checkpoint(run, "best")
    prune(run, "step_00000020", keep=1)
    assert {"best", "step_00000010_best", "step_00000015"} <= names(run)
    assert json.loads((run / "checkpoints" / "best" / MANIFEST).read_text())["state"] == {"n": 0}


@pytest.mark.parametrize("name", ["step_00000007", "../checkpoints", "..", "notes.txt", ""])
def test_a_checkpoint_that_is_not_there_is_said(run: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        find_checkpoint(run, name)


def test_best_of_a_run_that_keeps_none_is_said(run: Path) -> None:
    call_best(run, 20, None)
    (run / "checkpoints" / "best").rename(run / "checkpoints" / "mine")
    with pytest.raises(CheckpointError, match="has no best checkpoint"):
        find_checkpoint(run, "best")


def test_a_tokenizer_goes_on_beside_another_operator(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(tmp_path / "config.yaml")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "config.yaml").write_text(dump_config(load_config(config)))
    operator = load_config(config, ["operator.experts.hidden=24"])
    check_same_run(operator, folder, of_tokenizer=True)
    with pytest.raises(ConfigError, match="other settings of operator"):
        check_same_run(operator, folder)
    with pytest.raises(ConfigError, match="other settings of tokenizer"):
        check_same_run(load_config(config, ["tokenizer.latent_channels=12"]), folder, of_tokenizer=True)
