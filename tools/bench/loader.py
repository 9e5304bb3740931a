"""Time the way of a sample from file to batch against a raw read of the same bytes, in the same order.

Raw: ``pread`` of each snapshot's chunk into one reused buffer. All contestants run interleaved in one process on a warm
page cache, or with --cold after the file was dropped from it; medians over rounds, and ratios are medians of ratios
within a round. Processor time, of the main process alone and so only without workers, is what a busy machine changes
least; the load is written down.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from timing import in_turns, ratios

from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.data import MixtureLoader, MixtureSampler, RegimeSource, WindowDataset, write_trajectories
from shodh.data.normalize import fit_normalizer
from shodh.schema.fields import Field, RegimeSchema, Trajectories

EXAMPLES = """examples:
  python tools/bench/loader.py --json tools/bench/results/loader_cpu.json
  python tools/bench/loader.py --grid 64 --rounds 5 --workers 2
  python tools/bench/loader.py --cold --rounds 3
"""
KINDS = {
    "4 scalars": tuple(Field(n) for n in "abcd"),
    "vector + scalar": (Field("velocity", "vector", placement="face", solenoidal=True), Field("tracer")),
}


def write(folder: Path, fields: tuple[Field, ...], grid: int, samples: int) -> Path:
    """One training file of single-frame windows, and the smallest of the others."""
    rng = np.random.default_rng(0)
    schema = RegimeSchema("box", fields, ("periodic",) * 3)
    for split, count in (("train", samples), ("valid", 1), ("test", 1)):
        shape = (1, count, grid, grid, grid)
        values = {f.name: rng.random((*shape, *((3,) * (f.kind == "vector"))), dtype=np.float32) for f in fields}
        file = Trajectories(schema, (1.0, 1.0, 1.0), np.arange(float(count)), values)
        write_trajectories(folder / "data" / split / "box.hdf5", file)
    return folder


def chunk_offsets(path: Path, fields: tuple[Field, ...]) -> list[list[tuple[int, int]]]:
    """``(offset, bytes)`` of the chunks of each sample."""
    offsets: list[list[tuple[int, int]]] = []
    with h5py.File(path) as file:
        for field in fields:
            dataset = file[f"t{int(field.kind == 'vector')}_fields/{field.name}"]
            for frame in range(dataset.shape[1]):
                info = dataset.id.get_chunk_info_by_coord((0, frame, *(0,) * (dataset.ndim - 2)))
                while len(offsets) <= frame:
                    offsets.append([])
                offsets[frame].append((info.byte_offset, info.size))
    return offsets


def raw_reader(path: Path, fields: tuple[Field, ...], order: list[int]) -> Callable[[], None]:
    offsets = chunk_offsets(path, fields)
    buffer = np.empty(sum(size for _, size in offsets[0]), dtype=np.uint8)
    descriptor = os.open(path, os.O_RDONLY)

    def read() -> None:
        for sample in order:
            start = 0
            for offset, size in offsets[sample]:
                done = os.preadv(descriptor, [memoryview(buffer)[start : start + size]], offset)
                assert done == size
                start += size

    return read


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(calls: dict[str, Callable[[], Any]], rounds: int, drop: Path | None) -> dict[str, Any]:
    """Wall and processor seconds of each call by round; a first round warms up, or ``drop`` leaves the cache."""

    def timed(call: Callable[[], Any]) -> tuple[float, float]:
        if drop is not None:
            drop_from_cache(drop)
        wall, processor = time.perf_counter(), time.thread_time()
        call()
        return time.perf_counter() - wall, time.thread_time() - processor

    return in_turns({name: partial(timed, call) for name, call in calls.items()}, rounds, 1)


def contestants(
    folder: Path, fields: tuple[Field, ...], workers: list[int]
) -> tuple[dict[str, Callable[[], Any]], int]:
    source = RegimeSource("box", folder, fields)
    normalizer = fit_normalizer([source])
    plain = WindowDataset(source, "train", history=1, horizon=0)
    dataset = WindowDataset(source, "train", history=1, horizon=0, normalizer=normalizer)
    sampler = MixtureSampler(0, [len(dataset)], [1.0], 1)
    order = [index for step in range(len(dataset)) for _, index in sampler.batch(step)]
    out = np.empty(dataset.sample_shape, dtype=np.float32)

    def read_into_reused() -> None:
        for index in order:
            source.read("train", 0, range(index, index + 1), out)

    def items(data: WindowDataset) -> Callable[[], None]:
        def run() -> None:
            for index in order:
                data[index]

        return run

    def loads(loader: MixtureLoader) -> Callable[[], None]:
        def run() -> None:
            for batch in loader.iterate(0, len(order)):
                del batch

        return run

    calls: dict[str, Callable[[], Any]] = {
        "raw pread": raw_reader(source.files["train"][0].path, fields, order),
        "source.read": read_into_reused,
        "item, physical": items(plain),
        "item, normalised": items(dataset),
    }
    for count in workers:
        loader = MixtureLoader([dataset], sampler, num_workers=count)
        calls[f"loader, {count} workers"] = loads(loader)
    return calls, len(order) * out.nbytes


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--grid", type=int, default=128, help="cells along each axis (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=12, help="samples of a pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each pass")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    rows = []
    load = [os.getloadavg()[0]]
    for kind, fields in KINDS.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            calls, size = contestants(
                write(Path(folder), fields, options.grid, options.samples), fields, options.workers
            )
            file = next(Path(folder).glob("data/train/*.hdf5"))
            times = measure(calls, options.rounds, file if options.cold else None)
        for name, seconds in times.items():
            wall, processor = zip(*seconds, strict=True)
            raw_wall, raw_processor = zip(*times["raw pread"], strict=True)
            rows.append(
                {
                    "fields": kind,
                    "name": name,
                    "gb_per_s": size / statistics.median(wall) / 1e9,
                    "over_raw": statistics.median(ratios(raw_wall, wall)),
                    "over_raw_best": min(raw_wall) / min(wall),
                    "over_raw_processor": None
                    if "workers" in name and not name.startswith("loader, 0")
                    else statistics.median(ratios(raw_processor, processor)),
                }
            )
        load.append(os.getloadavg()[0])
    threads = torch.get_num_threads()
    print(f"{options.grid}^3 x 4 channels, float32, batch 1, {threads} threads, load {load[0]:.1f} to {max(load):.1f}")
    for row in rows:
        print(
            f"{row['fields']:<16} {row['name']:<20} {row['gb_per_s']:>8.2f} GB/s {row['over_raw']:>6.2f} of raw"
            + (f", {row['over_raw_processor']:.2f} in processor time" if row["over_raw_processor"] else "")
        )
    write_record(options.json, {"load": load, "cold": options.cold, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
