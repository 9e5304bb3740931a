"""Conserved quantities: what the mean and the mean square of a field have changed by.

The mean over the cells where a field exists is its mass (of a scalar) or momentum (of a velocity), the mean square its
energy or the variance of a tracer. Whether the true flow conserves them is read from the truth, which is measured the
same way: a model should drift as the truth does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shodh.schema.measures import Truth


def drifts(before: Truth, after: Truth, zero: float) -> dict[str, Tensor]:
    """Changes of one field in physical units, relative to its size before: ``[B]`` each.

    ``drift_mean``: length of the change of the mean over the root mean square before; ``drift_square``: change of the
    mean square over that before. NaN of a field that was zero.

    Parameters
    ----------
    before, after : Truth
        In model units.
    zero : float
        What a physical zero is in them.
    """
    size, now = (moments.square(zero).sum(1) for moments in (before, after))
    at_rest = size < torch.finfo(size.dtype).tiny
    size = torch.where(at_rest, torch.nan, size)
    moved = (after.mean - before.mean).square().sum(1)
    return {"drift_mean": (moved / size).sqrt(), "drift_square": (now - size).abs() / size}
