"""What a forecast costs: a trained model against the solver that made its data, at equal error.

  python tools/bench/inference.py runs/demo --out runs/demo/report/inference.json

A forecast is ``evaluation.rollout`` frames from the first frames of a test trajectory, one at a time and in batches.
The solver makes the same trajectories anew, on the grid of the data and on coarser ones, from the same initial state:
noise that a regime draws on its grid is cut off at the wave numbers of the coarser one. Its error is that against the
stored truth, averaged over the coarse cells, which spares it all that the coarse grid cannot hold; but it starts at the
first frame, and the model at the last of its history. The solver at equal error is the fastest one whose VRMSE is not
above the model's; *breakeven* is the number of forecasts after which the training, tokenizer included, is paid back,
null where the solver is faster: each regime is charged the whole training, and none the data. ``verdict`` says it in
words. Where a coarse solve does not start from the stored first frame (`start`, VRMSE of that
frame: a turbulent spin-up forgets the noise), it cannot be compared, and the figure against the solver on the data's
own grid, whose error is zero, is an upper bound of what the model is worth.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
from torch import Tensor

from shodh.core.cli import command_parser, run_main
from shodh.core.devices import pick_device
from shodh.core.environment import write_record
from shodh.core.errors import DataError
from shodh.core.precision import ieee_float32
from shodh.core.reading import parse_json
from shodh.core.seeding import stable_seed
from shodh.evaluate.evaluation import Evaluator, evaluate, open_run
from shodh.evaluate.regime_evaluation import RegimeEvaluation
from shodh.experiments.transfer.measure import seconds_per_step
from shodh.generation.plan import FIRST, SETTINGS
from shodh.physics import get_regime
from shodh.physics.solvers.spectral import NOISE_POINTS
from shodh.schema.fields import Trajectories
from shodh.schema.measures import measure
from shodh.train.run_folder import RunFolder

SAME_START = 0.1  # VRMSE of the first frame up to which a coarse solve has the stored initial state


@contextmanager
def noise_of(factor: int, coarse: Sequence[int]) -> Iterator[None]:
    """White noise on the coarse grid, or on multiples of it, is the finer one's without the waves that do not fit."""
    draw, ndim = torch.randn, len(coarse)

    def cut(*shape: int, **options: Any) -> Tensor:
        cells = shape[-ndim:]
        strange = len(cells) < ndim or any(n % m for n, m in zip(cells, coarse, strict=True))
        if strange or set(cells) == {NOISE_POINTS}:  # the last: of spectral solvers, the same on every grid
            return draw(*shape, **options)
        axes, fine = tuple(range(-ndim, 0)), [factor * n for n in cells]
        waves = torch.fft.fftshift(torch.fft.fftn(draw(*shape[:-ndim], *fine, **options), dim=axes), dim=axes)
        for axis, n, m in zip(axes, fine, cells, strict=True):
            # Samples are at the centres of cells, and the first ones differ.
            phase = torch.exp(1j * math.pi * (1 / m - 1 / n) * torch.arange(-(m // 2), m - m // 2))
            waves = waves.narrow(axis, n // 2 - m // 2, m) * phase.view(-1, *(1,) * (-1 - axis))
        scale = factor ** (-ndim / 2)
        return torch.fft.ifftn(torch.fft.ifftshift(waves, dim=axes), dim=axes).real * scale

    with mock.patch("torch.randn", cut):
        yield


def peak_memory(device: torch.device, work: Callable[[], Any]) -> float:
    """GiB: of the device, or of this process, at the height of some work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) / 2**30
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def coarsened(values: np.ndarray, factor: int, ndim: int, *, face: bool) -> np.ndarray:
    """Means over blocks of cells ``[*grid(, ndim)]``; of a component on faces, over the cells of the coarse face."""

    def blocks(part: np.ndarray, normal: int | None) -> np.ndarray:
        for axis in range(ndim):
            part = np.moveaxis(part, axis, 0)
            part = part.reshape(-1, factor, *part.shape[1:])
            part = np.moveaxis(part[:, -1] if axis == normal else part.mean(1), 0, axis)
        return part

    if values.ndim == ndim:
        return blocks(values, None)
    return np.stack([blocks(values[..., i], i if face else None) for i in range(ndim)], -1)


def compare(found: Trajectories, truth: dict[str, np.ndarray], factor: int, frame: int) -> float:
    """Mean VRMSE over fields and trajectories of one frame, on the coarse cells."""
    errors = []
    for field in found.schema.dynamic:
        ndim = found.schema.ndim
        face = field.placement == "face"
        pairs = [
            (found.values[field.name][b, frame], coarsened(v[frame].astype(np.float64), factor, ndim, face=face))
            for b, v in enumerate(truth[field.name])
        ]
        u, v = (torch.from_numpy(np.stack(side).astype(np.float32)) for side in zip(*pairs, strict=True))
        u, v = (x.movedim(-1, 1) if field.kind == "vector" else x.unsqueeze(1) for x in (u, v))
        scale = v.std().clamp(min=1e-30)
        errors.append(measure("vrmse", u / scale, v / scale).nanmean())
    return float(torch.stack(errors).nanmean())


def solver_costs(path: Path, frames: int, given: int, factors: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Seconds, memory and error of the solver that made a file of test trajectories, by grid.

    Seconds are those of the frames after the ``given`` first ones: the state that both start from is not charged.
    """
    with h5py.File(path) as file:
        if SETTINGS not in file.attrs:
            raise DataError(f"{path}: was not made by tools/generate_data.py, so there is no solver to compare with")
        settings: Any = parse_json(str(file.attrs[SETTINGS]), str(path))
        if settings.get("vary"):
            raise DataError(f"{path}: has parameters that vary; give a run on data with fixed ones")
        regime = get_regime(settings["regime"], **settings["parameters"])
        count = min(2, int(file.attrs["n_trajectories"]))
        groups = {f.name: "t1_fields" if f.kind == "vector" else "t0_fields" for f in regime.schema.dynamic}
        truth = {name: file[group][name][:count, :frames] for name, group in groups.items()}
    seeds = [stable_seed(settings["seed"], settings["regime"], FIRST["test"] + i) for i in range(count)]
    fine, by_grid = tuple(settings["grid"]), {}
    for factor in factors:
        grid = tuple(n // factor for n in fine)
        if min(grid) < 4 or any(n % factor for n in fine):
            continue
        with noise_of(factor, grid) if factor > 1 else nullcontext():

            def solve(steps: int, grid: tuple[int, ...] = grid, seeds: list[int] = seeds[:1]) -> Trajectories:
                return regime.simulate(seeds, grid, steps, device=str(device))

            memory = peak_memory(device, lambda: solve(frames))  # warms up
            taken = seconds(device, lambda: solve(frames), 1) - seconds(device, lambda: solve(given), 1)
            found = solve(frames, seeds=seeds)
        by_grid["x".join(map(str, grid))] = {
            "seconds": max(taken, 0.0),
            "memory_gib": memory,
            "start": compare(found, truth, factor, 0),
            "vrmse": compare(found, truth, factor, frames - 1),
        }
    return by_grid


@torch.no_grad()
@ieee_float32()
def model_costs(part: RegimeEvaluation, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a forecast with encoding and decoding, one at a time and in a batch, and memory."""
    batch = next(part.windows())
    forecaster, number = part.forecaster, part.number

    def forecast(size: int) -> Tensor:
        fields, static = batch.fields[:size, : forecaster.history], batch.static[:size]
        encoded = forecaster.encode(fields, static, number)
        told = None if batch.conditions is None else batch.conditions[:size]
        states = forecaster.rollout(*encoded, forecaster.labels(number, fields), steps, told)
        return forecaster.decode(states, static, number)

    size = len(batch.fields)
    memory = peak_memory(device, lambda: forecast(1))  # warms up
    alone, in_batch = seconds(device, lambda: forecast(1)), seconds(device, lambda: forecast(size)) / size
    return {
        "seconds": alone,
        "batch": size,
        "seconds_in_batch": in_batch,
        "samples_per_second": 1 / in_batch,
        "memory_gib": memory,
    }


def training_seconds(evaluator: Evaluator) -> float:
    """Steps times the median time of a step, of the operator and of its tokenizer."""
    config, total = evaluator.config, 0.0
    jobs = [(evaluator.folder, config.operator.train)]
    if config.has_tokenizer:
        jobs.append((RunFolder(config.tokenizer_dir), config.tokenizer.train))
    for folder, train in jobs:
        total += train.steps * (seconds_per_step(folder, train.valid_every) or math.nan)
    return total


def breakeven(training: float, solver: float, model: float) -> float | None:
    """Forecasts until the training is paid back; None where the model is no faster."""
    return training / (solver - model) if solver > model else None


def verdict(training: float, model: float, own: float, equal: float | None) -> str:
    """Which is faster, in words: against the solver on the grid of the data, and at equal error (None: unknown)."""

    def beside(solver: float, where: str) -> str:
        if (forecasts := breakeven(training, solver, model)) is None:
            times = f"{model / solver:.2g} times" if solver > 0 else "immeasurably"
            return f"{where}: the solver is {times} faster, and the training is never paid back"
        paid = f"after {forecasts:.0f} forecasts" if math.isfinite(forecasts) else "at an unknown number of forecasts"
        return f"{where}: the model is {solver / model:.2g} times faster, and the training is paid back {paid}"

    found = beside(own, "on the grid of the data (error 0)")
    if equal is None:
        return f"{found}; at equal error: unknown, as no coarser solve can be compared, and the model is worth no more"
    return f"{found}; {beside(equal, 'at equal error')}"


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="JSON (default: RUN/report/inference.json)")
    parser.add_argument("--coarser", type=int, nargs="+", default=[1, 2, 4], metavar="FACTOR", help="grids to solve on")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    device = torch.device(pick_device(args.device))
    evaluator = open_run(args.run, None, device)
    metrics = evaluate(evaluator, "test").metrics["regimes"]
    training, found = training_seconds(evaluator), {}
    for number, name in enumerate(evaluator.regimes.names):
        part = RegimeEvaluation(evaluator, number, "test")
        steps, history = part.schedule.steps, part.history
        path = evaluator.regimes.sources[number].files["test"][0].path
        # Without rollouts there are the values of one step.
        last = {f: kinds["model"][-1] for f, kinds in metrics[name].get("rollout", {}).items()}
        errors = last or {f: kinds["model"] for f, kinds in metrics[name]["vrmse"].items()}
        model = {**model_costs(part, steps, device), "vrmse": statistics.fmean(errors.values())}
        given, frames = ((n - 1) * evaluator.config.data.stride + 1 for n in (history, history + steps))
        solver = solver_costs(Path(path), frames, given, args.coarser, device)
        own = next(iter(solver.values()))["seconds"]
        fit = [s for s in solver.values() if s["start"] <= SAME_START and s["vrmse"] <= model["vrmse"]]
        equal = min(fit, key=lambda s: s["seconds"], default=None)
        comparable = any(s["start"] <= SAME_START for s in list(solver.values())[1:])
        matched = equal["seconds"] if equal is not None and comparable else None
        found[name] = {
            "verdict": verdict(training, model["seconds"], own, matched),
            "steps": steps,
            "model": model,
            "solver": solver,
            "breakeven_at_own_grid": breakeven(training, own, model["seconds"]),
            "breakeven_at_equal_error": None if matched is None else breakeven(training, matched, model["seconds"]),
            "coarse_solves_can_be_compared": comparable,
        }
        lines = [
            f"{name}: {steps} steps",
            f"  model {model['seconds']:.3g} s, VRMSE {model['vrmse']:.3g}, "
            f"{model['samples_per_second']:.3g} forecasts a second in batches of {model['batch']}",
        ]
        for grid, s in solver.items():
            lines.append(f"  solver {grid} {s['seconds']:.3g} s, VRMSE {s['vrmse']:.3g}, first frame {s['start']:.2g}")
        lines.append(f"  {found[name]['verdict']}")
        sys.stdout.write("\n".join(lines) + "\n")
    out = args.out or evaluator.folder.report / "inference.json"
    settings = {
        "run": str(args.run),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }
    write_record(out, {**settings, "training_seconds": training, "regimes": found})
    return 0


if __name__ == "__main__":
    run_main(main)
