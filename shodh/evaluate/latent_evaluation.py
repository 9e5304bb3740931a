"""Evaluation of operators on latents: what they predict, decoded, beside persistence and the tokenizer alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh.data import LatentWindowDataset, Split, WindowDataset
from shodh.evaluate.regime_evaluation import Evaluator, RegimeEvaluation, Windows, chunks
from shodh.models.tokenizer import Potential, relative_spacing
from shodh.ops import decode_velocity, divergence, face_flux
from shodh.schema.domain import add_walls
from shodh.train.latents import open_latents

DIVERGENCE_OPERATOR = "staggered, sum_i (u_i[c] - u_i[c - e_i]) / h_i, component i on the upper face of its cell"


class LatentEvaluation(RegimeEvaluation):
    """Latent and decoded errors, divergence and routing of one regime.

    Parameters
    ----------
    cache : Path
        From `prepare_latents`.
    """

    def __init__(self, evaluator: Evaluator, number: int, split: Split, cache: Path) -> None:
        super().__init__(evaluator, number, split)
        self.cache = cache
        self.divergence = DivergenceMeter(evaluator, number)

    def _open(self, horizon: int) -> tuple[LatentWindowDataset, WindowDataset]:
        """Latents and fields of the same windows."""
        data, regimes = self.e.config.data, self.e.regimes
        fields = WindowDataset(
            regimes.sources[self.number],
            self.split,
            history=data.history,
            horizon=horizon,
            stride=data.stride,
            normalizer=regimes.normalizer,
        )
        return open_latents(self.e.config, regimes, self.cache, self.split, horizon)[self.number], fields

    @cached_property
    def _one_step(self) -> tuple[LatentWindowDataset, WindowDataset]:
        return self._open(1)

    @property
    def num_windows(self) -> int:
        return len(self._one_step[0])

    def windows(self) -> Iterator[Windows]:
        yield from self._batches(*self._one_step, range(self.num_windows))

    def rollouts(self) -> Iterator[Windows]:
        steps = self.rollout_steps()
        if steps >= 1:
            latents, fields = self._open(steps)
            yield from self._batches(latents, fields, [i for i in range(len(fields)) if fields.index[i][1] == 0])

    def _batches(self, latents: LatentWindowDataset, fields: WindowDataset, rows: Sequence[int]) -> Iterator[Windows]:
        """Latents ``[B, T, L, ...]``, features ``[B, S', ...]``, fields ``[B, T, C, ...]``, static ``[B, S, ...]``."""
        assert len(latents) == len(fields)
        for chosen in chunks(rows, self.e.config.evaluation.batch):
            encoded, stored = [latents[i] for i in chosen], [fields[i] for i in chosen]
            parts = ((encoded, "latents"), (encoded, "static"), (stored, "fields"), (stored, "static"))
            yield tuple(torch.stack([item[name] for item in items]).to(self.e.device) for items, name in parts)

    def _decode(self, latent: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Fields, and what the network emitted for them."""
        emitted = self.e.tokenizer.emit(latent, geometry)
        return self.e.tokenizer.assemble(emitted, self.domain), emitted

    def add(self, *batch: Tensor) -> None:
        latents, features, fields, static = batch
        history = self.e.config.data.history
        past, target = latents[:, :history], latents[:, history]
        output = self.predict(past, features)
        self.means.add("latent_mse/model", (output.latent - target).square().flatten(1).mean(1))
        self.means.add("latent_mse/persistence", (past[:, -1] - target).square().flatten(1).mean(1))
        geometry = add_walls(static, self.domain)
        prediction, emitted = self._decode(output.latent, geometry)
        truth = fields[:, history]
        self._add_errors("model", prediction, truth, static)
        self._add_errors("persistence", fields[:, history - 1], truth, static)
        self._add_errors("tokenizer", self._decode(target, geometry)[0], truth, static)
        self.divergence.add(self.e.tokenizer.potentials(emitted, self.domain))
        if self.solid is not None:
            self._add_solid_speed(prediction, static[:, self.solid])
        self._add_routing(output)
        self._keep_example(truth, prediction, static)

    def _add_solid_speed(self, prediction: Tensor, solid: Tensor) -> None:
        """Speed inside solids over the mean speed in the fluid: the decode conserves mass, it does not know no-slip."""
        for f in self.e.regimes.fields_of(self.number):
            if f.solenoidal:
                speed = prediction[:, self.slices[f.name]].square().sum(1)
                inside = (speed * solid).flatten(1).sum(1) / solid.flatten(1).sum(1).clamp(min=1)
                outside = (speed * (1 - solid)).flatten(1).sum(1) / (1 - solid).flatten(1).sum(1).clamp(min=1)
                self.means.add(f"speed_in_solid/{f.name}", (inside / outside).sqrt())

    def rollout(self, *batch: Tensor) -> None:
        latents, features, fields, static = batch
        history = self.e.config.data.history
        window = latents[:, :history]
        geometry = add_walls(static, self.domain)
        for step in range(fields.shape[1] - history):
            predicted = self.predict(window, features).latent
            truth = fields[:, history + step]
            self._add_rollout(step + 1, "model", self._decode(predicted, geometry)[0], truth, static)
            self._add_rollout(step + 1, "persistence", fields[:, history - 1], truth, static)
            window = torch.cat((window[:, 1:], predicted.unsqueeze(1)), 1)

    def result(self) -> dict[str, Any]:
        return {**super().result(), "divergence": self.divergence.result()}


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
