"""Versions, machine, command line and commit: what a run needs to explain itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shodh import __version__
from shodh.core.devices import uses_cuda
from shodh.core.launcher import read_launch
from shodh.core.precision import float32_products
from shodh.core.strict_json import write_json

PACKAGES = ("torch", "deepspeed", "numpy", "h5py", "safetensors", "pydantic")


@cache
def git_commit() -> str | None:
    """The commit of the source tree, with ``-dirty`` if it was changed; None outside a checkout. Asked once."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


@cache
def installed_version(package: str) -> str:
    """The version of a package, or ``missing``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


@cache
def processor() -> str:
    """The model of this machine's processor, or its architecture where it does not say."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def describe_environment() -> dict[str, Any]:
    """Versions, machine, command line and commit: what a run needs to explain itself."""
    return {
        "shodh": __version__,
        "commit": git_commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if uses_cuda() else processor(),
        "float32_products": float32_products(),
        "world_size": read_launch().world,
        "launcher": read_launch().name,
    }


def write_record(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what was measured as JSON, with the day and `describe_environment` of now; None: nowhere."""
    if path is not None:
        now = {"date": time.strftime("%Y-%m-%d"), "env": describe_environment()}
        write_json(path, {**now, **content, **now})
