"""Bad input: one line that says what to do, exit code 2, nothing lost, no rank left hanging."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helper import ON_CPU, ROOT, Finished, free_port, run_script

from shodh.checkpoint.run_files import write_tokenizer
from shodh.config import load_config
from shodh.core.cli import run_main
from shodh.core.weights import expected_shapes
from shodh.models.factory import build_tokenizer
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

PRETRAIN, TOKENIZER = "launch/pretrain.py", "launch/train_tokenizer.py"


def assert_one_line(finished: Finished, *expected: str) -> str:
    """Exit code 2 and one ``error:`` line with these texts; returns it."""
    lines = [line for line in finished.stderr.splitlines() if "error:" in line]
    assert finished.code == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
    for text in expected:
        assert text in lines[0]
    assert finished.stdout == ""
    return lines[0]


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the runs of `config` go."""
    return tmp_path / "runs"


@pytest.mark.parametrize("script", [PRETRAIN, TOKENIZER])
def test_typo_in_the_configuration(script: str, config: Path, out: Path) -> None:
    config.write_text(config.read_text().replace("global_batch", "globl_batch"))
    assert_one_line(run_script(script, "--config", config), "globl_batch", "did you mean 'global_batch'?", str(config))
    assert not out.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["operator.depht=3"], ["unknown key 'operator.depht'", "did you mean 'depth'?"]),
        (["operator.depth"], ["--set 'operator.depth'", "expected key=value"]),
        (["data.regimes.7.path=x"], ["--set", "no such place"]),
        (["operator.train.lr=[1"], ["--set", "not valid YAML"]),
        (["data.grid=[16, 16, 20]"], ["data.grid [16, 16, 20]", "divides axes by 8", "[20]"]),
        (["parallel.ep_size=2"], ["ep_size=2 needs at least 2 ranks", "'deepspeed --num_gpus 2 ...'"]),
        (["parallel.ep_size=3"], ["ep_size=3 needs at least 3 ranks"]),
        (["operator.train.micro_batch=3"], ["micro_batch=3", "use micro_batch in [1, 2, 4, 8]"]),
        (["deepspeed=absent.json"], ["cannot read DeepSpeed configuration absent.json"]),
        (["operator.experts.num_experts=3"], ["num_experts=3 is not divisible by router.groups=2"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_setting_that_cannot_be_used(overrides: list[str], expected: list[str], config: Path, out: Path) -> None:
    assert_one_line(run_script(PRETRAIN, "--config", config, "--set", *overrides), *expected)
    assert not out.exists()


def test_number_of_experts_that_the_ranks_cannot_share(config: Path, out: Path) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    settings = ["parallel.ep_size=4", "operator.experts.num_experts=6"]
    finished = run_script(PRETRAIN, "--config", config, "--set", *settings, environment=ranks)
    assert_one_line(finished, "num_experts=6 is not divisible by ep_size=4", "use parallel.ep_size in [1, 2]")
    assert not out.exists()


def test_configuration_that_is_missing_or_no_yaml(tmp_path: Path, config: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert_one_line(run_script(PRETRAIN, "--config", absent), f"cannot read configuration {absent}")
    config.write_text("name: [tiny")
    assert_one_line(run_script(PRETRAIN, "--config", config), f"{config} is not valid YAML")


def test_missing_data(config: Path, tmp_path: Path) -> None:
    settings = [f"data.regimes.1.path={tmp_path / 'nowhere'}"]
    assert_one_line(
        run_script(TOKENIZER, "--config", config, "--set", *settings), f"{tmp_path / 'nowhere'} does not exist"
    )


def test_history_of_the_operator_is_checked_before_the_tokenizer_is_trained(config: Path, out: Path) -> None:
    line = assert_one_line(
        run_script(TOKENIZER, "--config", config, "--set", "data.history=6"), "no window of 7 frames"
    )
    assert "data.history=6" in line and not list(out.rglob("*.safetensors"))


def test_unrolled_steps_that_no_trajectory_holds_are_refused_before_anything_is_encoded(
    config: Path, tokenizer_folder: Callable[..., Path]
) -> None:
    folder = tokenizer_folder("seed=3")
    settings = [f"tokenizer.run={folder}", "operator.unroll.steps=5"]
    line = assert_one_line(run_script(PRETRAIN, "--config", config, "--set", *settings), "no window of 7 frames")
    assert "operator.unroll.steps=5" in line and not (folder / "latents").exists()


def test_data_of_another_grid(config: Path, tiny_data: Path) -> None:
    line = assert_one_line(run_script(TOKENIZER, "--config", config, "--set", "data.grid=[32, 16, 16]"))
    assert "[16, 16, 16]" in line and "[32, 16, 16]" in line and "--set data.grid=" in line and str(tiny_data) in line


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_data_file_is_named(damage: str, config: Path, tiny_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_data / "porous_media", copy)
    victim = next((copy / "data" / "train").glob("*.hdf5"))
    victim.write_bytes(victim.read_bytes()[:5000] if damage == "truncated" else b"not HDF5")
    settings = [f"data.regimes.1.path={copy}"]
    assert_one_line(run_script(TOKENIZER, "--config", config, "--set", *settings), str(victim))


def test_field_that_the_data_do_not_have(config: Path) -> None:
    settings = ["data.fields=[{name: velocity, kind: vector, solenoidal: true}, {name: pressure}]"]
    assert_one_line(run_script(TOKENIZER, "--config", config, "--set", *settings), "pressure")


def test_tokenizer_that_was_never_trained(config: Path, out: Path) -> None:
    line = assert_one_line(run_script(PRETRAIN, "--config", config), "no trained tokenizer in")
    assert "deepspeed launch/train_tokenizer.py" in line and f"--set tokenizer.run={out}/OLD-tokenizer" in line
    assert not (out / "tiny").exists()


@pytest.fixture
def tokenizer_folder(config: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run folder of a trained tokenizer with other settings, as far as it is looked at."""

    def make(*overrides: str) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        trained = load_config(config, overrides)
        model = build_tokenizer(trained)
        fields = [f.build() for f in trained.data.fields]
        names = [r.name for r in trained.data.regimes]
        constants = {name: {f.name: (0.0, 1.0) for f in fields if not f.static} for name in names}
        domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
        space = Space.of(FieldNormalizer(fields, 3, constants), fields, dict.fromkeys(names, domain))
        initialise(model, 0)
        write_tokenizer(folder, trained, space, {n: model.state_dict()[n] for n in expected_shapes(model)})
        if not overrides:
            content = bytearray((folder / "tokenizer.safetensors").read_bytes())
            content[-1] ^= 1
            (folder / "tokenizer.safetensors").write_bytes(content)
        return folder

    return make


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.fields=[{name: velocity, kind: vector}, {name: heat}, {name: rock, static: true}]"],
            ["was trained on the fields ['velocity', 'heat', 'rock']", "['velocity', 'tracer', 'solid']", "train it"],
        ),
        (["tokenizer.latent_channels=16"], ["other settings of tokenizer.latent_channels"]),
        ([], ["tokenizer.safetensors is damaged: its checksum"]),
    ],
)
def test_tokenizer_that_does_not_fit(
    overrides: list[str], expected: list[str], config: Path, out: Path, tokenizer_folder: Callable[..., Path]
) -> None:
    folder = tokenizer_folder(*overrides)
    finished = run_script(PRETRAIN, "--config", config, "--set", f"tokenizer.run={folder}")
    assert_one_line(finished, str(folder), *expected)
    assert not out.exists()


def test_checkpoint_that_is_missing_or_unreadable(config: Path, tmp_path: Path, out: Path) -> None:
    finished = run_script(PRETRAIN, "--config", config, "--resume", tmp_path / "absent")
    assert_one_line(finished, f"{tmp_path / 'absent'} is not a complete checkpoint")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    assert_one_line(run_script(PRETRAIN, "--config", config, "--resume", broken), f"{broken}/manifest.json is damaged")
    finished = run_script(PRETRAIN, "--config", config, "--init-from", broken)
    assert_one_line(finished, f"{broken}/manifest.json is damaged")
    assert not out.exists()


def test_new_run_never_overwrites_an_old_one(config: Path, out: Path) -> None:
    checkpoint = out / "tiny" / "checkpoints" / "step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"files": {}, "state": {}, "topology": {}}')
    (out / "tiny" / "latest").write_text("step_00000005\n")
    before = sorted(out.rglob("*"))
    assert_one_line(run_script(PRETRAIN, "--config", config), "already holds a run", "--resume auto")
    assert sorted(out.rglob("*")) == before


def test_unwritable_output_folder(config: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_one_line(run_script(TOKENIZER, "--config", config, "--set", f"out={blocked}"), str(blocked))


def test_full_disk_and_interrupt_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(28, "No space left on device", "runs/a/file")

    def interrupted() -> int:
        raise KeyboardInterrupt

    for main, code, text in ((full, 2, "error: no disk space left while writing runs/a/file"), (interrupted, 130, "")):
        with pytest.raises(SystemExit) as caught:
            run_main(main)
        stderr = capsys.readouterr().err
        assert caught.value.code == code and stderr.startswith(text) and stderr.count("\n") == 1


def test_programming_error_keeps_its_traceback() -> None:
    def broken() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_main(broken)


@pytest.mark.parametrize("script", [PRETRAIN, TOKENIZER])
def test_help_has_examples(script: str) -> None:
    finished = run_script(script, "--help")
    assert finished.code == 0 and "examples:" in finished.stdout and f"{script} --config" in finished.stdout


def on_ranks(world: int, *arguments: Any, **environment: str) -> list[Finished]:
    """A command on all ranks at once, as a launcher starts them, but none is ended for another's failure."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **environment}

    def start(rank: int) -> Finished:
        return run_script(*arguments, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(start, range(world)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("script", "setting", "expected"),
    [(PRETRAIN, "operator.depht=3", "did you mean 'depth'?"), (TOKENIZER, "data.regimes.0.path=/nowhere", "/nowhere")],
    ids=["typo", "missing data, after they are connected"],
)
def test_one_rank_speaks_and_all_end(script: str, setting: str, expected: str, config: Path) -> None:
    first, second = on_ranks(2, script, "--config", config, "--set", setting)
    assert_one_line(first, expected)
    connected = script == TOKENIZER  # Before, a rank that nobody ends may be the only one that failed: it speaks later.
    assert second.code == 2 and (second.stderr == "") == connected
    assert connected or (second.stderr.startswith("[rank 1 on ") and expected in second.stderr)


@pytest.mark.parametrize("local_size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_more_ranks_than_cards(config: Path, out: Path, local_size: str) -> None:
    """The first rank without a card speaks; the others end with it."""
    settings = ["operator.train.global_batch=6", "operator.train.valid_batches=1"]
    environment = {local_size: "3", "SHODH_CARDS": "1", "DS_ACCELERATOR": "cuda"}
    for rank, finished in enumerate(on_ranks(3, PRETRAIN, "--config", config, "--set", *settings, **environment)):
        if rank == 1:
            assert_one_line(finished, "3 ranks", "1 CUDA device,", "--num_gpus 1")
        assert finished.code == 2 and (rank == 1 or finished.stderr == "")
    assert not out.exists()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.exhaustive
def test_launcher_refuses_more_ranks_than_cards(config: Path, out: Path) -> None:
    """``deepspeed --num_gpus 2 ...``, as a user types it: it ends both ranks at the first that fails."""
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **ON_CPU, "SHODH_CARDS": "1"}
    del environment["DS_ACCELERATOR"]
    finished = subprocess.run(
        [str(part) for part in (*command, PRETRAIN, "--config", config)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    (line,) = (text for text in finished.stderr.splitlines() if text.startswith("error: "))
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert "2 ranks" in line and "1 CUDA device," in line
    assert not out.exists()


def test_reader_of_the_output_that_leaves_is_no_error() -> None:
    """``| head -1``: no traceback, and no second one when Python flushes at its end."""
    code = (
        "from shodh.core.cli import run_main\n"
        "run_main(lambda: print('x' * 70000, flush=True) or print('y' * 10**6) or 0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_a_pipe_that_is_not_the_output_keeps_its_traceback() -> None:
    def main() -> int:
        raise BrokenPipeError(32, "a rank has gone")

    with pytest.raises(BrokenPipeError, match="a rank has gone"):
        run_main(main)
