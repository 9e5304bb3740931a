"""Weight decay by the role of a parameter, in every configuration that comes with the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from shodh.config import ExpertsConfig, load_config
from shodh.models.factory import build_operator, build_tokenizer
from shodh.moe.experts import ExpertLayerReference, build_stack
from shodh.moe.groups import decay_groups

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "launch" / "configs").glob("*.yaml"))
RUNS = [path for path in CONFIGS if "\ndata:\n" in path.read_text()]  # Studies name one of these.
#: Biases, norms, frequencies, temperatures, and points in a space.
PLAIN = re.compile(r"(bias|norm\d?\.weight|_norm\.weight|\.b[12]|gamma|log_temperature|prototypes|position)$")


def by_role(name: str, linear_experts: bool) -> float:
    """What a name says, in the place of shapes: the decay of its group for a weight decay of 0.1."""
    stacked_bias = linear_experts and re.search(r"\.(experts|added_experts\.stack)\.w2$", name)
    return 0.0 if PLAIN.search(name) or stacked_bias else 0.1


def assert_grouped(model: nn.Module, groups: list[dict[str, object]], linear_experts: bool) -> None:
    decays: dict[int, list[float]] = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            decays.setdefault(id(parameter), []).append(group["weight_decay"])  # type: ignore[arg-type]
    found = {name: decays.pop(id(p), []) for name, p in model.named_parameters()}
    wanted = {n: [by_role(n, linear_experts)] if p.requires_grad else [] for n, p in model.named_parameters()}
    assert found == wanted and not decays


def test_the_runs_are_found() -> None:
    assert {"demo", "moe_pot_tiny", "dpot_tiny", "fno_tiny", "h100_multinode"} <= {path.stem for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_parameter_is_in_one_group_and_the_right_one(path: Path) -> None:
    """Of operator and tokenizer, on one rank and with experts spread over two."""
    config = load_config(path)
    linear = config.operator.experts.form == "linear"
    with torch.device("meta"):
        models = [build_operator(config)]
        if config.has_tokenizer:
            models.append(build_tokenizer(config))
        for model in models:
            assert_grouped(model, decay_groups(model, 0.1), linear)
        if config.operator.experts.num_experts:
            pytest.importorskip("deepspeed")
            from shodh.moe.layer import expert_layer_factory, optimizer_groups

            spread = build_operator(config, expert_layer_factory(2, 1))
            assert_grouped(spread, optimizer_groups(spread, 0.1), linear)


@pytest.mark.parametrize("form", ["gated", "linear"])
@pytest.mark.parametrize("kind", ["token", "noisy_topk", "two_level"])
def test_added_experts_and_every_gate_too(form: str, kind: str) -> None:
    router = {"kind": kind, "score": "softmax", "normalise": "after" if kind == "noisy_topk" else "before"}
    for settings in (router, {"kind": "token"}, {**router, "gate": "conv"}):
        config = ExpertsConfig(form=form, hidden=16, top_k=2, num_added=2, router=settings)  # type: ignore[arg-type]
        layer = nn.ModuleDict({"block": ExpertLayerReference(config, 16)})
        assert_grouped(layer, decay_groups(layer, 0.1), form == "linear")


def test_what_is_frozen_is_in_no_group() -> None:
    stack = build_stack(ExpertsConfig(hidden=16), 8, 2)
    stack.w1.requires_grad_(False)
    decay, plain = decay_groups(stack, 0.1)
    assert {id(p) for p in decay["params"]} == {id(stack.w2), id(stack.w3)} and not plain["params"]
