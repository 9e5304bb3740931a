"""Round trips: engine -> safetensors -> engine, at any ZeRO stage and expert degree: no bit of a weight is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rank_jobs
import torch
from helper import run_ranks
from laboratory import MORE_STAGES, Laboratory, Run, assert_same_output
from safetensors.torch import load_file

import shodh
from shodh.checkpoint.convert import convert
from shodh.checkpoint.description import read_pretrained
from shodh.checkpoint.folder import read_manifest, write_manifest
from shodh.checkpoint.pretrained import ShodhModel
from shodh.checkpoint.run_files import started_from
from shodh.checkpoint.weights import source_checksum
from shodh.models.operator import OperatorOutput
from shodh.schema.domain import num_static_features
from shodh.train.run_folder import RunFolder

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1), (3, 2)]
LAYOUTS += [pytest.param(*layout, marks=pytest.mark.exhaustive) for layout in ((1, 2), (2, 1), (2, 2), (3, 1))]


def converted(laboratory: Laboratory, run: Run, folder: Path) -> Path:
    """Convert the last step as plain ``engine.save_checkpoint`` leaves it."""
    convert(laboratory.raw(run), folder / "out", verify=True)
    return folder / "out"


def probed(model: ShodhModel) -> OperatorOutput:
    """What the operator of a converted run makes of the samples that its ranks were probed with."""
    inputs = rank_jobs.probe_input(model.history, model.config.tokenizer.latent_channels, num_static_features(1))
    with torch.no_grad():
        output: OperatorOutput = model.operator(*inputs)
    return output


@pytest.mark.parametrize(("stage", "ep_size"), LAYOUTS)
def test_round_trip_keeps_every_bit_of_the_weights(
    laboratory: Laboratory, stage: int, ep_size: int, tmp_path: Path
) -> None:
    """Back at the same layout; outputs, and those of ``shodh.from_pretrained``, are the engine's to rounding."""
    run = laboratory.run(2, ep_size, stage)
    out = converted(laboratory, run, tmp_path)
    overrides = laboratory.overrides(f"back-{stage}-{ep_size}", ep_size, stage)
    ranks = run_ranks(2, rank_jobs.start_from, laboratory.config, overrides, out)
    assert_same_weights(ranks[0]["state"], run)
    model = shodh.from_pretrained(out)
    output = probed(model)
    for rank in (*ranks, *run.ranks):
        assert_same_output(output, rank, model.config)


def test_outputs_are_those_of_the_engine_with_four_experts_a_token(laboratory: Laboratory, tmp_path: Path) -> None:
    settings = ("operator.experts.top_k=4", "operator.experts.router.kind=token")
    run = laboratory.run(2, 2, 1, *settings)
    convert(run.path, tmp_path / "out")
    model = shodh.from_pretrained(tmp_path / "out")
    assert_same_output(probed(model), run.ranks[0], model.config)


@pytest.mark.parametrize(("written", "read"), [((1, 1), (3, 2)), ((3, 2), (2, 1)), ((2, 2), (1, 1))])
def test_weights_move_to_another_layout_bitwise(
    laboratory: Laboratory, written: tuple[int, int], read: tuple[int, int], tmp_path: Path
) -> None:
    run = laboratory.run(2, written[1], written[0])
    overrides = laboratory.overrides(f"moved-{written}-{read}".replace(" ", ""), read[1], read[0])
    overrides[0] = f"name=moved{written[0]}{written[1]}{read[0]}{read[1]}"
    ranks = run_ranks(2, rank_jobs.start_from, laboratory.config, overrides, converted(laboratory, run, tmp_path))
    assert_same_weights(ranks[0]["state"], run)


def test_one_rank_starts_from_a_file_or_a_checkpoint_of_two(laboratory: Laboratory) -> None:
    run = laboratory.run(2, 2, 1)
    for number, source in enumerate((run.checkpoint(10), run.checkpoint(10) / "model.safetensors")):
        overrides = laboratory.overrides(f"file{number}", 1, 2)
        (rank,) = run_ranks(1, rank_jobs.start_from, laboratory.config, overrides, source)
        assert_same_weights(rank["state"], run)


def test_a_run_and_its_conversion_name_the_checkpoint_they_started_from(laboratory: Laboratory, tmp_path: Path) -> None:
    """By a checksum that the conversion of that checkpoint carries too."""
    run, anchor = laboratory.run(2, 2, 1), tmp_path / "anchor"
    convert(run.checkpoint(10), anchor)
    checksum = read_pretrained(anchor)[0].source.sha256
    for source in (run.checkpoint(10), anchor, anchor / "model.safetensors"):
        assert source_checksum(source) == checksum
    overrides = laboratory.overrides("expert", 1, 1)
    run_ranks(1, rank_jobs.start_from, laboratory.config, overrides, anchor)
    folder = RunFolder(laboratory.load(overrides).run_dir)
    assert started_from(folder.path) == checksum and started_from(run.path) is None
    checkpoint = folder.checkpoints / "step_00000010"
    shutil.copytree(run.checkpoint(10), checkpoint)
    shutil.copy(folder.path / "config.json", checkpoint)  # What a save would have put there.
    names = [checkpoint / name for name in read_manifest(checkpoint)["files"]]
    write_manifest(checkpoint, names)
    convert(checkpoint, tmp_path / "expert")
    assert read_pretrained(tmp_path / "expert")[0].source.init_from == checksum
    assert read_pretrained(anchor)[0].source.init_from is None


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.exhaustive), 3))
def test_bf16_run_goes_on_from_the_masters(laboratory: Laboratory, stage: int, tmp_path: Path) -> None:
    """Not from what they were rounded to."""
    run = laboratory.run(2, 2, stage, "operator.train.precision=bf16")
    out = converted(laboratory, run, tmp_path)
    overrides = laboratory.overrides(f"masters-{stage}", 1, stage, "operator.train.precision=bf16")
    ranks = run_ranks(2, rank_jobs.start_from, laboratory.config, overrides, out)
    assert_same_weights(ranks[0]["state"], run)
    masters = ranks[0]["state"]["embed.weight"]
    assert not torch.equal(masters, masters.bfloat16().float())


@pytest.mark.parametrize("stage", (*MORE_STAGES, 3))
def test_experts_that_several_ranks_share(laboratory: Laboratory, stage: int, tmp_path: Path) -> None:
    """Four ranks, EP 2: each expert is partitioned over the two ranks that hold it, which are not neighbours."""
    run = laboratory.run(4, 2, stage)
    state = load_file(converted(laboratory, run, tmp_path) / "model.safetensors")
    expected = load_file(run.checkpoint(10) / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(state[f"operator.{name}"], tensor), name


def assert_same_weights(state: dict[str, torch.Tensor], run: Run) -> None:
    expected = load_file(run.checkpoint(10) / "model.safetensors")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
