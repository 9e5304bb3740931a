"""Memory, descriptors, threads and files of a long training on two ranks: what grows with the steps, and what does not.

A tiny operator is trained for many steps with all that a run has beside them: metrics, TensorBoard, traces, logs,
validations, checkpoints, loader's workers. Growth is that from the first to the last fifth of the samples after a tenth
of the steps, medians, over the thousands of steps between. Ends with one line of JSON; exit code 1 if something grows
that must not: memory by more than 1 MiB per 1,000 steps and 1 % in all, descriptors, threads, files, or TensorBoard
faster than ``metrics.jsonl``.

example:
  python tools/bench/long_run.py --steps 20000 --json tools/bench/results/long_run_cpu.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from killing_training import configure, start

from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.train.status import read_status

KINDS = ("metrics.jsonl", "tensorboard", "routing", "logs", "checkpoints")
MIB = 2**20


def sizes(folder: Path) -> dict[str, int]:
    """Bytes by kind, and the number of files; what is removed meanwhile does not count."""
    found = dict.fromkeys((*KINDS, "others", "files"), 0)
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                first = path.relative_to(folder).parts[0]
                found[first if first in KINDS else "others"] += path.stat().st_size
                found["files"] += 1
        except FileNotFoundError:
            continue
    return found


def look(ranks: Sequence[psutil.Process], folder: Path) -> dict[str, Any]:
    """One sample: of each rank with its workers memory, descriptors and threads, and of the folder sizes."""
    rows = []
    for rank in ranks:
        family = [rank, *rank.children(recursive=True)]
        rows.append([sum(p.memory_info().rss for p in family), rank.num_fds(), rank.num_threads(), len(family)])
    columns = zip(("rss", "descriptors", "threads", "processes"), zip(*rows, strict=True), strict=True)
    maps = (Path(f"/proc/{p.pid}/maps").read_text() for rank in ranks for p in [rank, *rank.children(recursive=True)])
    shared = {line.split()[5] for text in maps for line in text.splitlines() if " /dev/shm/" in line}
    return {**{name: list(values) for name, values in columns}, **sizes(folder), "shared_memory_files": len(shared)}


def growth(samples: Sequence[dict[str, Any]], name: str, rank: int | None = None) -> float:
    """Per 1,000 steps, by the medians of the first and the last fifth."""
    fifth = max(1, len(samples) // 5)
    parts = samples[:fifth], samples[-fifth:]
    first, last = (statistics.median(s[name] if rank is None else s[name][rank] for s in part) for part in parts)
    steps = [statistics.median(s["step"] for s in part) for part in parts]
    return 1000 * float(last - first) / max(1.0, steps[1] - steps[0])


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--samples", type=int, default=200, help="looks, spread evenly over the steps")
    parser.add_argument("--workers", type=int, default=1, help="of the loader of each rank")
    parser.add_argument("--keep", type=Path, help="folder to work in, and to leave")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        every = max(10, args.steps // 40)
        config = str(configure(folder, args.steps, 32, every))
        changes = [f"operator.train.valid_every={every}", f"data.workers={args.workers}", "name=long"]
        began, run = time.monotonic(), folder / "runs" / "long"
        log = folder / "ranks.log"
        ranks = start("launch/pretrain.py", "--config", config, "--set", *changes, log=str(log))
        watched = [psutil.Process(process.pid) for process in ranks]
        samples: list[dict[str, Any]] = []
        while all(process.is_alive() for process in ranks):
            time.sleep(0.2)
            step = read_status(run).step if run.exists() else 0
            if step >= len(samples) * args.steps / args.samples and step > 0:
                try:
                    samples.append({"step": step, "seconds": round(time.monotonic() - began, 1), **look(watched, run)})
                except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                    break
        for process in ranks:
            process.join()
        codes, ended = [process.exitcode for process in ranks], read_status(run)
        if any(codes):
            sys.stderr.write(log.read_text()[-2000:])
        final = sizes(run)
    settled = [s for s in samples if s["step"] >= args.steps / 10]
    grown: dict[str, Any] = {
        name: [round(growth(settled, name, rank), 4) for rank in range(len(ranks))]
        for name in ("rss", "descriptors", "threads")
    }
    grown |= {name: round(growth(settled, name), 2) for name in (*KINDS, "others", "files", "shared_memory_files")}
    largest = [0.01 * max((s["rss"][i] for s in settled), default=0) for i in range(len(ranks))]
    bad = [
        f"memory of rank {i}"
        for i, value in enumerate(grown["rss"])
        if value > MIB and value * ended.step / 1000 > largest[i]
    ]
    bad += [n for n in ("descriptors", "threads") if any(abs(value) > 0.5 for value in grown[n])]
    bad += [name for name in ("files", "shared_memory_files") if grown[name] > 0.5]
    bad += ["tensorboard"] if grown["tensorboard"] > grown["metrics.jsonl"] else []
    bad += [f"exit codes {codes}"] if any(codes) or ended.state != "finished" else []
    result = {
        "steps": ended.step,
        "seconds": round(time.monotonic() - began, 1),
        "units": "bytes; growth: per 1,000 steps, of each rank where there are two values",
        "growth": grown,
        "grows": bad,
        "final": final,
        "samples": samples,
    }
    sys.stdout.write(dumps({name: value for name, value in result.items() if name != "samples"}) + "\n")
    write_record(args.json, result)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
