"""Rows in the order of their experts, and products of each expert's rows with its matrix.

Nothing here waits for the device, but for products that have no kernel (float64, and rows of odd sizes), which are
taken expert by expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shodh.moe.pointwise import fused_on_cuda

ALIGNMENT = 16  # bytes: the grouped GEMM wants rows of whole multiples
BLACKWELL = 10  # CUDA's major capability


def slots(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The stable order of ``keys [N]``: the place of each in it ``[N]``, and the inverse, what stands at each place.

    A stable order is unique, so both ways to find it agree: counting on a GPU, without a sort; sorting on a CPU, where
    a table of keys x N is slow.
    """
    if keys.is_cuda:
        place = slots_by_counting(keys, num_keys)
        return place, inverse(place)
    order = keys.argsort(stable=True)
    return inverse(order), order


@fused_on_cuda
def slots_by_counting(keys: Tensor, num_keys: int) -> Tensor:
    """Places by one running sum over a table that has a row a key: it counts smaller keys, and equal ones before."""
    hits = keys == torch.arange(num_keys, device=keys.device).unsqueeze(1)
    seen = hits.flatten().cumsum(0, dtype=torch.int32).view(num_keys, -1)
    return (seen.gather(0, keys.unsqueeze(0))[0] - 1).long()


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes ``permutation [N]``."""
    return torch.empty_like(permutation).scatter_(
        0, permutation, torch.arange(len(permutation), device=permutation.device)
    )


def ends_of(counts: Tensor) -> Tensor:
    """Where the rows of each expert end, int32, of how many there are."""
    return counts.cumsum(0, dtype=torch.int32)


def has_kernel(rows: Tensor, *widths: int) -> bool:
    """Whether ``torch._grouped_mm`` takes rows of this dtype and these widths."""
    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and hasattr(torch, "_grouped_mm")
    return known and len(rows) > 0 and not any(width * rows.element_size() % ALIGNMENT for width in widths)


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its expert: ``[N, A] x [E, A, B] -> [N, B]``.

    Parameters
    ----------
    rows : Tensor
        Sorted by expert.
    ends : Tensor [E], int32
        Where the rows of each expert end.
    """
    if has_kernel(rows, *weight.shape[1:]):
        out: Tensor = torch._grouped_mm(rows, weight, offs=ends)
        return out
    return torch.cat([part @ matrix for part, matrix in zip(_segments(rows, ends), weight.unbind(0), strict=True)])


def grouped_gradient(gradient: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Sum over each expert's rows of their outer products: ``[N, B], [N, A] -> [E, B, A]``; zero for no rows."""
    if not has_kernel(rows, gradient.shape[1], rows.shape[1]):
        parts = zip(_segments(gradient, ends), _segments(rows, ends), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])
    out: Tensor = torch._grouped_mm(gradient.t(), rows, offs=ends)
    if out.is_cuda and torch.cuda.get_device_capability(out.device)[0] >= BLACKWELL:
        # There the kernel leaves the gradient of an expert without rows as it finds the memory (pytorch #172439).
        out.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1), 0.0)
    return out


def product_flops(left: Sequence[int], right: Sequence[int]) -> int:
    """Work of ``torch._grouped_mm`` by the shapes of its factors: of either kind above."""
    return 2 * left[0] * left[1] * right[-1]


def _segments(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends[:-1].tolist())
