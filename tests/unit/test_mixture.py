"""The one arithmetic of routed experts against the slow and obvious version: values, gradients, what it costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shodh.moe import grouped, mixture, pointwise
from shodh.moe.experts import ExpertStack
from shodh.moe.mixture import mix_experts, mix_experts_reference
from shodh.moe.routing import count_assignments

FORMS = ("swiglu", "bilinear", "gelu", "linear")
EXPERTS, TOKENS = 4, 9
#: A kernel takes rows of whole multiples of 16 bytes; a loop takes the others, and float64.
SIZES = {
    "kernel": (8, 16, torch.float32),
    "odd": (5, 6, torch.float32),
    "float64": (8, 16, torch.float64),
    "bf16": (8, 32, torch.bfloat16),
}
#: Added to the scores of experts before the choice.
BIAS = {"uneven": [0.0] * 4, "one empty": [0.0, -99.0, 0.0, 0.0], "all on one": [0.0, 0.0, 99.0, 0.0]}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stack_of(form: str, sizes: str = "kernel") -> ExpertStack:
    dim, hidden, dtype = SIZES[sizes]
    stack = ExpertStack(EXPERTS, dim, hidden, form).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(stack.parameters()):
            parameter.copy_(draw(seed, *parameter.shape, dtype=dtype) / parameter.shape[2] ** 0.5)
    return stack


class Case:
    """A stack, strided rows, and experts for them by a leaf of scores, which carries the gradient of the weights."""

    def __init__(self, form: str, sizes: str = "kernel", bias: str = "uneven", top_k: int = 2, tokens: int = TOKENS):
        self.stack = stack_of(form, sizes)
        dim, _, dtype = SIZES[sizes]
        self.rows = draw(7, dim, tokens, dtype=dtype).t().requires_grad_()
        self.score = draw(9, tokens, EXPERTS, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        self.selected = (self.score.detach() + torch.tensor(BIAS[bias])).topk(top_k).indices
        self.counts = count_assignments(self.selected, EXPERTS)
        self.leaves = (self.rows, self.score, *self.stack.parameters())

    @property
    def chosen(self) -> tuple[Tensor, Tensor]:
        return self.selected, self.score.gather(1, self.selected)

    def fast(self) -> Tensor:
        out: Tensor = self.stack(self.rows, *self.chosen, self.counts)
        return out

    def slow(self) -> Tensor:
        stack = self.stack
        return mix_experts_reference(self.rows, *self.chosen, (stack.w1, stack.w2, stack.w3), stack.activation)


def with_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    weight = draw(8, *out.shape, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], terms: int) -> None:
    """Sums of ``terms`` products in two orders: each rounds at most ``terms`` times (Higham, section 3.1)."""
    dtype = ours[0].dtype
    # In bf16 products sum in float32, and what is rounded is each of the few operations in a row.
    near = 2 * (8 if dtype == torch.bfloat16 else terms) * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.abs().max()))


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_mixture_equals_its_reference(form: str, sizes: str, bias: str, top_k: int) -> None:
    case = Case(form, sizes, bias, top_k)
    dim, hidden, _ = SIZES[sizes]
    results = [with_gradients(out, case.leaves) for out in (case.fast(), case.slow())]
    # A gated expert multiplies two sums of dim products and adds hidden of these; backward adds over the rows.
    assert_alike(*results, 2 * (dim + hidden + TOKENS))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_finite_differences(form: str) -> None:
    case = Case(form, "float64", top_k=2, tokens=3)

    def mixed(rows: Tensor, score: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        weights = score.gather(1, case.selected)
        return mix_experts(rows, case.selected, weights, case.counts, (w1, w2, w3), form)

    assert torch.autograd.gradcheck(mixed, case.leaves, fast_mode=True)


@pytest.mark.parametrize("form", ["swiglu", "linear"])
def test_score_of_zero_has_a_gradient(form: str) -> None:
    case = Case(form, "float64")
    with torch.no_grad():
        case.score.zero_()
    assert_alike(*(with_gradients(out, case.leaves) for out in (case.fast(), case.slow())), 100)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_give_no_rows_and_no_gradient(form: str, sizes: str) -> None:
    case = Case(form, sizes, tokens=0)
    out, *gradients = with_gradients(case.fast(), case.leaves)
    assert out.shape == (0, case.stack.w2.shape[1])
    assert [g.shape for g in gradients] == [leaf.shape for leaf in case.leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("sizes", ["kernel", "odd"])
@pytest.mark.parametrize("form", FORMS)
def test_expert_without_tokens_has_no_gradient_and_the_others_have(form: str, sizes: str) -> None:
    case = Case(form, sizes, "one empty", top_k=3)
    for gradient in with_gradients(case.fast(), case.leaves)[3:]:
        assert [bool(expert.any()) for expert in gradient] == [True, False, True, True]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_gets_none_and_changes_nothing(form: str, frozen: int) -> None:
    case = Case(form)
    expected = with_gradients(case.fast(), case.leaves)
    case.leaves[frozen].requires_grad_(False)
    kept = [n for n in range(5) if n != frozen]
    found = with_gradients(case.fast(), tuple(case.leaves[n] for n in kept))
    for number, gradient in zip(kept, found[1:], strict=True):
        assert torch.equal(gradient, expected[1 + number])


@pytest.mark.parametrize("form", FORMS)
def test_recomputation_gives_the_same_bits_also_of_a_stack_that_is_used_twice(form: str) -> None:
    def twice(case: Case, run: Any) -> list[Tensor]:
        weights = case.score.gather(1, case.selected)
        first = run(case.stack, case.rows, case.selected, weights, case.counts)
        rows = torch.cat((first, case.rows), 1)[:, : case.rows.shape[1]]
        return with_gradients(run(case.stack, rows, case.selected, weights, case.counts), case.leaves)

    plain = twice(Case(form), lambda stack, *given: stack(*given))
    again = twice(Case(form), lambda stack, *given: checkpoint(stack, *given, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradient_that_is_one_expanded_number() -> None:
    case = Case("swiglu")
    ours, theirs = (torch.autograd.grad(out.sum(), case.leaves) for out in (case.fast(), case.slow()))
    assert_alike(list(ours), list(theirs), 100)


def test_one_expert_alone_is_the_same_expert_among_others() -> None:
    for form in FORMS:
        stack, rows = stack_of(form), draw(1, 9, 8)
        for expert in range(EXPERTS):
            selected = torch.full((9, 1), expert)
            mixed = stack(rows, selected, torch.ones(9, 1), count_assignments(selected, EXPERTS))
            torch.testing.assert_close(stack.one(rows, expert), mixed)


@pytest.mark.parametrize(("number", "keys"), [(0, 3), (1, 1), (7, 1), (40, 3), (1000, 64)])
def test_both_orders_are_the_stable_one(number: int, keys: int) -> None:
    given = torch.randint(keys, (number,), generator=torch.Generator().manual_seed(number))
    expected = sorted(range(number), key=lambda n: (int(given[n]), n))
    place, order = grouped.slots(given, keys)
    assert order.tolist() == expected and torch.equal(place[order], torch.arange(number))
    assert torch.equal(grouped.slots_by_counting(given, keys), place)


class Calls(TorchDispatchMode):
    """Counts what torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def by_counting(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """`grouped.slots` as on a GPU."""
    place = grouped.slots_by_counting(keys, num_keys)
    return place, grouped.inverse(place)


HOST = {"_local_scalar_dense", "nonzero", "item", "unique", "_unique2", "masked_select", "bincount", "is_nonzero"}


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_is_never_waited_for_and_nothing_is_sorted_or_scattered(
    form: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "slots", by_counting)
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("tolist waits for a GPU"), raising=False)
    case = Case(form, top_k=top_k)
    selected, weights = case.selected, case.score.gather(1, case.selected).detach().requires_grad_()
    with Calls() as calls:
        out = case.stack(case.rows, selected, weights, case.counts)
        out.backward(torch.ones_like(out))
    found = calls.names
    assert not found.keys() & (HOST | {"sort", "argsort", "topk", "scatter_add", "index_add", "index_put_"}), found
    linear = form == "linear"
    assert found["_grouped_mm"] == (2 + 6 if linear else 3 + 6)


@pytest.mark.parametrize("top_k", [1, 4])
def test_nothing_but_inputs_of_the_activation_is_kept_by_the_choice(top_k: int) -> None:
    case = Case("swiglu", top_k=top_k)
    dim, hidden, _ = SIZES["kernel"]
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        case.stack(case.rows, case.selected, case.score.detach()[:, :top_k], case.counts)
    given = {t.data_ptr() for t in (case.rows, *case.stack.parameters())}
    floats = sum(t.numel() for p, t in kept.items() if p not in given and t.is_floating_point() and t.ndim > 1)
    assert floats == TOKENS * top_k * (2 * hidden + 1)  # Gate, up, and the weight.


def test_a_compiler_takes_every_pass_over_the_rows_whole() -> None:
    gate, up, gradient = (draw(seed, 24, 16, dtype=torch.bfloat16) for seed in range(3))
    place = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (grouped.slots_by_counting, (place % 5, 5)),
        (pointwise.combine, (gate, place, draw(4, 12, 2))),
        (pointwise.collect, (place, 2, gate, up)),
        (pointwise.swiglu_backward, (gate, up, gradient, draw(5, 24))),
        (pointwise.gelu_backward, (gate, up, torch.cat((gradient, up), 1), draw(5, 24))),
    ]
    for function, given in calls:
        compiled = torch.compile(function.__wrapped__, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), function(*given), rtol=0, atol=0)


class OnCuda(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_compiler_is_asked_once_on_a_gpu_alone_and_missed_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def no_compiler(function: Any) -> Any:
        asked.append(function.__name__)
        return lambda *args: (_ for _ in ()).throw(RuntimeError("no Triton here\nand much more"))

    monkeypatch.setattr(torch, "compile", no_compiler)
    twice = pointwise.fused_on_cuda(lambda x: 2 * x)
    there = torch.ones(3).as_subclass(OnCuda)
    assert torch.equal(twice(torch.ones(3)), torch.full((3,), 2.0)) and asked == []
    with caplog.at_level("WARNING", "shodh"):
        assert all((twice(there) == 2).all() for _ in range(3))
    assert len(asked) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no Triton here" in line and "\n" not in line
