"""The CUDA sources on a machine without a device: their kernels run on the CPU, and nvcc compiles them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ops.cases import random_case
from ops.test_backends import FLOATS, check_gradients

from shodh.ops import build, decode_velocity
from shodh.ops.__main__ import main

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    """The operators of the CUDA sources, compiled by the host compiler against an emulated CUDA."""
    try:
        compiler, torch_folder = build.find_compiler("CXX", "g++"), build.find_torch()
    except build.BuildError as reason:
        pytest.skip(str(reason))
    output = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", f"-I{HERE / 'emulated_cuda'}"]
    files = ["-x", "c++", *map(str, build.sources("cuda"))]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(output)]
    build.run([compiler, *flags, *build.include_flags(build.find_include()), *files, *link])
    library = torch.library.Library("shodh_emulated", "DEF")
    for name in ("decode", "decode_exact", "decode_adjoint"):
        schema = str(getattr(torch.ops.shodh, name).default._schema)
        library.define(schema.removeprefix("shodh::"))
    torch.ops.load_library(str(output))
    yield torch.ops.shodh_emulated
    library._destroy()


@pytest.mark.parametrize("dtype", FLOATS)
def test_kernels_return_the_bits_of_the_reference(emulated, dtype: torch.dtype) -> None:
    for seed in range(100, 110):
        case = random_case(seed, dtype, sizes=(1, 2, 3, 5, 8, 12))
        tensors = (case.potential, case.harmonic)
        expected = decode_velocity(*tensors, **case.box, implementation="reference")
        assert torch.equal(emulated.decode(*tensors, *case.operator_box), expected), f"seed {seed}: {case.box}"
        gradient = torch.randn_like(expected)
        check_gradients(case, gradient, emulated.decode_adjoint(gradient, *case.operator_box))
        if dtype.itemsize >= 4:
            exact = decode_velocity(*tensors, **case.box, exact=True, implementation="reference")
            assert torch.equal(emulated.decode_exact(*tensors, *case.operator_box)[0], exact), f"seed {seed}"


def test_long_marches_and_vector_loads(emulated) -> None:
    """Enough rows for blocks that march over several planes and load four cells at once."""
    potential, harmonic = torch.randn(2, 3, 33, 16, 64), torch.randn(2, 3)
    box = ([1.0, 0.5, 0.3], [False, False, False], False)
    expected = decode_velocity(potential, harmonic, spacing=box[0])
    assert torch.equal(emulated.decode(potential, harmonic, *box), expected)
    shifted = torch.zeros(potential.numel() + 1)[1:].view_as(potential).copy_(potential)  # not aligned to 16 bytes
    assert torch.equal(emulated.decode(shifted, harmonic, *box), expected)


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
