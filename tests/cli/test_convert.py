"""tools/convert_checkpoint.py as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helper import run_script
from safetensors.torch import save_file

from shodh.checkpoint.run_files import write_tokenizer
from shodh.config import dump_config, load_config
from shodh.core.weights import expected_shapes
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

SCRIPT = "tools/convert_checkpoint.py"


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """Folders of a run and its tokenizer, never trained, as far as the command looks at them; returns the weights."""
    config = load_config(write_config(tmp_path / "tiny.yaml"))
    operator, tokenizer = build_operator(config), build_tokenizer(config)
    for folder, model, name in (
        (config.run_dir, operator, "model.safetensors"),
        (config.tokenizer_dir, tokenizer, "tokenizer.safetensors"),
    ):
        initialise(model, 0)
        folder.mkdir(parents=True)
        state = model.state_dict()
        save_file({n: state[n].contiguous() for n in expected_shapes(model)}, folder / name)
        (folder / "config.yaml").write_text(dump_config(config))
    fields = [f.build() for f in config.data.fields]
    names = [r.name for r in config.data.regimes]
    constants = {name: {f.name: (0.0, 1.0) for f in fields if not f.static} for name in names}
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
    space = Space.of(FieldNormalizer(fields, 3, constants), fields, dict.fromkeys(names, domain))
    write_tokenizer(config.tokenizer_dir, config, space, tokenizer.state_dict())
    return config.run_dir / "model.safetensors"


def test_converts_and_says_what_it_did(run: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "done.json"
    finished = run_script(
        SCRIPT, run, out, "--dtype", "bf16", "--max-shard-size", "100KB", "--verify", "--json", report
    )
    assert finished.code == 0, finished.stderr
    assert "verified bit by bit" in finished.stdout and "shodh.from_pretrained" in finished.stdout
    assert finished.stderr == "", "no progress bar where nobody looks"
    done = json.loads(report.read_text())
    assert done["dtype"] == "bf16" and done["verified"] and all((out / name).is_file() for name in done["files"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(done["files"])


def test_bad_input_is_one_line_and_exit_code_two(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torch.save({"a": 1}, tmp_path / "a.pt")
    run.with_name("cut.safetensors").write_bytes(run.read_bytes()[:-9])
    for arguments, expected in (
        ((tmp_path / "absent", out), "absent does not exist"),
        ((run.with_name("cut.safetensors"), out), "cut.safetensors is not a readable safetensors file"),
        ((run, out, "--max-shard-size", "5 parsec"), "must be like 5GB"),
        ((run, out, "--tokenizer", tmp_path), "no trained tokenizer in"),
        ((run, out, "--tag", "x"), "--tag chooses a checkpoint of a run folder"),
        ((run, tmp_path / "runs"), "runs exists"),
        ((tmp_path / "a.pt", out, "--config", tmp_path / "tiny.yaml"), "a.pt is not a run folder"),
    ):
        finished = run_script(SCRIPT, *arguments)
        assert finished.code == 2 and finished.stdout == ""
        assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1, finished.stderr
        assert expected in finished.stderr
        assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_help_has_examples() -> None:
    finished = run_script(SCRIPT, "--help")
    assert finished.code == 0 and "examples:" in finished.stdout and "shodh convert runs/demo" in finished.stdout
