"""Command-line tests share the fork server of the distributed tests, and the traces of those of the analysis."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("distributed", "analysis")]
