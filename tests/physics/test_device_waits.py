"""Solvers read nothing from their device within a step, and few numbers between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shodh.physics import get_regime
from shodh.physics.regimes import porous_media
from shodh.physics.regimes.compressible_2d import IdealGas
from shodh.physics.regimes.porous_media import Drive
from shodh.physics.solvers import spectral, stability
from shodh.physics.solvers.convection import Convection
from shodh.physics.solvers.finite_volume import FiniteVolume
from shodh.physics.solvers.mac import ChannelFlow
from shodh.physics.solvers.scalar import ScalarTransport
from shodh.physics.solvers.spectral import SpectralGrid
from shodh.physics.solvers.spectral_flow import IncompressibleFlow
from shodh.physics.solvers.stability import Clock, steps_to_look
from shodh.physics.solvers.stokes import subtract_neighbours
from shodh.physics.solvers.through_flow import ThroughFlow

META = torch.device("meta")  # whose values nobody can read
SPACE, LENGTHS = (4, 6, 5), (1.0, 2.0, 1.5)
DT = torch.empty(2, dtype=torch.float64, device=META)


def channel(interval: Callable[..., Any]) -> None:
    flow = ChannelFlow(SPACE, LENGTHS, 2, viscosity=0.01, force=1.0, device=META)
    scalar = ScalarTransport(SPACE, flow.spacing, 2, 0.01, periodic=(False, True, True), device=META)
    interval(flow, lambda: (flow.step(DT, scalar), flow.advance(0.1, 0.5, scalar)))


def convection(interval: Callable[..., Any]) -> None:
    cells = Convection(SPACE, (1.0, 2.0, 1.5), 2, rayleigh=1e4, prandtl=1.0, device=META)
    interval(cells, lambda: (cells.step(DT, cells.temperature), cells.run(0.1, 0.5)))


def obstacle(interval: Callable[..., Any]) -> None:
    solid = torch.zeros(6, 5, 2, dtype=torch.bool, device=META)
    flow = ThroughFlow(solid, (1.0, 1.0), 0.01, torch.ones(5), torch.float32)
    interval(flow, lambda: (flow.step(DT.float()), flow.advance(0.1, 0.5)))


def gas(interval: Callable[..., Any]) -> None:
    state = torch.empty(4, 6, 5, 2, device=META)
    solver = FiniteVolume(IdealGas(1.4), ("periodic", "wall"), (0.1, 0.1), state)
    interval(solver, lambda: (solver.step(DT, torch.zeros_like(DT)), solver.advance(0.1)))


@pytest.mark.parametrize("solver", [channel, convection, obstacle, gas])
def test_a_step_reads_nothing_from_its_device(solver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a step nor a march does, but for the number of steps to look."""
    looks = iter((3, 0))
    monkeypatch.setattr(stability, "steps_to_look", lambda count: next(looks))

    def interval(flow: Any, run: Callable[[], Any]) -> None:
        run()
        assert flow.clock.steps.is_meta

    solver(interval)
    assert next(looks, None) is None


def test_a_spectral_step_reads_nothing_from_its_device() -> None:
    flow = IncompressibleFlow(SpectralGrid(SPACE, LENGTHS, torch.float32, "meta"), 0.01)
    state = torch.empty(2, 3, *flow.space.modes, dtype=torch.complex64, device=META)
    Clock(2, META).record(DT, flow.tendency(state)[1].double())
    assert spectral.step(flow, state, DT).is_meta


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("open_channel", {"spin_up": 0.2, "frame_interval": 0.2}),
        ("rayleigh_benard", {"spin_up": 0.0, "frame_interval": 4.0}),
        ("decaying_turbulence", {"spin_up": 0.1}),
        ("compressible_2d", {"frame_interval": 0.1}),
    ],
)
def test_looking_rarely_gives_the_same_bits(
    name: str, settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, where each look would wait."""
    regime = get_regime(name, **settings)
    grid = (8,) * regime.schema.ndim
    often = regime.simulate([3, 4], grid, 2)
    looks: list[int] = []

    def rarely(count: torch.Tensor) -> int:
        looks.append(steps_to_look(count))
        return looks[-1]

    monkeypatch.setattr(stability, "waits", lambda device: True)
    for module in (stability, spectral):
        monkeypatch.setattr(module, "steps_to_look", rarely)
    seldom = regime.simulate([3, 4], grid, 2)
    assert all(np.array_equal(often.values[field], seldom.values[field]) for field in often.values)
    assert all(np.array_equal(often.diagnostics[key], seldom.diagnostics[key]) for key in often.diagnostics)
    assert 1 < len(looks) < seldom.diagnostics["steps"].max() <= sum(looks)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read of tensors."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return function(*args, **(kwargs or {}))


def test_porous_media_wait_once_a_frame_however_many_steps_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    regime = get_regime("porous_media")
    run = porous_media._Run(regime, [1, 2], (8, 8, 8), "cpu", lambda fraction: None)
    run.solve_flows()
    run.start_tracer()
    copies: list[torch.Size] = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (copies.append(tensor.shape), cpu(tensor))[1])
    reads, steps = [], []
    for interval in (0.02, 0.09):
        before = run.clock.steps.max().item()
        with Reads() as mode:
            run._advance(interval)
        reads.append(mode.found)
        steps.append(run.clock.steps.max().item() - before)
    assert steps[1] > 2 * steps[0] > 0
    assert reads == [1, 1], "the number of steps, on the host"
    assert copies == [(2, 2)] * 2, "wanted and allowed rates of both trajectories"


class Runaway:
    """A trajectory at rest that loses its rate at the third step."""

    decay = torch.zeros(1, 2, dtype=torch.float64)

    def __init__(self) -> None:
        self.calls = 0

    def tendency(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1  # four a step, the first of which tells the rate
        return torch.zeros_like(state), torch.tensor([10.0 if self.calls < 9 else torch.nan])


@pytest.mark.parametrize("seldom", [False, True])
def test_a_blow_up_between_two_looks_is_named(seldom: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "waits", lambda device: seldom)
    with pytest.raises(spectral.BlowUp) as caught:
        spectral.advance(Runaway(), torch.zeros(1, 1, 2, dtype=torch.float64), 1.0, 1.0)
    assert caught.value.index == 0


def test_three_quarters_of_the_steps_pass_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [torch.tensor([0.0, n]) for n in (0.0, 1.0, 2.0, 5.0, 60.0)]
    assert [steps_to_look(count) for count in counts] == [0, 1, 1, 1, 1]
    monkeypatch.setattr(stability, "waits", lambda device: True)
    assert [steps_to_look(count) for count in counts] == [0, 1, 2, 4, 45]


def test_forces_of_many_times_are_those_of_each() -> None:
    drive = Drive([1, 2, 3], 3.0)
    times = torch.rand(7, 3, dtype=torch.float64)
    assert torch.equal(drive(times), torch.stack([drive(time) for time in times]))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 3, 1, 2, 3)])
def test_neighbours_are_those_of_rolled_fields(shape: tuple[int, ...]) -> None:
    values, found = torch.randn(shape), torch.randn(shape)
    for axis in (2, 3, 4):
        expected = found - 0.7 * values.roll(1, axis) - 0.7 * values.roll(-1, axis)
        subtract_neighbours(found, values, axis, 0.7)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
