#!/usr/bin/env python
"""In the place of ``python`` for launch/slurm/shodh.sbatch: ranks that end as ``ACT`` says, without torch."""

import os
import sys
import time
from pathlib import Path

from shodh.core import signals
from shodh.core.launcher import read_launch

signals.catch()
launch, act = read_launch(), os.environ.get("ACT", "show")
if launch.rank == 0:
    sys.stdout.write(f"{os.getcwd()} {' '.join(sys.argv[3:])} of {launch.world} {os.environ['OMP_NUM_THREADS']}")
    sys.stdout.write(f" by {launch.name} at {launch.address}\n")
    sys.stdout.flush()
code = 0
if act == "error of one":
    time.sleep(60 if launch.rank == 0 else 2)
    code = 2
elif act in ("stop", "stop and go on"):
    step = 0 if act == "stop" else int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if launch.rank == 0:
        signals.hold(f"run {step}")
    time.sleep(0.5)
    code = 0 if step == 5 else signals.STOPPED
elif act == "wait":
    Path(os.environ["READY"] + str(launch.rank)).touch()
    time.sleep(60)
signals.leave_code(code)
sys.exit(code)
