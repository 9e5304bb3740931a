"""What a benchmark runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shodh.core.launcher import without_launcher

ROOT = Path(__file__).resolve().parents[2]


def read_status(name: str) -> int:
    """Bytes of memory of this process, from ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most so far."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def call(script: str, *arguments: str | Path) -> None:
    """Run a command of the project; ends with its errors where it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *arguments], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, arguments))}: exit code {done.returncode}")


def answer_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """The last line that a Python command prints, which is JSON: a measurement that others would disturb."""
    where = {**without_launcher(os.environ), **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
