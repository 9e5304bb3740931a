#!/usr/bin/env bash
# All benchmarks of the CUDA path in one call; see gpu_all.py.   bash tools/bench/gpu_all.sh OUT [--tiny] [--minutes 8]
# PYTHON chooses the interpreter (default: .venv/bin/python, or python3).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" tools/bench/gpu_all.py "$@"
