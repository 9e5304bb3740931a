"""What is said of cells that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh.study.runner import what_ended


@pytest.mark.parametrize(
    ("code", "expected"),
    [(-11, "killed by SIGSEGV"), (-9, "killed by SIGKILL"), (2, "error: no data (exit code 2)")],
)
def test_a_failed_cell_is_told_by_its_error_or_its_signal(tmp_path: Path, code: int, expected: str) -> None:
    log = tmp_path / "cell.log"
    log.write_text("step 1: loss 1\nerror: no data\nvalidation at step 2: 0.9\n")
    assert what_ended(code, log) == expected
