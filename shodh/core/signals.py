"""SIGTERM and SIGUSR1, which schedulers send before the end, from the first second on. Imports nothing heavy.

Until a training holds weights worth saving nothing can be lost: the process ends at once with `STOPPED`, also while
it imports, waits for other ranks or reads, where Python runs no handler. From `hold` on the training asks `asked` at a
step's edge.

Environment
-----------
SHODH_JOB_FILE=PATH
    A scheduler's script wants to know: the first rank that ends by its own will leaves its exit code in ``PATH.code``,
    and a training that begins or goes on leaves where it does so in ``PATH.start``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

from shodh.core.launcher import LauncherError, read_launch

STOPPED = 3  # Exit code of a process that a signal ended, and that can go on: back into the queue.
STOPS = (signal.SIGTERM, signal.SIGUSR1)
INTERRUPTED = 130
_PATIENCE = 5.0  # seconds for a Ctrl-C to reach Python, before the process is ended
_PR_SET_PDEATHSIG = 1


_SAYS = threading.Lock()


class _State:
    asked = False
    held = False
    caught = False
    interrupted = False


def asked() -> bool:
    """Whether a signal to stop came."""
    return _State.asked


def holds() -> bool:
    """Whether a training holds what must be saved before the end."""
    return _State.held


def catch() -> None:
    """Take the signals; once, in the main thread, before anything slow is imported."""
    if _State.caught:
        return
    _State.caught = True
    for number in STOPS:
        signal.signal(number, _ask)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOPS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS),
        after_in_child=_forget,
    )
    with contextlib.suppress(LauncherError):  # said later, by whoever asks for the rank
        if (launcher := read_launch().name) not in ("none", "by hand"):
            end_with_parent()
        if launcher == "deepspeed" and sys.platform == "linux":
            watched = (os.getppid(), _parent(os.getppid()))  # Now: the thread may begin after the command has died.
            threading.Thread(target=_end_with_command, args=watched, name="launcher", daemon=True).start()


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies, by whatever end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def heed_parent_alone() -> None:
    """In a helper process: SIGTERM of its parent ends it; what a scheduler sends to all processes of a job does not.

    Without the first, a parent that exits would wait for its helpers without end (`multiprocessing` terminates, and
    joins, what is left). Linux alone tells who sent a signal; elsewhere helpers take them as they come.
    """
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        threading.Thread(target=_end_by_parent, name="signals", daemon=True).start()


def _end_by_parent() -> None:
    while True:
        sent = signal.sigwaitinfo(STOPS)
        if sent.si_signo == signal.SIGTERM and sent.si_pid == os.getppid():
            os._exit(0)


def _end_with_command(launcher: int, command: int | None) -> None:
    """Get SIGTERM when what started the launcher of this machine dies: the command, or a session of ssh.

    deepspeed's launcher itself would go on without it, with ranks that nobody hears.
    """
    while (now := _parent(launcher)) == command:
        time.sleep(1.0)
    if now is not None:  # Whoever loses the launcher itself is told by the system.
        os.kill(os.getpid(), signal.SIGTERM)


def _parent(process: int) -> int | None:
    """Number of the process that started one; None for one that has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def hold(start: str = "") -> None:
    """From here on a signal only sets `asked`; ``start`` is where the training begins, for `SHODH_JOB_FILE`."""
    catch()
    _State.held = True
    path = os.environ.get("SHODH_JOB_FILE")
    if path and start:
        with contextlib.suppress(OSError), open(f"{path}.start", "w") as file:
            file.write(f"{start}\n")


def release() -> None:
    """What was to be saved is, or is lost by a Ctrl-C: the next signal ends the process at once again."""
    if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # Said while it is known what that has ended.
        say_interrupted()
    _State.held = False


def leave_code(code: int) -> None:
    """Leave the code in the job's file, unless another rank ended earlier; those after it are ended by the launcher."""
    path = os.environ.get("SHODH_JOB_FILE")
    if path and code:
        with contextlib.suppress(OSError), open(f"{path}.code", "x") as file:
            file.write(f"{code}\n")


def _forget() -> None:
    """In a child that is forked: what it gets is not for this process, and a scheduler's signal not for its helpers."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _ask(*_: object) -> None:
    _State.asked = True


def _watch(descriptor: int) -> None:
    while numbers := os.read(descriptor, 64):
        if signal.SIGINT in numbers:
            say_interrupted()
        stops = [number for number in numbers if number in STOPS]
        if stops and not _State.held and not _State.interrupted:  # Launchers send SIGTERM after a Ctrl-C.
            _say(
                f"ended by {signal.Signals(stops[0]).name} before there was anything to save; the same command goes on"
            )
            leave_code(STOPPED)
            os._exit(STOPPED)


def say_interrupted() -> None:
    """Say once what Ctrl-C has ended, and end at the latest after some seconds; either thread may be first."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # Somebody else's: a study hands it on.
    with _SAYS:
        if _State.interrupted:
            return  # One that a launcher sends after that of the terminal.
        _State.interrupted = True
        if _State.held:
            _say(
                "interrupted: steps since the last checkpoint are lost; the same command with --resume auto goes on "
                "from it (kill -TERM, instead of Ctrl-C, saves one first)"
            )
        else:
            _say("interrupted; run the same command again to go on")
    timer = threading.Timer(_PATIENCE, os._exit, (INTERRUPTED,))  # A rank may wait for others in a collective.
    timer.daemon = True
    timer.start()


def _say(line: str) -> None:
    with contextlib.suppress(LauncherError, OSError, ValueError):
        if read_launch().rank == 0:
            os.write(2, f"{line}\n".encode())
