"""Every configuration of the project is planned by its command, and every command starts on its own imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helper import ROOT, main_of

from shodh.experiments.composition.settings import CCMConfig
from shodh.experiments.harness.settings import Preset, load_settings
from shodh.experiments.transfer.map.settings import MapConfig
from shodh.experiments.transfer.settings import StudyConfig

SCALES = ("tiny", "small", "paper")
CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
STUDIES = [path for path in CONFIGS if path.name.startswith(("study_", "ccm_"))]
PLANS = [
    pytest.param(config, scale, marks=[] if scale == "tiny" or config.stem == "demo" else pytest.mark.exhaustive)
    for config in CONFIGS
    if not config.name.startswith("finetune_")  # It starts from a trained run; a test reads it.
    for scale in (SCALES if config in STUDIES else (None,))
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


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("config", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_defined_at_every_scale(config: Path, scale: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the exhaustive dry runs begin with, and cheap enough for every run of the tests."""
    monkeypatch.chdir(ROOT)
    kind = {"map": MapConfig, "ccm": CCMConfig}.get(
        yaml.safe_load(config.read_text()).get("kind", config.stem[:3]), StudyConfig
    )
    assert load_settings(kind, config, scale).name


# What all commands import, and nothing of the project; each then is a fork.
STARTS = """
import os, runpy, sys
from pathlib import Path

import matplotlib, numpy, pandas, torch

folder, *commands = sys.argv[1:]
for command in commands:
    if os.fork() == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(folder, f"{Path(command).stem}.{kind}"), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [command, "--help"]
        runpy.run_path(command, run_name="__main__")
    os.wait()
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each command says to ``--help``, started where nothing of the project is imported."""
    folder = tmp_path_factory.mktemp("started")
    code = [sys.executable, "-c", STARTS, folder, *COMMANDS]
    subprocess.run([str(part) for part in code], cwd=ROOT, check=True, timeout=240)
    return folder


@pytest.mark.exhaustive  # Half a minute of imports.
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_starts_where_nothing_of_the_project_is_imported(command: Path, started: Path) -> None:
    """Elsewhere commands are forks of a process that has imported everything (`helper.run_script`)."""
    out, err = (started / f"{command.stem}.{kind}" for kind in ("out", "err"))
    assert out.read_text().startswith("usage: "), err.read_text()
