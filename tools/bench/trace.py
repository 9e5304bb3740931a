"""Speed and memory of reading a routing trace: written, read back by a fresh process, and thrown away."""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from processes import answer_of

from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.routing import find_traces, read_traces

TARGET = 10**8
EXAMPLES = """examples:
  python tools/bench/trace.py --out tools/bench/results/trace_cpu.json
  python tools/bench/trace.py --records 200000 --regimes 6 --experts 16
  python tools/bench/trace.py --records 2000000 --ranks 50          a hundred million records: 50 links to one file
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--records", type=int, nargs="+", default=[250_000, 2_000_000], help="sizes of traces")
    parser.add_argument("--ranks", type=int, default=1, help="files of a trace, each with so many records")
    parser.add_argument("--regimes", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--folder", type=Path, help="where the trace is written meanwhile (default: a temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="write the numbers, machine, versions and command as JSON")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write(path: Path, records: int, args: argparse.Namespace) -> None:
    """A trace as training writes it: one record a layer and step, 4096 tokens each."""
    rng = np.random.default_rng(0)
    names = [f"regime_{chr(ord('a') + r)}" for r in range(args.regimes)]
    tails = []
    for _ in range(97):  # different digits, so that nothing is read from a cache of numbers
        counts = rng.multinomial(4096 // args.regimes, rng.dirichlet(np.ones(args.experts)), args.regimes).tolist()
        score = [round(v, 6) for v in rng.dirichlet(np.ones(args.experts)).tolist()]
        tail = {"rank": 0, "num_tokens": 4096, "top_k": 1, "num_experts": args.experts}
        tail |= {"counts": dict(zip(names, counts, strict=True)), "mean_score": score, "confidence": score[0]}
        tails.append(dumps(tail, separators=(",", ":"))[1:])
    with path.open("w") as file:
        for number in range(records):
            step, layer = divmod(number, args.layers)
            file.write(f'{{"v":2,"step":{step},"split":"train","layer":{layer},{tails[number % 97]}\n')


def measure(folder: Path) -> dict[str, float]:
    """Read the trace of a folder in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    trace = read_traces(find_traces(folder))
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"records": trace.tables.records, **seconds, "peak_mib": peak, "peak_before_mib": before}


def run_case(records: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write a trace, and read it in a process of its own, so that the peak of memory is its own."""
    trace = folder / str(records)
    trace.mkdir()
    first = trace / "rank0.jsonl"
    write(first, records, args)
    for rank in range(1, args.ranks):
        (trace / f"rank{rank}.jsonl").hardlink_to(first)
    found = answer_of([sys.executable, __file__, "--read", str(trace)])
    size = first.stat().st_size
    shutil.rmtree(trace)
    assert found["records"] == records * args.ranks
    speed = found["records"] / found["cpu_s"]
    return {**found, "files": args.ranks, "bytes_per_record": size / records, "records_per_cpu_s": speed}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.read is not None:
        sys.stdout.write(dumps(measure(args.read)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cases = [run_case(records, args, Path(folder)) for records in sorted(args.records)]
    for case in cases:
        sys.stdout.write(
            f"{case['records']:>10,} records of {case['bytes_per_record']:.0f} bytes: "
            f"{case['records_per_cpu_s'] / 1e6:.2f} million a CPU second, peak {case['peak_mib']:.0f} MiB "
            f"({case['peak_before_mib']:.0f} MiB before reading)\n"
        )
    last = cases[-1]
    hours = TARGET / last["records_per_cpu_s"] / 3600
    if last["records"] < TARGET:
        sys.stdout.write(f"extrapolated, not run: {TARGET:,} records in {hours:.2f} CPU hours, at the same memory\n")
    shape = {"regimes": args.regimes, "experts": args.experts, "layers": args.layers}
    write_record(args.out, {"shape": shape, "cases": cases, "extrapolated_cpu_hours_1e8": hours})
    return 0


if __name__ == "__main__":
    run_main(main)
