"""Start gloo ranks, or a whole command line, in fresh processes that need not import torch and DeepSpeed again.

A fork server imports them once a session. Every rank, every command, and every job that a command of a study starts is
a fork of it: a new process without anything of an earlier test, which starts in milliseconds instead of seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import random
import re
import runpy
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, TypeVar
from unittest import mock

from torch.distributed import TCPStore

from shodh.experiments.harness import workers

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = [
    "torch",
    "deepspeed",
    "torch._inductor.compile_fx",  # torch's compiler; optimisers import half of it
    "shodh.moe.layer",
    *sorted(f"shodh.commands.{path.stem}" for path in (ROOT / "shodh" / "commands").glob("[!_]*.py")),
    "shodh.experiments.harness.worker",
    "torch.utils.tensorboard",
    "scipy.stats",  # what commands import when they need it costs one that reports four seconds
    "sklearn.linear_model",
    "warm",
]

#: Tests compare ranks, resumed runs and devices to the last bit, and start more ranks than a machine may have cards:
#: their processes compute on the CPU, whatever the machine has.
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SUPPORT = Path(__file__).parent


T = TypeVar("T")

_STARTING = threading.Lock()  # Two threads that changed the environment at once would leave it changed.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def made_once(path: Path, make: Callable[[], T]) -> T:
    """What ``make()`` returns to the first process that asks; the others read it from the file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
        value: T = pickle.loads(path.read_bytes())
        return value


def _process(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A started process that knows of no card; the environment is the fork server's, not that of pytest."""
    _server()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


class RankError(AssertionError):
    """A rank failed or did not answer; the message holds the tracebacks."""


class Finished(NamedTuple):
    """How a command line ended."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A port for a launcher to listen on: below those that systems give to whoever asks for any."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("0.0.0.0", random.randrange(20_000, 32_000)))
            return int(s.getsockname()[1])


def _rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _enter(environment: Mapping[str, str]) -> None:
    import torch

    # What the server imported stays: DeepSpeed collects garbage, and would copy and search all of it, 1 s a rank.
    gc.freeze()
    os.chdir(ROOT)
    # One thread a process: threads that wait for each other on busy cores cost more than they give.
    path = os.environ["PYTHONPATH"].removeprefix(str(SUPPORT)).removeprefix(os.pathsep)  # Without the server's `warm`.
    os.environ.update({"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment})
    torch.set_num_threads(1)


def _leave(code: int) -> None:
    """End without destructors: a process group would wait for what a failed neighbour never sends."""
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._run_finalizers()
    os._exit(code)


def _rank_main(connection: Connection, environment: Mapping[str, str], payload: bytes) -> None:
    _enter(environment)
    try:
        function, arguments = pickle.loads(payload)
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
    _leave(0)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*arguments)`` on ``world`` ranks at once; returns what each rank returned.

    The function is a module-level one of a test file; it finds ``RANK``, ``WORLD_SIZE`` and the rest in its
    environment, as the launcher would set them, and connects the ranks itself (`shodh.train.runtime`).

    Raises
    ------
    RankError
        With the traceback of each rank that failed, or the ranks that gave no answer in time; none is left running.
    """
    # This process listens, as torchrun does: a port that a rank takes later could be another's by then.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    payload = pickle.dumps((function, arguments))
    ranks = []
    for rank in range(world):
        receiver, sender = _context.Pipe(duplex=False)
        process = _process(_rank_main, sender, _rank_environment(rank, world, store.port), payload)
        sender.close()
        ranks.append((process, receiver))
    deadline = time.monotonic() + timeout
    answers: list[tuple[bool, Any]] = []
    try:
        for rank, (_, receiver) in enumerate(ranks):
            # After a failure the others may wait for the failed rank: they get a moment, not the whole time.
            patience = 5.0 if any(not ok for ok, _ in answers) else deadline - time.monotonic()
            if not receiver.poll(max(0.0, patience)):
                answers.append((False, f"rank {rank} gave no answer in time"))
                continue
            try:
                answers.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                answers.append((False, f"rank {rank} died"))
    finally:
        for process, receiver in ranks:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()
    failed = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in answers]


def _python_main(
    script: str, argv: Sequence[str], environment: Mapping[str, str], out: str, err: str, server: str
) -> None:
    """``python <script> <argv>``, or ``python -m <script> <argv>`` where it names a module."""
    _join_server(server)
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # Python's own streams may be another's in the fork server; these write to the descriptors.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    _enter(environment)
    workers.subprocess = SimpleNamespace(Popen=_Job)
    sys.argv = [script, *argv]
    code = 0
    try:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)


def _server() -> str:
    """Where the fork server listens, which runs."""
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    with _STARTING, mock.patch.dict(os.environ, {**ON_CPU, "PYTHONPATH": path}):
        forkserver._forkserver.ensure_running()
    return str(forkserver._forkserver._forkserver_address)


def _join_server(address: str) -> None:
    """Have this process's own processes made by the server that made it: a second one imports everything again."""
    server = forkserver._forkserver
    server._forkserver_address = address
    server.ensure_running = lambda: None


class _Job:
    """What `subprocess.Popen` is to a study: its jobs too are forks, and need not import everything again."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stdout: IO[str], stderr: IO[str], text: bool
    ) -> None:
        interpreter, flag, module, *argv = command
        assert (interpreter, flag, stderr.name, text) == (sys.executable, "-m", stdout.name, True)
        self._process = _process(_python_main, module, argv, dict(env), stdout.name, stderr.name, _server())
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def run_script(
    script: str, *argv: str | Path, environment: Mapping[str, str] | None = None, timeout: float = 240.0
) -> Finished:
    """Run ``python <script> <argv>`` from the root of the project, in a process of its own, without a launcher."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        arguments = (str(ROOT / script), [str(a) for a in argv], dict(environment or {}), out, err, _server())
        process = _process(_python_main, *arguments)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise RankError(f"{script} {' '.join(map(str, argv))} did not end; stderr:\n{Path(err).read_text()}")
        assert process.exitcode is not None
        return Finished(process.exitcode, Path(out).read_text(), Path(err).read_text())


def command_of(script: Path) -> str:
    """The command that a script runs; on many ranks it takes signals before it imports the rest."""
    found = re.search(r'run_command\("(.*)"\)|from shodh\.commands\.(\w+) import main', script.read_text())
    assert found is not None
    return found[1] or found[2].replace("_", "-")


def main_of(script: str) -> Callable[[list[str]], int]:
    """``main(argv)`` of the command that a script runs, to be called in this process."""
    module = importlib.import_module(f"shodh.commands.{command_of(ROOT / script).replace('-', '_')}")

    def main(argv: list[str]) -> int:
        with mock.patch.object(sys, "argv", [script, *argv]):
            code: int = module.main()
        return code

    return main
