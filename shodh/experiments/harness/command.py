"""The command line that all studies share: its options, and the way from them to a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from shodh.core.cli import choose_names, command_parser
from shodh.core.errors import ConfigError
from shodh.experiments.harness.ranks import Ranks
from shodh.experiments.harness.run import Run
from shodh.experiments.harness.runner import check_forerunners, run_all
from shodh.experiments.harness.settings import PRESETS, StudySettings
from shodh.experiments.harness.workers import Progress, Workers


def study_parser(description: str | None, examples: str, config_required: bool = True) -> argparse.ArgumentParser:
    """The options of every study; they mean the same in all of them, as do the settings of their files."""
    parser = command_parser(description, examples)
    add = parser.add_argument
    add("--config", required=config_required, type=Path, help="study file")
    add("--scale", choices=PRESETS, default="tiny", help="preset of the study file")
    add("--only", nargs="+", metavar="PATTERN", help="runs whose names match, as in a shell")
    add("--jobs", type=int, default=1, help="runs side by side, each on one rank")
    add("--seeds", type=int, help="in place of the study's")
    add("--name", help="in place of the study's")
    add("--out", type=Path, help="folder of the study's folder")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change the base run; study.KEY=VALUE: the study itself",
    )
    add("--dry-run", action="store_true", help="list the runs and what they cost; make nothing")
    add("--report-only", action="store_true", help="report on the runs that are finished")
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def parse_study(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, and those that `load_settings` takes; raises `ConfigError` for impossible numbers."""
    args = parser.parse_args(argv)
    for name in ("jobs", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    keys = {"path": args.config, "scale": args.scale, "overrides": args.set}
    return args, {**keys, "name": args.name, "out": args.out, "seeds": args.seeds}


class Unit(Protocol):
    """A run as the command line needs it."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Refuse what lies in its place and is of another run."""


R = TypeVar("R", bound=Unit)


@dataclass(frozen=True)
class Study(Generic[R]):
    """A study as the command line needs it.

    Attributes
    ----------
    expand : callable
        Number of ranks -> every run, in the order in which they are made.
    describe : callable
        Chosen runs -> what they are and cost, as text; makes nothing.
    make : callable
        (chosen runs, every run, jobs side by side, ranks): make those that are not finished; `one_by_one`, or another.
    report : callable
        Every run -> the top of the report as text; writes ``<study>/report`` from those that are finished.
    """

    settings: StudySettings
    expand: Callable[[int], list[R]]
    describe: Callable[[Sequence[R]], str]
    make: Callable[[Sequence[R], Sequence[R], int, Ranks], Progress]
    report: Callable[[Sequence[R]], str]


def one_by_one(settings: StudySettings, prepare: Callable[[Sequence[Run], Workers], None] | None = None) -> Any:
    """`Study.make` of runs that are processes; ``prepare(chosen, workers)`` makes what all of them need."""

    def make(chosen: Sequence[Run], every: Sequence[Run], jobs: int, ranks: Ranks) -> Progress:
        check_forerunners(chosen, every)
        first = None if prepare is None else lambda workers: prepare(chosen, workers)
        return run_all(settings.folder, chosen, jobs, ranks, settings.name, first)

    return make


def conduct(study: Study[R], args: argparse.Namespace) -> int:
    """List, or make, the chosen runs that are not finished, and report on all that are; the exit code.

    Raises
    ------
    ConfigError, DataError
        Another run lies in the place of one of the study's (`Unit.check`), or a chosen one needs another.
    ShodhError
        What all runs need could not be made.
    """
    ranks = Ranks()
    every = study.expand(ranks.world)
    names = choose_names([run.name for run in every], args.only, "run")
    chosen = [run for run in every if run.name in names]
    if args.dry_run:
        sys.stdout.write(study.describe(chosen) if ranks.rank == 0 else "")
        return 0
    for run in every:  # Before anything is made: the report reads them all.
        run.check()
    progress = Progress() if args.report_only else study.make(chosen, every, args.jobs, ranks)
    if ranks.rank == 0:
        sys.stdout.write(study.report(every))
        sys.stdout.write(f"\nreport: {study.settings.folder / 'report' / 'index.html'}\n")
        sys.stderr.write(progress.complaints())
    return progress.exit_code
