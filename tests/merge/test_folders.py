"""Converted folders of real models, merged by the command a user types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from expert_weights import same_bits
from helper import Finished, run_script
from safetensors.torch import load_file

import shodh
from shodh.checkpoint.description import read_pretrained
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.weights import open_weights
from shodh.merge import lazy
from shodh.merge.experts import open_expert
from shodh.merge.folders import merge_experts, open_family
from shodh.merge.recipe import make_recipe

SCRIPT = "tools/merge_experts.py"
LOW, HIGH = 1.0e-5, 1.0e-3


class Family(NamedTuple):
    anchor: Path
    low: Path
    high: Path
    middle: Path


def place(value: Any) -> dict[str, Any]:
    return {"name": "vortices", "parameters": {"viscosity": value}}


@pytest.fixture(scope="session")
def family(make_folder: Callable[..., Path]) -> Family:
    anchor = make_folder("anchor", family=place([LOW, HIGH]))
    others = [
        make_folder(name, name, init_from=anchor, family=place(value))
        for name, value in (("low", LOW), ("high", HIGH), ("middle", 1.0e-4))
    ]
    return Family(anchor, *others)


def merge(family: Family, *arguments: Any) -> Finished:
    return run_script(SCRIPT, "--anchor", family.anchor, "--low", family.low, "--high", family.high, *arguments)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_weights(folder).items()}


def refused(finished: Finished, expected: str, out: Path) -> None:
    assert finished.code == 2 and finished.stdout == "", finished
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1, finished.stderr
    assert expected in finished.stderr
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def test_merged_model_is_the_expert_at_its_end(family: Family, tmp_path: Path) -> None:
    """Weights bit by bit, through the command and into `shodh.from_pretrained`."""
    finished = merge(family, "--alpha", "1", "--out", tmp_path / "out", "--json", tmp_path / "done.json")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    assert "shodh.from_pretrained" in finished.stdout and "alpha 1" in finished.stdout
    found, expert = tensors(tmp_path / "out"), tensors(family.high)
    assert found.keys() == expert.keys() and all(same_bits(found[name], expert[name]) for name in expert)
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["files"] == ["model.safetensors"] and done["tensors"] == len(expert)
    model, other = (shodh.from_pretrained(folder) for folder in (tmp_path / "out", family.high))
    fields, static = torch.randn(1, model.history, model.num_channels, *model.grid), torch.zeros(1, 1, *model.grid)
    assert torch.equal(*(m.predict(fields, static, model.regimes[0]) for m in (model, other)))


def test_merged_folder_says_how_it_was_made(family: Family, tmp_path: Path) -> None:
    """And is a source for whatever comes next: shards, the card, another merge."""
    out = tmp_path / "out"
    finished = merge(family, "--value", "1e-4", "--map", "log", "--out", out, "--max-shard-size", "50KB")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    description, _ = read_pretrained(out)
    merged, anchor = description.merge, read_pretrained(family.anchor)[0]
    assert merged is not None and merged["method"] == "compose"
    assert merged["coordinates"]["default"] == pytest.approx([0.0], abs=1e-14)
    assert merged["parameter"]["name"] == "viscosity" and merged["parameter"]["value"] == 1e-4
    assert merged["parameter"]["low"] == LOW and merged["parameter"]["scale"] == "log"
    assert merged["anchor"]["sha256"] == anchor.source.sha256 == description.source.init_from
    assert [e["sha256"] for e in merged["experts"]] == [
        read_pretrained(f)[0].source.sha256 for f in (family.low, family.high)
    ]
    card = (out / "README.md").read_text()
    assert len(list(out.glob("model-*.safetensors"))) > 3 and "Not trained: merged from the experts" in card
    low, high, found = tensors(family.low), tensors(family.high), tensors(out)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (low[name] + high[name]) / 2, rtol=1e-6, atol=1e-7)


def test_coordinates_by_layer_and_expert(family: Family, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "default: -1\nrules:\n  - {match: operator.blocks.1.*, alpha: 1}\n"
        "  - {match: operator.blocks.0.*.experts.*, experts: [2], alpha: 1}\n"
    )
    finished = merge(family, "--coordinates", rules, "--out", tmp_path / "out")
    assert finished.code == 0 and "2 rules" in finished.stdout, finished.stderr
    low, high, found = tensors(family.low), tensors(family.high), tensors(tmp_path / "out")
    for name, tensor in found.items():
        if name.startswith("operator.blocks.1."):
            assert torch.equal(tensor, high[name]), name
        elif ".experts." in name:
            assert torch.equal(tensor[2], high[name][2]) and torch.equal(tensor[:2], low[name][:2]), name
        else:
            assert torch.equal(tensor, low[name]), name
    merged = read_pretrained(tmp_path / "out")[0].merge
    assert merged is not None and merged["coordinates"]["rules"][1]["experts"] == [2]


@pytest.mark.parametrize("kind", ("piecewise", "polynomial"))
def test_a_curve_through_three_experts_reaches_the_middle_one(family: Family, tmp_path: Path, kind: str) -> None:
    arguments = ("--between", family.middle, "--value", "1e-4", "--map", "log", "--curve", kind)
    finished = merge(family, *arguments, "--out", tmp_path / "out")
    assert finished.code == 0, finished.stderr
    found, expert = tensors(tmp_path / "out"), tensors(family.middle)
    assert all(same_bits(found[name], expert[name]) for name in expert)


def test_a_plane_has_its_corners(family: Family, tmp_path: Path) -> None:
    corners = (family.low, family.high, family.middle, family.anchor)
    arguments = ("--anchor", family.anchor, "--any-anchor", "--corners", *corners, "--alpha", "1", "-1")
    finished = run_script(SCRIPT, *arguments, "--out", tmp_path / "out")
    assert finished.code == 0, finished.stderr
    found, expert = tensors(tmp_path / "out"), tensors(family.middle)
    assert all(same_bits(found[name], expert[name]) for name in expert)


@pytest.mark.parametrize("method", ("average", "task_arithmetic", "ties", "dare", "random_direction", "wrong_sign"))
def test_every_method_gives_a_model_that_loads(family: Family, tmp_path: Path, method: str) -> None:
    anchor, experts = open_family(family.anchor, [family.low, family.high])
    along = {"alpha": [0.4]} if method in ("random_direction", "wrong_sign") else {}
    merged = merge_experts(anchor, experts, make_recipe(experts, method, **along), tmp_path / "out")  # type: ignore[arg-type]
    assert merged.merge["method"] == method
    model = shodh.from_pretrained(tmp_path / "out")
    tokenizer = {n: t for n, t in tensors(tmp_path / "out").items() if n.startswith("tokenizer.")}
    assert all(torch.equal(t, tensors(family.anchor)[n]) for n, t in tokenizer.items())
    change = [
        float((p - tensors(family.anchor)[f"operator.{n}"]).abs().max()) for n, p in model.operator.named_parameters()
    ]
    assert max(change) > 1e-3
    if method == "wrong_sign":
        recipe = make_recipe(experts, alpha=[-0.4])
        merge_experts(anchor, experts, recipe, tmp_path / "other")
        assert all(torch.equal(t, tensors(tmp_path / "other")[n]) for n, t in tensors(tmp_path / "out").items())


def test_report_says_where_the_direction_lives(family: Family, tmp_path: Path) -> None:
    finished = merge(family, "--report", tmp_path / "report.json")
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    assert "routed experts" in finished.stdout and "operator.blocks.1 expert 3" in finished.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["components"]["tokenizer"]["direction_norm"] == 0.0
    assert len(report["experts"]) == 8
    # Every weight changed by as much: the share of the norm is the share of the weights that move.
    routed = report["components"]["routed experts"]
    moving = report["total"]["parameters"] - report["components"]["tokenizer"]["parameters"]
    assert routed["share_of_direction"] == pytest.approx(routed["parameters"] / moving, rel=0.05)


def test_reading_is_bounded_whatever_the_size(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a file that is read at once is longer than a block."""
    lengths: list[int] = []
    read = lazy.FileTensor.part

    def record(self: lazy.FileTensor, start: int, stop: int) -> torch.Tensor:
        lengths.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(lazy, "BLOCK", 128)
    monkeypatch.setattr(lazy.FileTensor, "part", record)
    anchor, experts = open_family(family.anchor, [family.low, family.high])
    merge_experts(anchor, experts, make_recipe(experts, alpha=[0.3]), tmp_path / "out")
    assert max(lengths) == 128
    whole = tensors(tmp_path / "out")
    assert len(lengths) > sum(t.numel() for t in whole.values()) / 128


# Bad input


def test_a_parameter_outside_the_range_warns_with_its_distance(family: Family, tmp_path: Path) -> None:
    finished = merge(family, "--value", "2e-3", "--map", "log", "--out", tmp_path / "out")
    assert finished.code == 0
    assert finished.stderr.startswith("WARNING: ")
    assert all(text in finished.stderr for text in ("viscosity", "0.002", "1e-05", "0.001", "0.151"))
    assert finished.stderr.count("\n") == 1


def test_experts_of_another_anchor_are_refused(
    family: Family, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_folder("other-anchor", "other")
    stranger = make_folder("stranger", "stranger", init_from=other)
    silent = make_folder("silent", "silent")
    out = tmp_path / "out"
    for high, flags, expected in (
        (stranger, (), "was fine-tuned from another checkpoint"),
        (stranger, ("--any-anchor",), "was fine-tuned from another checkpoint"),
        (silent, (), "say so with --any-anchor"),
    ):
        refused(merge(family._replace(high=high), "--alpha", "0", "--out", out, *flags), expected, out)
    finished = merge(family._replace(high=silent), "--alpha", "0", "--out", out, "--any-anchor")
    assert finished.code == 0, finished.stderr


def test_experts_of_another_model_are_refused(family: Family, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Also where no shape differs: the error names the setting."""
    out = tmp_path / "out"
    from_anchor = {"init_from": family.anchor}
    for name, settings, expected in (
        ("wider", {"operator": {"experts": {"hidden": 40}}}, "operator.experts.hidden is 40 and 32"),
        ("top-2", {"operator": {"experts": {"top_k": 2}}}, "differ in architecture: operator.experts.top_k is 2 and 1"),
        (
            "normal",
            {"mean": 0.5},
            "normalisation: constants.open_channel.tracer.mean is 0.5 and 0.0",
        ),
        ("half", {"dtype": "bf16"}, "differ in precision: dtype is bf16 and fp32"),
        ("foreign", {"family": {**place(1e-3), "name": "dams"}}, "family.name is dams and vortices"),
        ("latents", {"tokenizer": 1}, "have different tokenizers"),
    ):
        if name == "latents":
            folder = make_folder(name, name, init_from=family.anchor, tokenizer=1)
        else:
            folder = make_folder(name, name, **from_anchor, **settings)  # type: ignore[arg-type]
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            open_family(family.anchor, [family.low, folder])
        assert expected in str(caught.value), str(caught.value)
    refused(merge(family._replace(high=folder), "--alpha", "0", "--out", out), "have different tokenizers", out)


def test_how_it_was_trained_does_not_matter(family: Family, make_folder: Callable[..., Path]) -> None:
    operator = {"train": {"steps": 3, "lr": 1e-4}, "input_noise": 0.1, "experts": {"balance": {"switch": 0.5}}}
    folder = make_folder("elsewhere", "x", init_from=family.anchor, operator=operator)
    open_family(family.anchor, [family.low, folder])


def test_bad_recipes_are_refused(family: Family, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    nameless = open_expert(make_folder("nameless", "nameless", init_from=family.anchor))
    low, high, middle = (open_expert(path) for path in (family.low, family.high, family.middle))
    rules = tmp_path / "rules.yaml"
    rules.write_text("default: 0\nrules: [{match: nothing.*, alpha: 1}]\n")
    for experts, settings, expected in (
        ((low, high), {}, "where along the direction?"),
        ((low, high), {"value": 0.0, "scale": "log"}, "expected a positive number on a logarithmic scale"),
        ((low, high), {"value": 1e-4, "parameter": "density"}, "does not give a value of 'density'"),
        ((low, nameless), {"value": 1e-4}, "name the parameters of both experts with --range"),
        ((low, high), {"method": "ties", "alpha": [0.0]}, "method ties has no coordinate"),
        ((low, high), {"method": "ties", "density": 2.0}, "density 2: expected a share"),
        ((low, high), {"method": "task_arithmetic", "density": 0.5}, "task arithmetic has no density"),
        ((low, high), {"alpha": [0.0], "density": 0.5}, "method compose has no density"),
        ((low, high), {"coordinates": rules}, "no tensor matches 'nothing.*'"),
        ((low, nameless, high), {"value": 1e-4, "values": [None]}, "its configuration gives no viscosity"),
        ((low, middle, high), {"value": 1e-4, "values": [1.0]}, "does not lie between the experts"),
        ((low, middle, high), {"alpha": [0.1], "values": [None], "method": "random_direction"}, "for two experts"),
    ):
        anchor = open_expert(family.anchor)
        with pytest.raises(ConfigError) as caught:
            merge_experts(anchor, experts, make_recipe(experts, **settings), tmp_path / "out")  # type: ignore[arg-type]
        assert expected in str(caught.value), str(caught.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_sources_and_other_folders_are_not_overwritten(family: Family) -> None:
    anchor, experts = open_family(family.anchor, [family.low, family.high])
    recipe = make_recipe(experts, alpha=[0.0])
    with pytest.raises(CheckpointError, match="is one of the folders to be merged"):
        merge_experts(anchor, experts, recipe, family.low, overwrite=True)
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        merge_experts(anchor, experts, recipe, family.middle)


def test_bad_input_is_one_line_and_exit_code_two(family: Family, tmp_path: Path) -> None:
    out, cut = tmp_path / "out", tmp_path / "cut"
    cut.mkdir()
    for file in family.low.iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-7])
    to = ("--out", out)
    for experts, arguments, expected in (
        (family, (), "nothing to do"),
        (family, ("--alpha", "0", "--value", "1e-4", *to), "give one of them"),
        (family, ("--alpha", "0", "1", *to), "2 numbers; expected one"),
        (family, ("--between", f"{family.middle}=high", "--value", "1", *to), "expected DIR or DIR=VALUE"),
        (family, ("--alpha", "0", *to, "--max-shard-size", "5 parsec"), "must be like 5GB"),
        (family._replace(low=tmp_path / "absent"), ("--alpha", "0", *to), "is not a converted folder"),
        (family._replace(low=cut), ("--alpha", "0", *to), "is not a readable safetensors file"),
    ):
        refused(merge(experts, *arguments), expected, out)
    finished = run_script(SCRIPT, "--anchor", family.anchor, *to)
    assert finished.code == 2 and "give --low and --high" in finished.stderr


def test_help_has_examples() -> None:
    finished = run_script(SCRIPT, "--help")
    assert finished.code == 0 and "examples:" in finished.stdout and "shodh merge --anchor" in finished.stdout


def test_a_lone_converted_file_will_do(family: Family) -> None:
    expert = open_expert(family.low / "model.safetensors")
    assert expert.parameter(None) == ("viscosity", LOW) and expert.parameter("density") is None
    assert load_file(family.low / "model.safetensors").keys() == expert.weights.keys()
    assert open_expert(family.anchor).parameter(None) is None, "a range is not the place of one expert"
