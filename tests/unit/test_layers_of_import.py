"""Lower packages import no higher ones, and importing the project imports no DeepSpeed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Room -> floor. A file imports from lower floors, or from its own room; rooms of one floor do not know each other.
FLOORS = {
    "errors": 1,
    "base": 2,  # fields, config, topology, seeding, cli, distributed, weights, pickles: the files beside errors.py
    "ops": 2,
    "physics": 3,
    "data": 3,
    "moe": 3,
    "merge": 3,
    "models": 4,
    "generation": 4,
    "checkpoint": 5,
    "train": 6,
    "analysis": 7,
    "exchange": 7,
    "study": 8,
    "ccm": 8,
    "launch": 9,
    "tools": 9,
}


def room_of(parts: tuple[str, ...]) -> str:
    """Room of a module such as ``("shodh", "moe", "router")``, or of a script below ``launch`` or ``tools``."""
    if parts[0] != "shodh":
        return parts[0]
    if len(parts) == 1 or parts[1] == "errors":
        return "errors"
    return parts[1] if parts[1] in FLOORS else "base"


def imports_of(path: Path, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of the project that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            # "from shodh import data" imports a module too.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "shodh" else [module]
        else:
            continue
        found |= {tuple(name.split(".")) for name in names if name.split(".")[0] in ("shodh", "launch", "tools")}
    return found - {("shodh", "__version__")}


def violations(root: Path) -> list[str]:
    found = []
    for top in ("shodh", "launch", "tools"):
        for path in sorted((root / top).rglob("*.py")):
            module = path.relative_to(root).with_suffix("").parts
            room = room_of(module)
            for imported in sorted(imports_of(path, module[:-1])):
                other = room_of(imported)
                if other != room and FLOORS[other] >= FLOORS[room]:
                    found.append(f"{path.relative_to(root)} imports {'.'.join(imported)}")
    return found


def test_lower_packages_import_no_higher_ones() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("shodh/moe/x.py", "from shodh.models.blocks import Block"),
        ("shodh/data/x.py", "import shodh.physics"),
        ("shodh/config.py", "def f():\n    from shodh.train import jobs"),
        ("shodh/fields.py", "from . import data"),
        ("shodh/models/x.py", "from ..train.losses import vrmse"),
        ("shodh/ops/x.py", "from shodh import moe"),
    ],
)
def test_a_forbidden_import_would_be_found(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert len(violations(tmp_path)) == 1


def run(code: str) -> str:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_the_project_imports_no_deepspeed() -> None:
    modules = (
        "shodh, shodh.data, shodh.physics, shodh.ops, shodh.models.factory, shodh.moe.experts, shodh.moe.balance, "
        "shodh.moe.trace, shodh.train.jobs, shodh.train.evaluation, shodh.analysis, shodh.models.pretrained, "
        "shodh.exchange.convert"
    )
    assert run(f"import sys, {modules}; print('deepspeed' in sys.modules)") == "False"


def test_configuration_and_command_line_need_no_torch() -> None:
    """Bad input is answered at once, and not after seconds of imports."""
    assert run("import sys, shodh.config, shodh.cli; print('torch' in sys.modules)") == "False"


def test_twin_works_where_deepspeed_is_not_installed() -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import torch\n"
        "from shodh.config import OperatorConfig\n"
        "from shodh.models.operator import LatentTransformer\n"
        "from shodh.models.init import initialise\n"
        "model = LatentTransformer(OperatorConfig(dim=16, heads=2, depth=1), 3, 2, (2, 2, 2), 1)\n"
        "initialise(model, 0)\n"
        "print(model(torch.zeros(1, 1, 3, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2)).latent.shape)"
    )
    assert run(code) == "torch.Size([1, 3, 2, 2, 2])"
