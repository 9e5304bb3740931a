"""How much of a device a run uses: work a second, the share of what a matrix product reaches there, and energy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import cached_property

import torch

from shodh.config import RunConfig
from shodh.models.factory import operator_space
from shodh.train.rehearsal import rehearse_operator, rehearse_tokenizer

log = logging.getLogger("shodh")

SIDE, PRODUCTS = 8192, 10  # of the matrices whose product is the measure of a card


def product_rate(dtype: torch.dtype, device: torch.device, side: int = SIDE, products: int = PRODUCTS) -> float:
    """Floating-point operations a second of a large matrix product, as this device computes it now."""
    draw = torch.Generator(device).manual_seed(0)  # Zeros would cost less power than a run, and be faster.
    left, right = (torch.randn(side, side, generator=draw, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        left @ right
    wait()
    start = time.perf_counter()
    for _ in range(products):
        left @ right
    wait()
    return products * 2 * side**3 / (time.perf_counter() - start)


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """What reads the joules that a card has used since its driver was loaded; None on a CPU.

    Not a number where nobody tells: it takes NVML, by the package ``nvidia-ml-py``, which nothing requires.
    """
    if device.type != "cuda":
        return None

    try:
        import pynvml

        pynvml.nvmlInit()
        # By its name: NVML numbers all cards of the machine, CUDA those that a process may see.
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # No NVML, or another package of that name.
        return lambda: math.nan

    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3
        except Exception:  # An old card or driver, or a share of a card.
            return math.nan

    return read


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return "".join(str(error).strip().splitlines()[:1])


class Throughput:
    """Of a training stage; its work is what the model needs, not what checkpointing computes again.

    Parameters
    ----------
    of_tokenizer : bool
        Whether the tokenizer is trained, or the operator.
    """

    def __init__(self, config: RunConfig, world: int, device: torch.device, of_tokenizer: bool) -> None:
        self._config, self._world, self._device, self._of_tokenizer = config, world, device, of_tokenizer

    @cached_property
    def flops(self) -> int:
        """Forward and backward of a sample; 0 where a step cannot be rehearsed."""
        operator = self._config.operator.model_copy(update={"activation_checkpointing": False})
        config = self._config.model_copy(update={"operator": operator})
        try:
            return (rehearse_tokenizer if self._of_tokenizer else rehearse_operator)(config, 1).flops
        except (NotImplementedError, RuntimeError) as error:  # A metric must not end a run.
            log.warning("no perf/tflops is reported: %s", _reason(error))
            return 0

    @cached_property
    def rate(self) -> float:
        """Of a matrix product on a card, in the precision of the run; 0 where it cannot be measured."""
        train = (self._config.tokenizer if self._of_tokenizer else self._config.operator).train
        try:
            rate = product_rate(torch.bfloat16 if train.precision == "bf16" else torch.float32, self._device)
            if not 0 < rate < math.inf:
                raise ArithmeticError(f"a {train.precision} product reaches {rate:g} FLOP/s")
        except (RuntimeError, ArithmeticError) as error:  # Out of memory, for one: a metric must not end a run.
            log.warning("no perf/mfu is reported: %s", _reason(error))
            return 0.0
        log.info("a %s product reaches %.0f TFLOP/s here; perf/mfu is relative to it", train.precision, rate / 1e12)
        return rate

    @cached_property
    def _tokens(self) -> int:
        """Of a sample, in every unrolled step; a tokenizer and convolutions have none."""
        operator = self._config.operator
        if self._of_tokenizer or operator.kind in ("fno", "unet"):
            return 0
        return operator.unroll.steps * math.prod(n // operator.patch for n in operator_space(self._config).grid)

    def of(self, samples_per_s: float) -> dict[str, float]:
        """``perf/tflops`` a rank, ``perf/mfu`` on cards, ``perf/tokens_per_s``, of samples a second of all ranks."""
        found: dict[str, float] = {}
        if self._tokens:
            found["perf/tokens_per_s"] = samples_per_s * self._tokens
        if self.flops:
            achieved = samples_per_s * self.flops / self._world
            found["perf/tflops"] = achieved / 1e12
            if self._device.type == "cuda" and self.rate:
                found["perf/mfu"] = achieved / self.rate
        return found
