"""How long ranks take from their start until their data are open: many small files, 1 to 32 gloo ranks on this machine.

    python tools/bench/startup.py --files 10000 --ranks 1 4 16 32 --out tools/bench/results/startup_cpu.json

``alone``: every rank opens all files by itself, and describes them. ``shared``: the ranks do it together. Both with
``stats.yaml`` beside the data, as the generator leaves it. ``connect``: until the ranks are connected; ``preflight``:
the checks before a run; ``cpu``: of all ranks together, which does not depend on what else the machine does.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.multiprocessing as processes
from torch.distributed import TCPStore

from shodh.config import load_config
from shodh.core.cli import command_parser
from shodh.core.environment import write_record
from shodh.core.strict_json import dumps
from shodh.data import compute_statistics, write_stats, write_trajectories
from shodh.schema.fields import Field, RegimeSchema, Trajectories

GRID = (8, 8, 8)
CONFIG = """
name: startup
out: {out}
data:
  grid: [8, 8, 8]
  history: 1
  fields: [{{name: heat}}]
  regimes: [{{name: box, path: {data}}}]
operator:
  {{kind: fno, modes: 2, dim: 8, depth: 1, loss: relative_l2, random_shifts: false, experts: {{num_experts: 0}},
    train: {{steps: 1, global_batch: 32}}}}
"""


def make_data(root: Path, count: int) -> None:
    """``count`` files of one trajectory of four frames, a tenth of them held out: one is written, the others copied."""
    schema = RegimeSchema("box", (Field("heat"),), ("periodic",) * 3)
    values = {"heat": np.random.default_rng(0).standard_normal((1, 4, *GRID)).astype(np.float32)}
    first = root / "data" / "train" / "box_00000.hdf5"
    write_trajectories(first, Trajectories(schema, (1.0, 1.0, 1.0), 0.1 * np.arange(4), values))
    for split in ("valid", "test"):
        (root / "data" / split).mkdir()
    for number in range(1, count):
        split = {8: "valid", 9: "test"}.get(number % 10, "train")
        shutil.copyfile(first, root / "data" / split / f"box_{number:05d}.hdf5")
    write_stats(root / "stats.yaml", compute_statistics([first]))


def start(rank: int, world: int, port: int, began: float, config: str, shared: bool, answers: Any) -> None:
    """A rank: connect, open the data, know what they are."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    from shodh.core.distributed import together
    from shodh.data.identity import describe_source
    from shodh.train.datasets import open_regimes
    from shodh.train.jobs import Job
    from shodh.train.runtime import start_distributed

    asked, times = load_config(Path(config), []), [began]

    def lap() -> None:
        with together():
            times.append(time.time())

    start_distributed()
    lap()
    Job.begin(asked, None, 0, {})
    lap()
    spent = time.process_time()
    regimes = open_regimes(asked, shared=shared)
    files = describe_source(regimes.sources[0])
    spent = time.process_time() - spent
    lap()
    with together():
        answers.put((len(files), *np.diff(times).tolist(), spent))
        answers.close()
        answers.join_thread()
    os._exit(0)


def measure(world: int, config: Path, shared: bool) -> dict[str, float]:
    """Seconds of the slowest rank in each phase, and of processors, of all ranks, for the last one."""
    context = processes.get_context("fork")
    answers = context.Queue()
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    began = time.time()
    arguments = (world, store.port, began, str(config), shared, answers)
    ranks = [context.Process(target=start, args=(rank, *arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    counts, connected, checked, opened, spent = zip(*(answers.get(timeout=1200) for _ in ranks), strict=True)
    for process in ranks:
        process.join()
    assert len(set(counts)) == 1, "all ranks have the same files"
    return {"connect_s": max(connected), "preflight_s": max(checked), "open_s": max(opened), "open_cpu_s": sum(spent)}


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--modes", nargs="+", choices=("alone", "shared"), default=["alone", "shared"])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    import deepspeed  # noqa: F401  forked ranks need not import it, nor what a model on the meta device needs, again

    from shodh.models.factory import operator_shapes

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root / "box", args.files)
        config = root / "startup.yaml"
        config.write_text(CONFIG.format(out=root / "runs", data=root / "box"))
        operator_shapes(load_config(config, []))
        for world in args.ranks:
            for mode in args.modes:
                row = {"ranks": world, "files": args.files, "mode": mode, **measure(world, config, mode == "shared")}
                rows.append({name: round(v, 2) if isinstance(v, float) else v for name, v in row.items()})
                sys.stdout.write(dumps(rows[-1]) + "\n")
                sys.stdout.flush()
                write_record(args.out, {"load": os.getloadavg(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
