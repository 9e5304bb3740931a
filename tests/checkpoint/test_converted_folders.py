"""Whatever the project or DeepSpeed wrote becomes one folder, with the same bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helper import ROOT
from laboratory import Laboratory, Run
from safetensors.torch import load_file, save_file

import shodh
from shodh.checkpoint.convert import convert, parse_size, push_to_hub
from shodh.checkpoint.description import read_pretrained
from shodh.checkpoint.foreign.deepspeed_folder import read_deepspeed_folder
from shodh.checkpoint.weights import read_initial_weights
from shodh.core.errors import CheckpointError, ConfigError, DataError
from shodh.core.weights import INDEX, WEIGHTS
from shodh.evaluate.evaluation import open_run
from shodh.schema.space import Space

pytestmark = pytest.mark.distributed


def operator_of(folder: Path) -> dict[str, torch.Tensor]:
    _, tensors = read_pretrained(folder)
    return {n.removeprefix("operator."): t.read() for n, t in tensors.items() if n.startswith("operator.")}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_raw_folder_gives_the_weights_of_the_engine(
    stage: int, runs: Callable[..., Run], raw: Callable[..., Path], tmp_path: Path
) -> None:
    done = convert(raw(stage), tmp_path / "out", verify=True)
    assert done.files == [WEIGHTS] and not done.masters
    assert_equal(operator_of(tmp_path / "out"), load_file(runs(stage).checkpoint(2) / WEIGHTS))
    description, _ = read_pretrained(tmp_path / "out")
    assert description.source.step == 2 and description.source.name == "global_step2"


@pytest.mark.parametrize("stage", (1, 2))
def test_float32_masters_of_a_bf16_run_round_to_what_it_computed_with(
    stage: int, runs: Callable[..., Run], raw: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = runs(stage, "bf16").checkpoint(2)
    computed = {n: t.read() for n, t in read_deepspeed_folder(raw(stage, "bf16"), masters=False).tensors.items()}
    assert convert(checkpoint, tmp_path / "fp32", verify=True).masters
    assert not convert(checkpoint, tmp_path / "bf16", "bf16", verify=True).masters
    masters = operator_of(tmp_path / "fp32")
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values()), "more than bf16 can hold"
    assert_equal(masters, load_file(checkpoint / WEIGHTS))
    assert_equal(operator_of(tmp_path / "bf16"), computed)


@pytest.mark.parametrize("stage", (1, 3))
def test_universal_checkpoint(stage: int, runs: Callable[..., Run], raw: Callable[..., Path], tmp_path: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    universal = tmp_path / "universal"
    to_universal(
        SimpleNamespace(
            input_folder=str(raw(stage)),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
    run = runs(stage)
    convert(universal, tmp_path / "out", config_path=run.path / "config.yaml", verify=True)
    assert_equal(operator_of(tmp_path / "out"), load_file(run.checkpoint(2) / WEIGHTS))


def test_module_weights_serve_where_the_optimizer_files_are_gone(
    runs: Callable[..., Run], raw: Callable[..., Path], tmp_path: Path
) -> None:
    folder = raw(2, "bf16")
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    assert not convert(folder, tmp_path / "out", "bf16", verify=True).masters
    found = operator_of(tmp_path / "out")
    masters = load_file(runs(2, "bf16").checkpoint(2) / WEIGHTS)
    assert_equal(found, {name: masters[name].to(found[name].dtype) for name in masters})


def test_run_folder_checkpoint_and_lone_file_give_the_same(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = runs(1)
    sources = {"run": run.path, "checkpoint": run.checkpoint(2), "file": run.checkpoint(2) / WEIGHTS}
    outs = [tmp_path / name for name in sources]
    for out, source in zip(outs, sources.values(), strict=True):
        convert(source, out)
    for out in outs[1:]:
        assert_equal(load_file(out / WEIGHTS), load_file(outs[0] / WEIGHTS))
    convert(outs[0] / WEIGHTS, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (outs[0] / WEIGHTS).read_bytes()


def test_a_run_and_its_checkpoint_load_where_they_lie(runs: Callable[..., Run], tmp_path: Path) -> None:
    """As what is converted of them, with the same name; also when the run and its tokenizer are gone."""
    run, alone = runs(1), tmp_path / "anywhere" / "copy"
    convert(run.path, tmp_path / "out")
    shutil.copytree(run.checkpoint(2), alone)
    models = [shodh.from_pretrained(path) for path in (run.path, run.checkpoint(2), alone, tmp_path / "out")]
    draw = torch.Generator().manual_seed(0)
    fields = torch.randn(2, models[0].history, models[0].num_channels, *models[0].grid, generator=draw)
    static = (torch.rand(2, models[0].num_static, *models[0].grid, generator=draw) < 0.3).float()
    for regime in models[0].regimes:
        first, *others = (model.rollout(fields, static, regime, 2, exact=True) for model in models)
        assert all(torch.equal(first, other) for other in others)
    assert len({model.description.source.sha256 for model in models}) == 1
    assert len({model.space.checksum for model in models}) == 1
    assert {model.description.source.step for model in models} == {2}
    tokenizer = shodh.from_pretrained(Path(run.overrides[1].partition("=")[2]))
    assert tokenizer.operator is None and tokenizer.space == models[0].space
    assert torch.equal(*(m.encode(fields, static, m.regimes[0]) for m in (tokenizer, models[0])))


@pytest.mark.parametrize("file", ("model.safetensors", "tokenizer.safetensors", "config.json", "space.json"))
def test_a_damaged_checkpoint_is_named_by_everyone_who_reads_it(
    file: str, runs: Callable[..., Run], laboratory: Laboratory
) -> None:
    run = laboratory.copy(runs(1), f"damaged-{file}")
    path = run.checkpoint(2) / file
    content = bytearray(path.read_bytes())
    position = -2 if file.endswith("safetensors") else content.index(b'"version') + 10
    content[position] ^= 1
    path.unlink()  # The tokenizer's is linked.
    path.write_bytes(content)
    readers: list[Callable[[], object]] = [
        lambda: shodh.from_pretrained(run.path),
        lambda: open_run(run.path, None, torch.device("cpu")),
        lambda: read_initial_weights(run.checkpoint(2)),
    ]
    for reader in readers:
        with pytest.raises(CheckpointError, match=file):
            reader()


def test_weights_that_are_not_finite_are_named(runs: Callable[..., Run], tmp_path: Path) -> None:
    weights = load_file(runs(1).checkpoint(2) / WEIGHTS)
    weights["head.bias"][3] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", config_path=runs(1).path / "config.yaml")
    with pytest.raises(CheckpointError, match=r"operator\.head\.bias hold NaN"):
        shodh.from_pretrained(tmp_path / "out")


def test_shards_hold_at_most_the_limit_and_load_like_one_file(runs: Callable[..., Run], tmp_path: Path) -> None:
    one, many, back = (tmp_path / name for name in ("one", "many", "back"))
    convert(runs(1).path, one)
    done = convert(one, many, max_shard_size=100_000, verify=True)
    assert len(done.files) > 3 and not (many / WEIGHTS).exists()
    index = json.loads((many / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.bytes
    for name in done.files:
        tensors = load_file(many / name)
        size = sum(t.numel() * t.itemsize for t in tensors.values())
        assert size <= 100_000 or len(tensors) == 1
        assert tensors.keys() == {tensor for tensor, file in index["weight_map"].items() if file == name}
    convert(many, back)
    assert (back / WEIGHTS).read_bytes() == (one / WEIGHTS).read_bytes()


def test_tokenizer_alone(laboratory: Laboratory, tmp_path: Path) -> None:
    tokenizer = laboratory.load(laboratory.overrides("any", 1, 1)).tokenizer_dir
    convert(tokenizer, tmp_path / "out", verify=True)
    model = shodh.from_pretrained(tmp_path / "out")
    fields = torch.randn(1, 1, model.num_channels, *model.grid)
    static = torch.zeros(1, model.num_static, *model.grid)
    latents = model.encode(fields, static, "open_channel")
    assert model.decode(latents, static, "open_channel").shape == fields.shape
    with pytest.raises(CheckpointError, match="a tokenizer alone"):
        model.predict(fields, static, "open_channel")


def test_a_tokenizer_of_an_older_version_says_how_to_mend_it(runs: Callable[..., Run], tmp_path: Path) -> None:
    run = runs(1)
    old = tmp_path / "old"
    tokenizer = Path(run.overrides[1].partition("=")[2])
    shutil.copytree(tokenizer, old, ignore=shutil.ignore_patterns("latents"))
    (old / "manifest.json").unlink()
    content = {"weights": "tokenizer.safetensors", "normalizer": Space.load(old).normalizer.to_dict()}
    (old / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="domains.*--resume auto"):
        convert(run.path, tmp_path / "out", tokenizer=old)


def test_card_and_config_describe_the_model(runs: Callable[..., Run], laboratory: Laboratory, tmp_path: Path) -> None:
    run = laboratory.copy(runs(1), "measured")
    (run.path / "report").mkdir()
    measured = {"latent_mse": {"model": 0.125, "persistence": 0.5}}
    numbers = {"checkpoint": "step_00000002", "split": "test", "regimes": {"open_channel": measured}}
    (run.path / "report" / "metrics.json").write_text(json.dumps(numbers))
    convert(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "| open_channel | latent_mse | 0.125 | 0.5 |",
        "velocity (solenoidal vector)",
        "Apache-2.0",
        "## Limits",
        "conserves mass by construction",
    ):
        assert text in card
    description, _ = read_pretrained(tmp_path / "out")
    # The build ("+cu130") is not always part of the version that is installed.
    assert description.run["seed"] == 3
    assert description.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert description.parameters["active"] < description.parameters["total"]
    assert description.space.domains[0].boundary == ("periodic", "periodic", "wall")
    numbers["checkpoint"] = "step_00000001"
    (run.path / "report" / "metrics.json").write_text(json.dumps(numbers))
    convert(run.path, tmp_path / "other")
    assert "No numbers of" in (tmp_path / "other" / "README.md").read_text(), "numbers of another checkpoint"


def test_loads_and_predicts_in_a_process_without_deepspeed_and_extension(
    runs: Callable[..., Run], tmp_path: Path
) -> None:
    convert(runs(3).path, tmp_path / "out")
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import shodh\n"
        "assert 'torch' not in sys.modules\n"
        "import doctest, torch\n"
        "torch.set_num_threads(1)\n"
        "import shodh.ops.extension as extension, shodh.checkpoint.pretrained as pretrained\n"
        "extension.choose_implementation = lambda *a, **k: 'reference'\n"
        f"finder = doctest.DocTestFinder().find(pretrained.ShodhModel, globs={{'folder': {str(tmp_path / 'out')!r}}})\n"
        "runner = doctest.DocTestRunner()\n"
        "[runner.run(test) for test in finder]\n"
        "print(runner.summarize())"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "failed=0, attempted=6" in finished.stdout, finished.stdout


def test_saved_model_loads_with_the_same_outputs(runs: Callable[..., Run], tmp_path: Path) -> None:
    convert(runs(1).path, tmp_path / "out")
    model = shodh.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    again = shodh.from_pretrained(str(tmp_path / "saved"))
    draw = torch.Generator().manual_seed(0)
    fields = torch.randn(2, model.history, model.num_channels, *model.grid, generator=draw)
    static = torch.zeros(2, model.num_static, *model.grid)
    for regime in model.regimes:
        assert torch.equal(model.predict(fields, static, regime), again.predict(fields, static, regime))
    with pytest.raises(DataError, match="no regime 'plasma'; this model knows"):
        model.predict(fields, static, "plasma")
    with pytest.raises(DataError, match=r"fields must be \[batch, time, 4, 16, 16, 16\]"):
        model.predict(fields[..., :8], static, "open_channel")


def test_rollout_of_physical_fields_is_what_the_evaluation_computes(
    runs: Callable[..., Run], laboratory: Laboratory, tmp_path: Path
) -> None:
    """Decoded one-step prediction against the path through the run's own data set, normalisation and domain."""
    from shodh.schema.domain import add_walls, static_features

    run = runs(1)
    convert(run.path, tmp_path / "out")
    model = shodh.from_pretrained(tmp_path / "out")
    evaluator = open_run(run.path, None, torch.device("cpu"))
    for number, regime in enumerate(model.regimes):
        draw = torch.Generator().manual_seed(number)
        fields = torch.randn(1, model.history, model.num_channels, *model.grid, generator=draw)
        static = (torch.rand(1, model.num_static, *model.grid, generator=draw) < 0.3).float()
        normal = evaluator.regimes.space.normalizer.normalize(fields, regime, static)
        domain = evaluator.regimes.space.domains[number]
        geometry, tokenizer = add_walls(static, domain), evaluator.tokenizer
        unit = tokenizer.units([domain], [0], fields.device)
        assert 0.03 < float(unit[0, :3].max() / unit[0, :3].min()) ** -1 < 1, "components of different size"
        with torch.no_grad():
            latents = torch.stack([tokenizer.encode(normal[:, t], geometry, unit) for t in range(model.history)], 1)
            following = evaluator.operator(latents, static_features(geometry)).latent
            decoded = tokenizer.assemble(tokenizer.emit(following, geometry, unit), domain)
        expected = evaluator.regimes.space.normalizer.denormalize(decoded, regime, static)
        # Two ways to the same numbers: a library may order the sums of one of them differently.
        torch.testing.assert_close(model.predict(fields, static, regime), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1000", 1000), ("1.5kb", 1500)],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "5 parsec", "9" * 400])
def test_size_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="must be like 5GB"):
        parse_size(text)


def test_push_uploads_the_folder_or_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, exist_ok: bool) -> None:
            calls.append(repository)

        def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> str:
            if repo_id == "someone/else":
                raise PermissionError("403 Forbidden\nmore lines")
            calls.append((folder_path, repo_id))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push_to_hub(tmp_path, "me/model") == "https://hub/commit"
    assert calls == ["me/model", (tmp_path, "me/model")]
    with pytest.raises(CheckpointError, match="someone/else.*403 Forbidden"):
        push_to_hub(tmp_path, "someone/else")


def test_hub_model_is_downloaded_and_a_missing_one_is_one_line(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    convert(runs(1).path, tmp_path / "out")
    monkeypatch.setattr("shodh.checkpoint.pretrained.snapshot_download", lambda name, **_: str(tmp_path / "out"))
    assert shodh.from_pretrained("someone/model").regimes == ("open_channel", "porous_media")

    def absent(name: str, **_: Any) -> str:
        raise OSError("no such repository\nand more")

    monkeypatch.setattr("shodh.checkpoint.pretrained.snapshot_download", absent)
    with pytest.raises(CheckpointError, match="no such repository$"):
        shodh.from_pretrained("someone/model")
    for name in ("runs/nope", "./nope", "a/b/c", tmp_path / "nope"):
        with pytest.raises(CheckpointError, match=f"no such folder: {name}; expected a run"):
            shodh.from_pretrained(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder: out/nope"):
        shodh.from_pretrained("out/nope")


def test_what_cannot_be_evaluated_says_what_can(runs: Callable[..., Run], tmp_path: Path) -> None:
    run, device = runs(1), torch.device("cpu")
    convert(run.path, tmp_path / "out")
    with pytest.raises(ConfigError, match="is a converted folder; give the run .*shodh.from_pretrained"):
        open_run(tmp_path / "out", None, device)
    with pytest.raises(ConfigError, match="is a checkpoint; give its run, with --checkpoint step_00000002"):
        open_run(run.checkpoint(2), None, device)
    with pytest.raises(CheckpointError, match=r"has no checkpoint '10' \(there are \['step_00000002'"):
        open_run(run.path, "10", device)
    with pytest.raises(CheckpointError, match="is the run of a tokenizer; give the run of an operator"):
        open_run(Path(run.overrides[1].partition("=")[2]), None, device)


def test_integer_weights_are_refused(runs: Callable[..., Run], tmp_path: Path) -> None:
    weights = load_file(runs(1).checkpoint(2) / WEIGHTS)
    weights["head.bias"] = weights["head.bias"].long()
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="head.bias is torch.int64"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", config_path=runs(1).path / "config.yaml")
    assert not (tmp_path / "out").exists()
