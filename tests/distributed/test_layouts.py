"""A run goes on at other ranks, expert degree and ZeRO stage: the same numbers, the same steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from helper import RankError, run_ranks
from laboratory import Laboratory, Run
from safetensors.torch import load_file

from shodh.checkpoint.folder import OPTIMIZER, read_manifest
from shodh.checkpoint.optimizer_state import MOMENTS, Fragments
from shodh.core.weights import WEIGHTS

pytestmark = pytest.mark.distributed

ROUNDING = 1e-5  # relative, of errors and gradient norms after some steps in float32
BF16 = "operator.train.precision=bf16"
Layout = tuple[int, int, int]  # ranks, expert degree, ZeRO stage


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and both moments of the whole model, and the number of updates."""
    state = load_file(checkpoint / WEIGHTS)
    fragments = Fragments(sorted((checkpoint / OPTIMIZER).glob("*.safetensors")))
    names = {key.partition("/")[2] for key in fragments.keys()}
    moments = {f"{key}/{n}": fragments.read(f"{key}/{n}", 0, state[n].numel()) for key in MOMENTS for n in names}
    return {**state, **moments, "updates": torch.tensor(fragments.updates)}


def assert_same_state(ours: Path, theirs: Path) -> None:
    one, other = whole_state(ours), whole_state(theirs)
    assert one.keys() == other.keys() and sum(name.startswith("exp_avg/") for name in one) > 20
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


def deviation(lines: list[dict[str, float]], whole: list[dict[str, float]], name: str) -> float:
    """Largest difference of a metric over the steps after the change: relative, but of the loss, which crosses zero."""
    ours, theirs = ({line["step"]: line[name] for line in part if name in line} for part in (lines, whole))
    assert len(ours) >= 5
    unit = {step: 1.0 if name == "train/loss" else abs(value) for step, value in theirs.items()}
    return max(abs(value - theirs[step]) / unit[step] for step, value in ours.items())


class Moves:
    """Resumes at one layout, of checkpoints of step 5 that others wrote."""

    def __init__(self, laboratory: Laboratory, folder: Path) -> None:
        self.laboratory, self.folder = laboratory, folder

    def __call__(
        self, layout: Layout, sources: list[Run], *more: str, lost: tuple[str | None, ...] = ()
    ) -> list[dict[str, Any]]:
        world, ep_size, stage = layout
        overrides = self.laboratory.overrides(self.folder.name, ep_size, stage, *more)
        moves = [(run.checkpoint(5), what) for run, what in zip(sources, lost or [None] * len(sources), strict=True)]
        job = (rank_jobs.resume_many, self.laboratory.config, overrides, moves, self.folder)
        ranks = run_ranks(world, *job, timeout=60.0 + 20.0 * len(moves))
        return ranks[0]  # type: ignore[no-any-return]


@pytest.fixture
def moves(laboratory: Laboratory, tmp_path: Path) -> Moves:
    return Moves(laboratory, tmp_path)


def assert_moved(moved: list[dict[str, Any]], sources: list[Run], folder: Path) -> list[dict[str, float]]:
    """Every number arrived, and the steps that follow are those of the uninterrupted run; returns the deviations."""
    found = []
    for number, (answer, source) in enumerate(zip(moved, sources, strict=True)):
        assert_same_state(folder / str(number), source.checkpoint(5))
        names = ("train/latent_nmse", "train/grad_norm", "train/loss")
        found.append({name: deviation(answer["lines"], source.lines(), name) for name in names})
    assert all(value < ROUNDING for row in found for value in row.values()), found
    return found


@pytest.mark.parametrize(
    ("layout", "written"),
    [
        pytest.param((1, 1, 3), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 3)], marks=pytest.mark.exhaustive),
        ((2, 2, 2), [(1, 1, 1), (2, 2, 3), (2, 1, 1)]),
        pytest.param((2, 1, 1), [(2, 2, 1), (2, 2, 3), (2, 1, 3)], marks=pytest.mark.exhaustive),
    ],
)
def test_resume_at_another_layout_goes_on_as_the_uninterrupted_run(
    laboratory: Laboratory, moves: Moves, layout: Layout, written: list[Layout]
) -> None:
    sources = [laboratory.run(*source) for source in written]
    assert_moved(moves(layout, sources), sources, moves.folder)


def test_a_checkpoint_that_loses_a_part_would_be_noticed(laboratory: Laboratory, moves: Moves) -> None:
    """Each is seen in what is written again; and, but for a bias that moves few tokens so soon, in the steps."""
    source, lost = laboratory.run(2, 2, 1), ("step", "moments", "selection_bias")
    for number, answer in enumerate(moves((1, 1, 3), [source] * 3, lost=lost)):
        with pytest.raises(AssertionError, match=("updates", "exp_avg", "selection_bias")[number]):
            assert_same_state(moves.folder / str(number), source.checkpoint(5))
        if lost[number] != "selection_bias":
            assert deviation(answer["lines"], source.lines(), "train/latent_nmse") > 10 * ROUNDING


def test_accumulation_follows_from_the_global_batch(laboratory: Laboratory, moves: Moves) -> None:
    """Ranks times micro-batch stay: experts are balanced over as many samples at once."""
    source = laboratory.run(2, 2, 1, "operator.train.micro_batch=2")
    assert_moved(moves((1, 1, 2), [source], "operator.train.micro_batch=4"), [source], moves.folder)


def test_precision_may_change_and_no_master_is_rounded(laboratory: Laboratory, moves: Moves) -> None:
    exact, rounded = laboratory.run(2, 2, 3), laboratory.run(2, 2, 1, BF16)
    for number, answer in enumerate(moves((2, 1, 1), [rounded, exact], BF16)):
        assert_same_state(moves.folder / str(number), (rounded, exact)[number].checkpoint(5))
        assert deviation(answer["lines"], exact.lines(), "train/latent_nmse") < 0.05


def test_configured_decay_betas_and_rate_take_effect(laboratory: Laboratory, moves: Moves) -> None:
    source = laboratory.run(2, 2, 1)
    more = ("weight_decay=0.5", "betas=[0.5,0.6]", "lr=2.0e-3")
    (answer,) = moves((2, 2, 1), [source], *(f"operator.train.{setting}" for setting in more))
    assert answer["settings"] == {(0.5, (0.5, 0.6)), (0.0, (0.5, 0.6))}
    assert deviation(answer["lines"], source.lines(), "train/lr") > 0.5
    assert deviation(answer["lines"], source.lines(), "train/latent_nmse") > 10 * ROUNDING


@pytest.mark.parametrize(
    ("world", "more", "layout"),
    [
        (1, (), {"world_size": 1, "ep_size": 1, "micro_batch": 8}),
        (1, ("operator.train.micro_batch=4",), {"world_size": 1, "ep_size": 1, "micro_batch": 4}),
        (4, ("operator.train.micro_batch=4",), {"world_size": 4, "ep_size": 2, "micro_batch": 2}),
    ],
)
def test_the_same_command_goes_on_at_other_ranks(
    laboratory: Laboratory, world: int, more: tuple[str, ...], layout: dict[str, int]
) -> None:
    """The batches of every step are the same; so are the steps, where as many samples are balanced at once."""
    source = laboratory.run(2, 2, 1, *more)
    lost = laboratory.copy(source, f"elastic-{world}-{len(more)}", until=5)
    asked = (lost.path / "config.yaml").read_text()
    run_ranks(world, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    written = read_manifest(lost.checkpoint(10))["topology"]
    assert {name: written[name] for name in layout} == layout
    assert (lost.path / "config.yaml").read_text().partition("parallel")[2] == asked.partition("parallel")[2]
    if layout["world_size"] * layout["micro_batch"] == 8:
        assert deviation(lost.lines(), source.lines(), "train/grad_norm") < ROUNDING
    ours, theirs = (
        {key: {regime: sum(counts) for regime, counts in cell.items()} for key, cell in run.counts().items()}
        for run in (lost, source)
    )
    assert ours == theirs, "the samples of every step"


def test_ranks_that_do_not_divide_the_batch_are_told_which_do(laboratory: Laboratory) -> None:
    lost = laboratory.copy(laboratory.run(2, 2, 1), "elastic-3", until=5)
    with pytest.raises(RankError, match="SharedError: global_batch=8 is not divisible by 3 ranks; start 2 or 4 ranks"):
        run_ranks(3, rank_jobs.pretrain, laboratory.config, lost.overrides, "auto")
    assert not lost.checkpoint(10).exists()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)  # The first makes the runs of all layouts.
@pytest.mark.parametrize("layout", [(w, e, s) for w, e in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)) for s in (1, 2, 3)])
def test_every_layout_goes_on_from_every_other(laboratory: Laboratory, moves: Moves, layout: Layout) -> None:
    """Ten steps after the change; the deviations are printed (``pytest -s -m exhaustive``)."""
    layouts = [(w, e, s) for w, e in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)) for s in (1, 2, 3)]
    sources = [laboratory.run(*source, "operator.train.steps=15") for source in layouts]
    found = assert_moved(moves(layout, sources, "operator.train.steps=15"), sources, moves.folder)
    for source, row in zip(layouts, found, strict=True):
        print(json.dumps({"written": source, "read": layout, **row}))
