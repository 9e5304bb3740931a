"""A kind of router is one class and one line of the registry; the example of docs/routers.md is run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from shodh.config import ExpertsConfig, config_from_dict
from shodh.config.routers import ROUTERS, RouterTraits
from shodh.core.errors import ConfigError
from shodh.models.init import initialise
from shodh.moe.experts import ExpertLayerReference
from shodh.moe.groups import decay_groups
from shodh.moe.routers import Router, make_router

PAGE = Path(__file__).parents[2] / "docs" / "routers.md"
DATA = {"grid": [16, 16, 16], "fields": [{"name": "p"}], "regimes": [{"name": "a", "path": "data/a"}]}


@pytest.mark.parametrize("kind", ROUTERS)
def test_every_line_names_a_class_in_a_file_of_its_own(kind: str) -> None:
    settings = {"groups": 2} if kind == "operator" else {"score": "softmax", "normalise": "after", "groups": 1}
    router = make_router(ExpertsConfig(top_k=2, router={"kind": kind, **settings}), 8)
    assert isinstance(router, Router) and type(router).__module__ == f"shodh.moe.routers.{kind}"

    assert bool(list(router.parameters())) == ROUTERS[kind].trained
    assert f"| `{kind}` |" in PAGE.read_text()


def test_the_lines_of_the_page_run() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    lines = yaml.safe_load(block)
    assert set(lines) == set(ROUTERS)
    data = {**DATA, "regimes": [{"name": name, "path": name} for name in "ab"]}
    for kind, operator in lines.items():
        experts = config_from_dict({"name": "x", "data": data, "operator": operator}).operator.experts
        assert experts.router.kind == kind and make_router(experts, 8).top_k == experts.top_k


def test_only_a_control_is_given_labels() -> None:
    assert {kind for kind, traits in ROUTERS.items() if traits.labelled} == {"oracle"}


@pytest.mark.parametrize(("kind", "expected"), [("tokens", "did you mean 'token'"), ("xyz", "oracle"), (3, "string")])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config_from_dict({"name": "x", "data": DATA, "operator": {"experts": {"router": {"kind": kind}}}})


def test_the_example_of_the_page_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    module = types.ModuleType("shodh.moe.routers.nearest")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, traits in eval(f"{{{line}}}", {"RouterTraits": RouterTraits}).items():
        monkeypatch.setitem(ROUTERS, name, traits)
    run = config_from_dict({"name": "x", "data": DATA, "operator": {"experts": {"router": {"kind": "nearest"}}}})
    layer = ExpertLayerReference(run.operator.experts, 16)
    initialise(torch.nn.ModuleDict({"layer": layer}), 0)
    assert "router.centres" in dict(layer.named_parameters())
    assert all(layer.router.centres is not p for p in decay_groups(layer, 0.1)[0]["params"])
    x = layer.router.centres.detach().unsqueeze(0)
    assert layer(x)[1].selected.flatten().tolist() == [0, 1, 2, 3], "each centre is nearest to itself"
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = (layer(x)[0] - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and layer.router.centres.grad.abs().max() > 0
