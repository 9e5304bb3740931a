"""What every command line of the project shares: one clear line for bad input, and exit code 2."""

from __future__ import annotations

import argparse
import errno
import fnmatch
import os
import select
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from shodh.errors import ConfigError, ShodhError

EXIT_USAGE = 2
EXIT_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def training_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """The arguments that every training command has."""
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def named_paths(option: str, settings: Sequence[str]) -> dict[str, Path]:
    """Paths by name from ``NAME=PATH``; raises `ConfigError` for another form."""
    found: dict[str, Path] = {}
    for setting in settings:
        name, equals, path = setting.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{option} {setting!r}: expected NAME=PATH")
        found[name] = Path(path)
    return found


def field_maps(settings: Sequence[str], regimes: Collection[str]) -> dict[str, dict[str, str]]:
    """``{regime: {our field: field of the files}}`` from ``REGIME.OURS=THEIRS``; raises `ConfigError`."""
    found: dict[str, dict[str, str]] = {}
    for setting in settings:
        place, equals, theirs = setting.partition("=")
        regime, dot, ours = place.rpartition(".")
        if not (regime and dot and ours and equals and theirs):
            raise ConfigError(f"--map {setting!r}: expected REGIME.OURS=THEIRS")
        if regime not in regimes:
            raise ConfigError(f"--map {setting!r}: no regime {regime!r} is given; there are {sorted(regimes)}")
        found.setdefault(regime, {})[ours] = theirs
    return found


def choose_names(names: Sequence[str], patterns: Sequence[str] | None, what: str) -> list[str]:
    """The names that match a pattern of ``--only``, as in a shell; all without patterns.

    Raises
    ------
    ConfigError
        A pattern matches none; ``what`` the names are of is said in the message.
    """
    if patterns is None:
        return list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"--only {pattern!r} matches no {what}; they are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def error_line(error: BaseException) -> str | None:
    """One line for errors a user can act on; None for those that deserve a traceback."""
    if isinstance(error, ShodhError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no disk space left{where}; free some, or choose another output folder, and run the same command again"
    if isinstance(
        error, PermissionError | FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError
    ):
        return f"{error.strerror}: {error.filename}"
    return None


def _reader_left() -> bool:
    """Whether it is standard output that is broken, and not some other pipe or socket."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def run_main(main: Callable[[], int]) -> None:
    """Run ``main`` and end the process: its exit code, 2 with one ``error:`` line for bad input, 130 for Ctrl-C.

    Where the reader of the output has left (``| head``) it ends without a word.
    """
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end.
            sys.exit(EXIT_PIPE)
        line = error_line(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        sys.exit(EXIT_USAGE)
    sys.exit(code)
