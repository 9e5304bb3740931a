"""Installation. The compiled kernels are optional: without a compiler, or without torch where the package is built, the
plain-torch reference serves, and ``python -m shodh.ops --build`` adds them later."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def kernels() -> tuple[list[Any], dict[str, Any]]:
    """``ext_modules`` and ``cmdclass``; the file is loaded by its path, because importing the package imports torch."""
    spec = importlib.util.spec_from_file_location("shodh_ops_build", ROOT / "shodh" / "ops" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    modules: tuple[list[Any], dict[str, Any]] = module.extension_modules()
    return modules


EXT_MODULES, CMDCLASS = kernels()
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "shodh" / "__init__.py").read_text())
assert VERSION is not None

REQUIRED = [
    "torch>=2.10",
    "deepspeed>=0.19.8,<0.20",
    "numpy>=1.26",
    "h5py>=3.10",
    "safetensors>=0.5",
    "huggingface_hub>=0.30",
    "pydantic>=2.7,<3",
    "pyyaml>=6.0",
    "tensorboard>=2.15",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "pandas>=2.2",
    "scipy>=1.11",
    "msgspec>=0.19",
    "scikit-learn>=1.4",
    "tqdm>=4.66",
]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "the-well>=1.2",
    "ruff>=0.8",
    "import-linter>=2.3",
    "mypy>=1.13",
    "types-PyYAML",
]

DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "mkdocs-jupyter>=0.25", "nbmake>=1.5", "ipykernel"]

# What tools/bench/peers.py compares with, and what solves four of its data sets.
PEERS = ["neuraloperator>=2.0", "the-well>=1.2", "pdetransformer>=0.1.11", "exponax>=0.2"]

setup(
    name="shodh",
    version=VERSION.group(1),
    description="Sparse multi-physics foundation models with exactly conserved mass",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    packages=find_packages(include=["shodh", "shodh.*"]),
    package_data={
        "shodh": ["presets/*/*.yaml", "presets/*/*.json"],
        "shodh.ops": ["csrc/*"],
        "shodh.report": ["*.j2"],
    },
    entry_points={"console_scripts": ["shodh = shodh.commands:main"]},
    ext_modules=EXT_MODULES,
    cmdclass=CMDCLASS,
    install_requires=REQUIRED,
    extras_require={
        "test": TEST,
        "images": ["tifffile>=2024.1"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "docs": DOCS,
        "peers": PEERS,
    },
)
