"""The console command ``shodh``: one module a subcommand, each with a ``main(argv)`` that returns an exit code.

``launch/*.py`` and ``tools/*.py`` call the same functions. Nothing here imports torch before a subcommand is chosen.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import shodh
from shodh.core import signals
from shodh.core.cli import run_main
from shodh.core.errors import ConfigError


class Command(NamedTuple):
    """A subcommand: what it does in one line, and whether it may run on many ranks."""

    summary: str
    ranks: bool = False


COMMANDS = {
    "generate": Command("solve trajectories of the built-in regimes: The Well HDF5 files"),
    "inspect": Command("what a data file or folder is, and what is wrong with it"),
    "convert-data": Command("PDEBench, DPOT, FNO, JHTDB files to shards of The Well"),
    "fetch-rock": Command("percolating cubes of microCT sandstones, downloaded on request"),
    "plot": Command("one slice of each regime of a data folder"),
    "tokenizer": Command("train the autoencoder between fields and latents", ranks=True),
    "plan": Command("step time, traffic and memory of a run on 1 to 1,024 cards"),
    "pretrain": Command("train the operator; --dry-run plans it and prints every setting", ranks=True),
    "finetune": Command("fine-tune a run on a regime it has not seen", ranks=True),
    "status": Command("what runs are doing: step, speed, faults, checkpoints, experts, time to go"),
    "evaluate": Command("held-out errors with intervals, rollouts, spectra, routing: table, JSON, page", ranks=True),
    "analyze": Command("which expert learned which physics: verdict, tables, figures, page"),
    "convert": Command("a checkpoint to safetensors, with configuration and model card"),
    "merge": Command("compose experts of one family into one model"),
    "export": Command("predictions and truth, or a data file, for ParaView or xarray"),
    "study": Command("does sparse routing help? a grid of runs and one report", ranks=True),
    "launch": Command("start one of these on many ranks, here or over ssh"),
    "ccm": Command("does composition pay for a family? data, models, one report", ranks=True),
}
HELP = """usage: shodh COMMAND [OPTION ...]

{commands}

shodh COMMAND --help shows the options and examples of a command. --config takes a file, or the name of a packaged one,
as in: shodh pretrain --config demo --dry-run. Many ranks: deepspeed --num_gpus N --module shodh pretrain ..., or
deepspeed launch/pretrain.py ... in the source tree.
"""


def usage() -> str:
    """All subcommands, one a line."""
    return HELP.format(commands="\n".join(f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()))


def _choose(argv: Sequence[str]) -> int:
    """What ends before a subcommand: help, the version, or an unknown name."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        sys.stdout.write(f"shodh {shodh.__version__}\n")
        return 0
    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    raise ConfigError(f"shodh has no command {argv[0]!r}; {hint}")


def main() -> None:
    """Run ``shodh COMMAND ...`` of ``sys.argv`` and end the process."""
    argv = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        run_main(lambda: _choose(argv))
        return
    name, *rest = argv
    sys.argv = [f"shodh {name}", *rest]  # What argparse and the record of a run show.
    run_command(name, rest)


def run_command(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a subcommand, with these arguments or those of ``sys.argv``, and end the process."""
    ranks = COMMANDS[name].ranks
    if ranks:
        signals.catch()

    def run() -> int:
        code: int = import_module(f"shodh.commands.{name.replace('-', '_')}").main(argv)
        return code

    if ranks:
        from shodh.train.runtime import run_ranks

        run_ranks(run)
    else:
        run_main(run)
