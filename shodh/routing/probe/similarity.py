"""How alike two experts are: linear CKA of their outputs, and exact tensor similarity of bilinear ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shodh.moe.experts import ExpertStack


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two representations of the same rows (Kornblith et al. 2019, 1905.00414).

    Parameters
    ----------
    x, y : Tensor [N, D1], [N, D2]
        Computed in float64.
    debiased : bool
        With the unbiased estimator of HSIC (Song et al. 2007): near 0 for independent representations, and at times
        below it. The biased one is near 1 whenever N is small against D, whatever the representations.

    Returns
    -------
    float
        1 for representations equal up to rotation, scale and shift; NaN where one is constant.
    """
    if x.shape[0] != y.shape[0] or x.shape[0] < 4:
        raise ValueError(f"CKA needs the same rows, at least 4 of them; there are {x.shape[0]} and {y.shape[0]}")
    x, y = (a.double() - a.double().mean(0) for a in (x, y))
    products = [_hsic(a, b, debiased) for a, b in ((x, y), (x, x), (y, y))]
    if min(products[1:]) <= 0:
        return float("nan")
    return products[0] / (products[1] * products[2]) ** 0.5


def _hsic(x: Tensor, y: Tensor, debiased: bool) -> float:
    """HSIC of centred rows, but for a factor of N alone, from features: ``||X^T Y||^2`` and corrections."""
    product = float((x.T @ y).square().sum())
    if not debiased:
        return product
    n = x.shape[0]
    rows_x, rows_y = x.square().sum(1), y.square().sum(1)
    return product - n / (n - 2) * float(rows_x @ rows_y) + float(rows_x.sum() * rows_y.sum()) / ((n - 1) * (n - 2))


def expert_outputs(experts: ExpertStack, inputs: Tensor) -> Tensor:
    """Output of *every* expert on the same rows, whoever they were routed to: ``[E, N, D]``, on the CPU."""
    rows = inputs.to(experts.w1)
    with torch.no_grad():
        return torch.stack([experts.one(rows, e).cpu() for e in range(len(experts.w1))])


def cka_matrix(first: Tensor, second: Tensor, *, debiased: bool = True) -> np.ndarray:
    """`linear_cka` of all pairs of outputs ``[E1, N, D1]`` and ``[E2, N, D2]``: ``[E1, E2]``."""
    return np.array([[linear_cka(x, y, debiased=debiased) for y in second] for x in first])


class Pairing(NamedTuple):
    """Inner products of bilinear experts ``[E1, E2]``; see `bilinear_pairing`."""

    tensor: np.ndarray
    contraction: np.ndarray


def bilinear_pairing(first: ExpertStack, second: ExpertStack) -> Pairing:
    """Exact inner products of the quadratic forms that bilinear experts are (2605.15183).

    Expert ``y = D ((L x) * (R x))`` is one symmetric form an output, ``y_o = x^T B_o x`` with
    ``B_o = sum_h D_oh (L_h R_h^T + R_h L_h^T) / 2``. Then

    ``tensor = sum_o <B1_o, B2_o> = sum_hk ((L1 L2^T)*(R1 R2^T) + (L1 R2^T)*(R1 L2^T))_hk / 2 (D1^T D2)_hk``

    and ``contraction = sum_o tr(B1_o) tr(B2_o)``, where a form is contracted with itself. For ``x ~ N(0, I)``, by
    Isserlis' theorem, ``E[y1 . y2] = 2 tensor + contraction``; ``2 tensor`` alone is their covariance.
    """
    d1, l1, r1 = (p.detach().double() for p in (first.w2, first.w1, first.w3))
    d2, l2, r2 = (p.detach().double() for p in (second.w2, second.w1, second.w3))
    tensor = [
        [_tensor_product(l1[i], r1[i], d1[i], l2[j], r2[j], d2[j]) for j in range(len(d2))] for i in range(len(d1))
    ]
    trace1, trace2 = (torch.einsum("eoh,eh->eo", d, (a * b).sum(-1)) for d, a, b in ((d1, l1, r1), (d2, l2, r2)))
    return Pairing(np.array(tensor), (trace1 @ trace2.T).cpu().numpy())


def _tensor_product(l1: Tensor, r1: Tensor, d1: Tensor, l2: Tensor, r2: Tensor, d2: Tensor) -> float:
    hidden = 0.5 * ((l1 @ l2.T) * (r1 @ r2.T) + (l1 @ r2.T) * (r1 @ l2.T))
    return float((hidden * (d1.T @ d2)).sum())


def tensor_similarity(first: ExpertStack, second: ExpertStack, *, self_contraction: bool = False) -> np.ndarray:
    """Cosine of bilinear experts as quadratic forms, ``[E1, E2]``, exact: no inputs are drawn.

    Parameters
    ----------
    self_contraction : bool
        Without: ``tensor``, the correlation of the outputs for Gaussian inputs. With: ``2 tensor + contraction``, their
        cosine about zero; see `bilinear_pairing`.

    Raises
    ------
    ValueError
        The experts are not bilinear.
    """

    def product(a: ExpertStack, b: ExpertStack) -> np.ndarray:
        pairing = bilinear_pairing(a, b)
        return 2 * pairing.tensor + pairing.contraction if self_contraction else pairing.tensor

    for stack in (first, second):
        if not is_bilinear(stack):
            raise ValueError("tensor similarity is exact for bilinear experts alone; use linear_cka for others")
    norms = np.sqrt(np.outer(np.diag(product(first, first)), np.diag(product(second, second))))
    return product(first, second) / norms


def is_bilinear(experts: ExpertStack) -> bool:
    """Whether an expert is a quadratic form of its input."""
    return experts.activation == "bilinear"
