"""One run of a map under way: its model, its optimiser, one step, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shodh.data.fresh import FreshRegime
from shodh.experiments.harness.learning import gradients_of, take_step
from shodh.experiments.transfer.map.parted import PartedTransformer
from shodh.experiments.transfer.map.runs import MapRun
from shodh.experiments.transfer.map.settings import OBSERVED
from shodh.models.factory import count_parameters
from shodh.models.init import initialise
from shodh.models.kernels import adamw
from shodh.models.operator import LatentTransformer, OperatorOutput
from shodh.models.unfolding import unfold
from shodh.moe.balance import GlobalBalance
from shodh.moe.clusters import Clusters
from shodh.moe.fingerprint import fingerprint
from shodh.moe.groups import decay_groups
from shodh.moe.routers.operator import make_operator_gate
from shodh.moe.routing import count_by_regime, regime_information
from shodh.moe.step import router_arguments
from shodh.train.latent_metric import weighted_square
from shodh.train.schedule import learning_rate

Frames = Mapping[str, Tensor]  # trajectories [B, history + 1, 1, n, n] by regime
LAST = 1e-12  # squared norms below it are those of no gradient


def build_model(run: MapRun) -> LatentTransformer:
    """The operator of a run; weights are not drawn yet."""
    study = run.study
    side = study.grid // study.unfold
    model = LatentTransformer(run.operator, study.unfold**2, 0, (side, side, 1), study.history)
    # It is shown the fields, not their unfolded cells.
    model.router = make_operator_gate(run.operator.experts, *OBSERVED)
    return model


def part(run: MapRun, model: LatentTransformer, regimes: int) -> LatentTransformer | PartedTransformer:
    """The model itself, or parted as the study says of this arm; raises `ConfigError` where it says it wrongly."""
    own = run.study.apart.get(run.arm)
    return model if own is None else PartedTransformer(model, regimes, own)


class Learner:
    """A model that learns the regimes of its run from batches that hold these and maybe others.

    Parameters
    ----------
    regimes : sequence of str, optional
        Others than those of the run.
    """

    def __init__(
        self, run: MapRun, data: Mapping[str, FreshRegime], device: torch.device, regimes: Sequence[str] | None = None
    ) -> None:
        self.run, self.device, self.regimes = run, device, tuple(regimes or run.regimes)
        self.train = run.operator.train
        model = build_model(run)
        initialise(model, run.seed)
        self.model = part(run, model, len(self.regimes)).to(device)
        self.optimizer = adamw(decay_groups(self.model, self.train.weight_decay), self.train.lr, self.train.betas)
        self.balance = GlobalBalance()
        changes = [data[name].change for name in self.regimes]
        self.changes = torch.tensor(changes, device=device)
        self.weights = 1 / self.changes if run.fields == "normalised" else torch.ones_like(self.changes)
        self.seconds = 0.0

    def batch(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """Fields ``[B, history + 1, 1, n, n]`` of this run's regimes, and labels ``[B]``, told to an oracle."""
        parts = [frames[name] for name in self.regimes]
        labels = [torch.full((len(part),), number, device=self.device) for number, part in enumerate(parts)]
        return torch.cat(parts), torch.cat(labels)

    def look(self, fields: Tensor) -> Tensor:
        """Fingerprints of the frames that are given: what routers of kind operator go by."""
        axes = torch.ones(len(fields), 2, dtype=torch.bool, device=self.device)
        return fingerprint(fields[:, : self.run.study.history], axes)

    def predict(self, fields: Tensor, labels: Tensor) -> tuple[OperatorOutput, Tensor]:
        """The output, and the mean square error of each sample, ``[B]``."""
        latents = unfold(fields, self.run.study.unfold)
        history = latents[:, : self.run.study.history]
        static = latents.new_zeros(len(latents), 0, *latents.shape[3:])
        given = router_arguments(self.run.operator.experts, labels, look=lambda: self.look(fields))
        if isinstance(self.model, PartedTransformer):
            given = {"labels": labels}
        output = self.model(history, static, **given)
        return output, weighted_square(output.latent, latents[:, -1], None)

    def step(self, number: int, frames: Frames) -> None:
        """One optimiser step, numbered from 0."""
        start = self._now()
        experts = self.run.operator.experts
        self.model.train()
        fields, labels = self.batch(frames)
        self.balance.start_step()
        output, error = self.predict(fields, labels)
        loss = (error * self.weights[labels]).mean()
        if output.routing:
            loss = loss + self.balance(output.routing).weighted(experts.balance)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.train)
        take_step(self.model, self.optimizer, loss, self.run.operator, output.routing, lambda: self.look(fields))
        self.seconds += self._now() - start

    def _now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def measure(self, held_out: Frames) -> dict[str, Any]:
        """Errors of each held-out sample over its regime's mean change (persistence: 1), and who goes where."""
        self.model.eval()
        errors: dict[str, list[float]] = {}
        counts: list[Tensor] = []
        places: dict[str, Any] = {}
        for number, name in enumerate(self.regimes):
            labels = torch.full((len(held_out[name]),), number, device=self.device)
            output, error = self.predict(held_out[name], labels)
            errors[name] = (error / self.changes[number]).tolist()
            rows = [count_by_regime(r.selected, labels, len(self.regimes), r.num_experts) for r in output.routing]
            if rows:
                counts.append(torch.stack(rows))
            if (found := self._places(held_out[name])) is not None:
                places[name] = found
        model, experts = self.model, self.run.operator.experts
        size = count_parameters(model, experts)
        active = count_parameters(model.models[0] if isinstance(model, PartedTransformer) else model, experts).active
        values: dict[str, Any] = {"errors": errors, "parameters": size.total, "active": active}
        if counts:
            tables = torch.stack(counts).sum(0)
            values["tables"] = tables.tolist()
            values["information"] = [regime_information(table)[0] for table in tables]
        values |= {"places": places} if places else {}
        return values | {"steps": self.run.operator.train.steps, "seconds": self.seconds}

    @torch.no_grad()
    def unseen(self, held_out: Frames, data: Mapping[str, FreshRegime]) -> dict[str, Any]:
        """As `measure`, of regimes that the model has never met: errors, and where fingerprints put the samples."""
        self.model.eval()
        found: dict[str, Any] = {"errors": {}, "places": {}}
        for name in sorted(held_out.keys() - set(self.run.regimes)):
            labels = torch.zeros(len(held_out[name]), dtype=torch.long, device=self.device)
            found["errors"][name] = (self.predict(held_out[name], labels)[1] / data[name].change).tolist()
            if (places := self._places(held_out[name])) is not None:
                found["places"][name] = places
        return found

    def adapted(self, name: str, data: Mapping[str, FreshRegime], batches: Sequence[Frames], new: bool) -> Learner:
        """A learner of another regime alone, from this one's weights or from ``new`` ones, after a step a batch.

        The learning rate goes over these steps as it went over those of the run; the optimiser starts anew.
        """
        found, count = Learner(self.run, data, self.device, [name]), len(batches)
        warmup = round(self.train.warmup * count / self.train.steps)
        found.train = self.train.model_copy(update={"steps": count, "warmup": warmup})
        if not new:
            found.model.load_state_dict(self.model.state_dict())
        for step, frames in enumerate(batches):
            found.step(step, frames)
        return found

    def _places(self, fields: Tensor) -> dict[str, Any] | None:
        """Nearest cluster of each sample, and its squared distance over the mean one in training."""
        clusters = getattr(self.model, "router", None)
        if not isinstance(clusters, Clusters):
            return None
        nearest = clusters.distances(self.look(fields)).min(1)
        return {"cluster": nearest.indices.tolist(), "distance": (nearest.values / clusters.spread).tolist()}

    def gradients(self, frames: Frames) -> dict[str, Any]:
        """Cosines and norms of the regimes' gradients, beside those of two halves of one regime's samples.

        ``cosine`` is between halves of different regimes, ``corrected`` the same over the geometric mean of both
        ``within``: what it would be with samples without end (Spearman's correction). ``norm`` is over the geometric
        mean of all, ``norm_floor`` the ratio of the larger half's to the smaller's.
        """
        halves = {name: [self._gradient(name, half) for half in frames[name].chunk(2)] for name in self.regimes}
        cosine = torch.nn.CosineSimilarity(0)
        within = {name: float(cosine(*pair)) for name, pair in halves.items()}
        pairs, corrected = {}, {}
        names = list(halves)
        for number, a in enumerate(names):
            for b in names[number + 1 :]:
                value = (float(cosine(halves[a][0], halves[b][1])) + float(cosine(halves[a][1], halves[b][0]))) / 2
                pairs[f"{a} ~ {b}"] = value
                floor = within[a] * within[b]
                corrected[f"{a} ~ {b}"] = value / floor**0.5 if min(within[a], within[b]) > 0 else None
        norms = {name: float((pair[0] + pair[1]).norm()) / 2 for name, pair in halves.items()}
        sizes = {name: [max(float(g.norm()), LAST) for g in pair] for name, pair in halves.items()}
        scale = float(torch.tensor([max(n, LAST) for n in norms.values()]).log().mean().exp())
        return {
            "cosine": pairs,
            "corrected": corrected,
            "within": within,
            "norm": {name: norm / scale for name, norm in norms.items()},
            "norm_floor": {name: max(pair) / min(pair) for name, pair in sizes.items()},
        }

    def _gradient(self, name: str, frames: Tensor) -> Tensor:
        """Of one regime's loss, without balance terms, flat in float64."""
        self.model.eval()
        number = self.regimes.index(name)
        labels = torch.full((len(frames),), number, device=self.device)
        _, error = self.predict(frames, labels)
        return torch.cat(list(gradients_of(self.model, (error * self.weights[number]).mean()).values()))

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and optimiser state by name; what `restore` takes."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in values.items()}
        return {**found, "seconds": torch.tensor([self.seconds], dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        own = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
        self.model.load_state_dict(own)
        kept: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                kept.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        self.seconds = float(state["seconds"])
