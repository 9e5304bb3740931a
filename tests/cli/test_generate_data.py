"""The data generator as a user runs it."""

from __future__ import annotations

import errno
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import psutil
import pytest
import torch
from helper import run_script

from shodh.core.cli import run_main
from shodh.core.seeding import stable_seed
from shodh.data import RegimeSource, WellFile, read_stats
from shodh.data.formats.inspection import DIAGNOSTICS, inspect_file
from shodh.generation import Interval
from shodh.generation.plan import FIRST
from shodh.physics import REGIMES, get_regime
from shodh.physics.regimes.open_channel import OpenChannel
from shodh.physics.solvers.mac import ChannelFlow
from shodh.physics.solvers.scalar import ScalarTransport
from shodh.schema.fields import Trajectories

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "generate_data.py"
SMALL = ["--grid", "8", "10", "9", "--trajectories", "5", "--frames", "2", "--workers", "1"]
QUICK = ["--set", "open_channel.spin_up=0", "open_channel.frame_interval=0.02"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("shodh.commands.generate")


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
    assert "2 dimensions" in run("--grid", "8", "8", "8", regime="shallow_water_2d")
    assert "LOW:HIGH" in run("--vary", "open_channel.re_tau=100")
    assert "smaller first" in run("--vary", "open_channel.re_tau=200:100")
    assert "positive" in run("--vary", "open_channel.re_tau=-1:100")
    assert "both set and varied" in run("--vary", "open_channel.spin_up=0:1", *QUICK)
    assert "of type bool" in run("--vary", "open_channel.double=0:1")
    assert "at least 3" in run("--trajectories", "2")
    assert "sum 1" in run("--split", "0.5", "0.1", "0.1")
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
    monkeypatch.setattr("shodh.core.files.sync_to_disk", full)
    assert "no disk space" in fail(tool, capsys, *arguments)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GB are free" in fail(tool, capsys, *arguments)


def test_unstable_solution_is_refused_and_nothing_else_is_lost(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trajectory takes steps far beyond its limit: one line, no file of it; mended, the run goes on."""
    arguments = ["--regime", "open_channel", "--out", str(tmp_path / "out"), *SMALL, *QUICK]
    arguments += ["--trajectories-per-file", "1", "--set", "open_channel.re_tau=5", "open_channel.frame_interval=0.2"]
    advance, last = ChannelFlow.advance, stable_seed(0, "open_channel", FIRST["test"])
    solve = OpenChannel._solve

    def too_long(
        flow: ChannelFlow, interval: float, courant: float, scalar: ScalarTransport | None = None
    ) -> torch.Tensor:
        flow.step(interval, scalar)
        return torch.ones(1, dtype=torch.bool)

    def unstable(regime: OpenChannel, seeds: list[int], *rest: object) -> Trajectories:
        with monkeypatch.context() as patch:
            patch.setattr(ChannelFlow, "advance", too_long if last in seeds else advance)
            return solve(regime, seeds, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenChannel, "_solve", unstable)
    line = fail(tool, capsys, *arguments)
    assert all(word in line for word in ("open_channel", "trajectory 0 of test", "time 0.2", "not stored"))
    before = snapshot(tmp_path / "out")
    assert len(before) == 4 and not any("00004" in name for name in before)
    monkeypatch.undo()
    assert tool.main(arguments) == 0
    after = snapshot(tmp_path / "out")
    assert all(after[name] == content for name, content in before.items()) and len(after) == 6


@pytest.mark.parametrize("vary", [(), ("--vary", "open_channel.schmidt=1:2")])
def test_files_say_what_their_solutions_span(generate: Callable[..., Path], vary: tuple[str, ...]) -> None:
    """Of every trajectory, in a root attribute that other readers need not know; inspection shows it."""
    out = generate(*vary) / "open_channel/data/train/open_channel_00000.hdf5"
    with h5py.File(out) as file:
        stored = json.loads(file.attrs[DIAGNOSTICS])
        tracer, velocity = file["t0_fields/tracer"][:], file["t1_fields/velocity"][:]
    assert len(stored) == len(tracer) == 3
    for report, dye, flow in zip(stored, tracer, velocity):
        assert report["ranges"]["tracer"] == [[pytest.approx(dye.min())], [pytest.approx(dye.max())]]
        energy = 0.5 * np.square(flow, dtype=np.float64).sum((1, 2, 3, 4)) / dye[0].size
        assert report["energy"]["kinetic"] == pytest.approx([energy[0], energy[-1]], rel=1e-5)
        assert 0 < report["divergence"]["velocity"] < 1e-6 and 0 < report["solver"]["limit_share"] <= 1
    solved = inspect_file(out).solved
    assert solved is not None
    assert solved["ranges"]["tracer"] == [[pytest.approx(tracer.min())], [pytest.approx(tracer.max())]]
    assert len(solved["energy"]["kinetic"]["first"]) == 3
    if vary:
        return
    done = run_script("tools/inspect_data.py", out)
    assert done.code == 0 and "limit_share" in done.stdout and "kinetic energy" in done.stdout, done.stderr


@pytest.mark.parametrize("text", ["{", "[1]", '[{"ranges": {"tracer": [[0], [NaN]]}}]', "[]"])
def test_files_without_a_sound_attribute_are_inspected_all_the_same(generate: Callable[..., Path], text: str) -> None:
    path = generate() / "open_channel/data/test/open_channel_00004.hdf5"
    whole = inspect_file(path)
    with h5py.File(path, "r+") as file:
        file.attrs[DIAGNOSTICS] = text
    spoilt = inspect_file(path)
    with h5py.File(path, "r+") as file:
        del file.attrs[DIAGNOSTICS]
    foreign = inspect_file(path)
    assert whole.solved and spoilt.solved is None and foreign.solved is None
    assert len(spoilt.problems) == len(whole.problems) + (text != "[]") and foreign.problems == whole.problems
    assert foreign.fields == spoilt.fields == whole.fields


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(TOOL), "--regime", "porous_media", "--out", str(out), *SMALL, *options]


def test_workers_give_the_same_files_as_one_process(tool: ModuleType, tmp_path: Path) -> None:
    """Two worker processes through the real command line; also shows the summary and an image as geometry."""
    rng = np.random.default_rng(0)
    (rng.random((12, 12, 12)) < 0.2).astype(np.uint8).tofile(tmp_path / "rock.raw")
    image = ["--image", str(tmp_path / "rock.raw"), "--image-shape", "12", "12", "12", "--image-dtype", "uint8"]
    options = [*image, "--pore-value", "0", "--trajectories-per-file", "2"]
    assert tool.main(command(tmp_path / "one", *options)[2:]) == 0
    done = run_script(*command(tmp_path / "two", *options)[1:], "--workers", "2")
    assert done.code == 0 and "3 train, 1 valid, 1 test" in done.stdout, done.stderr
    assert done.stderr == ""
    for path in sorted((tmp_path / "one").rglob("*.hdf5")):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        with h5py.File(path) as a, h5py.File(other) as b:
            assert np.array_equal(a["t1_fields/velocity"][:], b["t1_fields/velocity"][:])
            assert np.array_equal(a["t0_fields/solid"][:], b["t0_fields/solid"][:])


def test_regimes_of_both_dimensions_in_one_command(tool: ModuleType, tmp_path: Path) -> None:
    """One number serves both; the positive and open 2-D fields come back through the reader."""
    options = ["--grid", "8", "--trajectories", "3", "--frames", "2", "--workers", "1", "--out", str(tmp_path)]
    assert tool.main(["--regime", "shallow_water_2d", "porous_media", *options]) == 0
    flat = RegimeSource("a", tmp_path / "shallow_water_2d", get_regime("shallow_water_2d").schema.fields)
    deep = RegimeSource("b", tmp_path / "porous_media", get_regime("porous_media").schema.fields)
    assert flat.grid == (8, 8) and flat.boundary == ("open", "open") and deep.grid == (8, 8, 8)


def test_names_stand_for_all_regimes_of_a_dimension(tool: ModuleType) -> None:
    flat, deep = tool.expand_regimes(["all2d"]), tool.expand_regimes(["all3d"])
    assert "shallow_water_2d" in flat and "open_channel" in deep
    assert set(flat) | set(deep) == set(REGIMES) and not set(flat) & set(deep)
    assert tool.expand_regimes(["all2d", "shallow_water_2d"]) == flat


def test_varied_parameters_are_stored_and_used(tool: ModuleType, tmp_path: Path) -> None:
    """Each trajectory equals one solved with the value that is stored with it, whatever file it is in."""
    name, interval = "diffusion_reaction_2d", "1e-4:1e-2"
    options = [
        "--regime",
        name,
        "--grid",
        "8",
        "--trajectories",
        "6",
        "--frames",
        "2",
        "--workers",
        "1",
        "--split",
        "4",
        "1",
        "1",
    ]
    options += ["--vary", f"{name}.diffusivity_u={interval}", f"{name}.k=0.001:0.002"]
    drawn = []
    for per_file in ("4", "1"):
        out = tmp_path / per_file
        assert tool.main([*options, "--out", str(out), "--trajectories-per-file", per_file]) == 0
        files = sorted((out / name / "data/train").glob("*.hdf5"))
        scalars = {
            key: np.concatenate([h5py.File(f)[f"scalars/{key}"][:] for f in files]) for key in ("diffusivity_u", "k")
        }
        fields = np.concatenate([h5py.File(f)["t0_fields/activator"][:] for f in files])
        drawn.append((scalars, fields))
        # The reader gives them back too.
        read = np.concatenate([np.atleast_1d(WellFile(f).parameters["diffusivity_u"]) for f in files])
        np.testing.assert_allclose(read, scalars["diffusivity_u"], rtol=1e-6)
    (scalars, fields), (again, same) = drawn
    assert np.array_equal(fields, same) and all(np.array_equal(scalars[key], again[key]) for key in scalars)
    assert len(np.unique(scalars["diffusivity_u"])) == 4 and len(np.unique(scalars["k"])) == 4
    assert (scalars["k"] >= 0.001).all() and (scalars["k"] <= 0.002).all()
    values = {key: float(value[2]) for key, value in scalars.items()}
    alone = get_regime(name, **values).simulate([stable_seed(0, name, 2)], (8, 8), 2)
    np.testing.assert_allclose(fields[2], alone.values["activator"][0], atol=1e-6)


def test_wide_intervals_are_drawn_uniformly_in_the_logarithm() -> None:
    wide, narrow = Interval(1e-5, 1e-3), Interval(1.0, 3.0)
    draws = np.array([[i.draw(seed, "x") for seed in range(2000)] for i in (wide, narrow)])
    for values, low, high in ((np.log(draws[0]), np.log(1e-5), np.log(1e-3)), (draws[1], 1.0, 3.0)):
        share = (values - low) / (high - low)
        # Five standard errors of the mean and of the variance of a uniform variable.
        assert abs(share.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 2000)
        assert abs(share.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 2000)
        assert share.min() >= 0 and share.max() <= 1


@pytest.mark.parametrize("varied", ["frame_interval=0.01:0.02", "length=5:6"])
@pytest.mark.parametrize("per_file", ["1", "4"])
def test_what_changes_the_times_or_the_box_cannot_vary_within_a_data_set(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, varied: str, per_file: str
) -> None:
    options = ["--regime", "shallow_water_2d", "--grid", "8", "--trajectories", "4", "--frames", "2", "--workers", "1"]
    options += ["--trajectories-per-file", per_file, "--out", str(tmp_path)]
    assert "cannot be varied" in fail(tool, capsys, *options, "--vary", f"shallow_water_2d.{varied}")


def test_killing_it_again_and_again_gives_the_same_files(tool: ModuleType, tmp_path: Path) -> None:
    """SIGKILL at five random moments against an undisturbed run."""
    options = ["--regime", "diffusion_reaction_2d", "porous_media", "--grid", "12", "--trajectories", "8"]
    options += ["--frames", "4", "--workers", "1", "--trajectories-per-file", "1"]

    def start(out: str) -> multiprocessing.context.ForkProcess:
        process = multiprocessing.get_context("fork").Process(
            target=tool.main, args=([*options, "--out", str(tmp_path / out)],)
        )
        process.start()
        return process

    began = time.monotonic()
    start("whole").join(timeout=120)
    duration = time.monotonic() - began
    moments = random.Random(0)
    killed = 0
    for _ in range(5):
        process = start("killed")
        process.join(timeout=moments.uniform(0.0, 0.2) * duration)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    process = start("killed")
    process.join(timeout=120)
    assert process.exitcode == 0
    whole = snapshot(tmp_path / "whole")
    assert len(whole) == 18 and snapshot(tmp_path / "killed") == whole


@pytest.mark.exhaustive
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


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """A killed run tells its workers nothing; they must not stay, or write beside the next run."""
    size = ["--frames", "60", "--trajectories", "12", "--workers", "2", "--trajectories-per-file", "1"]
    process = psutil.Popen(command(tmp_path / "out", *size), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").rglob("*.hdf5")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = process.children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for left in alive:
        left.kill()
    assert not alive
