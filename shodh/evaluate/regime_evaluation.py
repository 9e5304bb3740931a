"""What one regime of a run is measured by: rollouts from several starts of each held-out trajectory, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from shodh.checkpoint.description import Kind
from shodh.config import RunConfig
from shodh.core.precision import Precision
from shodh.data import LatentWindowDataset, Split, WindowDataset
from shodh.data.windows import WindowIndex, require_windows
from shodh.evaluate.conserved import drifts
from shodh.evaluate.divergence import DivergenceMeter
from shodh.evaluate.rows import Key, Place, Rows
from shodh.evaluate.spectra import Shells
from shodh.evaluate.windows import Schedule
from shodh.models.forecaster import Forecaster
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.registry import FieldOperator
from shodh.models.tokenizer import Tokenizer
from shodh.moe.routing import count_by_regime
from shodh.schema.fields import AXES
from shodh.schema.measures import MEASURES, Truth, component_vrmse, mean_over, mean_square_error
from shodh.train.datasets import Regimes
from shodh.train.field_task import open_windows
from shodh.train.latents import LatentCache, TrainedTokenizer, open_latents
from shodh.train.operator_task import CONDITIONS
from shodh.train.run_folder import RunFolder


@dataclass
class Example:
    """One window for the figures: normalised fields ``[C, *grid]``, those that exist, and the static ones."""

    regime: str
    labels: list[str]
    truth: Tensor
    prediction: Tensor
    static: Tensor
    solid: Tensor | None


@dataclass(frozen=True)
class Evaluator:
    """Everything an evaluation of one run needs, opened and checked; ``trained`` is None for operators on fields.

    ``weights`` says whether they are the average over the training (``ema``) or as its optimiser left them (``raw``).
    """

    config: RunConfig
    folder: RunFolder
    checkpoint: str
    regimes: Regimes
    trained: TrainedTokenizer | None
    operator: LatentTransformer | FieldOperator
    device: torch.device
    weights: Kind = "raw"
    precision: Precision = "fp32"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of a run on latents."""
        return None if self.trained is None else self.trained.model

    @property
    def forecaster(self) -> Forecaster:
        """The model on the regimes of the run."""
        return Forecaster.of(self.config, self.regimes.space, self.operator, self.tokenizer)


class Windows(NamedTuple):
    """Windows of one regime: history and the frames that follow.

    ``states [B, T, ...]`` and ``features [B, ...]`` of the operator (`Forecaster.encode`); ``fields [B, T, C, *grid]``
    and ``static [B, S, *grid]`` in model units; ``conditions [B, N]`` of an operator that is told some.
    """

    places: Sequence[Place]
    states: Tensor
    features: Tensor
    fields: Tensor
    static: Tensor
    conditions: Tensor | None


class RegimeEvaluation:
    """Errors, spectra, conserved quantities and routing of one regime; of decoded fields also what the tokenizer alone
    loses, and their divergence. Of this rank's windows; `parts` are put together by `evaluate`.

    Parameters
    ----------
    cache : LatentCache, optional
        Of latents (`prepare_latents`); without one, states are made of the fields as they are read.
    """

    def __init__(self, evaluator: Evaluator, number: int, split: Split, cache: LatentCache | None = None) -> None:
        self.e, self.number, self.split, self.cache = evaluator, number, split, cache
        self.forecaster, space = evaluator.forecaster, evaluator.regimes.space
        self.history = self.forecaster.history
        self.name, self.domain = space.names[number], space.domains[number]
        self.slices, self.channels = space.channels(number), space.channel_numbers(number)
        self.solid = space.solid_channel(number)
        self.masks, self.constants = space.masks(number), space.constants(number)
        self.kinds = {f.name: f.kind for f in space.dynamic}
        tokenizer = self.forecaster.tokenizer
        self.divergence = None if tokenizer is None else DivergenceMeter(space, number, evaluator.config.cells)
        axes = len(evaluator.config.cells)
        self.shells = Shells(evaluator.config.cells, self.domain.boundary[:axes], self.domain.lengths[:axes])
        self.rows = Rows(self.name)
        self.table: Tensor | None = None
        self.example: Example | None = None
        source, data = evaluator.regimes.sources[number], evaluator.config.data
        lengths = source.num_frames(split)
        index = WindowIndex(lengths, data.history + 1, data.stride)
        require_windows(index, f"regime {self.name!r}, split {split!r}, stride {data.stride}", lengths)
        self.schedule = Schedule.of(evaluator.config, lengths)
        if self.schedule.steps > 1:
            frames = (data.history + self.schedule.steps - 1) * data.stride + 1
            source.name_short(split, frames, f"rollouts of {self.schedule.steps} steps")

    # Reading

    def windows(self) -> Iterator[Windows]:
        """Batches of this rank's windows, each read while the one before is measured: arguments of `add`."""
        batches = self.schedule.batches(self.e.config.evaluation.batch)
        opened = {horizon: self._open(horizon) for horizon in self.schedule.places}
        with ThreadPoolExecutor(1) as reader:
            reading: list[Future[dict[str, Tensor]]] = []
            for number, (horizon, places) in enumerate(batches):
                if not reading:
                    reading.append(reader.submit(self._read, *opened[horizon], places))
                if number + 1 < len(batches):
                    following, others = batches[number + 1]
                    reading.append(reader.submit(self._read, *opened[following], others))
                yield self._windows(places, reading.pop(0).result())

    def _open(self, horizon: int) -> tuple[WindowDataset, LatentWindowDataset | None]:
        """Windows of fields, and of cached latents."""
        config, regimes = self.e.config, self.e.regimes
        fields = open_windows(config, regimes, self.split, horizon)[self.number]
        if self.cache is None:
            return fields, None
        return fields, open_latents(config, regimes, self.cache, self.split, horizon)[self.number]

    @staticmethod
    def _read(fields: WindowDataset, latents: LatentWindowDataset | None, places: Sequence[Place]) -> dict[str, Tensor]:
        numbers = [fields.index.number(*place) for place in places]
        items: list[Mapping[str, Any]] = [fields[number] for number in numbers]
        names = [name for name in ("fields", "static", CONDITIONS) if name in items[0]]
        found = {name: torch.stack([item[name] for item in items]) for name in names}
        if latents is not None:
            cached = [latents[number] for number in numbers]
            found["states"] = torch.stack([item["latents"] for item in cached])
            found["features"] = torch.stack([item["static"] for item in cached])
        return found

    def _windows(self, places: Sequence[Place], read: Mapping[str, Tensor]) -> Windows:
        on = {name: values.to(self.e.device) for name, values in read.items()}
        frames, static, conditions = on["fields"], on["static"], on.get(CONDITIONS)
        if "states" in on:
            return Windows(places, on["states"], on["features"], frames, static, conditions)
        encoded = self.forecaster.encode(frames, static, self.number)
        return Windows(places, *encoded, frames, static, conditions)

    # Measuring

    def add(self, batch: Windows) -> None:
        """Roll out a batch of windows and measure every step."""
        labels = self.forecaster.labels(self.number, batch.states)
        horizon = batch.fields.shape[1] - self.history
        given = batch.fields[:, self.history - 1]
        past = batch.states[:, : self.history]
        outputs = self.forecaster.unroll(past, batch.features, labels, conditions=batch.conditions)
        for step, output in enumerate(islice(outputs, horizon), 1):
            values: dict[Key, Tensor] = {}
            emitted = self.forecaster.emit(output.latent, batch.static, self.number)
            compared = {"model": self.forecaster.assemble(emitted, self.number).float(), "persistence": given}
            truth = batch.fields[:, self.history + step - 1]
            if self.forecaster.tokenizer is not None:
                target, last = batch.states[:, self.history + step - 1], batch.states[:, self.history - 1]
                values[Key("latent_mse", "", "model")] = _finite(mean_over((output.latent - target).square()))
                values[Key("latent_mse", "", "persistence")] = mean_over((last - target).square())
                if step in (1, horizon):  # It does not know how far a frame is ahead, and decoding costs most.
                    decoded = self.forecaster.decode(target.unsqueeze(1), batch.static, self.number)
                    compared["tokenizer"] = decoded[:, 0].float()
            values |= self._errors(compared, truth, batch.static)
            values |= self._drifts(compared, truth, given, batch.static)
            if step in (1, horizon):
                values |= self._spectra(compared, truth, batch.static)
            if step == 1:
                values |= self._solid_speeds(compared["model"], batch.static)
                if self.divergence is not None:
                    self.divergence.add(self.forecaster.potentials(emitted, self.number))
                self._add_routing(output)
                self._keep_example(truth, compared["model"], batch)
            self.rows.add(batch.places, horizon, step, values)

    def _fields(self, static: Tensor) -> Iterator[tuple[str, slice, Tensor | None, float | None]]:
        """Name, channels, cells (None: all), and model units of a physical zero of each field that exists.

        The zero of a field that is constant in the training data is None: it is decoded as its value, whatever is
        predicted for it, and no error.
        """
        for name, channels in self.slices.items():
            exists = static[:, self.masks[name], None] == 0 if name in self.masks else None
            mean, scale = self.constants[name]
            yield name, channels, exists, None if scale == 0 else -mean / scale

    def _errors(self, compared: Mapping[str, Tensor], target: Tensor, static: Tensor) -> dict[Key, Tensor]:
        """Errors of one step over the cells where fields exist; ``static [B, S, *grid]`` holds their masks.

        ``decoded_mse`` is the mean over channels of each one's mean square, as in `FieldTask`.
        """
        values: dict[Key, Tensor] = {}
        squares: dict[str, list[Tensor]] = {kind: [] for kind in compared}
        for name, channels, exists, zero in self._fields(static):
            truth = Truth.of(target[:, channels], exists)
            for kind, prediction in compared.items():
                guess = torch.zeros_like(target[:, channels]) if zero is None else prediction[:, channels]
                error = mean_square_error(guess, target[:, channels], exists)
                squares[kind].append(error)
                for measure, definition in MEASURES.items():
                    if measure != "vrmse_joint" or error.shape[1] > 1:
                        values[Key(measure, name, kind)] = definition.of(error, truth, zero or 0.0)
                if error.shape[1] > 1:
                    for axis, own in zip(AXES, component_vrmse(error, truth).unbind(1), strict=False):
                        values[Key("vrmse_component", f"{name} {axis}", kind)] = own
        return values | {Key("decoded_mse", "", k): torch.cat(parts, 1).mean(1) for k, parts in squares.items()}

    def _drifts(
        self, compared: Mapping[str, Tensor], truth: Tensor, given: Tensor, static: Tensor
    ) -> dict[Key, Tensor]:
        """What the mean and the mean square of each field changed by since the last given frame."""
        values: dict[Key, Tensor] = {}
        fields = {"truth": truth, **{kind: v for kind, v in compared.items() if kind != "persistence"}}
        for name, channels, exists, zero in self._fields(static):
            if zero is not None:
                before = Truth.of(given[:, channels], exists)
                for kind, now in fields.items():
                    found = drifts(before, Truth.of(now[:, channels], exists), zero)
                    values |= {Key(measure, name, kind): _finite(v) for measure, v in found.items()}
        return values

    def _spectra(self, compared: Mapping[str, Tensor], target: Tensor, static: Tensor) -> dict[Key, Tensor]:
        """Energy of fields and of errors by shell, in model units; nothing where a field does not exist."""
        values: dict[Key, Tensor] = {}
        for name, channels, exists, zero in self._fields(static):
            if zero is not None:
                kept = {kind: v[:, channels] for kind, v in {"truth": target, **compared}.items()}
                if exists is not None:
                    kept = {kind: torch.where(exists, v, 0.0) for kind, v in kept.items()}
                waves = {kind: self.shells.transform(v) for kind, v in kept.items()}
                for kind, wave in waves.items():
                    values[Key("energy", name, kind)] = _finite(self.shells.energy(wave))
                    if kind != "truth":
                        error = self.shells.energy(wave - waves["truth"])
                        values[Key("error_energy", name, kind)] = _finite(error)
        return values

    def _solid_speeds(self, prediction: Tensor, static: Tensor) -> dict[Key, Tensor]:
        """Speed inside solids over the mean speed in the fluid: the decode conserves mass, it does not know no-slip."""
        if self.solid is None or self.divergence is None:
            return {}
        solid, values = static[:, self.solid], {}
        for f in self.e.regimes.space.fields_of(self.number):
            if f.solenoidal:
                speed = prediction[:, self.slices[f.name]].square().sum(1)
                inside = (speed * solid).flatten(1).sum(1) / solid.flatten(1).sum(1).clamp(min=1)
                outside = (speed * (1 - solid)).flatten(1).sum(1) / (1 - solid).flatten(1).sum(1).clamp(min=1)
                values[Key("speed_in_solid", f.name, "model")] = (inside / outside).sqrt()
        return values

    def _add_routing(self, output: OperatorOutput) -> None:
        if not output.routing:
            return
        count = len(self.e.regimes.names)
        label = torch.full((len(output.latent),), self.number, device=output.latent.device)
        counts = [count_by_regime(r.selected, label, count, r.num_experts) for r in output.routing]
        table = torch.stack(counts)
        self.table = table if self.table is None else self.table + table

    def _keep_example(self, truth: Tensor, prediction: Tensor, batch: Windows) -> None:
        """The first window of the first batch."""
        if self.example is None:
            static = batch.static[0].cpu()
            solid = None if self.solid is None else static[self.solid]
            shown = [values[0, self.channels].cpu() for values in (truth, prediction)]
            self.example = Example(self.name, self._labels(), shown[0], shown[1], static, solid)

    def _labels(self) -> list[str]:
        """A name for each existing channel."""
        return [
            f"{name} {axis}" if self.kinds[name] == "vector" else name
            for name, s in self.slices.items()
            for axis in AXES[: s.stop - s.start]
        ]

    def parts(self) -> RegimeParts:
        """What this rank has measured."""
        divergence = {} if self.divergence is None else self.divergence.parts()
        table = None if self.table is None else self.table.cpu()
        return RegimeParts(self.rows.frame(), divergence, table)


class RegimeParts(NamedTuple):
    """What one rank has measured of a regime: rows, divergence of each window, and counts of tokens."""

    rows: pd.DataFrame
    divergence: dict[str, np.ndarray]
    table: Tensor | None


def _finite(values: Tensor) -> Tensor:
    """Infinite where not finite: NaN is undefined, and a model that diverged is not."""
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf)
