"""Importing the project imports no DeepSpeed, and the command line no torch; `make lint` checks who imports whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_configuration_and_command_line_need_no_torch() -> None:
    """Bad input is answered at once, and not after seconds of imports."""
    assert run("import sys, shodh.config, shodh.core.cli; print('torch' in sys.modules)") == "False"


def test_the_library_imports_no_deepspeed_and_its_twin_works_without() -> None:
    """Nor torch's compiler nor scipy.stats, which would cost every command seconds."""
    code = (
        "import sys, shodh, shodh.data, shodh.physics, shodh.ops, shodh.models.factory, shodh.moe.experts\n"
        "import shodh.moe.balance, shodh.moe.trace, shodh.train.jobs, shodh.evaluate.evaluation, shodh.report.page\n"
        "import shodh.checkpoint.pretrained, shodh.checkpoint.convert, shodh.routing, shodh.experiments.transfer.runs\n"
        "print([name for name in ('deepspeed', 'torch._dynamo', 'scipy.stats', 'sklearn') if name in sys.modules])\n"
        "sys.modules['deepspeed'] = None\n"
        "import torch\n"
        "from shodh.config import OperatorConfig\n"
        "from shodh.models.operator import LatentTransformer\n"
        "from shodh.models.init import initialise\n"
        "model = LatentTransformer(OperatorConfig(dim=16, heads=2, depth=1), 3, 2, (2, 2, 2), 1)\n"
        "initialise(model, 0)\n"
        "print(model(torch.zeros(1, 1, 3, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2)).latent.shape)"
    )
    assert run(code).splitlines() == ["[]", "torch.Size([1, 3, 2, 2, 2])"]
