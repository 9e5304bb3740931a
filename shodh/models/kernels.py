"""Fused kernels where they are found: NVIDIA's apex, else torch's own. The log says which one runs.

PyPI's ``apex`` is an unrelated web toolkit that raises on import; only NVIDIA's, built from source, is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from shodh.core.devices import uses_cuda
from shodh.core.errors import ExtensionError

Kernels = Literal["auto", "torch", "apex"]


def apex_attribute(module: str, name: str) -> Any | None:
    """``getattr(apex.<module>, name)``, or None where NVIDIA's apex is missing, broken or not NVIDIA's."""
    if importlib.util.find_spec("apex") is None:
        return None
    try:
        return getattr(importlib.import_module(f"apex.{module}"), name, None)
    except Exception:  # A foreign or half-built apex raises anything at all; torch serves instead.
        return None


def _use_apex(kernels: Kernels, found: Any | None, what: str) -> bool:
    if kernels == "apex" and found is None:
        raise ExtensionError(
            f"kernels: apex, but NVIDIA's apex with {what} is not installed; build it from NVIDIA's source "
            "(not PyPI's package of that name), or set kernels: auto"
        )
    return found is not None and (kernels == "apex" or (kernels == "auto" and uses_cuda()))


def rms_norm(dim: int, kernels: Kernels = "torch") -> nn.Module:
    """An RMSNorm module over the last axis: apex's fused one or torch's; same parameter name, ``weight``."""
    fused = apex_attribute("normalization", "FusedRMSNorm")
    if _use_apex(kernels, fused, "FusedRMSNorm"):
        assert fused is not None
        module: nn.Module = fused(dim, eps=1e-6)
        return module
    return nn.RMSNorm(dim, eps=1e-6)


def adamw(groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], kernels: Kernels = "auto") -> Any:
    """AdamW over parameter groups: apex's fused one where asked for, else torch's fused one (CPU and CUDA)."""
    fused = apex_attribute("optimizers", "FusedAdam")
    if _use_apex(kernels, fused, "FusedAdam"):
        assert fused is not None
        return fused(list(groups), lr=lr, betas=betas, adam_w_mode=True)
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, fused=True)


def describe_kernels(kernels: Kernels) -> str:
    """One line for the log: which norm and optimiser run."""
    norm = "apex" if _use_apex(kernels, apex_attribute("normalization", "FusedRMSNorm"), "FusedRMSNorm") else "torch"
    adam = "apex" if _use_apex(kernels, apex_attribute("optimizers", "FusedAdam"), "FusedAdam") else "torch"
    return f"RMSNorm: {norm}, AdamW: {adam}"
