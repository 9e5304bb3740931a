"""What is planned is what a step takes: memory and work of a rehearsal against a real step on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shodh.commands import tokenizer
from shodh.config import RunConfig, load_config
from shodh.core.errors import ConfigError, TopologyError
from shodh.models.factory import build_operator, operator_space
from shodh.models.init import initialise
from shodh.train.plan import Stage, decide_checkpointing, make_plan, stage_of
from shodh.train.plan_text import describe_plan
from shodh.train.rehearsal import FLOPS, rehearse_operator, rehearse_tokenizer
from shodh.train.throughput import Throughput, product_rate

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
CASES = {
    "sparse": ("demo", []),
    "dense": ("demo", ["operator.experts.num_experts=0", "parallel.ep_size=1"]),
    "bf16": ("demo", ["operator.train.precision=bf16"]),
    "checkpointed": ("demo", ["operator.activation_checkpointing=true"]),
    "hash": ("demo", ["operator.experts.router={kind: hash}", "operator.depth=2"]),
    "deep": ("demo", ["operator.depth=5", "operator.dim=64"]),
    "decoded": ("demo", ["operator.metric=decoded", "operator.decoded_every=2", "data.grid=[16, 16, 16]"]),
    "unrolled": ("demo", ["operator.unroll.steps=3", "operator.depth=1"]),
    "moe_pot": ("moe_pot_tiny", []),
    "fno": ("fno_tiny", []),
}


def load(name: str, changes: list[str]) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", changes)


@pytest.mark.parametrize("case", CASES)
def test_operator_is_planned_as_it_is_measured(case: str) -> None:
    config = load(*CASES[case])
    planned, measured = rehearse_operator(config, 2), rehearse_operator(config, 2, "cpu")
    for name in ("saved", "peak", "flops"):
        assert getattr(planned, name) == pytest.approx(getattr(measured, name), rel=0.1), name


def test_tokenizer_is_planned_as_it_is_measured() -> None:
    config = load("demo", ["data.grid=[16, 16, 16]", "tokenizer.widths=[16, 16]"])
    planned, measured = rehearse_tokenizer(config, 2), rehearse_tokenizer(config, 2, "cpu")
    for name in ("saved", "peak", "flops"):
        assert getattr(planned, name) == pytest.approx(getattr(measured, name), rel=0.1), name


@pytest.mark.parametrize("case", ["sparse", "dense", "fno"])
def test_what_is_kept_is_what_autograd_saves(case: str) -> None:
    """Counted another way: what torch hands to hooks, each storage once."""
    config = load(*CASES[case])
    model, space = build_operator(config), operator_space(config)
    initialise(model, 0)
    history = torch.randn(2, space.history, space.channels, *space.grid)
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(history, torch.randn(2, space.static, *space.grid))
        output.latent.square().mean()
    given = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), history]}
    saved = sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in given)
    assert rehearse_operator(config, 2).saved == pytest.approx(saved, rel=0.1)


def test_recomputation_is_work_that_is_counted() -> None:
    plain, again = (rehearse_operator(load(*CASES[name]), 2) for name in ("sparse", "checkpointed"))
    assert 1.2 * plain.flops < again.flops < 1.34 * plain.flops
    assert again.saved < 0.2 * plain.saved and again.peak < 0.6 * plain.peak


def test_unrolled_forecasts_the_noise_and_the_decoder_are_work_that_is_counted() -> None:
    """Linear in the forecasts; a pass for the noise is a third of one; of the decoder, the mean over all steps."""
    of = {n: rehearse_operator(load("demo", [f"operator.unroll.steps={n}"]), 2) for n in (1, 3)}
    # Later forecasts also have a gradient of what they are given.
    assert 3 < of[3].flops / of[1].flops < 3.1 and of[3].saved > 2.5 * of[1].saved
    noisy = load("demo", ["operator.input_noise=1.0", "operator.noise_relative_to=error"])
    assert rehearse_operator(noisy, 2).flops == pytest.approx(4 / 3 * of[1].flops, rel=0.02)
    decoded = [load("demo", ["operator.metric=decoded", f"operator.decoded_every={n}"]) for n in (1, 4)]
    every, fourth = (rehearse_operator(config, 2) for config in decoded)
    assert 4 * (fourth.flops - of[1].flops) == pytest.approx(every.flops - of[1].flops, rel=1e-6)
    assert fourth.peak == pytest.approx(every.peak, rel=1e-3)
    assert every.flops > 1.5 * of[1].flops


def test_work_is_that_of_torchs_counter() -> None:
    config = load(*CASES["fno"])
    with FlopCounterMode(display=False, custom_mapping={}) as counter:
        counted = rehearse_operator(config, 2, "cpu").flops
    assert counted == counter.get_total_flops() > 0 and torch.ops.aten.mm in FLOPS


def stage(samples: int, **changes: object) -> Stage:
    """A small model whose samples, on the meta device, may be as many as one likes: 2.2 MiB each."""
    settings = [f"operator.{name}={value}" for name, value in changes.items()]
    many = [f"operator.train.{name}_batch={samples}" for name in ("global", "micro")]
    fixed = [
        "operator.depth=2",
        "operator.random_shifts=false",
        "parallel.ep_size=1",
        "deepspeed=ds_configs/zero1.json",
    ]
    return stage_of(load("demo", [*fixed, *many, *settings]), 1)


def test_what_does_not_fit_says_which_setting_would() -> None:
    assert stage(16384).fits() and not stage(40000).fits()
    assert stage(40000).remedy().startswith("operator.activation_checkpointing=true would")
    named = re.match(r"operator.train.micro_batch=(\d+) with it would", stage(2**17).remedy())
    assert named, stage(2**17).remedy()
    once, twice = (stage(n * int(named[1]), activation_checkpointing=True) for n in (1, 2))
    assert once.fits() and not twice.fits()
    assert "more GPUs" in stage(1, dim=2**16).remedy()


def test_the_plan_speaks_of_both_models() -> None:
    changes = ["operator.train.global_batch=40000", "operator.train.micro_batch=40000", "operator.random_shifts=false"]
    text = describe_plan(make_plan(load("demo", ["parallel.ep_size=1", *changes]), 1, 1))
    assert "does NOT fit in 80 GB; operator." in text and "trains the tokenizer" in text


def test_auto_computes_again_only_where_memory_is_short() -> None:
    assert load("h100_single", []).operator.activation_checkpointing == "auto"
    config = stage(16384, activation_checkpointing="auto").config
    decided = {gib: decide_checkpointing(config, 1, gib * 2**30).operator.activation_checkpointing for gib in (20, 80)}
    assert decided == {20: True, 80: False}
    fixed = stage(16384, activation_checkpointing="true").config
    assert decide_checkpointing(fixed, 1, 2.0**50) is fixed


def test_throughput_is_work_over_time() -> None:
    config, cpu = load(*CASES["checkpointed"]), torch.device("cpu")
    found = Throughput(config, 2, cpu, of_tokenizer=False).of(10.0)
    work = rehearse_operator(load(*CASES["sparse"]), 1).flops
    assert found == {"perf/tokens_per_s": 640.0, "perf/tflops": pytest.approx(10 * work / 2 / 1e12)}
    assert product_rate(torch.float32, cpu, side=64, products=2) > 0


def test_dry_run_of_the_tokenizer_refuses_what_its_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "demo.yaml")
    small = ["tokenizer.widths=[8,8]", "operator.dim=32", "operator.depth=1", "data.grid=[16,16,16]"]
    assert tokenizer.main(["--config", config, "--gpus-per-node", "2", "--dry-run", "--set", *small]) == 0
    text = capsys.readouterr().out
    assert "memory of a rank that trains the tokenizer" in text and "\nname: demo\n" in text
    with pytest.raises(TopologyError, match="global_batch=3"):
        tokenizer.main(
            ["--config", config, "--dry-run", "--gpus-per-node", "2", "--set", "tokenizer.train.global_batch=3"]
        )
    with pytest.raises(ConfigError, match="without a tokenizer"):
        tokenizer.main(["--config", str(CONFIGS / "fno_tiny.yaml"), "--dry-run"])
