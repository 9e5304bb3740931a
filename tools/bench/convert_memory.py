"""Measure the memory of a conversion on made-up checkpoints of several gigabytes.

Made are what DeepSpeed leaves of a bf16 run on two ranks with the experts spread over both (ZeRO 1 and ZeRO 3; without
Adam's moments and the bf16 copies, which a conversion maps at most and never reads), and safetensors. Each is converted
in a process of its own, whose memory is sampled every 5 ms: RssAnon is what the process allocated, and what must fit;
RssFile are pages of the mapped source, a view of the page cache that the kernel takes back whenever it needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from processes import answer_of, read_status
from tqdm import tqdm

from shodh.checkpoint.run_files import write_tokenizer
from shodh.config import RunConfig, config_from_dict, dump_config
from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.core.weights import expected_shapes, persistent_buffers
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.schema.domain import Domain
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space

EXAMPLES = """examples:
  python tools/bench/convert_memory.py --json tools/bench/results/convert_memory_cpu.json
  python tools/bench/convert_memory.py --depth 1 --folder /scratch          a quick look
  mkdir /sys/fs/cgroup/memory/small; echo 1900M > /sys/fs/cgroup/memory/small/memory.limit_in_bytes
  python tools/bench/convert_memory.py --cgroup /sys/fs/cgroup/memory/small with all memory limited, page cache too
"""
RANKS = 2
COUNTERS = ("RssAnon", "RssFile", "VmRSS")
INTERVAL = 0.005


def read_counters() -> dict[str, int]:
    """Bytes by counter."""
    return {name: read_status(name) for name in COUNTERS}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """The peaks of the counters, sampled every `INTERVAL` seconds; final when the block is left."""
    peaks, done = read_counters(), threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            for name, value in read_counters().items():
                peaks[name] = max(peaks[name], value)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def large_run(depth: int, **settings: Any) -> RunConfig:
    """A run whose operator has ``depth`` layers of 16 experts, 0.87 GB each."""
    experts = {"num_experts": 16, "hidden": 4096}
    tree = {
        "name": "large",
        "data": {"grid": [16, 16, 16], "regimes": [{"name": "porous_media", "path": "nowhere"}]},
        "operator": {"dim": 1024, "heads": 16, "depth": depth, "experts": experts},
    }
    return config_from_dict({**tree, **settings})


def plain_space(config: RunConfig) -> Space:
    """Fields of a run in a periodic box, normalised already."""
    fields = [f.build() for f in config.data.fields]
    constants = {r.name: {f.name: (0.0, 1.0) for f in fields if not f.static} for r in config.data.regimes}
    domain = Domain(("periodic",) * 3, (1.0, 1.0, 1.0))
    return Space.of(FieldNormalizer(fields, 3, constants), fields, dict.fromkeys(constants, domain))


def make_tokenizer(config: RunConfig) -> None:
    """The run folder of a tokenizer that was never trained."""
    folder = config.tokenizer_dir
    folder.mkdir(parents=True)
    model = build_tokenizer(config)
    initialise(model, 0)
    state = model.state_dict()
    write_tokenizer(folder, config, plain_space(config), {name: state[name] for name in expected_shapes(model)})


def write_deepspeed(config: RunConfig, folder: Path, stage: int) -> int:
    """A folder as two ranks leave it; returns the bytes of its float32 weights."""
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    folder.mkdir(parents=True)
    (folder.parent / "config.yaml").write_text(dump_config(config))
    with torch.device("meta"):
        model = build_operator(config)
    num_experts = config.operator.experts.num_experts
    shapes: list[dict[str, tuple[int, ...]]] = [{}, {}]
    for name, parameter in model.named_parameters():
        expert = ".experts." in name
        local = (num_experts // RANKS, *parameter.shape[1:]) if expert else tuple(parameter.shape)
        shapes[expert][name] = local
    per_rank = num_experts // RANKS
    ranks = [{"rank": r, "experts": list(range(r * per_rank, (r + 1) * per_rank))} for r in range(RANKS)]
    prefixes = sorted({name.rpartition(".")[0] for name in shapes[1]})
    layers = [
        {"num_experts": num_experts, "expert_placement": {"ranks": ranks}, "expert_key_prefix": prefix}
        for prefix in prefixes
    ]
    buffers = {name: torch.zeros(b.shape) for name, b in persistent_buffers(model)}
    module = {
        "module": {**buffers, "embed.bias": torch.zeros(0, dtype=torch.bfloat16)},
        "buffer_names": list(buffers),
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "ds_version": "0.19.8",
        "ds_config": {},
        "global_steps": 1,
        "ds_autoep_layers": layers,
    }
    sizes = [sum(math.prod(s) for s in group.values()) for group in shapes]
    counts = [RANKS, 1]  # ranks among which a parameter of the group is split
    for rank in range(RANKS):
        if stage == 3:
            torch.save(module, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flats, mappings = [], []
        for group, count in zip(shapes, counts, strict=True):
            shares = {name: -(-math.prod(shape) // count) for name, shape in group.items()}
            total = sum(math.prod(shape) for shape in group.values())
            share = sum(shares.values()) if stage == 3 else -(-total // count)
            flats.append(torch.randn(share, generator=torch.Generator().manual_seed(rank)))
            mapping, start, first = {}, 0, share * rank if count > 1 else 0
            for name, shape in group.items():
                stop = start + math.prod(shape)
                low, high = max(start, first), min(stop, first + share)
                if low < high:
                    mapping[name] = fragment_address(numel=high - low, start=low - first)
                start = stop
            mappings.append(mapping)
        state: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage)}
        if stage == 3:
            state["partition_count"] = RANKS
            state["fp32_flat_groups"] = flats
            state["ds_zero_partition_groups"] = [{"partition_count": count} for count in counts]
        else:
            state["partition_count"] = counts
            state["single_partition_of_fp32_groups"] = flats
            state["param_slice_mappings"] = mappings
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, path)
    if stage < 3:
        torch.save(module, folder / "mp_rank_00_model_states.pt")
        for layer in range(len(prefixes)):
            for expert in range(num_experts):
                torch.save({}, folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return 4 * (sizes[0] + RANKS * sizes[1])


def measure(source: Path, out: Path, dtype: str, limit: int, verify: bool) -> dict[str, Any]:
    """Convert in this process; the peaks of its memory, and what it had before."""
    from shodh.checkpoint.convert import convert

    before, start = read_counters(), time.perf_counter()
    with peak_memory() as peaks:
        written = convert(source, out, dtype, max_shard_size=limit, verify=verify)
    largest = max((out / name).stat().st_size for name in written.files)
    return {
        "seconds": time.perf_counter() - start,
        "bytes_written": written.bytes,
        "files": len(written.files),
        "largest_shard": largest,
        "before": before,
        "peak": peaks,
        "anon_over_shard": peaks["RssAnon"] - largest,
    }


def forget_pages(folder: Path) -> None:
    """Drop the page cache of a folder's files, which is charged to whoever reads them first."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def run_child(cgroup: Path | None, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", dumps([str(a) for a in arguments])]
    if cgroup is not None:
        forget_pages(Path(arguments[0]))
        # The shell enters the group and then becomes the conversion.
        command = ["sh", "-c", 'echo $$ > "$0"; exec "$@"', str(cgroup / "cgroup.procs"), *command]
    found: dict[str, Any] = answer_of(command, {"OMP_NUM_THREADS": "1"})
    return found


def cgroup_limit(cgroup: Path | None) -> str | None:
    """The memory limit of a control group, version 1 or 2."""
    if cgroup is None:
        return None
    files = [cgroup / name for name in ("memory.limit_in_bytes", "memory.max")]
    return next(f.read_text().strip() for f in files if f.exists())


def main() -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--depth", type=int, default=5, help="layers of 16 experts, 0.87 GB each (default: %(default)s)"
    )
    parser.add_argument("--max-shard-size", type=int, default=10**9, metavar="BYTES", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to make them (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument(
        "--cgroup", type=Path, metavar="folder", help="memory control group, with a limit, that conversions run in"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        source, out, dtype, limit, verify = json.loads(options.measure)
        print(dumps(measure(Path(source), Path(out), dtype, int(limit), verify == "True")))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = large_run(options.depth, out=str(folder))
        make_tokenizer(config)
        limit = options.max_shard_size
        rows = []
        cases = [("zero1", "fp32"), ("zero3", "fp32"), ("safetensors", "bf16")]
        for kind, dtype in tqdm(cases, unit="case", disable=not sys.stderr.isatty()):
            source = folder / "out-zero1" if kind == "safetensors" else folder / kind / "global_step1"
            size = write_deepspeed(config, source, int(kind[-1])) if kind != "safetensors" else rows[0]["bytes_written"]
            row = {"source": kind, "dtype": dtype, "source_bytes": size}
            rows.append({**row, **run_child(options.cgroup, source, folder / f"out-{kind}", dtype, limit, True)})
            row = rows[-1]
            print(
                f"{kind:<12}{size / 1e9:6.2f} GB -> {dtype}, {row['files']} files, largest "
                f"{row['largest_shard'] / 1e9:.2f} GB, {row['seconds']:.0f} s; "
                f"peak RssAnon {row['peak']['RssAnon'] / 1e9:.2f} GB ({row['before']['RssAnon'] / 1e9:.2f} before), "
                f"RssFile {row['peak']['RssFile'] / 1e9:.2f} GB"
            )
            for path in sorted(source.parent.glob("**/*.pt")) if kind != "safetensors" else []:
                path.unlink()
            units = "bytes; RssAnon: allocated, RssFile: pages of mapped files, which the kernel may take back"
            about = {"verified": True, "limit": cgroup_limit(options.cgroup), "units": units}
            write_record(options.json, {**about, "cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
