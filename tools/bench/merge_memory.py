"""Measure the memory of a merge of made-up experts of several gigabytes.

Anchor and two experts are converted folders of one sparse model with random weights, in shards. Each method runs in a
process of its own, whose memory is sampled every 5 ms; VmRSS is the whole of it, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import large_run, peak_memory, plain_space, read_counters
from processes import answer_of
from tqdm import tqdm

from shodh.checkpoint.description import ModelDescription, Source, build_parts, describe_size, write_pretrained
from shodh.config import RunConfig, to_dict
from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.seeding import generator
from shodh.core.strict_json import dumps
from shodh.core.weights import LazyWeights, StoredTensor, expected_shapes, target_dtypes

EXAMPLES = """examples:
  python tools/bench/merge_memory.py --json tools/bench/results/merge_memory_cpu.json
  python tools/bench/merge_memory.py --depth 1 --methods compose --folder /scratch          a quick look
"""
NAMES = ("anchor", "low", "high")
BASE = 2**22  # random values that are repeated to fill a tensor


def write_expert(folder: Path, config: RunConfig, name: str, shard: int) -> int:
    """A converted folder with random weights; returns the bytes of its weights."""
    parts = ("tokenizer", "operator")
    with torch.device("meta"):
        shapes = expected_shapes(build_parts(config, parts))
    values = 0.02 * torch.randn(BASE, generator=generator("bench", name))
    shared = 0.02 * torch.randn(BASE, generator=generator("bench", "tokenizer"))
    weights: LazyWeights = {
        key: _repeated(shared if key.startswith("tokenizer.") else values, tuple(shape), folder)
        for key, shape in shapes.items()
    }
    start = None if name == "anchor" else "anchor"
    description = ModelDescription(
        parts=parts,
        dtype="fp32",
        space=plain_space(config),
        run=to_dict(config),
        parameters=describe_size(config, parts),
        versions={},
        source=Source(name=name, sha256=name, init_from=start),
    )
    folder.mkdir()
    write_pretrained(folder, description, weights, target_dtypes(weights, None), shard)
    return sum(4 * t.numel for t in weights.values())


def _repeated(values: torch.Tensor, shape: tuple[int, ...], path: Path) -> StoredTensor:
    count = torch.Size(shape).numel()
    whole, rest = divmod(count, len(values))
    return StoredTensor(shape, (*[values] * whole, *([values[:rest]] if rest or not whole else [])), path)


def measure(folder: Path, method: str, shard: int) -> dict[str, Any]:
    """Merge, or diagnose, in this process; the peaks of its memory, and what it had before."""
    from shodh.merge.folders import diagnose_experts, merge_experts, open_family
    from shodh.merge.recipe import ALONG, make_recipe

    before, start = read_counters(), time.perf_counter()
    with peak_memory() as peaks:
        anchor, experts = open_family(folder / "anchor", [folder / "low", folder / "high"])
        if method == "diagnose":
            diagnose_experts(anchor, *experts)
            size = 0
        else:
            recipe = make_recipe(experts, method, alpha=[0.3] if method in ALONG else None)  # type: ignore[arg-type]
            size = merge_experts(anchor, experts, recipe, folder / "out", max_shard_size=shard, overwrite=True).bytes
    seconds = time.perf_counter() - start
    return {"method": method, "seconds": seconds, "bytes_written": size, "before": before, "peak": peaks}


def main() -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--depth", type=int, default=5, help="layers of 16 experts, 0.87 GB each (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", default=["compose", "ties", "diagnose"], help="default: %(default)s")
    parser.add_argument("--max-shard-size", type=int, default=2 * 10**9, metavar="BYTES", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to make them (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, method, shard = json.loads(options.measure)
        print(dumps(measure(Path(folder), method, int(shard))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        config, rows = large_run(options.depth), []
        bar = tqdm(NAMES, desc="make", unit="expert", disable=not sys.stderr.isatty())
        size = max([write_expert(Path(name) / n, config, n, options.max_shard_size) for n in bar])
        for method in tqdm(options.methods, unit="case", disable=not sys.stderr.isatty()):
            asked = dumps([name, method, str(options.max_shard_size)])
            rows.append(answer_of([sys.executable, __file__, "--measure", asked], {"OMP_NUM_THREADS": "1"}))
            peak, before = (rows[-1][key]["VmRSS"] / 1e9 for key in ("peak", "before"))
            print(
                f"{method:<18}3 x {size / 1e9:.2f} GB, {rows[-1]['seconds']:.0f} s; "
                f"peak VmRSS {peak:.2f} GB ({before:.2f} before)"
            )
            units = "bytes; VmRSS: all memory of the process, RssFile: of it, pages of mapped files"
            write_record(options.json, {"units": units, "bytes_of_each_expert": size, "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
