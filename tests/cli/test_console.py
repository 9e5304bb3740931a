"""The console command ``shodh``: every subcommand, the scripts of the same functions, packaged configurations."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helper import command_of

from shodh.commands import COMMANDS, main, usage
from shodh.config import load_config
from shodh.core.errors import ConfigError
from shodh.core.presets import PRESETS, find_preset
from shodh.train.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")])


def shodh(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Exit code of ``shodh ARGV``."""
    monkeypatch.setattr(sys, "argv", ["shodh", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shodh(monkeypatch, name, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: shodh {name}" in text and f"\n  shodh {name} " in text
    assert f"\n  {name} " in usage()


def test_commands_are_modules_and_scripts_and_no_others() -> None:
    modules = {path.stem.replace("_", "-") for path in (ROOT / "shodh" / "commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)
    assert sorted(map(command_of, SCRIPTS)) == sorted(COMMANDS.keys() - {"launch"})  # which starts the others


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_a_script_is_a_few_lines_that_run_its_command_on_as_many_ranks(path: Path) -> None:
    text, name = path.read_text(), command_of(path)
    assert len(text.splitlines()) <= 8
    assert ("run_command(" in text) == COMMANDS[name].ranks
    assert callable(import_module(f"shodh.commands.{name.replace('-', '_')}").main)


def test_wrong_names_and_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shodh(monkeypatch, "pretran") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "did you mean 'pretrain'" in error
    assert shodh(monkeypatch) == 2 and "generate" in capsys.readouterr().out
    # DeepSpeed's launcher puts the rank before all other arguments of a module.
    assert shodh(monkeypatch, "--local_rank=1", "--version") == 0 and capsys.readouterr().out.startswith("shodh ")


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['shodh', '--help']\nfrom shodh.commands import main\ntry: main()\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


def test_nothing_changes_where_modules_are_found() -> None:
    changing = "sys." + "path"
    files = [p for folder in ("shodh", "launch", "tools", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    assert [str(path) for path in files if changing in path.read_text()] == []


def test_packaged_files_are_found_by_name_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for name in ("demo", "demo.yaml", "launch/configs/demo.yaml"):
        assert load_config(name).name == "demo"
    for name in ("ds_configs/zero2.json", "zero2"):
        assert make_plan(load_config("h100_single", [f"deepspeed={name}"])).stage.zero["stage"] == 2
    with pytest.raises(ConfigError, match="no packaged configuration of that name; they are .*demo, dpot_tiny"):
        load_config("dmeo")


def test_a_file_of_ones_own_goes_before_a_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "demo.yaml"
    own.write_text((ROOT / "launch/configs/demo.yaml").read_text().replace("name: demo", "name: mine"))
    assert load_config("demo.yaml").name == "mine" and load_config("demo").name == "demo"
    for path in (tmp_path / "runs" / "demo.yaml", Path("runs/demo.yaml"), Path("cpu.json"), tmp_path / "demo"):
        assert find_preset(path, "configs") == path, "neither another folder's, nor the other kind"


def test_every_file_of_the_tree_is_packaged() -> None:
    for kind, folder in (("configs", ROOT / "launch" / "configs"), ("ds_configs", ROOT / "ds_configs")):
        suffix = ".yaml" if kind == "configs" else ".json"
        expected = {path.name: path.read_text() for path in folder.glob(f"*{suffix}")}
        assert {path.name: path.read_text() for path in (PRESETS / kind).glob(f"*{suffix}")} == expected
        assert expected
