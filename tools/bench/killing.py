"""Kill the data generator at random moments, run it again, and compare with an undisturbed run.

example:
  python tools/bench/killing.py --regime all2d porous_media heat --kills 10 -- --grid 16 --trajectories 6 --frames 6

What follows -- goes to tools/generate_data.py. Kills hit the whole process group and the parent alone, in turn. Exit
code 1 if a file differs. Ends with one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shodh.core.cli import command_parser

ROOT = Path(__file__).resolve().parents[2]


def start(options: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools" / "generate_data.py"), *options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def finish(options: Sequence[str], out: Path) -> float:
    """Run to the end; seconds."""
    began = time.monotonic()
    if start(options, out).wait() != 0:
        raise SystemExit("the generator failed; run the same options with tools/generate_data.py to see why")
    return time.monotonic() - began


def kill(process: subprocess.Popen[bytes], *, group: bool) -> bool:
    """Kill with SIGKILL; whether the process was still at work."""
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
    process.wait()
    return alive


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--regime", nargs="+", required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("options", nargs="*", help="options of the generator, after --")
    args = parser.parse_args()
    options = ["--regime", *args.regime, *args.options]
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        duration = finish(options, whole)
        hits = 0
        for attempt in range(args.kills):
            process = start(options, killed)
            # Starting takes seconds, during which nothing can be lost: wait for the first new file, then a moment.
            files = len(list(killed.rglob("*.hdf5")))
            while process.poll() is None and len(list(killed.rglob("*.hdf5"))) == files:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 1.5 * duration / max(1, len(list(whole.rglob("*.hdf5"))))))
            hits += kill(process, group=attempt % 2 == 0)
        finish(options, killed)
        expected, found = snapshot(whole), snapshot(killed)
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    result = {
        "regimes": len({Path(name).parts[0] for name in expected}),
        "files": len(expected),
        "kills_at_work": hits,
        "different": different,
    }
    sys.stdout.write(json.dumps(result | {"undisturbed_seconds": round(duration, 1)}, allow_nan=False) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
