"""One pass of held-out windows through the operator: what was chosen, by which sample, at which layer, where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shodh.core.seeding import generator
from shodh.data import Split
from shodh.evaluate.evaluation import Evaluator
from shodh.routing.probe.interventions import sparse_layers
from shodh.routing.probe.local_physics import LocalPhysics
from shodh.routing.probe.windows import ProbeBatch, ProbeRegime, batches

PROBE_ROWS = 512  # token rows a regime and layer that are kept as inputs for expert similarity


@dataclass
class Picture:
    """One sample to draw: a scalar field and the solids ``[*grid]``, in physical units."""

    label: str
    background: np.ndarray
    solid: np.ndarray | None


@dataclass
class Recording:
    """What a pass over one regime recorded; ``N`` samples of ``S`` tokens, ``K`` choices a token.

    Attributes
    ----------
    selected : ndarray [layers, N, S, K]
        Experts, the best one first.
    trajectory, frame : ndarray [N]
    local : dict
        Local physics by name, ``[N, S]``.
    inputs : Tensor [layers, rows, D]
        Inputs of the expert layers at ``rows`` tokens drawn by (regime, trajectory, frame): another run gets the same.
    """

    regime: ProbeRegime
    num_experts: int
    selected: np.ndarray
    trajectory: np.ndarray
    frame: np.ndarray
    local: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: Tensor | None = None
    picture: Picture | None = None

    @property
    def name(self) -> str:
        return self.regime.name

    def shares(self) -> np.ndarray:
        """Share of each sample's assignments by layer and expert, ``[N, layers, E]``."""
        experts = np.arange(self.num_experts)
        return np.stack([(layer[..., None] == experts).mean((1, 2)) for layer in self.selected], 1)


def record(evaluator: Evaluator, regime: ProbeRegime, split: Split, limit: int, *, details: bool = True) -> Recording:
    """Run up to ``limit`` windows of a regime through a sparse operator.

    Parameters
    ----------
    details : bool
        Also local physics, inputs of the expert layers, and a picture; else the choices alone.
    """
    model, forecaster = evaluator.operator, regime.forecaster(evaluator)
    selected: list[np.ndarray] = []
    inputs: list[Tensor] = []
    trajectory: list[int] = []
    frame: list[int] = []
    local: dict[str, list[np.ndarray]] = {}
    picture: Picture | None = None
    physics = LocalPhysics(regime.source.spacing, regime.source.boundary, model.token_grid)
    rows = math.ceil(PROBE_ROWS / limit)
    for batch in batches(evaluator, regime, split, limit, "probe" if details else "probe, other split"):
        with _layer_inputs(model) as seen:
            labels = forecaster.labels(regime.number, batch.past)
            routing = forecaster.step(batch.past, batch.features, labels, conditions=batch.conditions).routing
        samples = len(batch.past)
        selected.append(torch.stack([r.selected.unflatten(0, (samples, -1)) for r in routing]).cpu().numpy())
        trajectory += batch.trajectory
        frame += batch.frame
        if details:
            inputs.append(_drawn_rows(seen, batch, regime.name, rows))
            fields, static = physical_fields(regime, batch)
            for name, values in physics(fields, static, batch.trajectory).items():
                local.setdefault(name, []).append(values)
            picture = picture or _picture(fields, static)
    return Recording(
        regime,
        routing[0].num_experts,
        np.concatenate(selected, 1),
        np.array(trajectory),
        np.array(frame),
        {name: np.concatenate(parts) for name, parts in local.items()},
        torch.cat(inputs, 1) if inputs else None,
        picture,
    )


def physical_fields(regime: ProbeRegime, batch: ProbeBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The last past frame by field, and the static fields, in physical units: ``[B, components, *grid]``."""
    last = batch.fields[:, batch.past.shape[1] - 1]
    physical = regime.regimes.space.normalizer.denormalize(last, regime.name, batch.static)
    return regime.by_name(physical), regime.by_name(batch.static, static=True)


@contextmanager
def _layer_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs ``[B, S, D]`` of the expert layers, in order, of the forward pass in the block."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    with ExitStack() as stack:
        for layer in sparse_layers(model):
            stack.callback(layer.register_forward_pre_hook(keep).remove)
        yield seen


def _drawn_rows(inputs: list[Tensor], batch: ProbeBatch, regime: str, rows: int) -> Tensor:
    """``rows`` tokens of each sample, the same at all layers: ``[layers, B * rows, D]``."""
    stacked = torch.stack(inputs)  # [layers, B, S, D]
    drawn = []
    for sample, key in enumerate(zip(batch.trajectory, batch.frame, strict=True)):
        order = torch.randperm(stacked.shape[2], generator=generator("probe rows", regime, *key))
        drawn.append(stacked[:, sample, order[:rows].to(stacked.device)])
    return torch.cat(drawn, 1).cpu()


def _picture(fields: Mapping[str, Tensor], static: Mapping[str, Tensor]) -> Picture:
    """The first sample's speed, or where there is no vector, its first field."""
    vectors = [name for name, values in fields.items() if values.shape[1] > 1]
    name = "velocity" if "velocity" in fields else next(iter([*vectors, *fields]))
    values = fields[name][0]
    background = values.square().sum(0).sqrt() if len(values) > 1 else values[0]
    label = f"|{name}|" if len(values) > 1 else name
    solid = static["solid"][0, 0].cpu().numpy() if "solid" in static else None
    return Picture(label, background.cpu().numpy(), solid if solid is not None and solid.any() else None)
