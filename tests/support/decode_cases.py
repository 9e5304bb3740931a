"""Random decodes for the tests: every boundary, odd sizes, uneven spacing, several scales, strided memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shodh.ops import decode_velocity

SIZES = (1, 2, 3, 5, 7, 8, 12, 17, 19)
SCALES = (1.0, 1e6, 1e-6)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass
class Case:
    """One decode: its tensors and its keyword arguments."""

    potential: Tensor
    harmonic: Tensor | None
    box: dict[str, Any]

    @property
    def ndim(self) -> int:
        return self.potential.dim() - 2

    @property
    def is_dyadic(self) -> bool:
        """Whether all ratios of spacings are powers of two."""
        ratios = torch.tensor([h / max(self.box["spacing"]) for h in self.box["spacing"]], dtype=torch.float64)
        return bool((torch.frexp(ratios).mantissa == 0.5).all())

    @property
    def spacing(self) -> tuple[float, ...]:
        return self.box["spacing"]

    @property
    def walls(self) -> list[bool]:
        return [b == "wall" for b in self.box["boundary"]]

    @property
    def operator_box(self) -> tuple[list[float], list[bool], bool]:
        """The same box as the registered operators take it."""
        return list(self.spacing), self.walls, self.box["stencil"] == "central"

    @property
    def divergence_box(self) -> dict[str, Any]:
        """Keyword arguments of `divergence` for face fluxes: unit spacing."""
        return self.box | {"spacing": (1.0,) * self.ndim}


def smooth_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of a few long waves along every space axis, float64."""
    field = torch.randn(shape, generator=generator, dtype=torch.float64)
    axes = tuple(range(2, len(shape)))
    spectrum = torch.fft.fftn(field, dim=axes)
    for axis in axes:
        waves = torch.fft.fftfreq(shape[axis], 1.0 / shape[axis], dtype=torch.float64).abs()
        keep = torch.where(waves <= 3, 1.0 / (1.0 + waves**2), 0.0)
        spectrum = spectrum * keep.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return torch.fft.ifftn(spectrum, dim=axes).real


def random_case(seed: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> Case:
    """A decode drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    ndim = draw((2, 3, 3))
    grid = tuple(draw(sizes) for _ in range(ndim))
    boundary = tuple(draw(("periodic", "wall")) for _ in range(ndim))
    stencil = "staggered" if "wall" in boundary else draw(("staggered", "central"))
    spacing = draw(
        (
            (1.0,) * ndim,
            (uniform(0.1, 3.0),) * ndim,
            (2.0, 0.5, 1.0)[:ndim],
            tuple(uniform(0.2, 2.0) for _ in range(ndim)),
        )
    )
    batch, channels, periodic = 3, 3 if ndim == 3 else 1, boundary.count("periodic")
    shape = (batch, channels, *grid)
    if draw((True, False)):
        potential = smooth_noise(shape, generator)
    else:
        potential = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = 1.0 if dtype in (torch.float16, torch.bfloat16) else draw(SCALES)
    potential = potential * scale + draw((0.0, 0.0, 50.0 * scale))
    if draw((True, False)) and dtype.itemsize >= 4:  # samples of very different size
        potential[1] *= 1e-5
    memory = draw(("contiguous", "transposed", "sliced"))
    potential = potential.to(dtype)
    if memory == "transposed":
        potential = potential.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif memory == "sliced":
        padded = torch.zeros((*potential.shape[:-1], 2 * potential.shape[-1] + 1), dtype=dtype)
        padded[..., 1::2] = potential
        potential = padded[..., 1::2]
    harmonic = torch.randn(batch, periodic, generator=generator, dtype=torch.float64) * scale
    with_harmonic = draw((True, False)) and periodic > 0
    box = {"spacing": spacing, "boundary": boundary, "stencil": stencil}
    return Case(potential, harmonic.to(dtype) if with_harmonic else None, box)


def check_gradients(case: Case, gradient: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Against automatic differentiation of the reference, in units of what is summed."""
    potential = torch.zeros(case.potential.shape, dtype=torch.float64, requires_grad=True)
    harmonic = torch.zeros(3, case.walls.count(False), dtype=torch.float64, requires_grad=True)
    velocity = decode_velocity(potential, harmonic, **case.box, implementation="reference")
    wide = torch.autograd.grad(velocity, (potential, harmonic), gradient.double(), materialize_grads=True)
    tolerance = TOLERANCE[gradient.dtype]
    largest = float(gradient.double().abs().max()) / min(case.spacing)
    assert (found[0].double() - wide[0]).abs().max() <= 4 * tolerance * largest
    if harmonic.numel():
        total = float(gradient.double().abs().flatten(2).sum(2).max())
        assert (found[1].double() - wide[1]).abs().max() <= tolerance * total
