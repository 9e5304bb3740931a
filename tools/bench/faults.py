"""Do to a training on several ranks what a cluster does, start it again each time, compare it with an undisturbed run.

faults: `rank`, `launcher`: kill -9. `stop`: SIGSTOP of a rank, which the watchdog must notice. `flip`: kill -9 of all,
and a bit of the newest checkpoint flips. `full`: the file system of the run (a tmpfs) is full. `share`: one rank sees
an empty folder where the others see the runs. The last two need root, and are left out, which is said, without it.

Every fault is aimed at a random moment: anywhere, while a checkpoint is written, when it is published. At the end
metrics but those of the clock, traces, weights and the optimiser's state must be the undisturbed run's, bit by bit.
Prints a line a fault, and ends with one line of JSON; exit code 1 if something differs, or a fault ends otherwise than
it must.

example:
  python tools/bench/faults.py --faults 50 --ranks 4 --out tools/bench/results/faults_cpu.json
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import killing_training as killing
from torch.distributed import TCPStore

import shodh.checkpoint.complete
from shodh.checkpoint.folder import checkpoints_of
from shodh.core.cli import EXIT_FAULT, EXIT_USAGE, command_parser
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.train.runtime import AGENT_STORE

KINDS = ("rank", "launcher", "stop", "flip", "full", "share")
AIMS = ("anywhere", "writing", "publishing")
CODES = {"stop": EXIT_FAULT, "full": EXIT_USAGE, "share": EXIT_USAGE}  # others end by a signal
TMPFS_MB = 256
NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS
SCRIPT = "launch/pretrain.py"


def own_mounts() -> bool:
    """Give this process mounts of its own; whether it may."""
    return ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE) == 0


def mount(path: Path, megabytes: int, process: int | None = None) -> None:
    """An empty tmpfs at a path, as this process sees it, or another one."""
    enter = [] if process is None else ["nsenter", "-t", str(process), "-m"]
    command = [*enter, "mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "shodh", str(path)]
    subprocess.run(command, check=True, timeout=20)


def _enter_rank(*arguments: Any) -> None:
    own_mounts()
    os.setpgid(0, 0)
    killing._rank(*arguments)


def _launch(connection: Connection, world: int, arguments: list[str], log: str) -> None:
    """What a launcher does: start the ranks, wait, and end all at the first that fails."""
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, AGENT_STORE: "True", "OMP_NUM_THREADS": 1}
        place |= {"TORCHELASTIC_RUN_ID": "faults"}  # As torchrun: ranks end with it.
        environment = {name: str(value) for name, value in place.items()}
        target = (str(killing.ROOT / SCRIPT), arguments, environment, log)
        ranks.append(multiprocessing.get_context("fork").Process(target=_enter_rank, args=target))
        ranks[-1].start()
    connection.send([process.pid for process in ranks])
    code = None
    while code is None:
        time.sleep(0.02)
        ended = [process.exitcode for process in ranks if process.exitcode is not None]
        code = next((c for c in ended if c), 0 if len(ended) == world else None)
    time.sleep(0.5)  # The other ranks may say something, too.
    for process in ranks:
        process.kill()
        process.join()
    os._exit(code if code >= 0 else 128 - code)


class Job:
    """A started training: its launcher and its ranks."""

    def __init__(self, world: int, arguments: list[str], log: Path) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        self.log, self._said = log, log.stat().st_size if log.exists() else 0
        context = multiprocessing.get_context("fork")
        self.launcher = context.Process(target=_launch, args=(sender, world, arguments, str(log)))
        self.launcher.start()
        self.ranks: list[int] = receiver.recv()

    def alive(self) -> bool:
        return self.launcher.is_alive()

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        found = []
        for process in self.ranks:
            with suppress(OSError, IndexError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found.append(process)
        return found

    def wait(self, limit: float) -> int | None:
        """The launcher's exit code, once no rank is left; None if one is, after ``limit`` seconds."""
        self.launcher.join(limit)
        end = time.monotonic() + limit
        while self.running() and time.monotonic() < end:
            time.sleep(0.02)
        return None if self.alive() or self.running() else self.launcher.exitcode

    def clear(self) -> None:
        for process in (self.launcher.pid, *self.running()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)  # type: ignore[arg-type]
        self.launcher.join()
        while self.running():
            time.sleep(0.02)

    def errors(self) -> list[str]:
        """The error lines of this start."""
        text = self.log.read_bytes()[self._said :].decode(errors="replace")
        return [line for line in text.splitlines() if "error: " in line or "Traceback" in line]


@dataclass
class Trial:
    """A run that things are done to."""

    run: Path
    moments: random.Random
    seconds: float  # of a step
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def newest(self) -> int:
        found = checkpoints_of(self.run)
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def aim(self, job: Job, target: str) -> None:
        """Wait for a new checkpoint, so that the run gets on, and then for a moment of the kind."""

        def until(reached: Callable[[], bool], limit: float = 120.0) -> None:
            end = time.monotonic() + limit
            while job.alive() and not reached() and time.monotonic() < end:
                time.sleep(0.002)

        known = self.newest()
        until(lambda: self.newest() > known)
        if target == "writing":
            until(lambda: any(self.checkpoints.glob(".step_*.partial")))
        elif target == "publishing":
            known = self.newest()
            until(lambda: self.newest() > known)
        spread = {"anywhere": 6.0, "writing": 1.0, "publishing": 0.1}[target]
        time.sleep(self.moments.uniform(0.0, spread * self.seconds))

    def inject(self, job: Job, kind: str) -> int | None:
        """Do it, and wait until it was noticed; the exit code."""
        chosen = self.moments.choice(job.ranks)
        if kind == "rank":
            os.kill(chosen, signal.SIGKILL)
        elif kind == "launcher":
            job.launcher.kill()
        elif kind == "stop":
            os.kill(chosen, signal.SIGSTOP)
        elif kind == "flip":
            job.clear()
            self.flip()
        elif kind == "share":
            mount(self.run.parent, 8, chosen)
        elif kind == "full":
            return self.fill(job)
        return job.wait(90.0)

    def flip(self) -> None:
        """One bit of any file of the newest checkpoint that the manifest lists."""
        newest = checkpoints_of(self.run)[-1]
        victim = self.moments.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_nlink == 1))
        position = self.moments.randrange(8 * victim.stat().st_size)
        with victim.open("r+b") as file:
            file.seek(position // 8)
            byte = file.read(1)[0] ^ 1 << position % 8
            file.seek(position // 8)
            file.write(bytes([byte]))

    def fill(self, job: Job) -> int | None:
        """Leave no byte free for as long as the run lives."""
        filler = self.run.parent / "filler"
        end = time.monotonic() + 90.0
        with filler.open("wb", buffering=0) as file:
            while job.alive() and time.monotonic() < end:
                with suppress(OSError):
                    while file.write(bytes(2**20 if file.tell() < 2**20 * TMPFS_MB else 2**12)):
                        pass
                time.sleep(0.01)
        code = job.wait(10.0)
        filler.unlink()
        return code


def compared(run: Path) -> dict[str, Any]:
    """What must be the same: `killing.content`, but for checkpoints that were damaged and set aside."""
    found = killing.content(run)
    for name in ("names", "weights and moments"):
        kept = [n for n in found[name] if "damaged_" not in n]
        found[name] = kept if name == "names" else {n: found[name][n] for n in kept}
    return found


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=400, help="of a run; when it is done, the next one begins")
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--width", type=int, default=128, help="of an expert: how much a checkpoint holds")
    parser.add_argument("--least", type=float, default=8.0, help="seconds until the watchdog acts")
    parser.add_argument("--seed", type=int, default=0, help="of faults and moments")
    parser.add_argument("--log", type=Path, help="what the ranks say (default: in the scratch folder)")
    parser.add_argument("--out", type=Path, help="write the result, every fault, machine and command as JSON")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    shodh.checkpoint.complete.PATIENCE = 2.0  # seconds for a file of another node; the ranks are forks
    rooted = own_mounts() and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0
    kinds = [kind for kind in args.kinds if rooted or kind not in ("full", "share")]
    if len(kinds) < len(args.kinds):
        sys.stderr.write("full and share are left out: this process may not mount\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch), args.log or Path(scratch, "log")
        (folder / "runs").mkdir()
        if rooted:
            mount(folder / "runs", TMPFS_MB)
        config = str(killing.configure(folder, args.steps, args.width, args.every))
        watch = [f"watchdog.least={args.least}", "watchdog.startup=60"]
        began = time.monotonic()
        whole = Job(args.ranks, ["--config", config, "--set", "name=whole", *watch], log)
        if whole.wait(3600.0) != 0:
            sys.stderr.write("\n".join([*whole.errors(), "the undisturbed run failed\n"]))
            return 1
        duration = time.monotonic() - began
        expected = compared(folder / "runs" / "whole")
        killing.shutil.rmtree(folder / "runs" / "whole")
        table: list[dict[str, Any]] = []
        different, wrong, runs, unasked = [], [], 0, Counter[str]()
        while len(table) < args.faults:
            runs += 1
            trial = Trial(folder / "runs" / f"run{runs}", moments, duration / args.steps)
            command = ["--config", config, "--set", f"name=run{runs}", *watch, "--resume", "auto"]
            code: int | None = None
            while code != 0:
                job = Job(args.ranks, command, log)
                if len(table) == args.faults:
                    code = job.wait(3600.0)
                    if code != 0:
                        wrong.append(f"left alone, run{runs} ended with {code}: {job.errors()[:1]}")
                        job.clear()
                        code = 0
                    continue
                target = moments.choice(AIMS)
                trial.aim(job, target)
                if not job.alive():
                    code = job.wait(10.0)
                    if code != 0:
                        unasked[f"{code}: {job.errors()[:1]}"] += 1
                        if sum(unasked.values()) > 5:
                            code = 0
                    continue
                options = [k for k in kinds if k != "flip" or len(checkpoints_of(trial.run)) > 1]
                kind, before, start = moments.choice(options), trial.newest(), time.monotonic()
                ended = trial.inject(job, kind)
                row = {"fault": kind, "at": target, "checkpoint": before, "code": ended}
                row |= {"seconds": round(time.monotonic() - start, 1), "said": job.errors()[:1], "left": trial.newest()}
                table.append(row)
                sys.stderr.write(dumps(row) + "\n")
                if ended is None or CODES.get(kind, ended) != ended:
                    wrong.append(f"{kind} ended with {ended}")
                    job.clear()
            found = compared(trial.run)
            different += [f"run{runs}: {key}" for key in expected if found[key] != expected[key]]
            killing.shutil.rmtree(trial.run)
        if rooted:
            subprocess.run(["umount", "-l", str(folder / "runs")], check=True)
    seconds = {kind: [row["seconds"] for row in table if row["fault"] == kind] for kind in kinds}
    result = {
        "faults": dict(Counter(row["fault"] for row in table)),
        "seconds_until_ended": {k: [min(v), max(v)] for k, v in seconds.items() if v},
        "codes": {k: sorted({str(row["code"]) for row in table if row["fault"] == k}) for k in kinds},
        "runs": runs,
        "ended_otherwise": wrong,
        "ended_unasked": dict(unasked),
        "different": different,
        "undisturbed_seconds": round(duration, 1),
    }
    sys.stdout.write(dumps(result) + "\n")
    write_record(args.out, {**result, "table": table})
    return 1 if different or wrong or unasked else 0


if __name__ == "__main__":
    sys.exit(main())
