"""The one arithmetic of routed experts against the slow and obvious version: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from shodh.moe.experts import ExpertStack, run_experts_reference
from shodh.moe.grouped import Order, grouped_linear, mix_experts
from shodh.moe.routing import Routing

COUNTS = {"uneven": (3, 8, 1, 5), "empty": (0, 7, 0, 2), "all on one": (0, 0, 9, 0), "none": (0, 0, 0, 0)}
#: A kernel takes rows of whole multiples of 16 bytes; a loop takes the others, and float64.
SIZES = {"kernel": (8, 16, torch.float32), "odd": (5, 6, torch.float32), "float64": (8, 16, torch.float64)}


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """A sum of ``terms`` products in two orders: each rounds at most ``terms`` times (Higham, section 3.1)."""
    return 2 * terms * torch.finfo(dtype).eps


@pytest.mark.parametrize("activation", ["swiglu", "bilinear", "gelu", "linear"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("counts", [c for c in COUNTS if c != "none"])
def test_experts_equal_their_reference(activation: str, sizes: str, counts: str) -> None:
    dim, hidden, dtype = SIZES[sizes]
    number = torch.tensor(COUNTS[counts])
    stack = ExpertStack(4, dim, hidden, activation).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(stack.parameters()):
            parameter.copy_(draw(seed, *parameter.shape, dtype=dtype))
    rows = draw(7, int(number.sum()), dim, dtype=dtype).requires_grad_()
    leaves = (rows, *stack.parameters())
    outputs = [stack(rows, number), run_experts_reference(rows, number, stack.w1, stack.w2, stack.w3, activation)]
    weight = draw(8, *outputs[0].shape, dtype=dtype)
    # A gated expert multiplies two sums of dim products and adds hidden of these; backward adds over the rows.
    near = tolerance(dtype, 2 * (dim + hidden + len(rows)))
    for ours, theirs in zip(*([out, *torch.autograd.grad(out, leaves, weight)] for out in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("sizes", SIZES)
def test_experts_of_no_rows_have_no_gradient(sizes: str) -> None:
    dim, hidden, dtype = SIZES[sizes]
    weight = draw(0, 4, hidden, dim, dtype=dtype).requires_grad_()
    for counts in (COUNTS["none"], COUNTS["empty"]):
        rows = draw(1, sum(counts), dim, dtype=dtype)
        out = grouped_linear(rows, weight, torch.tensor(counts))
        assert out.shape == (sum(counts), hidden)
        (gradient,) = torch.autograd.grad(out.sum(), weight)
        assert [bool(expert.any()) for expert in gradient] == [n > 0 for n in counts]


def test_rows_need_not_be_contiguous() -> None:
    rows, weight = draw(0, 8, 9, dtype=torch.float32).T, draw(1, 4, 16, 8, dtype=torch.float32)
    counts = torch.tensor(COUNTS["all on one"])
    torch.testing.assert_close(grouped_linear(rows, weight, counts), rows @ weight[2].T)


@pytest.mark.parametrize("top_k", [1, 3])
def test_mixing_is_the_weighted_sum_with_the_gradients_of_it(top_k: int) -> None:
    tokens, dim, experts = 7, 5, 4
    rows = draw(0, tokens, dim, dtype=torch.float64).requires_grad_()
    weight = draw(1, experts, 6, dim, dtype=torch.float64).requires_grad_()
    score = draw(2, tokens, experts, dtype=torch.float64).requires_grad_()
    selected = score.detach().topk(top_k).indices
    counts = torch.bincount(selected.flatten(), minlength=experts)
    weights = score.gather(1, selected)
    routing = Routing(score, score, selected, counts, score[:, :0], weights)
    mixed = mix_experts(rows, routing, lambda x, n: grouped_linear(x, weight, n))
    every = torch.einsum("td,eod->teo", rows, weight)
    expected = (every.gather(1, selected.unsqueeze(-1).expand(-1, -1, 6)) * weights.unsqueeze(-1)).sum(1)
    leaves, given = (rows, weight, score), draw(3, tokens, 6, dtype=torch.float64)
    for ours, theirs in zip(
        *([out, *torch.autograd.grad(out, leaves, given, retain_graph=True)] for out in (mixed, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_order_is_stable_and_undone() -> None:
    keys = torch.tensor([2, 0, 2, 1, 0, 2])
    order, rows = Order(keys), torch.arange(6.0).unsqueeze(1)
    assert order.sort(rows).flatten().tolist() == [1, 4, 3, 0, 2, 5]
    assert torch.equal(order.restore(order.sort(rows)), rows)
    slots = Order(keys, copies=2).sort(rows[:3]).flatten().tolist()
    assert slots == [0, 2, 1, 0, 1, 2]


def test_one_expert_alone_is_the_same_expert_among_others() -> None:
    for activation, expert in itertools.product(("swiglu", "linear"), range(4)):
        stack = ExpertStack(4, 8, 16, activation)
        stack.seeded_reset(0, "stack")
        rows, counts = draw(1, 9, 8, dtype=torch.float32), torch.zeros(4, dtype=torch.int32)
        counts[expert] = 9
        torch.testing.assert_close(stack.one(rows, expert), stack(rows, counts))
