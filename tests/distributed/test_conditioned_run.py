"""One operator for several time steps and a family of one parameter: trained, resumed, evaluated, converted, asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rank_jobs
import torch
from helper import ROOT, run_ranks
from laboratory import Laboratory, Run
from published import published

import shodh
from shodh.checkpoint.convert import convert
from shodh.config import load_config
from shodh.core.errors import ConfigError, DataError, ShodhError
from shodh.data import write_trajectories
from shodh.evaluate.evaluation import evaluate, open_run
from shodh.schema.fields import Field, RegimeSchema, Trajectories
from shodh.schema.space import Space
from shodh.train.opening import open_data
from shodh.train.run_folder import RunFolder
from shodh.train.start import check_same_run

pytestmark = pytest.mark.distributed

GRID, FRAMES, STEPS, DECAY = (8, 8), 9, 8, "rate"


def decays(batch: int, seed: int, told: bool) -> Trajectories:
    """Noise that decays at a rate of each trajectory, which the files say or do not."""
    rng = np.random.default_rng(seed)
    rate, time = rng.uniform(0.2, 4.0, batch), 0.1 * np.arange(FRAMES)
    first = rng.standard_normal((batch, 1, *GRID))
    dye = first * np.exp(-rate[:, None] * time)[..., None, None]
    schema = RegimeSchema("decay", (Field("dye"),), ("periodic", "periodic"))
    values = {"dye": dye.astype(np.float32)}
    return Trajectories(schema, (1.0, 1.0), time, values, {DECAY: rate} if told else {})


class Decay:
    def __init__(self, config: Path) -> None:
        self.config = config

    def run(self, name: str, resume: str | None = None) -> Run:
        overrides = [f"name={name}", f"deepspeed={ROOT / 'ds_configs' / 'zero1.json'}"]
        ranks = run_ranks(1, rank_jobs.pretrain, self.config, overrides, resume)
        return Run(load_config(self.config, overrides).run_dir, overrides, ranks)


@pytest.fixture(scope="module")
def decay(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path]) -> Decay:
    """A regime whose files say the rate, and one whose files do not."""
    root = tmp_path_factory.mktemp("decay")
    for number, name in enumerate(("told", "untold")):
        for part, split in enumerate(("train", "valid", "test")):
            file = root / name / "data" / split / "decay.hdf5"
            write_trajectories(file, decays(4, 10 * number + part, name == "told"))
    regimes = [{"name": name, "path": str(root / name)} for name in ("told", "untold")]
    data = {"grid": list(GRID), "history": 1, "fields": [{"name": "dye"}], "regimes": regimes, "strides": [1, 2]}
    experts = {"num_experts": 4, "top_k": 2, "hidden": 16, "router": {"kind": "token"}}
    sizes = {"kind": "moe_pot", "dim": 16, "depth": 1, "heads": 2, "patch": 4, "field": {"mlp": 16}}
    train = {"steps": STEPS, "global_batch": 8, "lr": 2.0e-3, "warmup": 2, "log_every": 1, "checkpoint_every": 4}
    train |= {"valid_every": 4, "valid_batches": 1}
    operator = published({**sizes, "conditions": ["time_step", DECAY], "experts": experts, "train": train})
    return Decay(write_config(root / "decay.yaml", data=data, operator=operator, evaluation={"rollout": 2}))


@pytest.fixture(scope="module")
def whole(decay: Decay) -> Run:
    return decay.run("whole")


def test_resumed_run_is_bitwise_the_uninterrupted_one_and_keeps_the_units(decay: Decay, whole: Run) -> None:
    again = whole.path.with_name("again")
    shutil.copytree(whole.path, again)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS:08d}")
    (again / "latest").write_text("step_00000004\n")
    resumed = decay.run("again", "auto")
    assert resumed.lines() == whole.lines()
    weights = [run.checkpoint(STEPS) / "model.safetensors" for run in (resumed, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    step, rate = Space.load(again).conditions
    assert step.ranges == (("told", 0.1, 0.2), ("untold", 0.1, 0.2))
    assert [regime for regime, *_ in rate.ranges] == ["told"]
    with pytest.raises(ConfigError, match="operator.conditions"):
        check_same_run(load_config(decay.config, ["operator.conditions=[time_step]"]), RunFolder(again))
    Space.load(again).unconditioned().save(again)
    with pytest.raises(ShodhError, match="one of them was changed"):
        open_data(load_config(decay.config, whole.overrides), RunFolder(again), torch.device("cpu"))


def test_a_run_that_starts_from_weights_keeps_their_units(decay: Decay, whole: Run, tmp_path: Path) -> None:
    more = ["data.strides=[4]", "name=tuned", *whole.overrides[1:]]
    config = load_config(decay.config, more)
    tuned, *_ = open_data(config, None, torch.device("cpu"), whole.checkpoint(STEPS))
    fresh, *_ = open_data(config, None, torch.device("cpu"))
    kept, own, new = (
        [(c.mean, c.scale) for c in s.conditions] for s in (Space.load(whole.path), tuned.space, fresh.space)
    )
    assert own == kept != new
    assert tuned.space.conditions[0].range_of("told") == (0.4, 0.4), "the ranges are those of what it learns"


def test_evaluation_tells_each_trajectory_its_own_values_at_any_stride(whole: Run) -> None:
    """The errors are those of predictions that a user asks for with the values of the files."""
    model = shodh.from_pretrained(whole.path)
    for stride in (1, 3):
        opened = open_run(whole.path, None, torch.device("cpu"), stride=stride)
        found = evaluate(opened, "test")
        assert found.metrics["stride"] == stride
        assert opened.folder.report.name == ("report" if stride == 1 else f"report-stride{stride}")
        source, rows = opened.regimes.sources[0], found.trajectories
        rates = source.files["test"][0].parameters[DECAY]
        rows = rows[(rows.regime == "told") & (rows.step == 1) & (rows.measure == "nrmse") & (rows.of == "model")]
        starts = opened.config.evaluation.starts
        for trajectory, value in zip(rows.trajectory, rows.value, strict=True):
            frames = torch.empty(FRAMES, 1, *GRID)
            source.read("test", trajectory, range(FRAMES), frames.numpy())
            last = FRAMES - 1 - 2 * stride  # A rollout has two steps.
            first = sorted({int(i) for i in np.linspace(0, last, min(last + 1, starts)).round()})
            told = {"time_step": 0.1 * stride, DECAY: rates[trajectory]}
            ahead = model.predict(frames[first].unsqueeze(1), regime="told", conditions=told)
            errors = [((a - frames[f + stride]).norm() / frames[f + stride].norm()) for a, f in zip(ahead, first)]
            assert value == pytest.approx(float(np.mean(errors)), rel=1e-4)


def test_converted_folder_answers_and_a_regime_that_lacked_a_value_needs_none(whole: Run, tmp_path: Path) -> None:
    convert(whole.path, tmp_path / "model")
    models = [shodh.from_pretrained(path) for path in (whole.path, tmp_path / "model")]
    fields = torch.randn(2, 1, 1, *GRID, generator=torch.Generator().manual_seed(0))
    absent, known = (
        [m.predict(fields, regime="untold", conditions={"time_step": 0.1, **more}) for m in models]
        for more in ({}, {DECAY: 1.0})
    )
    assert torch.equal(*absent) and torch.equal(*known) and not torch.allclose(absent[0], known[0], rtol=1e-4)
    with pytest.raises(DataError, match=f"lack {DECAY}"):
        models[1].predict(fields, regime="told", conditions={"time_step": 0.1})


def test_data_without_the_parameter_are_refused_with_what_they_have(decay: Decay) -> None:
    config = load_config(decay.config, ["name=none", "operator.conditions=[viscosity]"])
    with pytest.raises(ShodhError, match=f"'viscosity': told has {DECAY}; untold has none"):
        open_data(config, None, torch.device("cpu"))


def test_latent_operators_learn_the_same_at_any_layout_and_keep_the_latents(laboratory: Laboratory) -> None:
    """ZeRO 3 and expert parallelism against one rank; the cache is that of operators that are told nothing."""
    plain = laboratory.run(2, 2, 3)
    caches = laboratory.load(plain.overrides).tokenizer_dir / "latents"
    before = {path.name for path in caches.iterdir()}
    more = ("operator.conditions=[time_step]", "data.strides=[1,2]")
    told, one = laboratory.run(2, 2, 3, *more), laboratory.run(1, 1, 1, *more)
    assert {path.name for path in caches.iterdir()} == before
    assert Space.load(told.path).conditions[0].ranges[0][1:] == (0.1, 0.2)
    for name in ("train/loss", "train/grad_norm"):
        assert told.training(name) == pytest.approx(one.training(name), rel=1e-4)
    assert told.training("train/loss") != pytest.approx(plain.training("train/loss"), rel=1e-3)
    model = shodh.from_pretrained(told.path)
    fields = torch.randn(1, 2, model.num_channels, *model.grid, generator=torch.Generator().manual_seed(0))
    given = (fields, torch.zeros(1, 1, *model.grid), "open_channel")
    slow, fast = (model.rollout(*given, conditions={"time_step": dt}) for dt in (0.1, 0.2))
    assert not torch.allclose(slow, fast, rtol=1e-4)
