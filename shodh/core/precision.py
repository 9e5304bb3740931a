"""How exact products of float32 numbers are: IEEE single precision, wherever this project trains or measures.

By default cuDNN convolutions run in TF32 (10 bits of mantissa), and a user, apex or a launcher may allow it for matrix
products too. Nothing here can use it: what is float32 (all of an fp32 run; of a bf16 run the router, the tokenizer's
linear part and its potentials, every metric) is float32 because it must be, and the rest is bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Literal

import torch

log = logging.getLogger("shodh")

Precision = Literal["fp32", "bf16"]  # of what networks compute in
IEEE = "ieee"
OPERATIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


def float32_products() -> dict[str, str]:
    """Precision of float32 products by kind of operation, as torch names it: ``"ieee"``, ``"tf32"``, ``"bf16"``, or
    ``"none"`` where nothing was set."""
    return {name: attrgetter(name)(torch.backends).fp32_precision for name in OPERATIONS}


def _set(precisions: dict[str, str]) -> None:
    for name, precision in precisions.items():
        attrgetter(name)(torch.backends).fp32_precision = precision


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 products in single precision inside, and put back what the caller had set. Also a decorator."""
    before = float32_products()
    _set(dict.fromkeys(OPERATIONS, IEEE))
    try:
        yield
    finally:
        _set(before)


def keep_ieee() -> None:
    """Inside `ieee_float32`, set single precision again, with a line in the log, if a library has changed it."""
    changed = {name: precision for name, precision in float32_products().items() if precision != IEEE}
    if changed:
        log.warning("a library set float32 products to %s; they stay in single precision", changed)
        _set(dict.fromkeys(changed, IEEE))
