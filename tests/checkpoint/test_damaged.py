"""What cannot be trusted is refused in one line that names the file, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from helper import run_ranks
from laboratory import Laboratory, Run
from safetensors.torch import load_file, save_file

import shodh
from shodh.checkpoint.convert import convert
from shodh.checkpoint.folder import checksum
from shodh.checkpoint.foreign.pickles import read_pt, refuse_foreign_globals
from shodh.checkpoint.optimizer_state import Fragments
from shodh.checkpoint.training import load_checkpoint
from shodh.checkpoint.weights import read_initial_weights, source_checksum
from shodh.core.errors import CheckpointError, ShodhError
from shodh.core.weights import INDEX, WEIGHTS
from shodh.evaluate.evaluation import open_run

pytestmark = pytest.mark.distributed


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(source: Path, tmp_path: Path, match: str, **options: Any) -> str:
    """Convert ``source`` in vain; returns the line."""
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(source, out, **options)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name], "nothing may be left"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("protocol", (2, 4))
@pytest.mark.parametrize("victim", ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"))
def test_payload_is_refused_by_name_and_not_run(
    victim: str, protocol: int, raw: Callable[..., Path], tmp_path: Path
) -> None:
    folder, created = raw(1), tmp_path / "created"
    content = torch.load(folder / victim, weights_only=False)
    content["extra"] = Payload(created)
    torch.save(content, folder / victim, pickle_protocol=protocol)
    line = refused(folder, tmp_path, f"{victim} is refused")
    assert protocol != 2 or "would call posix.mkdir" in line
    assert not created.exists()


def test_payload_in_an_expert_file_is_refused(raw: Callable[..., Path], tmp_path: Path) -> None:
    folder, created = raw(1), tmp_path / "created"
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    torch.save({"a": Payload(created)}, folder / "layer_1_expert_3_mp_rank_00_model_states.pt")
    refused(folder, tmp_path, "layer_1_expert_3_mp_rank_00_model_states.pt is refused.*posix.mkdir")
    assert not created.exists()


def test_pickles_in_other_containers_are_refused(tmp_path: Path) -> None:
    created = tmp_path / "created"
    legacy, packed, script = (tmp_path / name for name in ("legacy.pt", "packed.pt", "script.pt"))
    torch.save(Payload(created), legacy, _use_new_zipfile_serialization=False)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    torch.jit.script(torch.nn.Linear(1, 1)).save(script)
    for path in (legacy, packed, script):
        for read in (refuse_foreign_globals, read_pt):
            with pytest.raises(CheckpointError, match=path.name):
                read(path)
    assert not created.exists()
    assert torch.equal(read_pt(tmp_path / "plain.pt")["a"], torch.zeros(1000))


def test_a_tensor_larger_than_its_file_is_not_allocated(raw: Callable[..., Path], tmp_path: Path) -> None:
    folder = raw(1)
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    name = content["buffer_names"][0]
    content["module"][name] = torch.zeros(1).expand(10**12)
    torch.save(content, path)
    refused(folder, tmp_path, f"{name} claims \\[1000000000000\\]")


def test_a_pickle_in_a_checkpoint_is_opened_by_nobody(
    laboratory: Laboratory, runs: Callable[..., Run], tmp_path: Path
) -> None:
    """Whether the manifest lists it or not."""
    run, created = laboratory.copy(runs(1), "payload"), tmp_path / "created"
    folder = run.checkpoint(2)
    for victim in ("mp_rank_00_model_states.pt", "optimizer/rank_00002.pt"):
        torch.save({"extra": Payload(created)}, folder / victim)
    (folder / "optimizer" / "rank_00003.safetensors").write_bytes(b"not listed")
    manifest = json.loads((folder / "manifest.json").read_text())
    victim = folder / "mp_rank_00_model_states.pt"
    manifest["files"][victim.name] = {"size": victim.stat().st_size, "sha256": checksum(victim)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run_ranks(2, rank_jobs.pretrain, laboratory.config, run.overrides, "auto")
    convert(run.path, tmp_path / "out")
    assert not created.exists()


def test_checkpoint_of_an_older_version_gives_its_masters_and_is_not_resumed(
    runs: Callable[..., Run], raw: Callable[..., Path], tmp_path: Path
) -> None:
    """It was a DeepSpeed folder with a manifest and rounded weights beside."""
    folder, masters = raw(1, "bf16"), load_file(runs(1, "bf16").checkpoint(2) / WEIGHTS)
    save_file({name: t.bfloat16() for name, t in masters.items()}, folder / WEIGHTS)
    files = {p.name: {"size": p.stat().st_size, "sha256": checksum(p)} for p in folder.iterdir() if p.is_file()}
    manifest = {"tag": folder.name, "state": {"step": 2, "seed": 3}, "topology": {}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    convert(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[f"operator.{name}"], tensor) for name, tensor in masters.items())
    with pytest.raises(ShodhError, match="older version wrote it.*--init-from"):
        load_checkpoint(None, folder)
    flip_bit(next(folder.glob("*_optim_states.pt")), 5000)
    with pytest.raises(CheckpointError, match="optim_states.pt is damaged: its checksum"):
        convert(folder, tmp_path / "again")


@pytest.mark.parametrize("stage", (1, 3))
def test_truncated_optimizer_file(stage: int, raw: Callable[..., Path], tmp_path: Path) -> None:
    folder = raw(stage)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, tmp_path, f"{path.name} is truncated")


def test_flipped_bit_is_seen_by_the_manifest(laboratory: Laboratory, runs: Callable[..., Run], tmp_path: Path) -> None:
    """By whoever reads weights: conversion, a new run, evaluation."""
    run = laboratory.copy(runs(1), "flipped")
    path = run.checkpoint(2) / WEIGHTS
    flip_bit(path, path.stat().st_size // 2)
    message = f"{WEIGHTS} is damaged: its checksum"
    refused(run.path, tmp_path, message)
    for read in (read_initial_weights, lambda _: open_run(run.path, None, torch.device("cpu"))):
        with pytest.raises(CheckpointError, match=message):
            read(run.checkpoint(2))


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"exp_avg/a": 4}, {}, "holds no fragments"),
        ({"exp_avg/a": 4}, {"starts": "[]", "updates": "[1]"}, "holds no fragments"),
        ({"exp_avg/a": 4}, {"starts": '{"a": 0}', "updates": "[1, 2]"}, "do not agree on one number of updates"),
        ({"exp_avg/a": 4}, {"starts": '{"a": 0}', "updates": "[1]"}, "holds 4 of the 6 numbers of exp_avg/a from 0"),
        ({"exp_avg/a": 4}, {"starts": '{"a": 2}', "updates": "[1]"}, "holds 0 of the 6 numbers of exp_avg/a from 0"),
        ({"exp_avg/b": 4}, {"starts": '{"b": 0}', "updates": "[1]"}, "holds 0 of the 6 numbers"),
    ],
)
def test_fragments_that_do_not_hold_each_number_once(
    tensors: dict[str, int], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rank_00000.safetensors"
    save_file({name: torch.ones(n) for name, n in tensors.items()}, path, metadata)
    with pytest.raises(CheckpointError, match=message):
        Fragments([path]).read("exp_avg/a", 0, 6)


@pytest.mark.parametrize(
    ("stage", "victim", "message"),
    [
        (1, "layer_1_expert_2_mp_rank_00_model_states.pt", "expert file .*layer_1_expert_2_.* is missing"),
        (1, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer file of rank 0 is missing"),
        (2, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "was written by 2 ranks, and 1 optimizer files"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", "has 1 model files and 2 optimizer files"),
    ],
)
def test_missing_file(stage: int, victim: str, message: str, raw: Callable[..., Path], tmp_path: Path) -> None:
    folder = raw(stage)
    (folder / victim).unlink()
    refused(folder, tmp_path, message)


def test_file_of_an_expert_too_many(raw: Callable[..., Path], tmp_path: Path) -> None:
    folder = raw(1)
    source = folder / "layer_0_expert_3_mp_rank_00_model_states.pt"
    (folder / "layer_0_expert_4_mp_rank_00_model_states.pt").write_bytes(source.read_bytes())
    refused(folder, tmp_path, r"a file of expert 4 in layer 0, and its experts are \[4, 4\] by layer")


def test_number_of_experts_that_is_not_the_configurations(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = runs(1)
    config = tmp_path / "config.yaml"
    config.write_text((run.path / "config.yaml").read_text().replace("num_experts: 4", "num_experts: 8"))
    refused(
        run.checkpoint(2) / WEIGHTS,
        tmp_path,
        r"does not fit the model: .*experts.w1 is \[4, 32, 32\], the model's \[8, 32, 32\]",
        config_path=config,
    )


@pytest.mark.parametrize("stage", (1, 3))
def test_partition_of_another_dtype_or_length(stage: int, raw: Callable[..., Path], tmp_path: Path) -> None:
    key = "single_partition_of_fp32_groups" if stage == 1 else "fp32_flat_groups"
    folder = raw(stage)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    groups = content["optimizer_state_dict"][key]
    whole = groups[0]
    groups[0] = whole.half()
    torch.save(content, path)
    refused(folder, tmp_path, "mixes dtypes")
    groups[0] = whole[:-5].clone()
    torch.save(content, path)
    refused(folder, tmp_path, "lies outside its partition")


def test_run_without_a_checkpoint(runs: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text((runs(1).path / "config.yaml").read_text())
    refused(tmp_path / "young", tmp_path, "young is a run without a complete checkpoint")


def test_foreign_folders(tmp_path: Path) -> None:
    refused(tmp_path / "absent", tmp_path, "does not exist; expected a run folder")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"jpeg")
    refused(tmp_path / "holiday", tmp_path, "holiday is not a run folder, .* or a converted folder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Bert"]}')
    refused(tmp_path / "other", tmp_path, "other is not a run folder")
    (tmp_path / "notes.txt").write_text("text")
    refused(tmp_path / "notes.txt", tmp_path, "no config.yaml at or above|notes.txt is not a run folder")
    torch.save({"model": torch.zeros(1)}, tmp_path / "holiday" / "mp_rank_00_model_states.pt")
    (tmp_path / "holiday" / "config.yaml").write_text("name: a\ndata: {regimes: [{name: a, path: b}]}\n")
    refused(tmp_path / "holiday", tmp_path, "mp_rank_00_model_states.pt is not DeepSpeed's")


def test_tag_that_is_not_there(runs: Callable[..., Run], tmp_path: Path) -> None:
    refused(runs(1).path, tmp_path, r"has no checkpoint 'step_9' \(there are \['step_00000002'\]\)", tag="step_9")
    refused(runs(1).path, tmp_path, "has no checkpoint '../../x'", tag="../../x")


@pytest.fixture
def converted(runs: Callable[..., Run], tmp_path: Path) -> Path:
    """A sharded folder."""
    folder = tmp_path / "converted"
    convert(runs(1).path, folder, max_shard_size=200_000)
    return folder


def test_existing_folder_is_replaced_on_request_only(converted: Path, runs: Callable[..., Run], tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in converted.iterdir()}
    with pytest.raises(CheckpointError, match="converted exists; .*--overwrite"):
        convert(runs(1).path, converted)
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "absent", converted, overwrite=True)
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == before
    convert(converted, converted, "bf16", overwrite=True, verify=True)
    assert sorted(p.name for p in converted.iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        WEIGHTS,
        "space.json",
    ]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="replaces nothing else"):
        convert(converted, mine, overwrite=True)
    assert (mine / "thesis.tex").exists()
    checkpoint, run = tmp_path / "checkpoint", tmp_path / "run"
    shutil.copytree(runs(1).checkpoint(2), checkpoint)
    shutil.copytree(converted, run)
    (run / "config.yaml").write_text("name: run")
    for theirs in (checkpoint, run):  # They describe a model too, and are nothing to be thrown away.
        with pytest.raises(CheckpointError, match="replaces nothing else"):
            convert(converted, theirs, overwrite=True)


def test_failure_while_writing_leaves_nothing(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("shodh.core.weights.sync_to_disk", full)
    with pytest.raises(OSError, match="No space"):
        convert(runs(1).path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_verification_finds_a_bit_that_was_written_wrong(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from shodh.checkpoint import description as module

    write = module.write_weights

    def write_and_flip(folder: Path, *arguments: Any, **options: Any) -> list[Path]:
        files = write(folder, *arguments, **options)
        flip_bit(files[0], files[0].stat().st_size - 3)
        return files

    monkeypatch.setattr(module, "write_weights", write_and_flip)
    refused(runs(1).path, tmp_path, "what was written differs", verify=True)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(format_version=3), "config.json: format_version: Input should be 2"),
        ("config.json", lambda c: c["run"].update(seed=5), r"config.json has \d+ bytes, and \d+ were written"),
        ("config.json", lambda c: c.update(colour="red"), "config.json: colour: Extra inputs"),
        ("config.json", lambda c: c["run"].update(sed=1), "unknown key 'sed': did you mean 'seed'"),
        ("space.json", lambda c: c.pop("fields"), "space.json is damaged: KeyError"),
        ("space.json", lambda c: c.update(version=2), "space.json: expected format 'shodh-space' of version 1"),
        ("space.json", lambda c: c["regimes"].clear(), "space.json is damaged: .* at least one"),
        ("space.json", lambda c: c["regimes"][0]["domain"].pop("lengths"), "space.json is damaged: KeyError"),
        ("space.json", lambda c: c["regimes"][0]["domain"].update(flat=True), "space.json is damaged: its checksum"),
        ("config.json", lambda c: c["run"]["operator"].update(depth=3), "lacks operator.blocks.2"),
        (INDEX, lambda c: c.pop("weight_map"), "index.json is damaged: it has no weight_map"),
        (
            INDEX,
            lambda c: c["weight_map"].update({"operator.head.bias": "../../etc/passwd"}),
            "names the shard '../../etc",
        ),
        (INDEX, lambda c: c["weight_map"].update({"operator.head.bias": "absent.safetensors"}), "absent.* is missing"),
        (INDEX, lambda c: c["weight_map"].update({"ghost": max(c["weight_map"].values())}), "disagree on ghost"),
    ],
)
def test_damaged_json_of_a_converted_folder(
    file: str, change: Callable[[dict[str, Any]], object], message: str, converted: Path, tmp_path: Path
) -> None:
    edit_json(converted / file, change)
    refused(converted, tmp_path, message)
    with pytest.raises(CheckpointError, match=message):
        shodh.from_pretrained(converted)


@pytest.mark.parametrize("file", ("config.json", INDEX))
def test_json_that_is_cut_off(file: str, converted: Path, tmp_path: Path) -> None:
    (converted / file).write_text((converted / file).read_text()[:-20])
    refused(converted, tmp_path, f"{file} is damaged: it is not valid JSON")


def test_damaged_shards(converted: Path, tmp_path: Path) -> None:
    first, shard, *_ = sorted(converted.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(converted, tmp_path, f"{shard.name} is not a readable safetensors file")
    save_file(load_file(first), shard)
    refused(converted, tmp_path, f"{shard.name} and .* disagree")
    shard.unlink()
    refused(converted, tmp_path, f"{shard.name} is missing")


def test_nan_is_kept_and_verified_bit_by_bit(runs: Callable[..., Run], tmp_path: Path) -> None:
    """A diverged run may be looked into: conversion changes no value."""
    weights = load_file(runs(1).checkpoint(2) / WEIGHTS)
    weights["head.bias"][3] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", config_path=runs(1).path / "config.yaml", verify=True)
    assert load_file(tmp_path / "out" / WEIGHTS)["operator.head.bias"].isnan().sum() == 1


def test_initial_weights_that_cannot_be_used(raw: Callable[..., Path], laboratory: Laboratory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tools/convert_checkpoint.py"):
        read_initial_weights(raw(1))
    with pytest.raises(CheckpointError, match="no weights at .*absent"):
        read_initial_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        read_initial_weights(tmp_path)
    save_file({"head.bias": torch.zeros(2)}, tmp_path / "w.safetensors", {"shodh": "{"})
    with pytest.raises(CheckpointError, match="w.safetensors.*JSON"):
        source_checksum(tmp_path / "w.safetensors")
    convert(laboratory.load(laboratory.overrides("any", 1, 1)).tokenizer_dir, tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="holds a tokenizer alone"):
        read_initial_weights(tmp_path / "tokenizer")
