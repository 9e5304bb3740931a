"""Arrays that a user gives and gets back: NumPy or torch, of any floating type, on any device; float32 between."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shodh.core.errors import DataError

Array = TypeVar("Array", np.ndarray, Tensor)

_BITS16 = "bfloat16"  # NumPy knows it by an extension, as a type without a kind


def to_float32(values: Tensor | np.ndarray, what: str, device: torch.device, *, integers: bool = False) -> Tensor:
    """A float32 tensor on ``device``; the given array is left as it is.

    Parameters
    ----------
    integers : bool
        Whether integers and booleans are taken too (masks).

    Raises
    ------
    DataError
        It is no array, or not of numbers that are taken.
    """
    if isinstance(values, Tensor):
        floating, whole = values.is_floating_point(), not values.is_complex()
    elif isinstance(values, np.ndarray):
        floating, whole = values.dtype.kind == "f" or values.dtype.name == _BITS16, values.dtype.kind in "biu"
    else:
        raise DataError(f"{what} must be a NumPy array or a torch tensor, got {type(values).__name__}")
    if not (floating or (integers and whole)):
        raise DataError(
            f"{what} must hold floating-point numbers, got {values.dtype}; convert them, for example to float32"
        )
    if isinstance(values, Tensor):
        return values.detach().to(device, torch.float32)
    with np.errstate(over="ignore"):  # What float32 cannot hold is refused as infinite.
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C")).to(device)


def like(result: Tensor, given: Array) -> Array:
    """``result`` as NumPy or torch, and on the device, of what was given; float64 for float64, else float32."""
    if isinstance(given, Tensor):
        return result.to(given.device, torch.promote_types(given.dtype, torch.float32))
    array = result.cpu().numpy()
    return array.astype(np.float64) if given.dtype.kind == "f" and given.dtype.itemsize >= 8 else array
