"""``tools/analyze_routing.py``: a page from traces, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helper import Finished, run_script
from routing_traces import megatron_trace

from shodh.moe.trace import VERSION


def record(step: int, layer: int) -> str:
    """Each regime at its own expert."""
    counts = {"channel": [64, 0], "porous": [0, 64]}
    values = {"v": VERSION, "step": step, "split": "train", "layer": layer, "rank": 0, "num_tokens": 128, "top_k": 1}
    return json.dumps({**values, "num_experts": 2, "counts": counts, "mean_score": [0.5, 0.5], "confidence": 0.9})


def traces(folder: Path) -> Path:
    (folder / "routing").mkdir(parents=True)
    lines = [record(step, layer) for step in range(30) for layer in range(2)]
    (folder / "routing" / "rank0.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tool(*arguments: str | Path) -> Finished:
    return run_script("tools/analyze_routing.py", *arguments)


def test_page_of_a_run_without_checkpoint(tmp_path: Path) -> None:
    finished = tool(traces(tmp_path / "run"), "--out", tmp_path / "out")
    assert finished.code == 0, finished.stderr
    assert finished.stdout.startswith("Specialised.") and finished.stderr == ""
    assert str(tmp_path / "out" / "index.html") in finished.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["verdict"] == "Specialised" and summary["title"] == "run: routing"
    assert summary["specialisation"]["layers"]["1"]["u"]["value"] == pytest.approx(1)
    assert "<h1>run: routing</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_bad_input_is_answered_in_one_line(tmp_path: Path) -> None:
    run = traces(tmp_path / "run")
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.mkdir()
    (broken / "rank0.jsonl").write_text(f"{record(0, 0)}\n{{\n{record(1, 0)}\n")
    for arguments, expected in (
        ([tmp_path / "absent"], "no such run folder"),
        ([broken], "rank0.jsonl, line 2: not a routing record"),
        ([run, "--split", "valid"], "no split 'valid'; it has train"),
        ([run, "--no-probe", "--checkpoint", "x"], "--no-probe contradicts --checkpoint"),
        ([run, "--probe-data", "heat"], "--probe-data 'heat': expected NAME=PATH"),
        ([run, "--probe-data", "heat=x", "--sections", "maps"], "--probe-data is read by the section fingerprint"),
        ([run, "--windows", "0"], "--windows 0: must be at least 1"),
        ([run, "--out", run / "routing" / "rank0.jsonl"], "is a file; name a folder"),
        ([run, "--checkpoint", "step_1"], "is not a run folder: it has no config.yaml"),
    ):
        finished = tool("--out", out, *arguments)
        assert finished.code == 2 and finished.stdout == ""
        (line,) = finished.stderr.splitlines()
        assert line.startswith("error: ") and expected in line
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["tools/analyze_routing.py", "launch/evaluate.py"])
def test_a_gpu_that_is_not_there(script: str, tmp_path: Path) -> None:
    run = traces(tmp_path / "run")
    (run / "latest").write_text("step_1\n")
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "checkpoints" / "step_1" / "manifest.json").write_text('{"files": {}, "state": {}, "topology": {}}')
    where = [run, "--out", tmp_path / "out"] if "analyze" in script else ["--run", run]
    finished = run_script(script, *where, "--device", "cuda")
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --device cuda") and "--device cpu" in line


def descending(chosen: list[int]) -> list[int]:
    return sorted(chosen, reverse=True)


def test_megatron_trace_that_is_sorted_says_nothing_of_first_choices(tmp_path: Path) -> None:
    """Made from a map of chosen experts, it has expert 7 never first and expert 0 always, and neither is so."""
    found, files = {}, {}
    for order in (list, sorted, descending):
        out = tmp_path / f"out-{order.__name__}"
        finished = tool(megatron_trace(tmp_path / order.__name__, order), "--out", out)
        assert finished.code == 0, finished.stderr
        found[order] = json.loads((out / "summary.json").read_text())
        files[order] = {p.stem for p in out.rglob("*") if "transitions" in p.name}
    assert files[list] and "transitions" in found[list]["structure"]
    for order in (sorted, descending):
        assert not files[order] and "transitions" not in found[order]["structure"]
        assert "which of them came first is unknown" in (tmp_path / f"out-{order.__name__}" / "index.html").read_text()
        # What needs only which experts were chosen is the same.
        for key in ("verdict", "load"):
            assert found[order][key] == found[list][key]
        assert found[order]["structure"]["co_activation"] == found[list]["structure"]["co_activation"]


def test_one_expert_a_token_is_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tool(megatron_trace(tmp_path / "run", sorted, top_k=1), "--out", out).code == 0
    assert "transitions" in json.loads((out / "summary.json").read_text())["structure"]
