"""Every kind of router: names in checkpoints, initial weights, outputs, gradients, as recorded in router_values.json.

The numbers were recorded before routers became one class a kind; those of noisy kinds again, when noise became a hash
of the seed. To record a new kind beside them:
``python tests/unit/test_router_values.py CASE``, with the case added to `CASES`, prints its line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shodh.config import ExpertsConfig
from shodh.models.init import initialise
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.routing import RouterInputs

RECORDED = Path(__file__).with_name("router_values.json")
DIM, SAMPLES, TOKENS = 16, 3, 7
SOFT = {"score": "softmax"}
AFTER = {**SOFT, "normalise": "after"}
SCHEDULE = {"temperature_schedule": {"start": 2.0, "end": 0.5, "decay": 0.9}}
CASES: dict[str, dict[str, Any]] = {
    "token": {"top_k": 2},
    "token-softmax": {"router": SOFT},
    "token-sample": {"router": {**AFTER, **SCHEDULE, "gate": "conv", "granularity": "sample"}, "top_k": 2},
    "token-orthogonal": {"balance": {"orthogonality": 0.1}},
    "token-one": {"num_experts": 1},
    "context": {"router": {"kind": "context"}},
    "context-softmax": {"router": {"kind": "context", **AFTER, **SCHEDULE}, "top_k": 2},
    "two_level": {"router": {"kind": "two_level"}},
    "two_level-conv": {"router": {"kind": "two_level", "groups": 3, "gate": "conv", **SOFT}, "num_experts": 6},
    "two_level-alone": {"router": {"kind": "two_level", "groups": 4}},
    "operator": {"router": {"kind": "operator", "groups": 2}},
    "operator-top2": {"router": {"kind": "operator", "groups": 3, **SOFT, **SCHEDULE}, "num_experts": 6, "top_k": 2},
    "operator-alone": {"router": {"kind": "operator", "groups": 4, **SCHEDULE}},
    "noisy_topk": {"router": {"kind": "noisy_topk", **AFTER}, "top_k": 2, "balance": {"load": 0.1}},
    "noisy_topk-conv": {"router": {"kind": "noisy_topk", **AFTER, "gate": "conv", "granularity": "sample"}, "top_k": 2},
    "noisy_topk-all": {"router": {"kind": "noisy_topk", **AFTER}, "top_k": 4},
    "hash": {"router": {"kind": "hash"}},
    "hash-two": {"router": {"kind": "hash", **SCHEDULE}, "top_k": 2},
    "frozen": {"router": {"kind": "frozen"}, "top_k": 2},
    "frozen-conv": {"router": {"kind": "frozen", "gate": "conv", **AFTER}, "top_k": 2},
    "oracle": {"router": {"kind": "oracle"}, "top_k": 2},
    "oracle-softmax": {"router": {"kind": "oracle", "groups": 3, **AFTER}, "num_experts": 6, "top_k": 2},
}


def numbers(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each tensor its product with a fixed random one, and its norm."""
    found = {}
    for name, tensor in tensors.items():
        values = tensor.detach().double().flatten()
        probe = torch.randn(len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(len(values)))
        found[name] = [float(values @ probe), float(values.norm())]
    return found


def describe(case: str) -> dict[str, Any]:
    config = ExpertsConfig(**{"num_experts": 4, "hidden": 16, **CASES[case]})
    layer = ExpertLayerReference(config, DIM)
    initialise(torch.nn.ModuleDict({"layer": layer}), 3)
    names = list(layer.state_dict())
    first = numbers(layer.router.state_dict())
    draw = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(SAMPLES, TOKENS, DIM, generator=draw) for _ in range(2))
    x.requires_grad_()
    kind = config.router.kind
    if kind == "noisy_topk":  # Its gates start as zeros.
        with torch.no_grad():
            for number, parameter in enumerate(layer.router.parameters()):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    regime = torch.arange(SAMPLES) % config.groups if kind == "oracle" else None
    noise = torch.tensor([5, 6, 7]) if kind == "noisy_topk" else None
    view = torch.randn(SAMPLES, config.groups, generator=draw, requires_grad=True)
    output, routing = layer(x, RouterInputs(regime, noise, view if kind == "operator" else None))
    more = [t.square().sum() for t in (routing.logits, routing.load_probs, routing.similarity) if t is not None]
    torch.stack([(output * weight).sum(), *more]).sum().backward()
    routed = {name: t for name, t in routing._asdict().items() if t is not None}
    gradients = {name: p.grad for name, p in layer.router.named_parameters() if p.grad is not None}
    if kind == "operator":
        gradients["view"] = view.grad
    return {
        "names": names,
        "initial": first,
        "output": numbers({"output": output, **routed}),
        "gradients": numbers({"x": x.grad, **gradients}),
    }


@pytest.mark.parametrize("case", CASES)
def test_router_gives_the_recorded_values(case: str) -> None:
    recorded, found = json.loads(RECORDED.read_text())[case], describe(case)
    assert found.pop("names") == recorded.pop("names")
    for part, values in recorded.items():
        assert found[part].keys() == values.keys()
        for name, expected in values.items():
            assert found[part][name] == pytest.approx(expected, rel=2e-5, abs=2e-5), f"{part} {name}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps({case: describe(case) for case in sys.argv[1:] or CASES}) + "\n")
