"""``python -m shodh.ops``: what is built and why not; build in place; compile check of the CUDA sources."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from shodh.core.cli import command_parser
from shodh.ops import build
from shodh.ops.extension import unavailable_reason

EXAMPLES = """examples:
  python -m shodh.ops                       what is built
  python -m shodh.ops --build               build for this machine, in place
  python -m shodh.ops --build cpu           the CPU kernels alone
  python -m shodh.ops --compile-cuda-check  compile the CUDA sources for sm_90a; needs nvcc, no device
  python -m shodh.ops --compile-check --torch-include DIR
                                            compile all sources against the headers of another torch
"""


def report() -> None:
    """Print each implementation, and the reason where it cannot serve."""
    print(f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}")
    print("reference  ready: plain torch, any device")
    for implementation in ("cpp", "cuda"):
        reason = unavailable_reason(implementation)
        backend = {"cpp": "cpu", "cuda": "cuda"}[implementation]
        if reason is None:
            print(f"{implementation:<9}  ready: {build.library_path(backend)}")
        else:
            print(f"{implementation:<9}  not available: {reason}; {build.HINT} {backend}")
            try:
                build.compile_command(backend, build.library_path(backend))
            except build.BuildError as missing:
                print(f"           which needs more than is here: {missing}")


def build_in_place(backends: list[str]) -> int:
    """Build back ends into the package; returns the exit status."""
    for backend in backends:
        try:
            print(f"{backend}: built {build.build(backend)}")
        except (build.BuildError, OSError) as error:
            print(f"{backend}: {error}", file=sys.stderr)
            return 1
    return 0


def compile_check(backends: list[str], arch: str, include: Path | None) -> int:
    """Compile the sources, print registers and spills of the CUDA ones; a back end without a compiler is skipped."""
    for backend in backends:
        files = ", ".join(path.name for path in build.sources(backend))
        try:
            if backend == "cuda":
                build.find_nvcc()
        except build.BuildError as error:
            print(f"{backend}: skipped: {error}")
            continue
        try:
            said = build.check_sources(backend, arch, include)
        except build.BuildError as error:
            print(f"{backend}: {error}", file=sys.stderr)
            return 1
        if backend == "cpu":
            print(f"cpu: {files} compile")
            continue
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
        spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", said)]
        print(
            f"sm_{arch}: {len(registers)} kernels from {files}; at most {max(registers)} registers; "
            f"{sum(1 for s in spills if s)} spill, at most {max(spills)} bytes"
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command_parser(__doc__, EXAMPLES, prog="python -m shodh.ops")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--build", nargs="?", const="all", choices=["all", *build.BACKENDS], help="build in place for this machine"
    )
    chosen.add_argument(
        "--compile-check", nargs="?", const="all", choices=["all", *build.BACKENDS], help="compile, and link nothing"
    )
    chosen.add_argument(
        "--compile-cuda-check", action="store_const", dest="compile_check", const="cuda", help="--compile-check cuda"
    )
    parser.add_argument(
        "--torch-include", type=Path, metavar="DIR", help="check against the headers in DIR, torch/include of any torch"
    )
    parser.add_argument("--arch", default="90a", help="compute capability of the check (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.torch_include is not None and not options.compile_check:
        parser.error("--torch-include is for --compile-check; a library is built for the installed torch")
    if options.build:
        return build_in_place(build.wanted_backends() if options.build == "all" else [options.build])
    if options.compile_check:
        backends = list(build.BACKENDS) if options.compile_check == "all" else [options.compile_check]
        return compile_check(backends, options.arch, options.torch_include)
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
