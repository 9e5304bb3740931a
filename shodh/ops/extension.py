"""Which back ends of the decode are built here, and why not."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from shodh.core.errors import ExtensionError
from shodh.ops import build, library

IMPLEMENTATIONS = ("reference", "cpp", "cuda")
_BACKENDS = {"cpp": "cpu", "cuda": "cuda"}


@cache
def unavailable_reason(implementation: str) -> str | None:
    """Load the shared library of ``"cpp"`` or ``"cuda"`` once; None if it serves, else why it does not."""
    backend = _BACKENDS[implementation]
    path = build.library_path(backend)
    reason = None
    if not path.exists():
        reason = f"{path.name} is not built"
    else:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            reason = f"{path.name} cannot be loaded ({str(error).splitlines()[0]}); build it again"
    if not library.is_compiled(backend.upper()):
        library.register_fallback(backend.upper())
    return reason


def load() -> None:
    """Load whatever is built, so that the operators exist on both devices."""
    for implementation in _BACKENDS:
        unavailable_reason(implementation)


def choose_implementation(device_type: str, dtype: torch.dtype) -> str:
    """The fastest implementation built for a device; says once why it is only the reference."""
    fastest = {"cpu": "cpp", "cuda": "cuda"}.get(device_type)
    if fastest is None or dtype.itemsize < 2:
        return "reference"
    if unavailable_reason(fastest) is None:
        return fastest
    _warn_once(fastest)
    return "reference"


# What torch.compiler.assume_constant_result does, which would import the compiler: three seconds of every command.
choose_implementation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _warn_once(implementation: str) -> None:
    reason = unavailable_reason(implementation)
    warnings.warn(
        f"shodh.ops decodes in plain torch, which is slower: {reason}; {build.HINT}",
        RuntimeWarning,
        stacklevel=4,
    )


def require_implementation(implementation: str, device_type: str, dtype: torch.dtype) -> None:
    """Refuse an implementation that was asked for by name and cannot serve.

    Raises
    ------
    ValueError
        An unknown name, or tensors on another device than it works on.
    TypeError
        A dtype that it does not store.
    ExtensionError
        It is not built, or cannot be loaded.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"expected implementation to be None or one of {IMPLEMENTATIONS}, given {implementation!r}")
    if implementation == "reference":
        return
    backend = _BACKENDS[implementation]
    if device_type != backend:
        raise ValueError(f"implementation {implementation!r} needs tensors on {backend}, given {device_type}")
    if dtype.itemsize < 2:
        raise TypeError(
            f"implementation {implementation!r} stores float16, bfloat16, float32 or float64, given {dtype}"
        )
    reason = unavailable_reason(implementation)
    if reason is not None:
        raise ExtensionError(f"implementation {implementation!r} was asked for, but {reason}; {build.HINT}")
