"""The CUDA sources on a machine without a device: their kernels run on the CPU, and nvcc compiles them."""

from __future__ import annotations

import ctypes
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decode_cases import FLOATS, Case, check_gradients, random_case

from shodh.ops import build, decode_velocity
from shodh.ops.__main__ import main
from shodh.ops.grid import Grid
from shodh.ops.reference import decode_adjoint_reference, decode_exact_reference

HERE = Path(__file__).parent
pytestmark = pytest.mark.exhaustive  # A minute of compilers.


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    """The operators of the CUDA sources, compiled by the host compiler against an emulated CUDA."""
    try:
        compiler, torch_folder = build.find_compiler("CXX", "g++"), build.find_torch()
    except build.BuildError as reason:
        pytest.skip(str(reason))
    output = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", f"-I{HERE / 'emulated_cuda'}"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # as on a device, it ends the process
    files = ["-x", "c++", *map(str, build.sources("cuda"))]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(output)]
    build.run([compiler, *flags, *build.include_flags(build.find_include()), *files, *link])
    library = torch.library.Library("shodh_emulated", "DEF")
    for name in ("decode", "decode_exact", "decode_adjoint"):
        schema = str(getattr(torch.ops.shodh, name).default._schema)
        library.define(schema.removeprefix("shodh::"))
    torch.ops.load_library(str(output))
    operators = torch.ops.shodh_emulated
    blocks = ctypes.CDLL(str(output)).emulated_blocks
    blocks.restype = ctypes.c_long
    yield SimpleNamespace(
        decode=operators.decode,
        decode_exact=operators.decode_exact,
        decode_adjoint=operators.decode_adjoint,
        blocks=blocks,
    )
    library._destroy()


def check_case(emulated, case: Case, message: str) -> None:
    """Decode and exact decode against the bits of the reference, gradients against its automatic differentiation."""
    tensors = (case.potential, case.harmonic)
    expected = decode_velocity(*tensors, **case.box, implementation="reference")
    assert torch.equal(emulated.decode(*tensors, *case.operator_box), expected), message
    gradient = torch.randn_like(expected)
    found = emulated.decode_adjoint(gradient, *case.operator_box)
    check_gradients(case, gradient, found)
    assert torch.equal(found[0], decode_adjoint_reference(gradient, grid_of(case))[0]), message
    if case.potential.dtype.itemsize >= 4:
        exact, step = emulated.decode_exact(*tensors, *case.operator_box)
        reference = decode_exact_reference(*tensors, grid_of(case))
        assert torch.equal(exact, reference[0]) and torch.equal(step, reference[1]), message


def grid_of(case: Case) -> Grid:
    spacing, walls, central = case.operator_box
    return Grid(tuple(spacing), tuple(walls), central)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels_return_the_bits_of_the_reference(emulated, dtype: torch.dtype) -> None:
    for seed in range(100, 112):
        case = random_case(seed, dtype, sizes=(1, 2, 3, 5, 8, 12))
        check_case(emulated, case, f"seed {seed}: {case.box}")


def blocks_of(volume: int, width: int) -> int:
    """Blocks of 256 threads that each own so many cells."""
    return -(-volume // (256 * width))


BOUNDARIES = [*product(("periodic", "wall"), repeat=3), *product(("periodic", "wall"), repeat=2)]


@pytest.mark.parametrize("boundary", BOUNDARIES, ids="-".join)
def test_every_boundary_with_every_width_of_access(emulated, boundary: tuple[str, ...]) -> None:
    """16 to 2 bytes at once, several blocks; neither what a wall pins nor what lies around the field is used."""
    ndim, batch = len(boundary), 3
    for dtype, row in product(FLOATS, (32, 20, 6, 5)):
        grid = (5, 16, row) if ndim == 3 else (80, row)
        shape = (batch, 3 if ndim == 3 else 1, *grid)
        around = torch.full((math.prod(shape) + 32,), math.nan, dtype=dtype)
        potential = around[16:-16].view(shape).copy_(torch.randn(shape))
        for axis, channel in product(range(ndim), range(shape[1])):
            if boundary[axis] == "wall" and (ndim == 2 or channel != axis):
                potential[:, channel].select(axis + 1, grid[axis] - 1).fill_(math.nan)
        harmonic = torch.randn(batch, boundary.count("periodic"), dtype=dtype)
        for stencil in ("staggered", "central") if "wall" not in boundary else ("staggered",):
            box = {"spacing": (0.3, 2.0, 0.7)[:ndim], "boundary": boundary, "stencil": stencil}
            case = Case(potential, harmonic, box)
            check_case(emulated, case, f"{dtype}, {grid}, {stencil}")
            emulated.blocks()
            emulated.decode(potential, harmonic, *case.operator_box)
            width = math.gcd(row, 16 // dtype.itemsize)
            assert emulated.blocks() == batch * blocks_of(math.prod(grid), width)


def test_memory_that_is_not_aligned_to_16_bytes(emulated) -> None:
    potential, harmonic, box = torch.randn(2, 3, 5, 16, 32), torch.randn(2, 3), ([1.0, 0.5, 0.3], [False] * 3, False)
    expected = decode_velocity(potential, harmonic, spacing=box[0], implementation="reference")
    for shift, width in ((0, 4), (1, 1), (2, 2)):
        shifted = torch.zeros(potential.numel() + shift)[shift:].view_as(potential).copy_(potential)
        emulated.blocks()
        assert torch.equal(emulated.decode(shifted, harmonic, *box), expected)
        assert emulated.blocks() == 2 * blocks_of(5 * 16 * 32, width)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("grid", [(3, 2, 4), (3, 5)])
def test_derivatives_of_the_kernels(emulated, grid: tuple[int, ...], exact: bool) -> None:
    ndim = len(grid)
    box = ([1.0, 2.0, 0.5][:ndim], [False, True, False][:ndim], False)

    class Decode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, potential: torch.Tensor, harmonic: torch.Tensor) -> torch.Tensor:
            return (
                emulated.decode_exact(potential, harmonic, *box)[0]
                if exact
                else emulated.decode(potential, harmonic, *box)
            )

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return emulated.decode_adjoint(gradient, *box)

    potential = torch.randn(2, 3 if ndim == 3 else 1, *grid, dtype=torch.float64, requires_grad=True)
    harmonic = torch.randn(2, box[1].count(False), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Decode.apply, (potential, harmonic), fast_mode=True)


def test_no_sample_is_decoded_to_none(emulated) -> None:
    box = ([1.0] * 3, [False] * 3, False)
    empty = torch.empty(0, 3, 4, 4, 4)
    assert emulated.decode(empty, None, *box).shape == empty.shape
    assert emulated.decode_exact(empty, None, *box)[1].shape == (0,)
    assert [t.shape[0] for t in emulated.decode_adjoint(empty, *box)] == [0, 0]


def test_sample_that_is_not_finite_is_marked(emulated) -> None:
    potential = torch.randn(2, 3, 4, 4, 4)
    potential[1, 0, 1, 2, 3] = math.inf
    velocity, step = emulated.decode_exact(potential, None, [1.0] * 3, [False] * 3, False)
    assert velocity[1].isnan().all() and step[1].isnan()
    assert velocity[0].isfinite().all() and step[0].isfinite()


def test_compile_failure_shows_what_the_compiler_said(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    try:
        compiler = build.find_compiler("CXX", "g++")
    except build.BuildError as reason:
        pytest.skip(str(reason))
    with pytest.raises(build.BuildError, match="broken.cpp"):
        build.run([compiler, "-c", str(source), "-o", str(tmp_path / "broken.o")])


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="set CXX"):
        build.compile_command("cpu", Path("unused.so"))


def test_report_says_what_is_built_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out
    assert "reference  ready" in lines
    # A CUDA build of torch and nvcc make the library also where there is no device to run it on.
    if not any(Path(build.__file__).parent.glob("_cuda*.so")):
        assert "cuda       not available" in lines and "python -m shodh.ops --build cuda" in lines


def test_build_that_cannot_be_done_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert main(["--build", "cpu"]) == 1
    assert "no compiler found" in capsys.readouterr().err


def test_sources_are_checked_against_the_headers_that_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CI gives those of the oldest torch; here they say at once that they were read."""
    assert main(["--compile-check", "cpu", "--torch-include", str(tmp_path)]) == 1
    assert "torch/include" in capsys.readouterr().err
    library = tmp_path / "torch" / "csrc" / "stable" / "library.h"
    library.parent.mkdir(parents=True)
    library.write_text('#error "the oldest torch"\n')
    assert main(["--compile-check", "cpu", "--torch-include", str(tmp_path)]) == 1
    assert "the oldest torch" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--build", "cpu", "--torch-include", str(tmp_path)])
    assert caught.value.code == 2
