"""How long a save holds the training, and how long it takes until it is published.

One rank, ZeRO 1, a model of ``--millions`` parameters in float32, as many saves as ``--rounds``; shown are medians in
seconds. ``held`` is what the training waits for: the checks and the copy to host memory. ``published`` is the whole
save, which was waited for before there was a thread to write.

example:
  python tools/bench/saving.py --millions 50 --out saving.json
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from shodh.checkpoint.snapshot import Snapshot
from shodh.checkpoint.training import CheckpointWriter
from shodh.config import TrainConfig
from shodh.core.cli import command_parser, run_main
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.core.topology import Topology
from shodh.moe.groups import decay_groups
from shodh.train.engine import build_engine, load_deepspeed_config
from shodh.train.runtime import quiet_logs, start_distributed

WIDTH = 1000


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    quiet_logs()
    device = start_distributed()
    train, topology = TrainConfig(steps=1, lr=1e-3), Topology(world_size=1, ep_size=1, micro_batch=1, accumulation=1)
    root = Path(__file__).resolve().parents[2]
    settings = load_deepspeed_config(root / "ds_configs" / "zero1.json", train, topology)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(args.millions))).to(device)
    engine = build_engine(model, decay_groups(model, 0.0), train, settings, "torch")
    engine.backward(engine(torch.ones(1, WIDTH, device=device)).square().mean())
    engine.step()
    found: dict[str, list[float]] = {"copied": [], "held": [], "published": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        for step in range(args.rounds):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            Snapshot.take(engine)
            found["copied"].append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.save(engine, {"state": {"step": step}, "topology": {}})
            found["held"].append(time.perf_counter() - began)
            writer.join()
            found["published"].append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    result = {
        "parameters": WIDTH * WIDTH * args.millions,
        "checkpoint_bytes": size,
        **{f"{name}_seconds": round(statistics.median(values), 3) for name, values in found.items()},
    }
    sys.stdout.write(dumps(result) + "\n")
    write_record(args.out, result)
    return 0


if __name__ == "__main__":
    run_main(main)
