"""What is checked before an engine is built: the DeepSpeed JSON, optimiser groups, movement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh.config import ExpertsConfig, OperatorConfig, RouterConfig, TrainConfig
from shodh.core.errors import ConfigError
from shodh.core.topology import Topology
from shodh.models.operator import LatentTransformer
from shodh.moe.groups import decay_groups
from shodh.train.engine import _describe_idle, check_groups, keep_float32, load_deepspeed_config

ROOT = Path(__file__).resolve().parents[2]
TRAIN = TrainConfig(steps=1, clip=0.5, precision="bf16")
TOPOLOGY = Topology(world_size=2, ep_size=1, micro_batch=3, accumulation=4)


def load(path: Path, content: Any) -> dict[str, Any]:
    path.write_text(json.dumps(content))
    return load_deepspeed_config(path, TRAIN, TOPOLOGY)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_file_of_the_project_takes_its_numbers_from_the_run(path: Path) -> None:
    config = load_deepspeed_config(path, TRAIN, TOPOLOGY)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5 and config["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage=0; use 1, 2 or 3"),
        ({}, "stage=0; use 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "stage=True; use 1, 2 or 3"),
        ({"zero_optimization": []}, r"zero_optimization: expected a mapping, got \[\]"),
        ({"zero_optimization": {"stage": 1}, "bf16": 3}, "bf16: expected a mapping, got 3"),
        ([], "expected a JSON object of settings, got list"),
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 7}, "train_batch_size=7 contradicts 24"),
        # What rounds sums of gradients, or lets those pass that are not finite.
        ({"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}, "communication_data_type='bf16'"),
        ({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype='bf16'"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm=False contradicts True"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"check_grad_overflow": False}}, "check_grad_overflow=False"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "fp16.enabled=True contradicts False"),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts 0.5"),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}},
            "bf16.enabled=False contradicts True .*precision bf16",
        ),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, "round_robin_gradients is not supported"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size is not supported"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device=nvme is not"),
    ],
)
def test_deepspeed_file_that_contradicts_the_run_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path / "ds.json", content)
    assert "ds.json" in str(caught.value)


def test_gradients_are_summed_in_float32_whatever_the_file_leaves_out(tmp_path: Path) -> None:
    config = load(tmp_path / "ds.json", {"zero_optimization": {"stage": 1}})
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["bf16"]["check_grad_overflow"] is True and config["zero_optimization"]["compute_grad_norm"] is True


def test_unreadable_deepspeed_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.json"):
        load_deepspeed_config(tmp_path / "absent.json", TRAIN, TOPOLOGY)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="bad.json is not valid JSON"):
        load_deepspeed_config(tmp_path / "bad.json", TRAIN, TOPOLOGY)


def model() -> LatentTransformer:
    experts = ExpertsConfig(hidden=8, router={"kind": "two_level"})
    experts = ExpertsConfig(hidden=8, router=RouterConfig(kind="two_level"))
    config = OperatorConfig(dim=16, depth=1, heads=2, position="learned", experts=experts)
    return LatentTransformer(config, 3, 2, (2, 2, 2), 1)


def test_groups_hold_every_parameter_once_and_decay_matrices_alone() -> None:
    operator = model()
    groups = decay_groups(operator, 0.3)
    check_groups(operator, groups)
    names = {id(p): name for name, p in operator.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    plain = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {"blocks.0.feed_forward.experts.w1", "blocks.0.attention.qkv.weight", "head.weight"} <= decayed
    assert {"blocks.0.norm1.weight", "head.bias", "position.position"} <= plain
    assert {n for n in plain if n.endswith(("prototypes", "log_temperature"))} == {
        f"blocks.0.feed_forward.router.{gate}.{p}"
        for gate in ("expert_gate", "group_gate")
        for p in ("prototypes", "log_temperature")
    }


@pytest.mark.parametrize("mistake", ["forgotten", "twice", "frozen"])
def test_parameter_outside_its_one_group_is_found(mistake: str) -> None:
    operator = model()
    groups = decay_groups(operator, 0.3)
    if mistake == "forgotten":
        groups[0]["params"].pop()
    elif mistake == "twice":
        groups[1]["params"].append(groups[0]["params"][0])
    else:
        groups[0]["params"][0].requires_grad_(False)
    with pytest.raises(AssertionError, match="not in exactly one optimiser group"):
        check_groups(operator, groups)


def test_buffers_are_put_back_to_float32() -> None:
    operator = model().to(torch.bfloat16)
    keep_float32(operator)
    assert {b.dtype for b in operator.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in operator.parameters()} == {torch.bfloat16}


def test_parameters_without_gradient_are_named_by_what_they_are() -> None:
    idle = ["blocks.0.feed_forward.experts.w1 of expert rank 1", "decoder.geometry.0.weight"]
    expert, other = _describe_idle(idle)
    assert expert == f"{idle[0]} (experts that got no token)"
    assert idle[1] in other and "expert" not in other
    assert _describe_idle([]) == []
