"""The log file of a rank: bounded, with host and rank in each line, and never the reason that a run ends."""

from __future__ import annotations

import errno
import io
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh.train import rank_logs
from shodh.train.rank_logs import drop_rank_log, file_log, keep_rank_log, log_path

log = logging.getLogger("shodh")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)
    for handler in list(file_log.handlers):
        if not isinstance(handler, logging.NullHandler):
            drop_rank_log(handler)


def test_lines_name_host_and_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "7", "WORLD_SIZE": "16", "LOCAL_RANK": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    keep_rank_log(tmp_path, 40)
    log.info("for all")
    logging.getLogger("other").warning("of a library")
    file_log.error("for the file alone")
    lines = log_path(tmp_path, 7).read_text().splitlines()
    assert all(f" {socket.gethostname()} rank 7 " in line for line in lines)
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["40", "all", "library", "alone"]


def test_a_log_is_bounded_and_a_second_job_closes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_logs, "LIMIT", 2000)
    (tmp_path / "next").mkdir()
    keep_rank_log(tmp_path, 0)
    for number in range(1000):
        log.info("line %d", number)
    files = list((tmp_path / "logs").iterdir())
    assert len(files) == 2 and sum(path.stat().st_size for path in files) <= 4000
    assert "line 999" in log_path(tmp_path, 0).read_text()
    keep_rank_log(tmp_path / "next", 0)
    log.info("elsewhere")
    assert "elsewhere" not in log_path(tmp_path, 0).read_text()
    assert "elsewhere" in log_path(tmp_path / "next", 0).read_text()


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_is_not_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = keep_rank_log(tmp_path, 0)
    assert isinstance(handler, logging.StreamHandler)
    handler.stream.close()
    handler.stream = _FullDisk()
    log.info("lost")
    assert capsys.readouterr().err == ""
    drop_rank_log(handler)
    (tmp_path / "file").touch()
    assert keep_rank_log(tmp_path / "file", 0) is None, "no folder can be made there"
