"""Build the compiled back ends of `shodh.ops` with g++ and nvcc. Standard library only, and torch is never imported.

The sources use torch's stable ABI, so one build serves every torch from `TORCH_FLOOR` on. Called by ``setup.py``
(`extension_modules`), by ``python -m shodh.ops --build`` and by the compile check of the CUDA sources.

Environment
-----------
SHODH_FORCE_EXTENSION=1
    Fail the installation where the CPU kernels cannot be built (default: warn once, reference only).
SHODH_SKIP_CUDA=1
    Leave the CUDA kernels out even where nvcc and a CUDA torch are found.
SHODH_CUDA_ARCHS="90a;80"
    Compute capabilities to compile for (default: the local devices, else 80 and 90 with PTX for later ones).
CXX, NVCC
    Compilers to use.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TORCH_FLOOR = (2, 10)
BACKENDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
CUDA_FALLBACK_ARCHS = ("80", "90")
# No fused multiply-add: a decode rounds each operation once, in one order, so that C++, CUDA and the reference in plain
# torch on an x86-64 CPU give the same bits. Sums of gradients over cells have no order, and agree to rounding.
CPU_FLAGS = ("-O3", "-fPIC", "-fwrapv", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden")
CUDA_FLAGS = ("-O3", "-fmad=false", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden")
HINT = "build it with: python -m shodh.ops --build"


class BuildError(RuntimeError):
    """A back end cannot be built here; the message says why."""


def sources(backend: str) -> list[Path]:
    """Source files of a back end."""
    suffix = {"cpu": ".cpp", "cuda": ".cu"}[backend]
    return sorted((PACKAGE / "csrc").glob(f"*_{backend}{suffix}"))


def library_path(backend: str, folder: Path = PACKAGE) -> Path:
    """Where the shared library of a back end is put and looked for."""
    return folder / f"_{backend}.abi3.so"


def find_torch() -> Path:
    """Folder of the installed torch; raises `BuildError` without one that is new enough."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not importable here; install it first and use pip install --no-build-isolation")
    folder = Path(spec.origin).parent
    match = re.search(r"__version__.*?'(\d+)\.(\d+)", (folder / "version.py").read_text())
    if match and (int(match[1]), int(match[2])) < TORCH_FLOOR:
        raise BuildError(f"expected torch >= {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}, found {match[1]}.{match[2]}")
    return folder


def find_compiler(variable: str, *names: str) -> str:
    """Path of the first compiler found; raises `BuildError` if there is none."""
    for name in (os.environ.get(variable, ""), *names):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise BuildError(f"no compiler found (looked for {', '.join(names)}; set {variable} to name one)")


def find_nvcc() -> str:
    """Path of nvcc; raises `BuildError` if there is none."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    return find_compiler("NVCC", "nvcc", *(f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"] if home))


def find_include(folder: Path | None = None) -> Path:
    """torch's headers: those of the installed torch, or a given include folder; raises `BuildError` if it has none."""
    include = find_torch() / "include" if folder is None else folder
    if not (include / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"{include} holds no torch/csrc/stable/library.h; give the folder torch/include of a torch")
    return include


def include_flags(include: Path) -> list[str]:
    """Preprocessor flags common to both compilers, for an include folder of torch."""
    version = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}{0:012x}"
    return ["-std=c++20", f"-DTORCH_TARGET_VERSION={version}", f"-I{include}"]


def cuda_archs() -> list[str]:
    """Compute capabilities to compile for."""
    chosen = os.environ.get("SHODH_CUDA_ARCHS")
    if chosen:
        return [arch.strip().removeprefix("sm_").replace(".", "") for arch in re.split("[;, ]+", chosen) if arch]
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        return sorted({line.strip().replace(".", "") for line in found.splitlines() if line.strip()})
    except (OSError, subprocess.SubprocessError):
        return []


def cuda_arch_flags() -> list[str]:
    """nvcc's ``-gencode`` flags; without a choice or a device, code for common ones and PTX for later ones."""
    archs = cuda_archs()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs or CUDA_FALLBACK_ARCHS]
    if not archs:
        newest = CUDA_FALLBACK_ARCHS[-1]
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def compile_command(backend: str, output: Path) -> list[str]:
    """The command that builds a back end; raises `BuildError` where a part is missing."""
    torch = find_torch()
    files = [str(path) for path in sources(backend)]
    link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    if backend == "cpu":
        flags = [*CPU_FLAGS, "-shared"]
        return [
            find_compiler("CXX", "g++", "clang++", "c++"),
            *flags,
            *include_flags(find_include()),
            *files,
            *link,
            "-o",
            str(output),
        ]
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise BuildError("the installed torch has no CUDA support; install a CUDA build of torch")
    flags = [*CUDA_FLAGS, "-shared", "-cudart=shared"]
    return [
        find_nvcc(),
        *flags,
        *cuda_arch_flags(),
        *include_flags(find_include()),
        *files,
        *link,
        "-ltorch_cuda",
        "-o",
        str(output),
    ]


def run(command: list[str]) -> str:
    """Run a compiler and return what it said; raises `BuildError` with its last lines on failure."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        tail = "\n".join(said.splitlines()[-30:])
        raise BuildError(f"compiler failed with exit status {done.returncode}: {shlex.join(command)}\n{tail}")
    return said


def build(backend: str, output: Path | None = None) -> Path:
    """Build one back end and put it in place in one step, so that no process loads half a file.

    Raises
    ------
    BuildError
        A compiler, torch or CUDA is missing, or the compiler failed.
    """
    output = library_path(backend) if output is None else output
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        run(compile_command(backend, partial))
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def wanted_backends() -> list[str]:
    """Back ends to build at installation: CUDA only where nvcc and a CUDA torch are there and it is not skipped."""
    if os.environ.get("SHODH_SKIP_CUDA") == "1":
        return ["cpu"]
    try:
        compile_command("cuda", library_path("cuda"))
    except BuildError:
        return ["cpu"]
    return ["cpu", "cuda"]


def check_sources(backend: str, arch: str = "90a", include: Path | None = None) -> str:
    """Compile every source of a back end, link nothing, and return what the compiler said (ptxas' report for CUDA).

    Needs a compiler and torch's headers, no device and no CUDA build of torch.

    Parameters
    ----------
    arch : str
        Compute capability, for CUDA.
    include : Path, optional
        Folder ``torch/include`` of another torch than the installed one.

    Raises
    ------
    BuildError
        No compiler or no headers, or a source does not compile.
    """
    if backend == "cpu":
        command = [find_compiler("CXX", "g++", "clang++", "c++"), *CPU_FLAGS, "-fsyntax-only"]
    else:
        command = [find_nvcc(), *CUDA_FLAGS, "-c", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-o", os.devnull]
    command += include_flags(find_include(include))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "\n".join(pool.map(lambda path: run([*command, str(path)]), sources(backend)))


def extension_modules() -> tuple[list[Any], dict[str, Any]]:
    """``ext_modules`` and ``cmdclass`` for ``setup.py``; both empty, with one warning, where nothing can be built."""
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    forced = os.environ.get("SHODH_FORCE_EXTENSION") == "1"

    def give_up(reason: BuildError) -> None:
        if forced:
            raise SystemExit(f"SHODH_FORCE_EXTENSION=1, but the kernels cannot be built: {reason}") from reason
        warnings.warn(f"shodh.ops is installed without compiled kernels: {reason}; later, {HINT}", stacklevel=2)

    class BuildKernels(build_ext):
        def build_extension(self, ext: Any) -> None:
            backend = ext.name.rpartition("_")[2]
            try:
                build(backend, Path(self.get_ext_fullpath(ext.name)))
            except BuildError as reason:
                give_up(reason)
                ext.optional = True  # nothing to copy into the source tree

    try:
        compile_command("cpu", library_path("cpu"))
    except BuildError as reason:
        give_up(reason)
        return [], {}
    root = PACKAGE.parent.parent
    modules = [
        Extension(
            f"shodh.ops._{backend}",
            sources=[str(path.relative_to(root)) for path in sources(backend)],
            depends=[str(path.relative_to(root)) for path in (PACKAGE / "csrc").glob("*.h")],
            py_limited_api=True,
        )
        for backend in wanted_backends()
    ]
    return modules, {"build_ext": BuildKernels}


if __name__ == "__main__":
    sys.exit("use python -m shodh.ops --build")
