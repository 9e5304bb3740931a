"""Every configuration of the project is planned by its command, and every command starts in a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helper import ROOT, main_of

SCALES = ("tiny", "small", "paper")
PLANS = [
    (config, scale)
    for config in sorted((ROOT / "launch" / "configs").glob("*.yaml"))
    if not config.name.startswith("finetune_")  # It starts from a trained run; a test reads it.
    for scale in (SCALES if config.name.startswith(("study_", "ccm_")) else (None,))
]
COMMANDS = sorted(path.relative_to(ROOT) for room in ("launch", "tools") for path in (ROOT / room).glob("*.py"))


@pytest.mark.parametrize(("config", "scale"), PLANS, ids=lambda value: getattr(value, "stem", value))
def test_configuration_is_dry_run(
    config: Path, scale: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    script = {"study": "launch/study.py", "ccm": "launch/ccm.py"}.get(config.name.split("_")[0], "launch/pretrain.py")
    arguments = ["--config", str(config), *(["--scale", scale] if scale else []), "--dry-run"]
    assert main_of(script)(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_starts_in_a_new_interpreter(command: Path) -> None:
    """Elsewhere commands are forks of a process that has imported everything (`helper.run_script`)."""
    finished = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0 and finished.stdout.startswith("usage: "), finished.stderr
