"""Held-out evaluation of a run: latent and decoded errors, rollouts, divergence and routing, by regime.

Runs on one device with the plain-torch twin, from the exchange-format weights; DeepSpeed is not needed. Every error is
set beside that of persistence (the last known frame) on the same windows, and beside what the tokenizer alone loses.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shodh.config import RunConfig
from shodh.data import LatentWindowDataset, Split, WindowDataset
from shodh.errors import CheckpointError
from shodh.fields import AXES
from shodh.models.domain import Domain, add_walls
from shodh.models.factory import build_operator
from shodh.models.operator import LatentTransformer
from shodh.models.tokenizer import Potential, Tokenizer, relative_spacing
from shodh.moe.routing import count_by_regime, regime_information
from shodh.moe.step import regime_arguments
from shodh.ops import decode_velocity, divergence, face_flux
from shodh.train.checkpoint import WEIGHTS, load_into, load_weights, read_manifest
from shodh.train.datasets import Regimes
from shodh.train.latents import TrainedTokenizer, open_for_operator, open_latents, prepare_latents
from shodh.train.losses import relative_l2, vrmse
from shodh.train.run_folder import RunFolder

log = logging.getLogger("shodh")

DIVERGENCE_OPERATOR = "staggered, sum_i (u_i[c] - u_i[c - e_i]) / h_i, component i on the upper face of its cell"


class Means:
    """Running means of named per-sample values."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add per-sample values ``[B]``."""
        self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def result(self) -> dict[str, float]:
        return {name: self._sums[name] / self._counts[name] for name in self._sums}


@dataclass
class Example:
    """One window for the figures: normalised fields ``[C, X, Y, Z]``, those that exist, and the solid mask."""

    regime: str
    labels: list[str]
    truth: Tensor
    prediction: Tensor
    solid: Tensor | None


@dataclass
class Evaluation:
    """What `evaluate` found; `metrics` is JSON-able, the rest serves the figures."""

    metrics: dict[str, Any]
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation of one run needs, opened and checked."""

    config: RunConfig
    folder: RunFolder
    checkpoint: str
    regimes: Regimes
    trained: TrainedTokenizer
    operator: LatentTransformer
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        return self.trained.model


def open_run(run: Path, checkpoint: str | None, device: torch.device) -> Evaluator:
    """Open a run folder with its newest, or a named, checkpoint.

    Raises
    ------
    ConfigError, CheckpointError, DataError
        One line that names what is missing or does not fit.
    """
    folder = RunFolder(run)
    config = folder.config()
    tag = checkpoint or folder.latest()
    if tag is None:
        raise CheckpointError(f"{run} has no complete checkpoint yet")
    weights = folder.checkpoints / tag / WEIGHTS
    read_manifest(weights.parent)
    operator = build_operator(config)
    load_into(operator, load_weights(weights), weights)
    regimes, trained = open_for_operator(config)
    trained.model.to(device)
    return Evaluator(config, folder, tag, regimes, trained, operator.to(device).eval(), device)


Windows = tuple[Tensor, Tensor, Tensor, Tensor]


def _batches(
    latents: LatentWindowDataset, fields: WindowDataset, rows: Sequence[int], size: int, device: torch.device
) -> Iterator[Windows]:
    """Latents ``[B, T, L, ...]``, features ``[B, S', ...]``, fields ``[B, T, C, ...]`` and static ``[B, S, ...]``."""
    assert len(latents) == len(fields)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        encoded, stored = [latents[i] for i in chosen], [fields[i] for i in chosen]
        parts = ((encoded, "latents"), (encoded, "static"), (stored, "fields"), (stored, "static"))
        a, b, c, d = (torch.stack([item[name] for item in items]).to(device) for items, name in parts)
        yield a, b, c, d


class RegimeEvaluation:
    """One-step and rollout errors, divergence and routing of one regime."""

    def __init__(self, evaluator: Evaluator, number: int) -> None:
        self.e = evaluator
        self.number = number
        self.domain: Domain = evaluator.regimes.domains[number]
        self.name = evaluator.regimes.names[number]
        self.slices = evaluator.regimes.channels(number)
        self.channels = [c for s in self.slices.values() for c in range(s.start, s.stop)]
        self.solid = evaluator.regimes.solid_channel(number)
        self.means = Means()
        self.table: Tensor | None = None
        self.divergence = DivergenceMeter(evaluator, number)
        self.example: Example | None = None

    def _told(self, past: Tensor) -> dict[str, Any]:
        return regime_arguments(self.e.config.operator.experts, self.number, past)

    def _decode(self, latent: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Fields, and what the network emitted for them."""
        emitted = self.e.tokenizer.emit(latent, geometry)
        return self.e.tokenizer.assemble(emitted, self.domain), emitted

    def _add_errors(self, kind: str, prediction: Tensor, target: Tensor) -> None:
        error = (prediction - target)[:, self.channels]
        self.means.add(f"decoded_mse/{kind}", error.square().flatten(1).mean(1))
        for name, channels in self.slices.items():
            u, v = prediction[:, channels], target[:, channels]
            self.means.add(f"l2re/{name}/{kind}", relative_l2(u, v))
            self.means.add(f"vrmse/{name}/{kind}", vrmse(u, v))

    def add(self, latents: Tensor, features: Tensor, fields: Tensor, static: Tensor) -> None:
        """One batch of windows: history and the frame that follows."""
        history = self.e.config.data.history
        past, target = latents[:, :history], latents[:, history]
        output = self.e.operator(past, features, **self._told(past))
        self.means.add("latent_mse/model", (output.latent - target).square().flatten(1).mean(1))
        self.means.add("latent_mse/persistence", (past[:, -1] - target).square().flatten(1).mean(1))
        geometry = add_walls(static, self.domain)
        prediction, emitted = self._decode(output.latent, geometry)
        truth = fields[:, history]
        self._add_errors("model", prediction, truth)
        self._add_errors("persistence", fields[:, history - 1], truth)
        self._add_errors("tokenizer", self._decode(target, geometry)[0], truth)
        self.divergence.add(self.e.tokenizer.potentials(emitted, self.domain))
        if self.solid is not None:
            self._add_solid_speed(prediction, static[:, self.solid])
        if output.routing:
            count = len(self.e.regimes.names)
            label = torch.full((len(latents),), self.number, device=latents.device)
            counts = [count_by_regime(r.selected, label, count, r.num_experts) for r in output.routing]
            table = torch.stack(counts).cpu()
            self.table = table if self.table is None else self.table + table
        if self.example is None:
            solid = None if self.solid is None else static[0, self.solid].cpu()
            shown = [values[0, self.channels].cpu() for values in (truth, prediction)]
            self.example = Example(self.name, self._labels(), shown[0], shown[1], solid)

    def _labels(self) -> list[str]:
        """A name for each existing channel."""
        kinds = {f.name: f.kind for f in self.e.regimes.dynamic}
        return [
            f"{name} {axis}" if kinds[name] == "vector" else name
            for name, s in self.slices.items()
            for axis in AXES[: s.stop - s.start]
        ]

    def _add_solid_speed(self, prediction: Tensor, solid: Tensor) -> None:
        """Speed inside solids over the mean speed in the fluid: the decode conserves mass, it does not know no-slip."""
        for f in self.e.regimes.fields_of(self.number):
            if f.solenoidal:
                speed = prediction[:, self.slices[f.name]].square().sum(1)
                inside = (speed * solid).flatten(1).sum(1) / solid.flatten(1).sum(1).clamp(min=1)
                outside = (speed * (1 - solid)).flatten(1).sum(1) / (1 - solid).flatten(1).sum(1).clamp(min=1)
                self.means.add(f"speed_in_solid/{f.name}", (inside / outside).sqrt())

    def rollout(self, latents: Tensor, features: Tensor, fields: Tensor, static: Tensor) -> None:
        """Autoregressive errors by step, from the first frames of trajectories ``[B, T, ...]``."""
        history = self.e.config.data.history
        window = latents[:, :history]
        geometry = add_walls(static, self.domain)
        for step in range(fields.shape[1] - history):
            predicted = self.e.operator(window, features, **self._told(window)).latent
            truth = fields[:, history + step]
            decoded = self._decode(predicted, geometry)[0]
            for kind, u in (("model", decoded), ("persistence", fields[:, history - 1])):
                for name, channels in self.slices.items():
                    self.means.add(f"rollout/{name}/{kind}/{step + 1}", vrmse(u[:, channels], truth[:, channels]))
            window = torch.cat((window[:, 1:], predicted.unsqueeze(1)), 1)

    def result(self) -> dict[str, Any]:
        """Nested metrics of the regime."""
        tree: dict[str, Any] = {}
        for path, value in self.means.result().items():
            node = tree
            *parents, last = path.split("/")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        for name, kinds in tree.get("rollout", {}).items():
            tree["rollout"][name] = {
                kind: [steps[str(i + 1)] for i in range(len(steps))] for kind, steps in kinds.items()
            }
        tree["divergence"] = self.divergence.result()
        return tree


class DivergenceMeter:
    """Divergence of decoded velocity in physical units, mode by mode; see `DIVERGENCE_OPERATOR`.

    ``fp32``: decoded and stored in float32. ``fp64``: the same float32 potential decoded in float64. ``exact``: float32
    with the potential rounded to a lattice; zero to the last bit where the ratios of cell sizes are powers of two.
    ``exact_flux``: the net volume flux out of each cell of the same field, zero for every ratio (see
    `shodh.ops.decode_velocity`). Each as maximum, root mean square, and the maximum over the root mean square of the
    velocity gradient (a pure number, which does not depend on units).
    """

    def __init__(self, evaluator: Evaluator, number: int) -> None:
        regimes = evaluator.regimes
        domain = regimes.domains[number]
        self._domain = domain
        self._spacing = domain.spacing(evaluator.config.data.cells)
        constants = regimes.normalizer.constants[regimes.names[number]]
        self._scale = {f.name: constants[f.name][1] for f in regimes.fields_of(number)}
        self._max: dict[str, float] = {}
        self._square: dict[str, list[float]] = {}

    def add(self, potentials: Mapping[str, Potential]) -> None:
        """Potentials of a batch, float32, model units."""
        for name, (potential, harmonic) in potentials.items():
            relative = relative_spacing(self._domain, potential.shape[2:])
            for mode in ("fp32", "fp64", "exact"):
                dtype = torch.float64 if mode == "fp64" else torch.float32
                a = potential.to(dtype)
                h = None if harmonic is None else harmonic.to(dtype)
                u = decode_velocity(a, h, spacing=relative, boundary=self._domain.boundary, exact=mode == "exact")
                u = u * self._scale[name]
                self._measure(f"{name}/{mode}", u, relative)
                if mode == "exact":
                    self._measure(f"{name}/exact_flux", u, relative)

    def _measure(self, name: str, velocity: Tensor, relative: tuple[float, float, float]) -> None:
        # Differences are taken with the relative spacing the field was made with and rescaled to true lengths: in
        # exact arithmetic the same number, and in float32 the one whose rounding the decode controls.
        unit = relative[0] / self._spacing[0]
        boundary = self._domain.boundary
        if name.endswith("/exact_flux"):
            div = divergence(face_flux(velocity, spacing=relative), boundary=boundary) * (unit / max(relative))
        else:
            div = divergence(velocity, spacing=relative, boundary=boundary) * unit
        gradient = sum(
            (velocity.double().diff(dim=2 + axis) / relative[axis] * unit).square().mean() for axis in range(3)
        )
        self._max[name] = max(self._max.get(name, 0.0), float(div.abs().max()))
        self._square.setdefault(name, []).append(float(div.double().square().mean()))
        self._square.setdefault(f"{name}/gradient", []).append(float(gradient))

    def result(self) -> dict[str, Any]:
        out: dict[str, Any] = {"operator": DIVERGENCE_OPERATOR, "units": "velocity units / length units of the file"}
        for name, largest in self._max.items():
            squares, gradients = self._square[name], self._square[f"{name}/gradient"]
            rms = (sum(squares) / len(squares)) ** 0.5
            gradient_rms = (sum(gradients) / len(gradients)) ** 0.5
            out[name] = {"max": largest, "rms": rms, "max_over_gradient": largest / gradient_rms}
        return out


def _rollout_batches(evaluator: Evaluator, number: int, cache: Path, split: Split) -> Iterator[Windows]:
    """The first frames of every trajectory of a split, as long as the rollout asks and the data allow."""
    config, source = evaluator.config, evaluator.regimes.sources[number]
    history, stride = config.data.history, config.data.stride
    frames = min(source.num_frames(split))
    steps = min(config.evaluation.rollout, (frames - 1) // stride + 1 - history)
    if steps < 1:
        return
    fields = WindowDataset(
        source, split, history=history, horizon=steps, stride=stride, normalizer=evaluator.regimes.normalizer
    )
    latents = open_latents(config, evaluator.regimes, cache, split, horizon=steps)[number]
    firsts = [i for i in range(len(fields)) if fields.index[i][1] == 0]
    yield from _batches(latents, fields, firsts, config.evaluation.batch, evaluator.device)


@torch.no_grad()
def evaluate(evaluator: Evaluator, split: Split) -> Evaluation:
    """Evaluate a run on a split, regime by regime."""
    config, regimes = evaluator.config, evaluator.regimes
    cache = prepare_latents(config, regimes, evaluator.trained, evaluator.device)
    datasets = open_latents(config, regimes, cache, split)
    by_regime: dict[str, Any] = {}
    result = Evaluation({})
    table: Tensor | None = None
    hidden = not sys.stderr.isatty()
    for number, source in enumerate(regimes.sources):
        part = RegimeEvaluation(evaluator, number)
        history = config.data.history
        fields = WindowDataset(
            source, split, history=history, horizon=1, stride=config.data.stride, normalizer=regimes.normalizer
        )
        size = config.evaluation.batch
        batches = _batches(datasets[number], fields, range(len(fields)), size, evaluator.device)
        for batch in tqdm(batches, total=-(-len(fields) // size), desc=part.name, unit="batch", disable=hidden):
            part.add(*batch)
        for batch in _rollout_batches(evaluator, number, cache, split):
            part.rollout(*batch)
        by_regime[part.name] = part.result()
        if part.example is not None:
            result.examples.append(part.example)
        if part.table is not None:
            table = part.table if table is None else table + part.table
    result.metrics = {
        "run": str(evaluator.folder.path),
        "checkpoint": evaluator.checkpoint,
        "split": split,
        "windows": {name: len(d) for name, d in zip(regimes.names, datasets, strict=True)},
        "regimes": by_regime,
        "routing": routing_summary(table, regimes.names),
    }
    return result


def routing_summary(table: Tensor | None, names: list[str]) -> dict[str, Any] | None:
    """Shares of each regime's tokens by expert, U and NMI, layer by layer; None for a dense model."""
    if table is None:
        return None
    layers = []
    for counts in table:
        u, nmi = regime_information(counts)
        shares = (counts.double() / counts.sum(1, keepdim=True)).tolist()
        layers.append(
            {
                "regime_information": u,
                "nmi": nmi,
                "shares": dict(zip(names, shares, strict=True)),
                "counts": dict(zip(names, counts.tolist(), strict=True)),
            }
        )
    return {"num_experts": table.shape[-1], "layers": layers}
