"""Say what runs are doing: step, loss, speed, faults, checkpoints, experts, and when they will be done.

Reads the files of run folders and writes nothing, so it may look while a run is at work, from any machine that sees the
folder. States: running; finished; stopped (by a signal, at a checkpoint: --resume auto goes on); failed; killed (ended
without a last word); damaged; unknown (begun by a version that kept no record). Several runs make a table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shodh.core.cli import command_parser, positive
from shodh.core.strict_json import dumps
from shodh.train.status import Status, find_runs, read_status

EXAMPLES = """examples:
  shodh status runs/demo
  shodh status                     a table of the runs in runs/
  shodh status runs/demo --watch 10
  shodh status runs/a runs/b --json
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--json", action="store_true", help="a list with an object a run, in one line")
    parser.add_argument("--watch", type=positive, metavar="SECONDS", help="again and again, until Ctrl-C")
    return parser.parse_args(argv)


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """``3 d 4 h``, ``2 h 5 min``, ``40 s``."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"


def _steps(s: Status) -> str:
    return f"{s.step}/{_number(s.steps, 'd')}"


def _values(values: dict[str, float], prefix: str = "") -> str:
    return ", ".join(f"{name.removeprefix(prefix)} {_number(value)}" for name, value in values.items())


def _counts(events: dict[str, int]) -> str:
    return "".join(f", {count} {kind}" for kind, count in events.items())


def describe(s: Status) -> str:
    """One run, in lines."""
    state = s.state + (f" ({s.owner})" if s.owner else f": {s.why}" if s.why else "")
    share = f", {100 * s.step / s.steps:.1f} %" if s.steps else ""
    compute = "".join(f", {name} {_number(v)}" for name, v in (("MFU", s.mfu), ("TFLOP/s a rank", s.tflops)) if v)
    rows = [
        ("state", state),
        ("step", f"{_steps(s)}{share}; newest line {duration(s.silent_s)} ago; to go {duration(s.eta_s)}"),
        ("loss", f"{_number(s.loss)}, gradient norm {_number(s.grad_norm)}"),
        ("speed", f"{_number(s.samples_per_s)} samples/s{compute}, {_number(s.step_s)} s a step"),
        ("faults", f"{s.skipped} steps skipped, {_number(s.restarts, 'd')} restarts" + _counts(s.events)),
        ("checkpoint", f"{s.checkpoint}, {duration(s.checkpoint_age_s)} ago" if s.checkpoint else "none yet"),
    ]
    if s.experts:
        rows.append(("experts", _values(s.experts)))
    if s.validation:
        means = {name: value for name, value in s.validation.items() if name.count("/") == 1}
        rows.append(("validation", f"step {s.validation_step}: {_values(means or s.validation, 'valid/')}"))
    if s.best:
        best, persistence = s.best, s.best.get("persistence")
        beside = "" if persistence is None else f" (persistence {_number(persistence)})"
        rows.append(("best", f"step {best.get('step')}: {best.get('measure')} {_number(best.get('value'))}{beside}"))
    rows += [("problem", problem) for problem in s.problems]
    return f"{s.path}: {s.stage or 'run'}\n" + "".join(f"  {name:<12}{text}\n" for name, text in rows)


HEADS = ("run", "state", "step", "loss", "samples/s", "MFU", "skips", "restarts", "checkpoint", "load", "best", "ETA")


def _row(s: Status) -> tuple[str, ...]:
    best, load = (s.best or {}).get("value"), s.experts.get("load_max_over_mean")
    counts = str(s.skipped), _number(s.restarts, "d")
    speed = _number(s.loss), _number(s.samples_per_s), _number(s.mfu, ".3f")
    tag = (s.checkpoint or "-").removeprefix("step_").lstrip("0")
    return (str(s.path), s.state, _steps(s), *speed, *counts, tag, _number(load), _number(best), duration(s.eta_s))


def table(found: Sequence[Status]) -> str:
    """Many runs, one a line; then what is wrong with which."""
    rows = [HEADS, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{s.path}: {problem}" for s in found for problem in s.problems]
    return "\n".join(lines) + "\n"


def show(paths: Sequence[Path], as_json: bool) -> str:
    """What is printed of runs, now."""
    found = [read_status(path) for path in find_runs(paths)]
    if as_json:
        return dumps([asdict(s) | {"path": str(s.path)} for s in found]) + "\n"
    return describe(found[0]) if len(found) == 1 else table(found)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    clear = "\033[H\033[2J" if args.watch and sys.stdout.isatty() and not args.json else ""
    try:
        while True:
            sys.stdout.write(clear + show(args.runs, args.json))
            sys.stdout.flush()
            if not args.watch:
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        if not args.watch:
            raise
        return 0
