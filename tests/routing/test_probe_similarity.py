"""CKA against a published implementation; tensor similarity against its symmetries and the Gaussian expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh.core.seeding import generator
from shodh.moe.experts import ExpertStack
from shodh.routing.probe.similarity import (
    bilinear_pairing,
    cka_matrix,
    expert_outputs,
    is_bilinear,
    linear_cka,
    tensor_similarity,
)

EXPERTS, DIM, HIDDEN = 3, 6, 8


def normal(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator("test similarity", name), dtype=torch.float64)


def stack(name: str = "a", activation: str = "bilinear") -> ExpertStack:
    experts = ExpertStack(EXPERTS, DIM, HIDDEN, activation).double()
    with torch.no_grad():
        for key, parameter in experts.named_parameters():
            parameter.copy_(normal(name + key, *parameter.shape))
    return experts


def known_arrays() -> tuple[Tensor, Tensor]:
    i, j = torch.arange(20, dtype=torch.float64)[:, None], torch.arange(12, dtype=torch.float64)[None]
    x = torch.sin(1 + i * (j + 1))
    return x, torch.cos(i * i / 7 + 2 * j[:, :9]) + 0.5 * x[:, :9]


# ckatorch 1.0.3: cka_base(x, y, unbiased=False) and unbiased=True, which follows Kornblith et al.'s reference code.
@pytest.mark.parametrize(("debiased", "published"), [(False, 0.301312288734600), (True, 0.066074528361468)])
def test_cka_equals_the_value_of_a_published_implementation(debiased: bool, published: float) -> None:
    assert linear_cka(*known_arrays(), debiased=debiased) == pytest.approx(published, rel=1e-10)


def test_debiased_cka_equals_the_unbiased_estimator_on_gram_matrices() -> None:
    """Song et al. 2012, equation 5, from Gram matrices without their diagonals: another way to the same number."""

    def hsic(k: Tensor, h: Tensor) -> float:
        n = len(k)
        k, h = k - torch.diag(torch.diag(k)), h - torch.diag(torch.diag(h))
        one = torch.ones(n, dtype=k.dtype)
        value = torch.trace(k @ h) + k.sum() * h.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ h @ one)
        return float(value) / (n * (n - 3))

    x, y = normal("x", 15, 7), normal("y", 15, 4)
    y[:, :2] += x[:, :2]
    k, h = x @ x.T, y @ y.T
    expected = hsic(k, h) / (hsic(k, k) * hsic(h, h)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_cka_ignores_rotation_scale_and_shift_and_nothing_else() -> None:
    x = normal("x", 40, 5)
    rotation = torch.linalg.qr(normal("q", 5, 5)).Q
    assert linear_cka(x, -3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    stretch = torch.diag(torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64))
    assert linear_cka(x, x @ stretch) < 0.9


def test_debiased_cka_of_independent_representations_is_near_zero_where_the_biased_one_is_not() -> None:
    x, y = normal("x", 64, 128), normal("y", 64, 128)
    assert linear_cka(x, y, debiased=False) > 0.5
    # Over N rows, sums of products of independent kernels scatter by sqrt(2) N D about 0; the norms are N^2 D.
    assert abs(linear_cka(x, y)) < 5 * 2**0.5 / 64


def test_cka_of_a_constant_is_not_a_number_and_other_rows_are_refused() -> None:
    assert np.isnan(linear_cka(torch.ones(10, 3), normal("x", 10, 3)))
    with pytest.raises(ValueError, match="same rows"):
        linear_cka(normal("x", 10, 3), normal("y", 9, 3))


def test_outputs_are_those_of_every_expert() -> None:
    experts, x = stack(activation="swiglu"), normal("x", 11, DIM)
    outputs = expert_outputs(experts, x)
    assert outputs.shape == (EXPERTS, 11, DIM)
    torch.testing.assert_close(outputs[1], experts.one(x, 1).detach())
    np.testing.assert_allclose(np.diag(cka_matrix(outputs, outputs)), 1, atol=1e-12)


def forms(experts: ExpertStack, expert: int) -> Tensor:
    """Symmetric matrices ``B [D, D, D]`` of an expert, ``y_o = x^T B_o x``."""
    form = torch.einsum("oh,hi,hj->oij", experts.w2[expert], experts.w1[expert], experts.w3[expert])
    return (0.5 * (form + form.transpose(1, 2))).detach()


def test_pairing_equals_the_inner_product_of_the_whole_tensors() -> None:
    a, b = stack("a"), stack("b")
    pairing = bilinear_pairing(a, b)
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            first, second = forms(a, i), forms(b, j)
            traces = torch.einsum("oii->o", first) @ torch.einsum("oii->o", second)
            assert pairing.tensor[i, j] == pytest.approx(float((first * second).sum()), rel=1e-10)
            assert pairing.contraction[i, j] == pytest.approx(float(traces), rel=1e-10)


@pytest.mark.parametrize("self_contraction", [False, True])
def test_tensor_similarity_is_one_under_permutation_and_reciprocal_rescaling(self_contraction: bool) -> None:
    """Hidden units reordered, scaled between gate, up and down, gate and up exchanged: all one function."""
    experts, same = stack(), stack()
    order = torch.randperm(HIDDEN, generator=generator("test similarity order"))
    scale = (
        normal("scale", 2, HIDDEN, 1).exp() * torch.tensor([1.0, -1.0] * (HIDDEN // 2), dtype=torch.float64)[:, None]
    )
    with torch.no_grad():
        same.w1.copy_(experts.w3[:, order] * scale[0])
        same.w3.copy_(experts.w1[:, order] * scale[1])
        same.w2.copy_(experts.w2[:, :, order] / (scale[0] * scale[1]).T)
    x = normal("x", 5, DIM)
    torch.testing.assert_close(same.one(x, 0), experts.one(x, 0))
    similarity = tensor_similarity(experts, same, self_contraction=self_contraction)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-12)
    assert np.abs(similarity[~np.eye(EXPERTS, dtype=bool)]).max() < 0.9, "different experts are told apart"


def test_with_self_contraction_the_pairing_is_the_gaussian_expectation_and_without_the_covariance() -> None:
    a, b = stack("a"), stack("b")
    with torch.no_grad():  # Forms with a trace, so that the two definitions differ.
        b.w3.copy_(0.5 * b.w3 + b.w1)
        a.w3.copy_(0.5 * a.w3 + a.w1)
    x = normal("gaussian", 200_000, DIM)
    first, second = a.one(x, 0).detach(), b.one(x, 1).detach()
    pairing = bilinear_pairing(a, b)
    tensor, contraction = pairing.tensor[0, 1], pairing.contraction[0, 1]

    products = (first * second).sum(1)
    error = float(products.std()) / len(x) ** 0.5
    assert abs(float(products.mean()) - (2 * tensor + contraction)) < 4 * error
    assert abs(contraction) > 20 * error, "the self-contraction term is seen"

    norms = [float(y.square().sum(1).mean()) ** 0.5 for y in (first, second)]
    cosine = float(products.mean()) / (norms[0] * norms[1])
    # The norms of quartic moments scatter by about sqrt(8 / N) each, well below what the two definitions differ by.
    assert tensor_similarity(a, b, self_contraction=True)[0, 1] == pytest.approx(cosine, abs=0.03)
    assert abs(tensor_similarity(a, b)[0, 1] - cosine) > 0.1

    centred = ((first - first.mean(0)) * (second - second.mean(0))).sum(1)
    assert abs(float(centred.mean()) - 2 * tensor) < 4 * float(centred.std()) / len(x) ** 0.5


def test_experts_that_are_not_bilinear_are_refused() -> None:
    with pytest.raises(ValueError, match="bilinear"):
        tensor_similarity(stack(), stack(activation="swiglu"))


def test_linear_experts_are_compared_by_their_outputs_alone() -> None:
    stack = ExpertStack(3, 6, 16, "linear")
    stack.seeded_reset(0, "stack")
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    outputs = expert_outputs(stack, rows)
    assert outputs.shape == (3, 40, 16) and torch.equal(outputs[1], stack.one(rows, 1).detach())
    assert not is_bilinear(stack)
    with pytest.raises(ValueError, match="bilinear experts alone"):
        tensor_similarity(stack, stack)
