"""Every back end decodes to the bits of the reference of this machine's CPU, and is a well-behaved citizen of torch.

Gradients that are summed over cells agree to rounding.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_cases import FLOATS, check_gradients, random_case
from torch import Tensor

import shodh
from shodh.core.errors import ExtensionError
from shodh.ops import build, decode_velocity, divergence, extension
from shodh.ops.grid import Grid
from shodh.ops.reference import decode_adjoint_reference

BOX = {"spacing": (1.0, 2.0, 0.5), "boundary": ("periodic", "wall", "periodic")}

needs_cpp = pytest.mark.skipif(
    extension.unavailable_reason("cpp") is not None, reason=f"{extension.unavailable_reason('cpp')}; {build.HINT}"
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or extension.unavailable_reason("cuda") is not None, reason="needs a CUDA device"
)


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
def test_cpp_returns_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for seed in range(60):
        case = random_case(seed, dtype)
        for exact in (False, True) if dtype.itemsize >= 4 else (False,):
            decodes = [
                decode_velocity(case.potential, case.harmonic, **case.box, exact=exact, implementation=implementation)
                for implementation in ("reference", "cpp")
            ]
            assert torch.equal(*decodes), f"seed {seed}, exact {exact}: {case.box}"
            assert decodes[1].is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
def test_adjoint_is_the_transpose_of_the_decode(dtype: torch.dtype) -> None:
    for seed in range(40):
        case = random_case(seed, dtype)
        gradient = torch.randn_like(decode_velocity(case.potential, None, **case.box))
        found = torch.ops.shodh.decode_adjoint(gradient, *case.operator_box)
        check_gradients(case, gradient, found)
        spacing, walls, central = case.operator_box
        mirrored = decode_adjoint_reference(gradient, Grid(tuple(spacing), tuple(walls), central))
        check_gradients(case, gradient, mirrored)
        assert torch.equal(found[0], mirrored[0])


@needs_cpp
def test_results_do_not_depend_on_threads_or_runs() -> None:
    potential, harmonic = torch.randn(3, 3, 37, 19, 53, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    weight = torch.randn(3, 3, 37, 19, 53)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            velocity = decode_velocity(potential, harmonic, exact=True, implementation="cpp")
            results.append([velocity, *torch.autograd.grad((velocity * weight).sum(), (potential, harmonic))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("stencil", ["staggered", "central"])
def test_first_and_second_derivatives(implementation: str, ndim: int, stencil: str) -> None:
    boundary = ("periodic", "wall", "periodic")[:ndim] if stencil == "staggered" else ("periodic",) * ndim
    grid, spacing = (3, 2, 4)[:ndim], (1.0, 2.0, 0.5)[:ndim]
    potential = torch.randn(2, 3 if ndim == 3 else 1, *grid, dtype=torch.float64, requires_grad=True)
    harmonic = torch.randn(2, boundary.count("periodic"), dtype=torch.float64, requires_grad=True)

    def decode(a: Tensor, h: Tensor) -> Tensor:
        return decode_velocity(a, h, spacing=spacing, boundary=boundary, stencil=stencil, implementation=implementation)

    assert torch.autograd.gradcheck(decode, (potential, harmonic))
    assert torch.autograd.gradgradcheck(decode, (potential, harmonic))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_are_registered_correctly(dtype: torch.dtype) -> None:
    potential = torch.randn(2, 3, 5, 4, 3, dtype=dtype, requires_grad=True)
    harmonic = torch.randn(2, 2, dtype=dtype, requires_grad=True)
    box = ([1.0, 2.0, 0.5], [False, True, False], False)
    torch.library.opcheck(torch.ops.shodh.decode, (potential, harmonic, *box))
    torch.library.opcheck(torch.ops.shodh.decode, (potential.transpose(2, 4), None, *box))
    torch.library.opcheck(torch.ops.shodh.decode_adjoint, (potential, *box))
    if dtype.itemsize >= 4:
        torch.library.opcheck(torch.ops.shodh.decode_exact, (potential, harmonic, *box))
    stream = torch.randn(2, 1, 5, 4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.shodh.decode, (stream, None, [1.0, 1.0], [True, True], False))


class Head(torch.nn.Module):
    """A decoder's last step."""

    def __init__(self, exact: bool, implementation: str | None) -> None:
        super().__init__()
        self.options = {"exact": exact, "implementation": implementation}

    def forward(self, potential: Tensor, harmonic: Tensor) -> Tensor:
        return decode_velocity(torch.tanh(potential), harmonic, **BOX, **self.options)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("implementation", [None, pytest.param("reference", marks=pytest.mark.exhaustive)])
def test_compiles_without_graph_break_and_exports(exact: bool, implementation: str | None) -> None:
    head = Head(exact, implementation)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 5, 6):
        tensors = [torch.randn(n, 3, n, n + 1, n + 2).requires_grad_(), torch.randn(n, 2).requires_grad_()]
        pairs = []
        for function in (head, compiled):
            velocity = function(*tensors)
            pairs.append([velocity, *torch.autograd.grad(velocity.square().sum(), tensors)])
        for eager, traced in zip(*pairs, strict=True):
            torch.testing.assert_close(eager, traced)
    plain = (torch.randn(2, 3, 5, 4, 3), torch.randn(2, 2))
    program = torch.export.export(head, plain)
    assert torch.equal(program.module()(*plain), head(*plain))


def test_autocast_decodes_in_single_precision() -> None:
    potential, harmonic = torch.randn(1, 3, 5, 4, 6).bfloat16(), torch.randn(1, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = decode_velocity(potential, harmonic, **BOX, exact=True)
        mixed = decode_velocity(potential, harmonic.float(), **BOX, exact=True)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, decode_velocity(potential.float(), harmonic.float(), **BOX, exact=True))
    assert torch.equal(velocity, mixed)


@pytest.mark.parametrize("exact", [False, True])
def test_channels_last_and_expanded_memory(exact: bool) -> None:
    potential = torch.randn(2, 3, 5, 4, 6)
    expected = decode_velocity(potential, None, exact=exact)
    last = potential.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(decode_velocity(last, None, exact=exact), expected)
    repeated = potential[:1].expand(4, -1, -1, -1, -1)
    assert torch.equal(
        decode_velocity(repeated, None, exact=exact)[3], decode_velocity(potential[:1], None, exact=exact)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_storage_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    potential = torch.randn(1, 3, 6, 5, 7).to(dtype)
    assert torch.equal(decode_velocity(potential, None), decode_velocity(potential.float(), None).to(dtype))


POTENTIAL, HARMONIC = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3)
BAD_INPUT = {
    "rank": (ValueError, r"potential \[B, 3, X, Y, Z\].*given \[3, 4, 4, 4\]", (POTENTIAL[0], None), {}),
    "channels": (ValueError, r"given \[2, 2, 4, 4, 4\]", (POTENTIAL[:, :2], None), {}),
    "empty": (ValueError, "at least one cell", (POTENTIAL[:, :, :0], None), {}),
    "integer": (TypeError, "floating-point.*torch.int32", (POTENTIAL.int(), None), {}),
    "complex": (TypeError, "floating-point.*torch.complex64", (POTENTIAL.cfloat(), None), {}),
    "not a tensor": (TypeError, "a tensor, given list", ([1.0], None), {}),
    "batch": (ValueError, r"harmonic \[2, 3\].*given \[1, 3\]", (POTENTIAL, HARMONIC[:1]), {}),
    "dtypes": (TypeError, "float32, given torch.float64", (POTENTIAL, HARMONIC.double()), {}),
    "devices": (ValueError, "device cpu, given meta", (POTENTIAL, HARMONIC.to("meta")), {}),
    "spacing": (ValueError, r"3 positive finite numbers, given \(1, 0, 1\)", (POTENTIAL, None), {"spacing": (1, 0, 1)}),
    "spacings": (ValueError, "3 positive", (POTENTIAL, None), {"spacing": (1.0, 1.0)}),
    "nan spacing": (ValueError, "3 positive", (POTENTIAL, None), {"spacing": (1.0, float("nan"), 1.0)}),
    "boundary": (ValueError, "given .*'open'", (POTENTIAL, None), {"boundary": ("periodic", "open", "wall")}),
    "stencil": (ValueError, "given 'upwind'", (POTENTIAL, None), {"stencil": "upwind"}),
    "central wall": (
        ValueError,
        "needs periodic axes",
        (POTENTIAL, None),
        {"stencil": "central", "boundary": ("periodic", "periodic", "wall")},
    ),
    "harmonic on a walled axis": (
        ValueError,
        r"harmonic \[2, 2\], one constant per periodic axis \(x, z\).*given \[2, 3\]",
        (POTENTIAL, HARMONIC),
        {"boundary": ("periodic", "wall", "periodic")},
    ),
    "exact half": (TypeError, "float32 or float64, given torch.float16", (POTENTIAL.half(), None), {"exact": True}),
}


@pytest.mark.parametrize("implementation", [None, "reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("bad", BAD_INPUT)
def test_bad_input_is_refused_alike_by_every_back_end(bad: str, implementation: str | None) -> None:
    error, message, tensors, options = BAD_INPUT[bad]
    with pytest.raises(error, match=message):
        decode_velocity(*tensors, **options, implementation=implementation)


def test_named_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="given 'triton'"):
        decode_velocity(POTENTIAL, None, implementation="triton")
    with pytest.raises(ValueError, match="needs tensors on cuda, given cpu"):
        decode_velocity(POTENTIAL, None, implementation="cuda")
    monkeypatch.setattr(extension, "unavailable_reason", lambda name: "it is not built")
    with pytest.raises(ExtensionError, match="not built; build it with: python -m shodh.ops --build"):
        decode_velocity(POTENTIAL, None, implementation="cpp")


def test_package_works_without_compiled_kernels_and_says_so_once(tmp_path: Path) -> None:
    package = Path(shodh.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package / "ops", tmp_path / "shodh" / "ops", ignore=ignore)
    (tmp_path / "shodh" / "core").mkdir()
    for name in ("__init__.py", "core/__init__.py", "core/errors.py"):
        shutil.copy(package / name, tmp_path / "shodh" / name)
    script = """
import torch, warnings
from shodh.ops import decode_velocity, divergence
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    potential = torch.randn(1, 3, 5, 4, 6, requires_grad=True)
    for _ in range(3):
        velocity = decode_velocity(potential, None, exact=True)
    operator = torch.ops.shodh.decode_exact(potential, None, [1.0] * 3, [False] * 3, False)[0]
told = [str(w.message) for w in caught if "shodh.ops" in str(w.message)]
assert len(told) == 1 and "python -m shodh.ops --build" in told[0], told
assert torch.equal(operator, velocity) and divergence(velocity).abs().max() == 0
weight = torch.randn_like(velocity)
a, b = (torch.autograd.grad((v * weight).sum(), potential)[0] for v in (velocity, operator))
assert torch.allclose(a, b, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_returns_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    for seed in range(60):
        case = random_case(seed, dtype)
        harmonic = None if case.harmonic is None else case.harmonic.cuda()
        for exact in (False, True) if dtype.itemsize >= 4 else (False,):
            expected = decode_velocity(
                case.potential, case.harmonic, **case.box, exact=exact, implementation="reference"
            )
            runs = [decode_velocity(case.potential.cuda(), harmonic, **case.box, exact=exact) for _ in range(2)]
            assert torch.equal(runs[0], runs[1])
            assert torch.equal(runs[0].cpu(), expected), f"seed {seed}, exact {exact}: {case.box}"
        gradient = torch.randn_like(expected)
        first, second = (torch.ops.shodh.decode_adjoint(gradient.cuda(), *case.operator_box) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        check_gradients(case, gradient, (first[0].cpu(), first[1].cpu()))
    assert divergence(runs[0]).device.type == "cuda"
