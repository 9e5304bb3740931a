"""What a benchmark runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shodh.core.errors import ConfigError
from shodh.core.launcher import without_launcher
from shodh.core.reading import read_json

ROOT = Path(__file__).resolve().parents[2]


def read_status(name: str) -> int:
    """Bytes of memory of this process, from ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most so far."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def open_record(path: Path, arms: Mapping[str, str], **asked: Any) -> dict[str, Any]:
    """What a benchmark that goes on has in its file: ``runs`` of what is finished, and what it was asked.

    Raises
    ------
    ConfigError
        It was begun with other settings, or has an arm of this name with others.
    """
    record = read_json(path, "results") if path.exists() else {"asked": asked}
    begun = record.get("asked")
    for name, value in asked.items():
        if begun is None or begun.get(name) != value:
            what = (
                "does not say what it was begun with" if begun is None else f"was begun with {name} {begun.get(name)}"
            )
            raise ConfigError(f"{path} {what}, and is asked for {name} {value}; choose another --out")
    known = record.setdefault("arms", {})
    for name, changes in arms.items():
        if known.setdefault(name, changes) != changes:
            raise ConfigError(f"{path} has arm {name} with {known[name] or 'no changes'}; give this one another name")
    record.setdefault("runs", {})
    return record


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
