"""Signals from the first second: small processes that stand where Python runs no handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shodh.core import signals

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "import ctypes, os, signal, sys\nfrom shodh.core import signals\nsignals.catch()\n"
# `sleep` of C is interrupted and called again: only the thread that watches can end this.
BLOCKED = "print('ready', flush=True)\nwhile True: ctypes.CDLL(None).sleep(9)\n"
DEEPSPEED = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": "0", "CROSS_SIZE": "1"
}  # fmt: skip


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process that has caught the signals and is at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # A shell's background job ignores it.
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", signals.STOPS)
def test_before_a_training_the_process_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    process = start(BLOCKED, SHODH_JOB_FILE=str(tmp_path / "job"))
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == signals.STOPPED and error.count("\n") == 1 and number.name in error
    assert (tmp_path / "job.code").read_text() == "3\n"


def test_a_training_is_asked_and_ends_by_itself(tmp_path: Path) -> None:
    code = "signals.hold('runs/a 7')\nprint('ready', flush=True)\nwhile not signals.asked(): signal.pause()\n"
    process = start(code + "signals.release()\nsys.exit(4 if signals.holds() else 5)", SHODH_JOB_FILE=f"{tmp_path}/job")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 5
    assert (tmp_path / "job.start").read_text() == "runs/a 7\n"


def test_what_ctrl_c_has_ended_is_said_before_it_is_released() -> None:
    """A busy machine may let the main thread leave the training before the thread that watches has said a word."""
    code = "try:\n signals.hold()\n try: raise KeyboardInterrupt\n finally: signals.release()\n"
    process = start(code + "except KeyboardInterrupt: signals.say_interrupted()\nprint('ready', flush=True)\n")
    _, error = process.communicate(timeout=30)
    assert error.count("\n") == 1 and "--resume auto" in error


def test_signals_to_a_forked_helper_are_not_for_its_parent() -> None:
    code = (
        "child = os.fork()\n"
        "if not child: signal.sigwait([signal.SIGINT])\n"
        "os.kill(child, signal.SIGUSR1); os.kill(child, signal.SIGTERM)\n"
        "ended = os.waitpid(child, 0)[1]\nprint('ready', flush=True)\nsys.exit(os.WTERMSIG(ended))\n"
    )
    assert start(code).wait(30) == signal.SIGTERM


@pytest.mark.parametrize(
    ("environment", "between", "ends"),
    [(DEEPSPEED, 0, True), (DEEPSPEED, 1, True), ({}, 0, False)],
    ids=["launcher", "command or ssh", "shell"],
)
def test_rank_ends_with_its_launcher_and_survives_a_shell(
    environment: dict[str, str], between: int, ends: bool, tmp_path: Path
) -> None:
    """``nohup python ... &`` outlives the shell; a rank stays behind neither a launcher nor what started that."""
    pid, job = tmp_path / "pid", tmp_path / "job"
    code = BEGIN + f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n" + BLOCKED
    for _ in range(between + 1):
        code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {code!r}], stdout=sys.stdout).wait()\n"
    parent = start(code, SHODH_JOB_FILE=str(job), **environment)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (30 if ends else 1)
    while time.monotonic() < deadline and not job.with_suffix(".code").exists():
        time.sleep(0.05)
    assert job.with_suffix(".code").exists() is ends
    if not ends:
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("held", "says"), [(True, "--resume auto"), (False, "same command again")])
def test_interrupt_says_what_to_type_and_ends_a_rank_that_waits_for_others(held: bool, says: str) -> None:
    code = "signals._PATIENCE = 0.1\n" + "signals.hold()\n" * held
    code += "lock = ctypes.CDLL(None).pthread_mutex_lock\nmutex = (ctypes.c_char * 64)()\nlock(mutex)\n"
    code += "while True:\n try: print('ready', flush=True), lock(mutex)\n except KeyboardInterrupt: pass\n"
    process = start(code)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.count("\n") == 1 and says in error


def test_the_first_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHODH_JOB_FILE", str(tmp_path / "job"))
    for code in (0, 2, 3):
        signals.leave_code(code)
    assert (tmp_path / "job.code").read_text() == "2\n"
