"""Before a job reads or writes: are its ranks alike, do they see the same files, and does the network carry numbers.

Rank 0 decides where the run goes on and how ranks are laid out; all others follow. The number of collectives does not
depend on that of ranks, and hashes are exchanged, not contents: 1,024 ranks take seconds.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import shodh
from shodh.config import RunConfig, to_dict
from shodh.core.distributed import describe_ranks, from_first, gather, together
from shodh.core.environment import PACKAGES, installed_version
from shodh.core.errors import ConfigError, DataError
from shodh.core.files import PARTIAL_SUFFIX, checksum
from shodh.core.strict_json import dumps
from shodh.core.topology import Topology
from shodh.data.formats.splits import list_files

log = logging.getLogger("shodh")

CLOCKS = 5.0  # seconds that clocks may differ by before the log names their hosts
PATIENCE = 5.0  # seconds until a file of another node must be there
SLOW = 0.7  # part of the median rate of all cards below which a card is named


@dataclass(frozen=True)
class Decision:
    """What rank 0 found and chose.

    Attributes
    ----------
    start : Path, optional
        The checkpoint to go on from.
    topology : Topology
    inputs : sequence of (path, bytes)
        Files that every rank must be able to read; None for the size of a folder.
    token : Path
        A file of rank 0 in the run folder, or in the folder where that will be made.
    """

    start: Path | None
    topology: Topology
    inputs: Sequence[tuple[Path, int | None]]
    token: Path = field(default_factory=Path)


class Report(NamedTuple):
    """What a rank says of itself."""

    host: str
    alike: dict[str, str]  # hashes of what must be the same everywhere
    clock: float
    speed: float  # TFLOP/s of its card; 0 on a CPU


def inputs_of(config: RunConfig, more: Iterable[Path]) -> list[tuple[Path, int | None]]:
    """The first file of each regime, and further files and folders, as this rank sees them.

    What is missing here is left out: where it is opened the remedy is told.
    """
    firsts = (min(list_files(r.path), default=r.path) for r in config.data.regimes)
    there = [path.absolute() for path in (*firsts, *more) if path.exists()]
    return [(path, None if path.is_dir() else path.stat().st_size) for path in there]


def check_space(folder: Path, needed: float) -> None:
    """Refuse a run whose first checkpoint would not fit on the disk of its folder, which need not be there yet."""
    there = _existing(folder)
    free, size = (usage := shutil.disk_usage(there)).free, usage.total
    if free < needed and size:  # One of size zero is no disk, and says itself why nothing can be made there.
        raise ConfigError(
            f"{there}: {free / 2**30:.4g} GiB are free, and a checkpoint of this run takes {needed / 2**30:.4g}; free "
            "some, or choose another folder with --set out=..."
        )


def put_token(folder: Path) -> Path:
    """Leave a file with a name that nobody else has where a run's folder is, or will be."""
    path = _existing(folder) / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    try:
        path.touch(exist_ok=False)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; choose another folder with --set out=...") from error
    return path


def preflight(config: RunConfig, asked: Mapping[str, Any], decision: Decision, device: torch.device) -> None:
    """Compare the ranks, look for the files that they share, and measure the network. Collective.

    Parameters
    ----------
    asked : mapping
        What else the command line says and all ranks must have alike.

    Raises
    ------
    SharedError
        One line, with rank and host, of what differs, is missing, or does not work.
    """
    started = time.perf_counter()
    with together():
        _check_files(decision)
        speed = _card_speed(device) if device.type == "cuda" else 0.0
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    settings = {"config": to_dict(config), **asked}
    details = {"sources": sources(), "versions": _versions(), "settings": _flat(settings)}
    network = _measure(decision.topology.ep_size, device)
    hashes = {name: _digest(tree) for name, tree in details.items()}
    reports = gather(Report(socket.gethostname(), hashes, time.time(), speed))
    for name, tree in details.items():
        if any(report.alike[name] != reports[0].alike[name] for report in reports):
            _refuse(name, tree)
    _warn(reports)
    log.info("preflight: %d ranks on %d hosts in %.1f s; %s", len(reports), len({r.host for r in reports}),
             time.perf_counter() - started, network)  # fmt: skip


@cache
def sources() -> dict[str, str]:
    """SHA-256 of every source file of the package, by its place in it."""
    root = Path(shodh.__file__).parent
    kinds = {".py", ".cpp", ".cu", ".h", ".yaml", ".json"}
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return {f.relative_to(root).as_posix(): checksum(f) for f in sorted(files) if f.suffix in kinds}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there; NotADirectoryError where a file has the name of one."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    return there


def _check_files(decision: Decision) -> None:
    """Look for the token and the inputs; files of other nodes are waited for."""
    end = time.monotonic() + PATIENCE
    while not decision.token.exists():
        if time.monotonic() > end:
            raise ConfigError(
                f"{decision.token.parent} is not the folder of rank 0, which keeps the run there; let --set out=... "
                "name a folder that all nodes share"
            )
        time.sleep(0.2)
    for path, size in decision.inputs:
        try:
            status = path.stat()
            if size is not None:
                with path.open("rb") as file:
                    file.read(1)
        except FileNotFoundError:
            raise DataError(f"{path} is not there, and rank 0 has it; let all nodes see the same files") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}, and rank 0 can read it; correct its permissions") from error
        if size is not None and status.st_size != size:
            raise DataError(
                f"{path} has {status.st_size} bytes, and rank 0 sees {size}; let all nodes see the same files"
            )


def _card_speed(device: torch.device, size: int = 4096, repeats: int = 20) -> float:
    """TFLOP/s of a product of matrices of small whole numbers, whose result is known exactly.

    Raises
    ------
    ConfigError
        The result is wrong, or there is no memory for it.
    """
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        log.warning(
            "%s: %.3g of %.3g GiB are free; another process is at work there", device, free / 2**30, total / 2**30
        )
    ones = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    product = ones @ ones
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        product = ones @ ones
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    if not bool((product == size).all()):
        raise ConfigError(
            f"{device} multiplies wrongly: take this card out of service (nvidia-smi -q shows its errors)"
        )
    return 2e-12 * size**3 * repeats / seconds


def _measure(ep_size: int, device: torch.device) -> str:
    """Bandwidth of an all-reduce, and of an all-to-all among the ranks that share experts, the second time. Collective.

    Raises
    ------
    SharedError
        Numbers arrive wrong.
    """
    own, world = dist.get_rank(), dist.get_world_size()
    count = 2**24 if device.type == "cuda" else 2**18
    values = torch.empty(count, device=device)
    seconds = []
    for _ in range(2):
        values.fill_(own)
        seconds.append(_timed(lambda: dist.all_reduce(values), device))
    wrong = bool((values != world * (world - 1) / 2).any())
    text = f"all-reduce {_rate(2 * (world - 1) / world * 4 * count, seconds[1])}"
    if ep_size > 1:
        first, share = own - own % ep_size, count // ep_size
        splits = [share if first <= other < first + ep_size else 0 for other in range(world)]
        sent = torch.full((share * ep_size,), float(own), device=device)
        came = torch.empty_like(sent)
        seconds = [_timed(lambda: dist.all_to_all_single(came, sent, splits, splits), device) for _ in range(2)]
        expected = torch.arange(first, first + ep_size, device=device, dtype=torch.float32)
        wrong = wrong or bool((came.view(ep_size, share) != expected[:, None]).any())
        text += f", all-to-all of {ep_size} ranks {_rate(4 * share * (ep_size - 1), seconds[1])}"
    with together():
        if wrong:
            raise ConfigError("numbers that were sent between ranks arrive changed; test the network and the cards")
    return text


def _timed(call: Any, device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _rate(count: float, seconds: float) -> str:
    return f"{count / seconds / 1e9:.3g} GB/s a rank"


def _versions() -> dict[str, str]:
    from deepspeed.accelerator import get_accelerator

    return {
        "python": platform.python_version(),
        "shodh": shodh.__version__,
        "cuda": str(torch.version.cuda),
        "nccl": str(torch.cuda.nccl.version()) if torch.cuda.is_available() else "none",
        **{name: installed_version(name) for name in PACKAGES},
        "accelerator": str(get_accelerator().device_name()),  # DeepSpeed's choice, however it came to it
    }


def _flat(tree: Any, where: str = "") -> dict[str, str]:
    """Every setting by its name."""
    if not isinstance(tree, dict):
        return {where: str(tree)}
    return {name: text for k, v in tree.items() for name, text in _flat(v, f"{where}.{k}" if where else str(k)).items()}


def _digest(tree: Mapping[str, str]) -> str:
    return hashlib.sha256(dumps(tree, sort_keys=True).encode()).hexdigest()


def _refuse(name: str, ours: Mapping[str, str]) -> None:
    """Name what differs from rank 0, with ranks and hosts. Collective."""
    first = from_first(lambda: ours)
    with together():
        keys = sorted(k for k in {*ours, *first} if ours.get(k) != first.get(k))
        if keys:
            shown = [
                k if name == "sources" else f"{k} {ours.get(k, 'missing'):.60}, there {first.get(k, 'missing'):.60}"
                for k in keys[:3]
            ]
            raise ConfigError(
                f"other {name} than rank 0: {'; '.join(shown)}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}; "
                "let all nodes have the same installation, configuration and command line"
            )


def _warn(reports: Sequence[Report]) -> None:
    """Name clocks that differ and cards that are slow."""
    middle = sorted(report.clock for report in reports)[len(reports) // 2]
    late = [(n, r.host) for n, r in enumerate(reports) if abs(r.clock - middle) > CLOCKS]
    if late:
        widest = max(abs(r.clock - middle) for r in reports)
        log.warning("clocks differ by up to %.0f s: %s; set them (chrony, ntpd)", widest, describe_ranks(late))
    speed = sorted(report.speed for report in reports)[len(reports) // 2]
    slow = [(n, r.host) for n, r in enumerate(reports) if r.speed < SLOW * speed]
    if slow and not math.isclose(speed, 0.0):
        log.warning("cards below %.0f %% of the median %.0f TFLOP/s: %s; all ranks wait for them (nvidia-smi -q -d "
                    "PERFORMANCE)", 100 * SLOW, speed, describe_ranks(slow))  # fmt: skip
