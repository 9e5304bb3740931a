"""What is computed while rows travel, and that nothing else depends on when they arrive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helper import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shodh.config import ExpertsConfig
from shodh.moe import mixture

pytestmark = pytest.mark.distributed

DIM = 16
#: name -> (settings of ExpertsConfig, selection bias of the first expert, what is frozen)
CASES: dict[str, tuple[dict[str, Any], float, str]] = {
    "plain": ({}, 0.0, ""),
    "linear": ({"form": "linear", "top_k": 2}, 0.0, ""),
    "without shared": ({"num_shared": 0}, 0.0, ""),
    "added": ({"num_added": 2, "top_k": 2}, 0.0, ""),
    "a rank without rows": ({}, 99.0, ""),
    "frozen experts": ({}, 0.0, "experts."),
    "frozen router": ({}, 0.0, "router."),
    "frozen input": ({}, 0.0, "x"),
    "recomputed": ({}, 0.0, ""),
    "watched for NaN": ({}, 0.0, ""),
}


class Late:
    """A transfer that happens at the last moment: before, what it fills holds NaN."""

    def __init__(self, out: Tensor, run: Callable[[], Any], note: Callable[[str], None]) -> None:
        self.run, self.note = run, note
        out.fill_(torch.nan)
        note("leave")

    def wait(self) -> None:
        self.note("arrive")
        self.run()


def transfers(log: list[str], late: bool) -> Any:
    """All-to-alls of this process noted, each done when it is waited for, or at once."""
    original = dist.all_to_all_single

    def call(out: Tensor, given: Tensor, *splits: Any, group: Any, async_op: bool = False) -> Any:
        name = "counts" if not out.is_floating_point() else ("scales", "rows")[out.ndim - 1]
        run = partial(original, out, given, *splits, group=group)
        if async_op and late:
            return Late(out, run, lambda what: log.append(f"{name} {what}"))
        log.append(name if not async_op else f"{name} leave")
        run()
        return mock.Mock()

    return mock.patch.object(dist, "all_to_all_single", call)


def noted(function: Callable[..., Any], log: list[str], name: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*given: Any, **more: Any) -> Any:
        log.append(name)
        return function(*given, **more)

    return call


def run_layer(layer: nn.Module, name: str, frozen: str) -> list[Tensor | None]:
    """Output and gradients of two micro-batches whose passes are interleaved, and the output without gradients."""
    layer.zero_grad()
    draw = torch.Generator().manual_seed(dist.get_rank())
    inputs = [torch.randn(2, 5, DIM, generator=draw).requires_grad_(frozen != "x") for _ in range(2)]
    call = partial(checkpoint, layer, use_reentrant=False) if name == "recomputed" else layer
    with torch.autograd.detect_anomaly() if name == "watched for NaN" else nullcontext():
        outputs = [call(x)[0] for x in inputs]
        for out in outputs[::-1]:
            out.square().sum().backward(retain_graph=name == "plain")
        if name == "plain":
            outputs[0].sum().backward()
    with torch.no_grad():
        last, _ = layer(inputs[0])
    return [*outputs, last, *(x.grad for x in inputs), *(p.grad for p in layer.parameters())]


def compare() -> dict[str, dict[str, Any]]:
    """By case: whether late transfers, and real ones, give the bits of transfers that are waited for at once."""
    from shodh.models.init import initialise
    from shodh.moe.layer import ExpertLayer
    from shodh.train.runtime import start_distributed

    start_distributed()
    found = {}
    for name, (settings, bias, frozen) in CASES.items():
        config = ExpertsConfig(**{"num_experts": 4, "hidden": 32, "num_shared": 1, **settings})
        layer = ExpertLayer(config, DIM, 2, dist.get_rank())
        layer.set_deepspeed_parallelism()
        initialise(nn.ModuleDict({"block": layer}), 5)
        for path, parameter in layer.named_parameters():
            parameter.requires_grad_(not (frozen and path.startswith(frozen)))
        layer.router.selection_bias[0] = bias
        logs: list[list[str]] = [[], [], []]
        with transfers(logs[0], late=False):
            expected = run_layer(layer, name, frozen)
        with transfers(logs[1], late=True):
            results = [run_layer(layer, name, frozen), None]
        results[1] = run_layer(layer, name, frozen)
        same = [[a is b or torch.equal(a, b) for a, b in zip(r, expected, strict=True)] for r in results]
        left = [[e for e in log if not e.endswith("arrive")] for log in logs]
        found[name] = {"same": same, "log": logs[1], "left": left[:2], "grads": [g is not None for g in expected]}
    return found


def order() -> dict[str, list[str]]:
    """What happens in which order: forward, backward, and both where the layer is computed again."""
    from shodh.moe.layer import ExpertLayer
    from shodh.train.runtime import start_distributed

    start_distributed()
    layer = ExpertLayer(ExpertsConfig(num_experts=4, hidden=32, num_shared=1), DIM, 2, dist.get_rank())
    layer.set_deepspeed_parallelism()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    log: list[str] = []
    shared = layer.shared_experts
    shared.forward = noted(shared.forward, log, "shared")
    for parameter in shared.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("shared gradient"))
    found = {}
    weights = noted(mixture.grouped_gradient, log, "weight gradient")
    with transfers(log, late=True), mock.patch.object(mixture, "grouped_gradient", weights):
        for name, call in (("plain", layer), ("again", partial(checkpoint, layer, use_reentrant=False))):
            out, _ = call(torch.randn(2, 5, DIM).requires_grad_())
            found[f"{name} forward"], log[:] = log[:], []
            out.sum().backward()
            found[f"{name} backward"], log[:] = log[:], []
    return found


def goes_on() -> list[bool]:
    """Whether a layer whose shared experts failed while rows travelled gives the same bits afterwards."""
    from shodh.moe.layer import ExpertLayer
    from shodh.train.runtime import start_distributed

    start_distributed()
    layer = ExpertLayer(ExpertsConfig(num_experts=4, hidden=32, num_shared=1), DIM, 2, dist.get_rank())
    layer.set_deepspeed_parallelism()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected = run_layer(layer, "", "")
    with mock.patch.object(layer.shared_experts, "forward", side_effect=MemoryError), pytest.raises(MemoryError):
        run_layer(layer, "", "")
    return [torch.equal(a, b) for a, b in zip(run_layer(layer, "", ""), expected, strict=True)]


@pytest.fixture(scope="module")
def compared() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, compare)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_do_not_depend_on_when_rows_arrive(compared: Any, name: str) -> None:
    for rank in compared:
        assert all(map(all, rank[name]["same"])) and sum(rank[name]["grads"]) > 3


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_the_same_in_the_same_order_and_all_arrives(compared: Any, name: str) -> None:
    first, second = (rank[name] for rank in compared)
    assert first["log"] == second["log"] and first["left"][0] == first["left"][1]
    names = [event.split() for event in first["log"]]
    assert sorted(e[0] for e in names if e[-1] == "leave") == sorted(e[0] for e in names if e[-1] == "arrive")


def test_shared_experts_and_weight_gradients_are_computed_while_rows_travel() -> None:
    out = ["counts", "rows leave", "rows arrive"]
    forward = [*out, "rows leave", "shared", "rows arrive"]
    backward = [
        *("rows leave", "scales leave", *["shared gradient"] * 3, "rows arrive", "scales arrive"),
        *("rows leave", "scales leave", *["weight gradient"] * 3, "rows arrive", "scales arrive"),
    ]
    for found in run_ranks(2, order):
        assert found["plain forward"] == found["again forward"] == forward
        assert found["plain backward"] == backward
        assert found["again backward"] == forward + backward


def test_a_layer_goes_on_after_an_error_while_rows_travelled() -> None:
    assert all(map(all, run_ranks(2, goes_on)))
