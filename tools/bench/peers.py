"""Train our models and the peers' own code side by side on the same data, and say where we lose.

Ours (FNO, DPOT, MoE-POT and its dense counterpart) and the peers' (neuraloperator's FNO and TFNO, The Well's U-Net and
CNextU-Net, PDE-Transformer S) see the same batches in the same order, with one loss, optimiser and schedule, from equal
numbers of steps and again from equal seconds: as many steps as a model makes in so many seconds of one thread, by the
least time of a step that was measured with all models in turn. All data are solved here. What is not installed is left
out, and named on the page; ``pip install .[peers]`` has all. A cell (set, model, budget, seed) is a file: a run that
was killed goes on, and the page is made of what there is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import training
from side_by_side.jobs import run_jobs
from side_by_side.models import MODELS, Entry, Shape
from side_by_side.page import write_results
from side_by_side.results import PERSISTENCE, Results, chosen_rates
from side_by_side.scales import SCALES, Scale
from side_by_side.sets import SETS, make, path_of, read

from shodh.core.cli import choose_names, command_parser, positive, run_main
from shodh.core.environment import describe_environment, git_commit
from shodh.core.errors import ConfigError
from shodh.core.files import lock_file
from shodh.core.reading import read_json
from shodh.core.strict_json import to_json, write_json

EXAMPLES = """examples:
  python tools/bench/peers.py --scale tiny --out /tmp/peers_tiny
  python tools/bench/peers.py --scale small --out runs/peers --jobs 2
  python tools/bench/peers.py --out runs/peers --only gray_scott dam_break moe_pot 'neuralop_*'
  python tools/bench/peers.py --out runs/peers --page        # of what is finished, also beside a run
"""


class Cell(NamedTuple):
    """One training; ``budget`` is ``steps``, ``seconds``, or ``tune-RATE``, which has the budget of ``seconds``."""

    data: str
    model: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return ".".join(map(str, self))


@dataclass(frozen=True)
class Run:
    """A folder of results and how they are made."""

    out: Path
    scale: Scale
    device: str
    jobs: int
    residual: bool
    rates: str

    @property
    def data(self) -> Path:
        return self.out / "data"

    def file(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.name}.json"

    def run(self, what: str, jobs: Mapping[str, Callable[[], None]], at_once: int | None = None) -> list[str]:
        """Names of the jobs that failed."""
        return run_jobs(what, jobs, self.out / "failed", at_once or self.jobs)

    def shape(self, data: str, channels: int) -> Shape:
        return Shape(self.scale.history, channels, self.scale.grid, SETS[data].periodic)


class Change(torch.nn.Module):
    """A model that predicts the change since the last frame."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        return history[:, -1] + self.model(history)

    def __getattr__(self, name: str) -> Any:
        if name in ("added", "finish_step"):
            return getattr(self.model, name)
        return super().__getattr__(name)


def build(run: Run, entry: Entry, shape: Shape, seed: int) -> torch.nn.Module:
    model = entry.build(run.scale.size, shape, seed)
    return (Change(model) if run.residual and not entry.predicts_change else model).to(run.device)


def measure_costs(run: Run, names: Sequence[str], shape: Shape) -> None:
    """Seconds of a step of each model for so many channels, in ``costs/CHANNELS.json``; what is known stays.

    All models take turns, those with a known cost as well: the state of the machine is the same for all.
    """
    path = run.out / "costs" / f"{shape.channels}.json"
    given = torch.randn(run.scale.batch, shape.history, shape.channels, shape.grid, shape.grid)
    models = {name: (MODELS[name], build(run, MODELS[name], shape, 0)) for name in names}
    found = training.step_costs(models, given, given[:, 0].clone(), rounds=run.scale.rounds, device=run.device)
    known = read_json(path, "costs")["seconds"] if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"seconds": {**found, **known}, "env": describe_environment()})


def run_cell(run: Run, cell: Cell, rate: float) -> None:
    """Train and evaluate one model, and write its file."""
    scale, data = run.scale, read(run.data, cell.data)
    window = {"history": scale.history, "rollout": scale.rollout, "starts": scale.starts}
    record: dict[str, Any] = cell._asdict()
    model: Callable[[torch.Tensor], torch.Tensor]
    if cell.model == PERSISTENCE:
        model = last_frame
    else:
        entry = MODELS[cell.model]
        held = training.peak_memory(run.device)
        network = build(run, entry, run.shape(cell.data, data.channels), cell.seed)
        cost = read_json(run.out / "costs" / f"{data.channels}.json", "costs")["seconds"][cell.model]
        steps = scale.steps if cell.budget == "steps" else max(1, int(scale.seconds / cost))
        started, clock = time.process_time(), time.perf_counter()
        loss = training.train(
            network,
            entry,
            data.splits["train"],
            steps=steps,
            rate=rate,
            batch=scale.batch,
            history=scale.history,
            key=(cell.data, cell.seed),
            device=run.device,
        )
        record |= {
            "rate": rate,
            "steps": steps,
            "step_seconds": cost,
            "cpu_seconds": time.process_time() - started,
            "clock_seconds": time.perf_counter() - clock,
            "memory_mib": training.peak_memory(run.device) - held,
            "parameters": training.parameter_count(network),
            "loss": loss,
            "version": entry.version,
        }
        model = network.eval()
    for split in ("valid", "test"):
        if split == "valid" or not cell.budget.startswith("tune-"):
            record[split] = training.evaluate(model, data, split, batch=32, device=run.device, **window)
    write_json(run.file(cell), {**record, "env": describe_environment()}, indent=0)


def import_once(run: Run, models: Sequence[str]) -> None:
    """Import, before the jobs are forked, what each would import: packages of models, and what an optimiser wants."""
    torch.set_num_threads(1)
    git_commit()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for name in models:
        MODELS[name].build(run.scale.size, Shape(run.scale.history, 1, run.scale.grid, True), 0)


def last_frame(history: torch.Tensor) -> torch.Tensor:
    return history[:, -1]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--scale", choices=SCALES, help="default: that of the folder, or small")
    parser.add_argument("--out", type=Path, required=True, help="folder of data, cells and the page")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of sets and of models, as in a shell")
    parser.add_argument("--budgets", nargs="+", choices=("seconds", "steps"), default=["seconds", "steps"])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--jobs", type=positive, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: that of the scale")
    parser.add_argument(
        "--rates",
        choices=("tuned", "published"),
        help="learning rates: the best of a few and the published one by the validation split of two sets with seed 0 "
        "(default), or as published",
    )
    parser.add_argument("--residual", action="store_true", default=None, help="all models predict the change")
    parser.add_argument("--list", action="store_true", help="name sets and models, and end")
    parser.add_argument("--page", action="store_true", help="make the page of what is finished, and end")
    return parser.parse_args(arguments)


def open_run(args: argparse.Namespace) -> Run:
    """The run of a folder; what was not asked for is as the folder has it, and what differs from it is refused."""
    path = args.out / "settings.json"
    known = read_json(path, "settings") if path.exists() else {}
    asked = {name: getattr(args, name) for name in ("scale", "rates", "residual", "device")}
    for name, value in asked.items():
        if value is not None and known.get(name, value) != value:
            begun = f"{args.out} was begun with {known[name]}"
            raise ConfigError(f"--{name} {value}: {begun}; leave --{name} out, or choose another --out")
    defaults = {"scale": "small", "rates": "tuned", "residual": False}
    settings = {**defaults, **known, **{name: value for name, value in asked.items() if value is not None}}
    settings.setdefault("device", "cuda" if settings["scale"] == "h100" else "cpu")
    scale = SCALES[settings["scale"]]
    settings["numbers"] = to_json(asdict(scale))
    if known.get("numbers", settings["numbers"]) != settings["numbers"]:
        raise ConfigError(
            f"{path}: the numbers of --scale {settings['scale']} have changed since; choose another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return Run(args.out, scale, settings["device"], args.jobs, settings["residual"], settings["rates"])


def choose(only: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Sets and models that were asked for: those whose names match, or all of a kind of which no name matches."""
    both = choose_names([*SETS, *MODELS], only, "set or model")
    sets, models = [name for name in both if name in SETS], [name for name in both if name in MODELS]
    return sets or list(SETS), models or list(MODELS)


def installed(names: Sequence[str], of: Mapping[str, Any]) -> list[str]:
    """Those of the names that can run; what is left out is said."""
    for name in names:
        if of[name].missing:
            sys.stderr.write(f"{name}: left out, not installed: {', '.join(of[name].missing)}\n")
    return [name for name in names if not of[name].missing]


def compare(run: Run, sets: Sequence[str], models: Sequence[str], budgets: Sequence[str], seeds: int) -> list[str]:
    """Everything that is missing: data, costs, learning rates, cells; names of what failed."""
    scale = run.scale
    import_once(run, models)
    rate_sets = [name for name in scale.rate_sets if run.rates == "tuned"]

    def solved(name: str) -> bool:
        return all(path_of(run.data, name, split).exists() for split in scale.counts)

    missing = [name for name in dict.fromkeys([*rate_sets, *sets]) if not solved(name)]
    solve = {
        f"data.{n}": partial(make, run.data, n, scale.grid, scale.frames, scale.counts, run.device) for n in missing
    }
    failed = run.run("data", solve)
    sets = [name for name in sets if solved(name)]
    rate_sets = [name for name in rate_sets if solved(name)]

    shapes: dict[int, Shape] = {}
    for name in [*rate_sets, *sets]:
        channels = read(run.data, name).channels
        path = run.out / "costs" / f"{channels}.json"
        measured = read_json(path, "costs")["seconds"] if path.exists() else {}
        if any(model not in measured for model in models):
            shapes.setdefault(channels, run.shape(name, channels))
    costs = {f"costs.{n}": partial(measure_costs, run, models, shape) for n, shape in shapes.items()}
    failed += run.run("costs", costs, 1)

    tuning = {
        Cell(name, model, f"tune-{rate:g}", 0): rate
        for name in rate_sets
        for model in models
        for rate in sorted({*scale.rates, MODELS[model].rate})
    }
    failed += run_cells(run, "rates", tuning)
    known = {name: MODELS[name].rate for name in models}
    if run.rates == "tuned":
        known = chosen_rates(Results.read(run.out))
    cells = {Cell(name, PERSISTENCE, budget, 0): 0.0 for budget in budgets for name in sets}
    cells |= {
        Cell(name, model, budget, seed): known[model]
        for seed in range(seeds)
        for budget in budgets
        for name in sets
        for model in models
        if model in known
    }
    return failed + run_cells(run, "cells", cells)


def run_cells(run: Run, what: str, cells: Mapping[Cell, float]) -> list[str]:
    """The cells that have no file yet, with their learning rates."""
    (run.out / "cells").mkdir(exist_ok=True)
    pending = {cell: rate for cell, rate in cells.items() if not run.file(cell).exists()}
    return run.run(what, {cell.name: partial(run_cell, run, cell, rate) for cell, rate in pending.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        for name, kind in (*SETS.items(), *MODELS.items()):
            note = f" (not installed: {', '.join(kind.missing)})" if kind.missing else ""
            sys.stdout.write(f"{name:20s} {kind.label}{note}\n")
        return 0
    sets, models = choose(args.only)
    run = open_run(args)
    failed: list[str] = []
    if not args.page:
        try:
            lock = lock_file(args.out / "lock")
        except ConfigError:
            raise ConfigError(f"{args.out} is in use by another run; wait for it, or choose another --out") from None
        failed = compare(run, installed(sets, SETS), installed(models, MODELS), args.budgets, args.seeds)
        lock.close()
    page = write_results(run.out, scale=run.scale, rates=run.rates)
    sys.stdout.write(f"{page}\n")
    if failed:
        raise ConfigError(f"jobs that failed: {len(failed)}; see {run.out}/failed/{failed[0]}.txt, and run again")
    return 0


if __name__ == "__main__":
    run_main(main)
