"""The tool that does to a run what a cluster does finds the undisturbed run's bits in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helper import ON_CPU, ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_of_every_kind_leave_the_same_run() -> None:
    command = [sys.executable, "tools/bench/faults.py", "--faults", "8", "--ranks", "2", "--steps", "60", "--seed", "1"]
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ON_CPU}, timeout=900
    )
    result = json.loads(finished.stdout.splitlines()[-1])
    assert sum(result["faults"].values()) == 8 and result["runs"] >= 1
    assert (result["different"], result["ended_otherwise"], result["ended_unasked"]) == ([], [], {}), finished.stderr
    assert finished.returncode == 0
