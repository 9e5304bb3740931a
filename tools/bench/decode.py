"""Time the divergence-free decode against a plain copy, eager torch, torch.compile and PhysicsNeMo.

All contestants run interleaved in one process, medians are reported, and every ratio is the median of ratios within a
round, so that a machine shared with others disturbs all of them alike. On CUDA the L2 cache is flushed before every
call, for long enough that the call is queued before the device gets to it. ``fused``, ``fused backward alone`` and
``fused exact`` move the bytes of the copy (exact mode reads once more), so ``x copy`` is what is left to gain.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import in_turns, ratios, seconds
from torch import Tensor

from shodh.core.cli import command_parser
from shodh.core.environment import describe_environment, write_record
from shodh.ops import decode_velocity, divergence
from shodh.ops.extension import choose_implementation, unavailable_reason
from shodh.report.page import Table, text_table

EXAMPLES = """examples:
  python tools/bench/decode.py                                  128^3, batch 2, CPU
  python tools/bench/decode.py --device cuda --batch 8 --json decode.json
  python tools/bench/decode.py --grid 64 --skip compile
"""
CACHE_FLUSH_BYTES, CACHE_FLUSHES = 256 * 2**20, 4  # 0.4 ms on an H100, longer than the host needs to queue a call


def physicsnemo_curl() -> Callable[[Tensor], Tensor] | None:
    """PhysicsNeMo's periodic central curl, one sample after another (it has no batch); None if not installed."""
    try:
        from physicsnemo.nn.functional.derivatives.uniform_grid_curl import uniform_grid_curl
    except Exception as error:  # whatever its many dependencies raise when one is missing
        print(f"physicsnemo is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return lambda potential: torch.stack([uniform_grid_curl(sample) for sample in potential])


def make_contestants(potential: Tensor, harmonic: Tensor, skip: list[str]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``+ backward`` adds the gradients of potential and harmonic part."""
    gradient = torch.randn_like(potential)
    leaves = (potential.clone().requires_grad_(), harmonic.clone().requires_grad_())
    eager = partial(decode_velocity, implementation="reference")
    decodes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "eager": eager,
        "compile": torch.compile(eager, fullgraph=True),
        "fused": decode_velocity,
        "fused exact": partial(decode_velocity, exact=True),
    }
    curl = None if "physicsnemo" in skip else physicsnemo_curl()
    if curl is not None:
        decodes["physicsnemo"] = lambda a, h: curl(a)

    def forward_backward(decode: Callable[[Tensor, Tensor], Tensor]) -> Any:
        return torch.autograd.grad(decode(*leaves), leaves, gradient, allow_unused=True)

    contestants: dict[str, Callable[[], Any]] = {"copy": potential.clone}
    for name, decode in decodes.items():
        if name in skip:
            continue
        contestants[name] = partial(decode, potential, harmonic)
        contestants[f"{name} + backward"] = partial(forward_backward, decode)
    if choose_implementation(potential.device.type, potential.dtype) != "reference":
        box = ([1.0] * 3, [False] * 3, False)
        contestants["fused backward alone"] = partial(torch.ops.shodh.decode_adjoint, gradient, *box)
    return contestants


def measure(contestants: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; on a card with a cold L2 cache."""
    flush = torch.empty(CACHE_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def forget() -> None:
        for _ in range(CACHE_FLUSHES):
            flush.zero_()

    return in_turns({name: partial(seconds, call, device, forget) for name, call in contestants.items()}, rounds)


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one time over another."""
    return statistics.median(ratios(times[name], times[base]))


def tabulate(times: dict[str, list[float]], num_bytes: int) -> list[dict[str, Any]]:
    """One row a contestant: median and best time, bandwidth, ratio to the copy and to torch.compile."""
    rows = []
    for name, taken in times.items():
        passes = 2 if name.endswith("+ backward") else 1
        partner = "compile + backward" if passes == 2 else "compile"
        rows.append(
            {
                "name": name,
                "median_ms": 1e3 * statistics.median(taken),
                "best_ms": 1e3 * min(taken),
                "gb_per_s": passes * num_bytes / statistics.median(taken) / 1e9,
                "over_copy": ratio(times, name, "copy") / passes,
                "over_compile": ratio(times, name, partner) if partner in times else None,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--grid", type=int, default=128, help="cells along each axis (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="samples (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--skip", nargs="*", default=[], help="contestants to leave out, for example: compile")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; use --device cpu")
    skip = options.skip if dtype.itemsize >= 4 else [*options.skip, "fused exact"]
    torch.manual_seed(0)
    potential = torch.randn(options.batch, 3, *[options.grid] * 3, device=device).to(dtype)
    harmonic = torch.randn(options.batch, 3, device=device).to(dtype)
    contestants = make_contestants(potential, harmonic, skip)
    times = measure(contestants, device, options.rounds)
    rows = tabulate(times, 2 * potential.numel() * potential.element_size())

    machine = f"{describe_environment()['device']}, {torch.get_num_threads()} threads"
    print(f"{options.grid}^3, batch {options.batch}, {options.dtype}, torch {torch.__version__}, {machine}")
    for implementation in ("cpp", "cuda"):
        reason = unavailable_reason(implementation)
        print(f"{implementation}: {'built' if reason is None else reason}")
    print(text_table(Table(list(rows[0]), [list(row.values()) for row in rows])))
    if "fused exact" in contestants:
        print(f"fused exact over fused: {ratio(times, 'fused exact', 'fused'):.2f}")
        largest = divergence(decode_velocity(potential, harmonic, exact=True)).abs().max()
        print(f"max |divergence| of the exact decode: {float(largest)!r}")
    settings = {"grid": options.grid, "batch": options.batch, "dtype": options.dtype, "device": str(device)}
    write_record(options.json, {**settings, "threads": torch.get_num_threads(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
