"""Errors of the operating system end a command with one line, its path and exit code 2."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helper import Finished, run_script

from shodh.core.cli import REMEDIES, error_line, run_main
from shodh.core.files import LineFile, write_atomically
from shodh.moe.routing import Routing
from shodh.moe.trace import TraceWriter
from shodh.train.attempts import ATTEMPTS
from shodh.train.events import add_line
from shodh.train.metrics import MetricWriter


def assert_one_line(finished: Finished, *expected: str) -> None:
    lines = [line for line in finished.stderr.splitlines() if "error: " in line]
    assert finished.code == 2 and len(lines) == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert all(text in lines[0] for text in expected), lines[0]


@pytest.mark.parametrize(
    "name",
    ["EROFS", "ENAMETOOLONG", "ELOOP", "EFBIG", "ENOSPC", "EDQUOT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "EMFILE",
     "ENFILE", "EIO", "ESTALE", "ENOENT", "EEXIST", "EBUSY", "ENOTEMPTY", "EXDEV", "ENOLCK", "EINVAL"],
)  # fmt: skip
def test_every_error_with_a_path_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(errno, name)

    def main() -> int:
        raise OSError(number, os.strerror(number), "runs/a/file")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    stderr = capsys.readouterr().err
    assert caught.value.code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "runs/a/file" in stderr


def refused(write: Callable[[], object]) -> str:
    """The line for what ``write`` raises; errors of libraries keep their own classes."""
    with pytest.raises(Exception) as caught:
        write()
    line = error_line(caught.value)
    assert line is not None, repr(caught.value)
    return line


def test_full_disk_is_told_by_every_library_that_writes(tmp_path: Path) -> None:
    """``/dev/full`` has no space left."""

    def plain() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    def array() -> None:
        with open("/dev/full", "wb") as file:
            np.save(file, np.zeros(10**6))

    assert "no disk space left" in refused(plain)
    assert "space" in refused(array) or "written" in refused(array)
    assert "written" in refused(lambda: torch.save(torch.zeros(10**6), "/dev/full"))


@pytest.mark.parametrize("library", ["torch", "safetensors", "h5py", "plain"])
def test_limit_on_the_size_of_files(library: str, tmp_path: Path) -> None:
    """In a process of its own, whose files may have 64 KiB."""
    code = (
        "import resource, sys\n"
        "import h5py, numpy, torch\nfrom safetensors.torch import save_file\nfrom shodh.core.cli import run_main\n"
        "path = sys.argv[2]\n"
        "def h5py_():\n"
        "    with h5py.File(path, 'w') as file:\n        file['a'] = numpy.ones(10**6)\n"
        "write = {'torch': lambda: torch.save(torch.ones(10**6), path), 'h5py': h5py_,\n"
        "         'safetensors': lambda: save_file({'a': torch.ones(10**6)}, path),\n"
        "         'plain': lambda: open(path, 'w').write('x' * 10**6)}[sys.argv[1]]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "run_main(lambda: write() and 0)\n"
    )
    (tmp_path / "limited.py").write_text(code)
    finished = run_script(str(tmp_path / "limited.py"), library, tmp_path / "file")
    assert finished.code == 2, finished.stderr
    assert finished.stderr.startswith("error: ") and "Traceback" not in finished.stderr


def test_each_file_of_a_run_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Writing to an open file names none by itself; of a copy it is the target that matters."""
    metrics, trace = MetricWriter(tmp_path, trackers={}), TraceWriter(tmp_path / "trace", 0, ("a",), 10)
    one, chosen = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    routing = Routing(one, one, chosen, torch.ones(1, dtype=torch.int32), one[:, :0], one)

    def write_trace() -> None:
        trace.add(0, "train", [routing], torch.zeros(1, dtype=torch.long))
        trace.flush()

    writers: dict[str, Callable[[], object]] = {
        "metrics.jsonl": lambda: (metrics.write(0, {"a": 1.0}), metrics.flush()),
        "trace": write_trace,
        "attempts.jsonl": lambda: add_line(tmp_path / ATTEMPTS),
        "small": lambda: write_atomically(tmp_path / "small", "x"),
    }
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
        try:
            line = refused(write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert str(tmp_path / name) in line
    copying = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source", None, "copy")
    assert error_line(copying) == f"no disk space left while writing copy; {REMEDIES[errno.ENOSPC]}"


def test_lines_that_a_disk_refuses_for_a_time_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "lines"
    lines, strict = LineFile(path, lenient=True), LineFile(tmp_path / "strict")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        for number in range(4):
            lines.add(f"line {number}")
            lines.flush()
            strict.add(f"line {number}")
        assert str(tmp_path / "strict") in refused(strict.flush)
        assert path.read_text() == "line 0\nlin" and len(caplog.records) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for file in (lines, strict):
        file.close()
    assert path.read_text() == (tmp_path / "strict").read_text() == "".join(f"line {number}\n" for number in range(4))


def test_too_many_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        line = refused(lambda: [held.append(open(tmp_path / f"{n}", "w")) for n in range(100)])
        assert "ulimit -n" in line and str(tmp_path) in line
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lack_of_memory_is_no_traceback() -> None:
    assert "memory" in refused(lambda: torch.empty(2**55))
    assert "memory" in refused(lambda: np.ones(2**55, dtype=np.uint8))
    assert "memory" in refused(lambda: torch.empty((2**40, 2**40), device="meta"))


def test_full_shared_memory_of_nccl_is_one_line() -> None:
    """As torch 2.10 passes it on, of NCCL 2.27."""
    text = (
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5 ncclSystemError: System "
        "call (e.g. socket, malloc) or external library call failed or device error. Last error: Error while creating "
        "shared memory segment /dev/shm/nccl-Vx2f1a (size 9637888), error: No space left on device (28)"
    )
    line = error_line(torch.distributed.DistBackendError(text))
    assert line is not None and line.startswith("no disk space left while writing /dev/shm/nccl-Vx2f1a")


def test_full_shared_memory_of_workers_is_one_line() -> None:
    """As torch 2.10 passes on what a data worker met, and Python a semaphore that it could not make."""
    worker = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n ...\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_961_0>: No space left on device "
        "(28)"
    )
    semaphore = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/dev/shm")
    lines = [error_line(RuntimeError(worker)), error_line(semaphore)]
    assert lines[0] == lines[1] and "/dev/shm; give it more" in str(lines[0])


def test_hdf5_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path) in refused(lambda: h5py.File(tmp_path / "file" / "a.hdf5", "w"))


def test_port_in_use(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        two = {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        finished = run_script("launch/train_tokenizer.py", "--config", config, environment=two)
        assert_one_line(finished, f"port: {port}", "MASTER_PORT")
        alone = run_script("launch/train_tokenizer.py", "--config", config, environment={"MASTER_PORT": port})
    assert alone.code == 0, "one rank needs no port"


@pytest.mark.parametrize(
    ("out", "expected"),
    [("n" * 300, "File name too long"), ("loop", "symbolic link"), ("file/x", "Not a directory"), ("/proc/none", "")],
    ids=["long", "loop", "file", "unwritable"],
)
def test_output_folder_that_cannot_be_made(
    out: str, expected: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path / "c.yaml")
    place = tmp_path / out
    finished = run_script("launch/train_tokenizer.py", "--config", config, "--set", f"out={place}")
    assert_one_line(finished, expected, str(place)[:40])
