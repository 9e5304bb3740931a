"""Training some weights of a run alone: what is frozen stays bitwise as it was, on any ranks and ZeRO stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helper import ROOT, run_ranks
from laboratory import Laboratory, Run
from published import published

import shodh
from shodh.checkpoint.convert import convert
from shodh.checkpoint.weights import read_initial_weights
from shodh.config import config_from_dict, load_config
from shodh.core.errors import CheckpointError
from shodh.core.weights import load_into, load_weights
from shodh.data.normalize import fit_normalizer
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.models.factory import build_operator
from shodh.models.init import initialise
from shodh.moe.groups import added_weights, is_added, is_routed_expert
from shodh.train.opening import open_run_data

pytestmark = pytest.mark.distributed

STEPS = 3
OPERATOR = published(
    {
        "kind": "moe_pot",
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "patch": 8,
        "field": {"mlp": 16, "decoder": 8},
        "experts": {"num_experts": 4, "top_k": 2, "hidden": 16},
        "train": {
            "steps": STEPS,
            "warmup": 1,
            "global_batch": 4,
            "lr": 1e-2,
            "weight_decay": 0.1,
            "log_every": 1,
            "checkpoint_every": 2,
            "valid_batches": 1,
        },
    }
)
TRAIN = {
    "all": ["finetune.train=all"],
    "experts": ["finetune.train=experts"],
    "experts_router": ["finetune.train=experts", "finetune.router=true"],
    "new_expert": ["finetune.train=new_expert", "operator.experts.num_added=2"],
}


def trained_names(way: str, names: list[str]) -> set[str]:
    """What each way trains, said a second time."""
    rules: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "experts": lambda name: ".layer.experts." in name,
        "experts_router": lambda name: ".layer.experts." in name or ".layer.router." in name,
        "new_expert": lambda name: ".layer.added_experts." in name,
    }
    return {name for name in names if rules[way](name)}


def tune(config_path: Path, overrides: list[str], start: Path | None, resume: str | None = None) -> list[str]:
    """`pretrain` on a rank; the parameters that the optimiser was given, by name."""
    import numpy as np

    from shodh.train import jobs
    from shodh.train.callbacks import experts

    experts.share_picture = lambda table, regimes: np.zeros((1, 1, 3), dtype=np.uint8)
    given: list[str] = []
    run = jobs._run

    def look(*arguments: Any) -> bool:
        given.extend(name for name, p in arguments[2].named_parameters() if p.requires_grad)
        return run(*arguments)

    jobs._run = look
    jobs.pretrain(load_config(config_path, overrides), resume, start)
    return given


class Tuning:
    """A base run on one regime, and runs that go on from it on another; each is made once."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self._runs: dict[str, Run] = {}
        self.base = self._run("base", 2, 2, 1, ["data.regimes.0.name=known"], None)

    def _run(self, name: str, world: int, ep: int, stage: int, changes: list[str], start: Path | None) -> Run:
        overrides = [f"name={name}", f"deepspeed={ROOT / 'ds_configs' / f'zero{stage}.json'}"]
        overrides += [f"parallel.ep_size={ep}", *changes]
        if name not in self._runs:
            given = run_ranks(world, tune, self.config, overrides, start)
            path = load_config(self.config, overrides).run_dir
            self._runs[name] = Run(path, overrides, [{"given": g} for g in given])
        return self._runs[name]

    def tuned(self, way: str, world: int = 2, ep: int = 2, stage: int = 1) -> Run:
        changes = ["data.regimes.0.trajectories=[1]", *TRAIN[way]]
        return self._run(f"{way}-{world}-{ep}-{stage}", world, ep, stage, changes, self.base.checkpoint(STEPS))


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], tiny_data: Path) -> Tuning:
    path = write_config(tmp_path_factory.mktemp("tuning") / "base.yaml")
    tree = yaml.safe_load(path.read_text())
    tree["operator"] = OPERATOR
    tree["data"]["regimes"] = [{"name": "porous_media", "path": str(tiny_data / "porous_media")}]
    path.write_text(yaml.safe_dump(tree))
    return Tuning(path)


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_weights(run.checkpoint(STEPS) / "model.safetensors")


def initial_weights(run: Run, start: Run) -> dict[str, torch.Tensor]:
    """What a run began with: the weights of another, and freshly drawn added experts."""
    config = load_config(run.path / "config.yaml")
    model = build_operator(config)
    initialise(model, config.seed)
    return {**added_weights(model), **read_initial_weights(start.checkpoint(STEPS))}


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        ("all", 1),
        pytest.param("experts", 1, marks=pytest.mark.exhaustive),
        ("experts", 3),
        ("experts_router", 1),
        pytest.param("new_expert", 1, marks=pytest.mark.exhaustive),
        pytest.param("new_expert", 2, marks=pytest.mark.exhaustive),
        ("new_expert", 3),
    ],
)
def test_frozen_weights_stay_bitwise_and_the_others_move(tuning: Tuning, way: str, stage: int) -> None:
    run = tuning.tuned(way, stage=stage)
    before, after = initial_weights(run, tuning.base), weights_of(run)
    assert before.keys() == after.keys()
    parameters = [name for name, _ in build_operator(load_config(run.path / "config.yaml")).named_parameters()]
    trained = trained_names(way, parameters)
    assert trained and set(run.ranks[0]["given"]) == trained
    moved = {name for name in parameters if not torch.equal(before[name], after[name])}
    assert moved <= trained
    if way == "all":  # With few samples a router may leave some expert out, and its rows as they were.
        assert len(moved) > 0.9 * len(trained)
    else:
        assert moved == trained
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize("way", TRAIN)
def test_expert_parallel_ranks_tune_what_one_rank_tunes(tuning: Tuning, way: str) -> None:
    one, two = tuning.tuned(way, 1, 1), tuning.tuned(way, 2, 2)
    for name in ("train/loss", "train/grad_norm"):
        assert len(one.training(name)) == STEPS
        assert two.training(name) == pytest.approx(one.training(name), rel=1e-5)
    # Every way starts from the same function, and goes on from it.
    first, *later = one.training("train/loss")
    assert first == pytest.approx(tuning.tuned("all", 1, 1).training("train/loss")[0], rel=1e-6)
    assert all(abs(loss - first) > 1e-4 * first for loss in later)


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        pytest.param("experts", 1, marks=pytest.mark.exhaustive),
        pytest.param("new_expert", 1, marks=pytest.mark.exhaustive),
        ("new_expert", 3),
    ],
)
def test_resumed_tuning_is_bitwise_the_uninterrupted_one(tuning: Tuning, way: str, stage: int) -> None:
    whole = tuning.tuned(way, stage=stage)
    name = f"again-{way}-{stage}"
    again = Run(whole.path.with_name(name), [f"name={name}", *whole.overrides[1:]], [])
    shutil.copytree(whole.path, again.path)
    shutil.rmtree(again.checkpoint(STEPS))
    (again.path / "latest").write_text("step_00000002\n")
    run_ranks(2, tune, tuning.config, again.overrides, tuning.base.checkpoint(STEPS), "auto")
    ours, theirs = weights_of(again), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_added_experts_start_bitwise_as_the_given_model(tuning: Tuning) -> None:
    run = tuning.tuned("new_expert")
    grown, given = (build_operator(load_config(r.path / "config.yaml")).eval() for r in (run, tuning.base))
    load_into(grown, initial_weights(run, tuning.base), run.path)
    load_into(given, weights_of(tuning.base), run.path)
    draw = torch.Generator().manual_seed(0)
    history, static = torch.randn(3, 2, 4, 16, 16, 16, generator=draw), torch.randn(3, 1, 16, 16, 16, generator=draw)
    with torch.no_grad():
        start = grown(history, static).latent
        assert torch.equal(start, given(history, static).latent)
        load_into(grown, weights_of(run), run.path)
        assert not torch.equal(start, grown(history, static).latent)


def test_tuned_model_is_converted_and_loaded_with_its_added_experts(tuning: Tuning, tmp_path: Path) -> None:
    run = tuning.tuned("new_expert")
    convert(run.path, tmp_path / "out", verify=True)
    model = shodh.from_pretrained(tmp_path / "out")
    stored = dict(model.operator.named_parameters())
    added = {name: tensor for name, tensor in weights_of(run).items() if is_added(name)}
    assert added and all(torch.equal(stored[name], tensor) for name, tensor in added.items())
    assert not any(is_routed_expert(name) for name in added)
    fields = torch.randn(1, 2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.predict(fields, torch.zeros(1, 1, 16, 16, 16), "porous_media").isfinite().all()


def test_configuration_refuses_what_cannot_be_trained(tuning: Tuning) -> None:
    tree = yaml.safe_load(tuning.config.read_text())
    dense = {**tree, "operator": {**OPERATOR, "experts": {"num_experts": 0}}, "finetune": {"train": "experts"}}
    for changed, expected in (
        (dense, "dense, without routed experts"),
        ({**tree, "finetune": {"train": "new_expert"}}, "num_added of at least 1"),
        ({**tree, "finetune": {"train": "all", "router": True}}, None),
    ):
        if expected is None:
            config_from_dict(changed)
            continue
        with pytest.raises(shodh.core.errors.ConfigError, match=expected):
            config_from_dict(changed)


@pytest.fixture
def unseen(laboratory: Laboratory, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of a run of the latent transformer on a regime that its tokenizer did not learn."""

    def overrides(name: str, *more: str) -> list[str]:
        tree = yaml.safe_load(laboratory.config.read_text())
        regime = {"name": "unseen", "path": tree["data"]["regimes"][1]["path"], "trajectories": [2]}
        return laboratory.overrides(name, 2, 1, f"data.regimes=[{json.dumps(regime)}]", *more)

    return overrides


def test_tokenizer_serves_an_unseen_regime_with_its_own_normalisation(
    laboratory: Laboratory, unseen: Callable[..., list[str]]
) -> None:
    config = load_config(laboratory.config, unseen("unseen"))
    with pytest.raises(CheckpointError, match=r"without \['unseen'\]"):
        open_run_data(config)
    config = load_config(laboratory.config, unseen("unseen", "tokenizer.unseen_regimes=true"))
    regimes, trained = open_run_data(config)
    own = fit_normalizer(regimes.sources).constants["unseen"]
    assert regimes.space.normalizer.constants == {"unseen": own}
    assert own != trained.space.normalizer.constants["porous_media"]


def test_latent_transformer_is_tuned_evaluated_and_converted(
    laboratory: Laboratory, unseen: Callable[..., list[str]], tmp_path: Path
) -> None:
    base = laboratory.run(2, 2, 1)
    start = base.path / "checkpoints" / (base.path / "latest").read_text().strip()
    more = ["tokenizer.unseen_regimes=true", "finetune.train=new_expert", "operator.experts.num_added=1"]
    overrides = unseen("tuned", *more, "operator.train.steps=3")
    run_ranks(2, tune, laboratory.config, overrides, start)
    run = Run(load_config(laboratory.config, overrides).run_dir, overrides, [])
    before, after = read_initial_weights(start), weights_of(run)
    assert {n for n in after if n not in before} == {n for n in after if is_added(n)}
    moving = ("selection_bias", "temperature")
    assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith(moving))
    evaluation = evaluate(open_run(run.path, None, torch.device("cpu")), "test")
    assert evaluation.metrics["regimes"].keys() == {"unseen"}
    convert(run.path, tmp_path / "out", verify=True)
    assert shodh.from_pretrained(tmp_path / "out").regimes == ("unseen",)
