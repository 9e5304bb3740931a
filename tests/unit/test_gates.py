"""Gates: parameter counts, independence of samples, orthogonality, freezing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shodh.config import RouterConfig
from shodh.models.init import initialise
from shodh.moe.gates import (
    ConvGate,
    Gate,
    freeze,
    make_gate,
    mean_squared_cosine,
    scaled_cosine,
    scaled_cosine_reference,
)

DIM, EXPERTS = 32, 6


def drawn(gate: nn.Module, seed: int = 0) -> nn.Module:
    initialise(nn.ModuleDict({"gate": gate}), seed)
    return gate


def rows(count: int = 5) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(3))


def test_convolutional_gate_has_the_published_number_of_parameters() -> None:
    """1x1 convolutions with biases, two batch norms, a channel attention that reduces by 16 (arXiv 2510.25803)."""
    published = nn.Sequential(
        nn.Conv2d(DIM, 2 * DIM, 1),
        nn.BatchNorm2d(2 * DIM),
        nn.Conv2d(2 * DIM, 2 * DIM // 16, 1),
        nn.Conv2d(2 * DIM // 16, 2 * DIM, 1),
        nn.Conv2d(2 * DIM, DIM, 1),
        nn.BatchNorm2d(DIM),
        nn.Conv2d(DIM, EXPERTS, 1),
    )
    count = sum(p.numel() for p in ConvGate(DIM, EXPERTS).parameters())
    assert count == sum(p.numel() for p in published.parameters())


def test_convolutional_gate_is_the_chain_of_its_maps() -> None:
    gate, x = drawn(ConvGate(DIM, EXPERTS)), rows()
    wide = nn.functional.gelu(nn.functional.layer_norm(x @ gate.expand.weight.T + gate.expand.bias, (2 * DIM,)))
    squeezed = nn.functional.gelu(wide @ gate.squeeze.weight.T)
    # The published attention adds the branches of mean and maximum, which are the same on pooled features.
    attended = wide * torch.sigmoid(sum(squeezed @ gate.excite.weight.T for _ in ("mean", "maximum")))
    narrow = nn.functional.gelu(nn.functional.layer_norm(attended @ gate.reduce.weight.T, (DIM,)))
    torch.testing.assert_close(gate(x)[0], narrow @ gate.weight.T)


@pytest.mark.parametrize("config", [{}, {"score": "softmax"}, {"score": "softmax", "gate": "conv"}])
def test_rows_of_a_batch_do_not_see_each_other(config: dict[str, str]) -> None:
    gate, x = drawn(make_gate(RouterConfig(**config), DIM, EXPERTS, EXPERTS)), rows()
    together = gate(x)[0]
    assert together.shape == (5, EXPERTS) and together.dtype == torch.float32
    for row in range(5):
        torch.testing.assert_close(gate(x[row : row + 1])[0], together[row : row + 1])


def test_gate_computes_in_float32_from_weights_of_any_precision() -> None:
    gate = drawn(ConvGate(DIM, EXPERTS)).to(torch.bfloat16)
    exact = ConvGate(DIM, EXPERTS)
    exact.load_state_dict({name: value.float() for name, value in gate.state_dict().items()})
    assert torch.equal(gate(rows().bfloat16())[0], exact(rows().bfloat16().float())[0])


def test_mean_squared_cosine_is_zero_for_orthogonal_and_one_for_parallel_rows() -> None:
    assert mean_squared_cosine(3 * torch.eye(4, 7)).item() == pytest.approx(0.0, abs=1e-12)
    assert mean_squared_cosine(torch.ones(4, 7) * torch.arange(1, 5).unsqueeze(1)).item() == pytest.approx(1.0)
    half = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert mean_squared_cosine(half).item() == pytest.approx(0.5)
    assert mean_squared_cosine(torch.ones(1, 3)).item() == 0.0


@pytest.mark.parametrize("gate", [Gate(DIM, EXPERTS, "cosine", 8, 8.0), ConvGate(DIM, EXPERTS)])
def test_gradient_of_the_similarity_spreads_the_rows(gate: nn.Module) -> None:
    drawn(gate)
    assert gate(rows())[1] is None, "measured only where it is asked for"
    gate.measures_similarity = True
    parameter = gate.prototypes if isinstance(gate, Gate) else gate.weight
    before = gate(rows())[1]
    before.backward()
    with torch.no_grad():
        parameter -= parameter.grad / parameter.grad.norm()
    assert gate(rows())[1] < before


@pytest.mark.parametrize("config", [{}, {"score": "softmax", "gate": "conv"}])
def test_frozen_gate_has_no_parameters_and_the_same_values(config: dict[str, str]) -> None:
    free, frozen = (make_gate(RouterConfig(**config), DIM, EXPERTS, EXPERTS) for _ in range(2))
    freeze(frozen)
    drawn(free), drawn(frozen)
    assert not list(frozen.parameters())
    assert set(frozen.state_dict()) == {name for name, _ in free.named_parameters()}
    assert torch.equal(free(rows())[0], frozen(rows())[0])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_cosine_equals_its_reference(dtype: torch.dtype, zeros: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    query, prototypes = (torch.randn(n, 5, generator=draw).to(dtype) for n in (9, EXPERTS))
    if zeros:
        query[2], prototypes[1] = 0.0, 0.0
    leaves = [t.requires_grad_() for t in (query, prototypes, torch.tensor([1.3], dtype=dtype))]
    weight = torch.randn(9, EXPERTS, generator=draw).to(dtype)
    ours, theirs = (
        [out.detach(), *torch.autograd.grad(out, leaves, weight)]
        for out in (scaled_cosine(*leaves), scaled_cosine_reference(*leaves))
    )
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
