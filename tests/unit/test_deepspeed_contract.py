"""What the project uses of DeepSpeed's internals. A red test here means: read the new DeepSpeed before anything else.

The expert layer subclasses an undocumented class. Each test names one thing that `shodh.moe.layer`,
`shodh.checkpoint`, `shodh.train.engine` or `shodh.train.runtime` takes for granted.
"""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from typing import Any

import pytest
import torch

from shodh.config import ExpertsConfig

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.checkpoint import autoep_affine  # noqa: E402
from deepspeed.module_inject import auto_ep_layer  # noqa: E402
from deepspeed.moe import utils  # noqa: E402

from shodh.moe.layer import ExpertLayer, optimizer_groups  # noqa: E402

DIM, HIDDEN = 16, 8


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(scope="module")
def layer() -> ExpertLayer:
    config = ExpertsConfig(num_experts=4, hidden=HIDDEN, num_shared=2, num_added=1, top_k=1)
    return ExpertLayer(config, DIM, ep_size=2, ep_rank=1)


def test_version_is_one_that_was_read() -> None:
    version = tuple(int(part) for part in metadata.version("deepspeed").split("+")[0].split(".")[:3])
    assert (0, 19, 8) <= version < (0, 20), "read auto_ep_layer.py of the new version, then widen this range"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            autoep_affine.legacy_uniform_autoep_placement_descriptor,
            ["num_experts", "num_local_experts", "ep_size"],
        ),
        (autoep_affine.autoep_experts_for_rank, ["descriptor", "rank"]),
        (autoep_affine.autoep_placement_to_affine_map, ["descriptor", "logical_shape"]),
        (auto_ep_layer.AutoEPMoELayer.set_deepspeed_parallelism, ["self"]),
        (utils.split_params_into_different_moe_groups_for_optimizer, ["param_groups"]),
        (deepspeed.utils.groups._get_expert_parallel_group, ["group_name"]),
        (deepspeed.utils.groups._get_expert_data_parallel_group, ["group_name"]),
        (deepspeed.utils.safe_get_local_fp32_param, ["param"]),
        (deepspeed.utils.safe_get_local_optimizer_state, ["param", "optim_state_key"]),
        (deepspeed.DeepSpeedEngine._do_optimizer_sanity_check, ["self", "basic_optimizer"]),
        (deepspeed.DeepSpeedEngine.was_step_applied, ["self"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_signatures(function: Any, expected: list[str]) -> None:
    found = parameters(function)
    assert found[: len(expected)] == expected
    for name in found[len(expected) :]:
        parameter = inspect.signature(function).parameters[name]
        optional = parameter.default is not inspect.Parameter.empty
        assert optional or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), f"new argument {name}"


def test_engine_finds_expert_layers_by_their_class_and_asks_them_for_no_more(layer: ExpertLayer) -> None:
    assert isinstance(layer, auto_ep_layer.AutoEPMoELayer)
    engine = inspect.getsource(deepspeed.runtime.engine)
    asked = set(re.findall(r"\bmodule\.(\w+)", inspect.getsource(deepspeed.DeepSpeedEngine._save_moe_checkpoint)))
    native = {"expert_group_name", "state_dict", "named_modules"}
    assert {name for name in asked - native if not hasattr(layer, name)} == set()
    assert engine.count("isinstance(module, _AutoEPMoELayer)") > 3
    # What gives a layer its group reads these, and what it would do without them is never reached.
    binding = inspect.getsource(auto_ep_layer.AutoEPMoELayer.set_deepspeed_parallelism)
    read = set(re.findall(r"\bself\.(\w+)", binding.split("return\n", 1)[1]))
    assert {name for name in read if not hasattr(layer, name)} == set()


def test_parameters_are_those_of_the_exchange_format(layer: ExpertLayer) -> None:
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if not name.startswith("router.")}
    assert shapes == {
        "experts.w1": (2, HIDDEN, DIM),
        "experts.w2": (2, DIM, HIDDEN),
        "experts.w3": (2, HIDDEN, DIM),
        "shared_experts.w1.weight": (2 * HIDDEN, DIM),
        "shared_experts.w2.weight": (DIM, 2 * HIDDEN),
        "shared_experts.w3.weight": (2 * HIDDEN, DIM),
        "added_experts.gate.weight": (1, DIM),
        "added_experts.stack.w1": (1, HIDDEN, DIM),
        "added_experts.stack.w2": (1, DIM, HIDDEN),
        "added_experts.stack.w3": (1, HIDDEN, DIM),
    }
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in layer.parameters())
    # A rank holds its experts, not views of all of them.
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in layer.experts.parameters())
    assert (layer.num_experts, layer.num_local_experts, layer.ep_rank, layer.first_expert) == (4, 2, 1, 2)


def test_experts_are_marked_as_spread_and_everything_else_as_replicated(layer: ExpertLayer) -> None:
    for name, parameter in layer.named_parameters():
        spread = name.startswith("experts.")
        assert parameter.allreduce is not spread, name
        assert parameter.ds_zero_placement_family == ("autoep_expert" if spread else "replicated"), name
        assert not spread or parameter.group_name == "ep_size_2"


def test_optimiser_groups_keep_experts_apart_under_unique_names(layer: ExpertLayer) -> None:
    groups = optimizer_groups(torch.nn.ModuleDict({"block": layer}), 0.1)
    assert len({group["name"] for group in groups}) == len(groups) == 3
    (experts,) = [group for group in groups if group.get("moe")]
    assert {id(p) for p in experts["params"]} == {id(p) for p in layer.experts.parameters()}
    assert experts["weight_decay"] == 0.1 and experts["name"] == "ep_size_2"
    assert sum(len(group["params"]) for group in groups) == len(list(layer.parameters()))


def test_grouped_gemm_runs_here_and_keeps_its_limits() -> None:
    x, w = torch.randn(16, 8), torch.randn(2, 8, 12)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    out = torch._grouped_mm(x, w, offs=ends)
    torch.testing.assert_close(out, torch.cat((x[:8] @ w[0], x[8:] @ w[1])), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        torch._grouped_mm(x.double(), w.double(), offs=ends)


def test_switch_for_the_just_in_time_build_is_where_we_turn_it() -> None:
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in inspect.getsource(build_shm_op)


def test_private_places_that_checkpoints_and_checks_look_at() -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    fields = {"hp_fragment", "hp_fragment_address", "lp_fragment_address", "param_group_index"}
    assert fields <= tensor_fragment.__dataclass_fields__.keys()
    assert {"start", "numel"} <= fragment_address.__dataclass_fields__.keys()
    positions = inspect.getsource(Stage3.set_grad_positions)
    assert "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]" in positions
    assert parameters(Stage3.get_param_id) == parameters(Stage3._get_param_partition_rank) == ["self", "param"]
    assert "fp32_partitioned_groups_flat" in inspect.getsource(Stage3.__init__)
    assert hasattr(ZeroParamStatus, "AVAILABLE")
    for name in ("get_global_grad_norm", "zero_optimization_stage", "backward", "step"):
        assert callable(getattr(deepspeed.DeepSpeedEngine, name))


def test_zero_without_trained_experts_is_told_in_one_place() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer._configure_moe_settings)
    assert "None of the param groups are marked as MoE" in source and "self.is_moe_param_group" in source
