"""Compiled parts: the same numbers, one graph for all blocks, no break, and the names of checkpoints untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from shodh.config import ExpertsConfig, OperatorConfig, TokenizerConfig
from shodh.config.reading import config_from_dict
from shodh.core.errors import ConfigError
from shodh.models.init import initialise
from shodh.models.operator import LatentTransformer
from shodh.models.tokenizer import Tokenizer
from shodh.schema.fields import Field
from shodh.train import compiling
from shodh.train.compiling import CompileCount, compile_run, compiles

GRID = (4, 4, 4)
CASES: dict[str, dict[str, Any]] = {
    "dense": {"experts": {"num_experts": 0}},
    "sparse": {"experts": {"router": {"kind": "two_level"}}},
    "checkpointed": {"experts": {}, "activation_checkpointing": True},
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def build(case: str) -> LatentTransformer:
    settings = dict(CASES[case])
    experts = ExpertsConfig(**{"num_experts": 4, "hidden": 32, **settings.pop("experts")})
    model = LatentTransformer(OperatorConfig(dim=32, heads=2, depth=3, experts=experts, **settings), 4, 1, GRID, 2)
    initialise(model, 0)
    return model


def gradients(model: LatentTransformer) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    history, static = torch.randn(2, 2, 4, *GRID, generator=draw), torch.randn(2, 1, *GRID, generator=draw)
    output = model(history, static)
    loss = output.latent.square().mean() + sum(r.probs.square().mean() for r in output.routing)
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]


@pytest.mark.parametrize(
    "case", ["sparse", *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("dense", "checkpointed"))]
)
def test_compiled_model_is_the_model(case: str) -> None:
    plain, compiled = build(case), build(case)
    parts = compile_run(compiled, None, "aot_eager")
    assert parts == (3 if case == "dense" else 6)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for found, expected in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    # One graph a kind of part, whatever the depth; a break would have raised.
    assert CompileCount().read() == {"perf/compiled_graphs": 1 if case == "dense" else 2, "perf/graph_breaks": 0}


@pytest.mark.exhaustive
def test_compiled_tokenizer_is_the_tokenizer() -> None:
    plain, compiled = (Tokenizer(TokenizerConfig(widths=(8, 8, 8)), [Field("tracer")], []) for _ in range(2))
    for tokenizer in (plain, compiled):
        initialise(tokenizer, 0)
    assert compile_run(compiled, None, "aot_eager") == 7
    fields, geometry = torch.randn(1, 1, 8, 16, 8), torch.zeros(1, 3, 8, 16, 8)

    def found(tokenizer: Tokenizer) -> list[torch.Tensor]:
        loss = tokenizer.emit(tokenizer.encode(fields, geometry), geometry).square().mean()
        return [loss, *torch.autograd.grad(loss, list(tokenizer.parameters()))]

    for ours, expected in zip(found(compiled), found(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert CompileCount().read()["perf/graph_breaks"] == 0


def test_graphs_that_are_compiled_later_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, count = build("dense"), CompileCount()
    compile_run(model, None, "eager")
    gradients(model)
    before = count.read()["perf/compiled_graphs"]
    with torch.no_grad():
        model(torch.randn(3, 2, 4, *GRID), torch.randn(3, 1, *GRID))
    assert count.read()["perf/compiled_graphs"] > before
    assert "compiled" in caplog.text


def test_who_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    for cuda in (False, True):
        monkeypatch.setattr(compiling, "uses_cuda", lambda cuda=cuda: cuda)
        assert [compiles("auto", stage) for stage in (1, 2, 3)] == [cuda, cuda, False]
        assert compiles("on", 2) and not compiles("off", 2)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not compiles("auto", 1)
    with pytest.raises(ConfigError, match="ZeRO"):
        compiles("on", 3)


@pytest.mark.parametrize(("value", "read"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_reads_on_as_true(value: object, read: str) -> None:
    tree = {"name": "p", "compile": value, "data": {"grid": [16, 16, 16], "regimes": [{"name": "r", "path": "d"}]}}
    assert config_from_dict(tree, "a test").compile == read
