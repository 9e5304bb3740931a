"""The data generator as a user runs it."""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from shodh.cli import run_main
from shodh.data import RegimeSource, WellFile, read_stats
from shodh.physics import get_regime

TOOL = Path(__file__).parents[2] / "tools" / "generate_data.py"
SMALL = ["--grid", "8", "10", "9", "--trajectories", "5", "--frames", "2", "--workers", "1"]
QUICK = ["--set", "open_channel.spin_up=0", "open_channel.frame_interval=0.02"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generate(tool: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """``generate(*extra options)`` writes the small channel set to a folder and returns that."""

    def run(*options: str, out: Path = tmp_path / "out") -> Path:
        arguments = ["--regime", "open_channel", "--out", str(out), *SMALL, *QUICK, *options]
        assert tool.main(arguments) == 0
        return out

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail(tool: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run with bad input; return the one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: tool.main(list(arguments)))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_data_set_is_complete_and_readable(generate: Callable[..., Path]) -> None:
    out = generate("--trajectories-per-file", "2")
    names = sorted(str(p.relative_to(out / "open_channel")) for p in out.rglob("*") if p.is_file())
    assert names == [
        "data/test/open_channel_00004.hdf5",
        "data/train/open_channel_00000.hdf5",
        "data/train/open_channel_00002.hdf5",
        "data/valid/open_channel_00003.hdf5",
        "stats.yaml",
    ]
    schema = get_regime("open_channel").schema
    source = RegimeSource("open_channel", out / "open_channel", schema.fields)
    assert [source.num_trajectories(s) for s in ("train", "valid", "test")] == [3, 1, 1]
    assert source.boundary == ("periodic", "periodic", "wall") and source.grid == (8, 10, 9)
    stats = read_stats(out / "open_channel" / "stats.yaml")
    train = np.concatenate([h5py.File(out / "open_channel" / n)["t0_fields/tracer"][:] for n in names[1:3]])
    assert stats["mean"]["tracer"] == pytest.approx(train.mean(dtype=np.float64), rel=1e-5)


def test_finished_files_are_kept_and_lost_ones_come_back_bitwise(generate: Callable[..., Path]) -> None:
    out = generate("--trajectories-per-file", "2")
    before = snapshot(out)
    kept, lost = (out / "open_channel/data/train" / f"open_channel_0000{i}.hdf5" for i in (0, 2))
    damaged = out / "open_channel/data/valid/open_channel_00003.hdf5"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:3000])
    leftover = lost.with_name(f".{lost.name}.123.partial")
    leftover.write_bytes(b"half")
    generate("--trajectories-per-file", "2")
    assert snapshot(out).keys() == before.keys()
    assert kept.stat().st_mtime_ns == stamp
    for path in (lost, damaged):
        with h5py.File(path) as now:
            original = h5py.File(io.BytesIO(before[str(path.relative_to(out))]))
            for name in ("t1_fields/velocity", "t0_fields/tracer"):
                assert np.array_equal(now[name][:], original[name][:])


def test_a_trajectory_does_not_depend_on_how_files_are_cut(generate: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (generate("--trajectories-per-file", n, out=tmp_path / n) for n in ("1", "3"))
    first = h5py.File(one / "open_channel/data/train/open_channel_00002.hdf5")["t1_fields/velocity"][0]
    second = h5py.File(two / "open_channel/data/train/open_channel_00000.hdf5")["t1_fields/velocity"][2]
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_other_settings_are_refused_unless_overwritten(
    generate: Callable[..., Path], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = generate()
    common = ["--regime", "open_channel", "--out", str(out), *SMALL]
    line = fail(tool, capsys, *common, *QUICK, "--seed", "1")
    assert "seed" in line and "--overwrite" in line
    line = fail(tool, capsys, *common, *QUICK, "--trajectories-per-file", "1")
    assert "--overwrite" in line
    before = snapshot(out)
    generate("--seed", "1", "--overwrite")
    after = snapshot(out)
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in before)


def test_bad_input_gets_one_line(tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(*changes: str, regime: str = "open_channel") -> str:
        return fail(tool, capsys, "--regime", regime, "--out", str(tmp_path), *SMALL, *changes)

    assert "open_channel" in run(regime="open_chanel")
    assert "re_tau" in run("--set", "open_channel.re_taw=100")
    assert "number" in run("--set", "open_channel.re_tau=fast")
    assert "REGIME.KEY=VALUE" in run("--set", "re_tau")
    assert "not among" in run("--set", "porous_media.grain=0.1")
    assert "--grid" in run("--grid", "8", "8")
    assert "at least 3" in run("--trajectories", "2")
    assert "sum to 1" in run("--split", "0.5", "0.1", "0.1")
    assert "no trajectory for training" in run("--split", "0", "0.6", "0.4")
    assert "--frames" in run("--frames", "0")
    assert "porous_media" in run("--image", "rock.npy")
    assert "cannot read" in run("--image", "none.npy", "--pore-value", "0", regime="porous_media")
    assert "twice" in fail(tool, capsys, "--regime", "open_channel", "open_channel", "--out", str(tmp_path), *SMALL)
    assert "required" in fail(tool, capsys, "--regime", "open_channel")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_leaves_no_half_file(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    arguments = ["--regime", "open_channel", "--out", str(tmp_path), *SMALL, *QUICK]
    monkeypatch.setattr("shodh.files.sync_to_disk", full)
    assert "no disk space" in fail(tool, capsys, *arguments)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.undo()
    usage = tool.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GB are free" in fail(tool, capsys, *arguments)


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(TOOL), "--regime", "porous_media", "--out", str(out), *SMALL, *options]


def test_workers_give_the_same_files_as_one_process(tool: ModuleType, tmp_path: Path) -> None:
    """Two worker processes through the real command line; also shows the summary and an image as geometry."""
    rng = np.random.default_rng(0)
    (rng.random((12, 12, 12)) < 0.2).astype(np.uint8).tofile(tmp_path / "rock.raw")
    image = ["--image", str(tmp_path / "rock.raw"), "--image-shape", "12", "12", "12", "--image-dtype", "uint8"]
    options = [*image, "--pore-value", "0", "--trajectories-per-file", "2"]
    assert tool.main(command(tmp_path / "one", *options)[2:]) == 0
    done = subprocess.run(
        [*command(tmp_path / "two", *options), "--workers", "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "3 train, 1 valid, 1 test" in done.stdout, done.stderr
    assert done.stderr == ""
    for path in sorted((tmp_path / "one").rglob("*.hdf5")):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        with h5py.File(path) as a, h5py.File(other) as b:
            assert np.array_equal(a["t1_fields/velocity"][:], b["t1_fields/velocity"][:])
            assert np.array_equal(a["t0_fields/solid"][:], b["t0_fields/solid"][:])


def test_interrupted_run_leaves_whole_files_only(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *command(tmp_path / "out", "--trajectories-per-file", "1"),
            "--frames",
            "60",
            "--trajectories",
            "12",
            "--workers",
            "2",
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that put the tests into the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").rglob("*.hdf5")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted; run the same command again to go on\n"
    assert not list(tmp_path.rglob("*.partial"))
    files = list(tmp_path.rglob("*.hdf5"))
    assert 1 <= len(files) < 12
    for path in files:
        assert WellFile(path).num_frames == 60
