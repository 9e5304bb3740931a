"""What every command line of the project shares: one clear line for bad input, and exit code 2."""

from __future__ import annotations

import argparse
import errno
import fnmatch
import os
import re
import select
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from shodh.core.errors import ConfigError, ShodhError
from shodh.core.files import SHARED

EXIT_USAGE = 2
EXIT_FAULT = 4  # a fault of the machine, not of the run: the same command with --resume auto goes on
EXIT_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def command_parser(description: str | None, examples: str | None = None, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help shows description and examples line by line, as they stand."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=examples, formatter_class=layout, **options)


def training_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """The arguments that every training command has."""
    parser = command_parser(description, examples)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--verbose", action="store_true", help="show DeepSpeed's log too")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and every setting; touch no data")
    parser.add_argument("--nodes", type=positive, help="dry run: nodes to plan for (default: as configured)")
    parser.add_argument("--gpus-per-node", type=positive, help="dry run: GPUs of a node (default: as configured)")
    parser.add_argument(
        "--profile",
        type=positive,
        default=0,
        metavar="STEPS",
        help="profile so many steps after the first ones: a trace and a table of the largest kernels in RUN/profile",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_weights(parser: argparse._ActionsContainer, of: str = "") -> None:
    """Which weights of a checkpoint are meant; ``of`` says of which, where a command reads several."""
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help=f"{of}their average over the training, or those of the checkpoint's step (default: the average, where the "
        "run kept one)",
    )


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


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


#: What to do about errors of the operating system; others are told by their own words.
REMEDIES = {
    errno.ENOSPC: "free some, or choose another output folder, and run the same command again",
    errno.EDQUOT: "free some, or choose another output folder, and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another output folder",
    errno.EROFS: "let it be written (a disk with errors turns read-only: dmesg), or choose another output folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: end other programs",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ELOOP: "a symbolic link leads back to itself: mend it",
    errno.EADDRINUSE: "choose a free one with MASTER_PORT, or deepspeed --master_port",
    errno.ENOMEM: "use a smaller batch, grid or model",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OF_TARGET = (*_NO_SPACE, errno.EFBIG, errno.EROFS)  # of two files, where one is copied: the one that is written
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|storage size calculation overflow", re.I)
# How libraries tell an error of the operating system without its number: h5py, safetensors, torch's sockets, NCCL.
_NUMBER = re.compile(r"(?:errno = |\bcode: -?|\(os error |shared memory segment .*, error: [^(]*\()(\d+)")
_SHARED = re.compile(r"unable to .*shared memory.*No space left on device")
_MORE_SHARED = "give it more (docker run --ipc=host or --shm-size), or use fewer data.workers"
_TORCH_SAVE = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|iostream error")
_NAME = re.compile(r"(?:file)?name = '([^']+)'|\b(port: \d+)|(/dev/shm\S*)")


def _system_error(number: int, reason: str, place: object) -> str:
    if number in _NO_SPACE and str(place).startswith(SHARED):
        return f"no disk space left while writing {place}; {_MORE_SHARED}"
    if number in _NO_SPACE:
        return f"no disk space left{f' while writing {place}' if place else ''}; {REMEDIES[number]}"
    text = f"{reason}: {place}" if place else reason
    return f"{text}; {REMEDIES[number]}" if number in REMEDIES else text


def _named(text: str) -> str | None:
    """The file or port that the message of a library names."""
    found = _NAME.search(text)
    return found and next(name for name in found.groups() if name)


def error_line(error: BaseException) -> str | None:
    """One line for errors a user can act on; None for those that deserve a traceback."""
    if isinstance(error, ShodhError):
        return " ".join(str(error).split())
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        return f"out of memory ({text[:200]}); {REMEDIES[errno.ENOMEM]}" if text else "out of memory"
    if isinstance(error, BrokenPipeError | ConnectionError | ChildProcessError | ProcessLookupError):
        return None
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        name = error.filename2 if error.filename2 and error.errno in _OF_TARGET else error.filename
        place = os.fsdecode(name) if isinstance(name, bytes) else name
        place = place if place is not None else _named(text)
        return _system_error(error.errno, os.strerror(error.errno), place)
    foreign = ("SafetensorError", "DistNetworkError", "DistBackendError")
    if (isinstance(error, OSError) or type(error).__name__ in foreign) and (found := _NUMBER.search(text)):
        number = int(found[1])
        return _system_error(number, os.strerror(number), _named(text))
    if isinstance(error, RuntimeError) and _SHARED.search(text):
        return _system_error(errno.ENOSPC, "", SHARED)
    if isinstance(error, RuntimeError) and _TORCH_SAVE.search(text):
        return f"a file could not be written ({text[:200]}): is the disk full, or a limit on files reached?"
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
