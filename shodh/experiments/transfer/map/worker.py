"""A group of runs in a process of their own: ``python -m shodh.experiments.transfer.map.worker JOB.json``.

Runs of a group are of one width, scale of fields and seed, and learn side by side from one stream: data are solved once
for all of them, and none sees the others. Every `SAVE_EVERY` seconds, and when a signal comes, their state is kept, and
the same command goes on from there with the same numbers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file

from shodh.core import signals
from shodh.core.devices import pick_device
from shodh.core.environment import describe_environment
from shodh.core.files import atomic_path
from shodh.core.precision import ieee_float32
from shodh.core.reading import parse_json
from shodh.core.seeding import Key
from shodh.core.strict_json import dumps, write_json
from shodh.data.fresh import FreshRegime
from shodh.experiments.harness.workers import STOPPED, begin_worker
from shodh.experiments.transfer.map.learner import Frames, Learner
from shodh.experiments.transfer.map.runs import MapRun, by_group, expand
from shodh.experiments.transfer.map.settings import DENSE, SPECIALIST, MapConfig
from shodh.physics.opposed import OPPOSED
from shodh.train.runtime import run_ranks

SAVE_EVERY = 60.0  # seconds between two states that are kept


def job_of(study: MapConfig, group: str, runs: Sequence[MapRun]) -> dict[str, Any]:
    """JSON-able: what a worker is told."""
    return {"study": study.model_dump(mode="json"), "group": group, "runs": [run.name for run in runs]}


def can_meet_others(run: MapRun) -> bool:
    """Whether a model can be asked about a regime that it has not learned: it learned several, and needs no label."""
    experts = run.operator.experts
    return (
        run.arm != SPECIALIST
        and run.arm not in run.study.apart
        and not (experts.num_experts and experts.router.traits.labelled)
    )


class Group:
    """Runs of one group under way.

    Parameters
    ----------
    runs : sequence of MapRun
        Of one width, scale of fields and seed, and none finished.
    state : Path
        Where the state of all of them is kept.
    """

    def __init__(self, runs: Sequence[MapRun], state: Path, device: torch.device) -> None:
        first = runs[0]
        self.study, self.seed, self.path = first.study, first.seed, state
        self.names = [run.name for run in runs]
        unit = 1.0 if first.fields == "normalised" else None
        frames = self.study.history + 1

        def regimes(names: Iterable[str]) -> dict[str, FreshRegime]:
            return {n: FreshRegime(n, self.study.grid, frames, unit, self.study.noise, device) for n in names}

        self.data = regimes(n for n in self.study.regimes if any(n in run.regimes for run in runs))
        asked = [run for run in runs if can_meet_others(run)] if self.study.unseen or self.study.plasticity else []
        self.others = regimes(n for n in OPPOSED if any(n not in run.regimes for run in asked))
        self.learners = [Learner(run, self.data, device) for run in runs]
        self.steps = max(run.operator.train.steps for run in runs)
        self.done = self._restore()

    def frames(self, keys: Sequence[tuple[Key, ...]]) -> dict[str, torch.Tensor]:
        """Trajectories of all regimes by the names of samples."""
        return {name: regime.samples(keys) for name, regime in self.data.items()}

    def train(self, stop: Event) -> bool:
        """Take the steps that are left; False if it was stopped, with its state kept."""
        kept, size = time.monotonic(), self.study.samples
        while self.done < self.steps:
            steps = range(self.done, min(self.steps, self.done + self.study.stream))
            together = self.frames([(self.seed, step, number) for step in steps for number in range(size)])
            for place, step in enumerate(steps):
                batch = {name: frames[place * size : (place + 1) * size] for name, frames in together.items()}
                for learner in self.learners:
                    if step < learner.run.operator.train.steps:
                        learner.step(step, batch)
            self.done = steps.stop
            if stop.is_set() or time.monotonic() - kept > SAVE_EVERY:
                self._keep()
                kept = time.monotonic()
            if stop.is_set() and self.done < self.steps:
                return False
        return True

    def finish(self, stop: Event) -> bool:
        """Measure every run and write its result; False if it was stopped. The state is then of no more use."""
        study = self.study
        self._keep()
        keys = [("held out", number) for number in range(study.held_out)]
        held_out = self.frames(keys)
        probes: Frames = {}
        if study.gradient_samples:
            probes = self.frames([("gradients", number) for number in range(study.gradient_samples)])
        others = {name: regime.samples(keys) for name, regime in self.others.items()}
        for learner in self.learners:
            if stop.is_set():
                return False
            values = learner.measure(held_out)
            if others and can_meet_others(learner.run):
                if study.unseen:
                    values["unseen"] = learner.unseen(others, self.others)
                if study.plasticity:
                    values["plasticity"] = self.plasticity(learner, others)
            if probes and learner.run.arm == DENSE:
                values["gradients"] = learner.gradients(probes)
            run = learner.run
            said = {"run": run.labels, "identity": run.identity()}
            write_json(run.result, {**said, **values, "env": describe_environment()})
        self.path.unlink(missing_ok=True)
        return True

    def plasticity(self, learner: Learner, held_out: Frames) -> dict[str, Any]:
        """Errors of the model, and of a new one of its kind, after a few steps on each regime that it has not met."""
        found: dict[str, Any] = {"trained": {}, "new": {}}
        for name in sorted(self.others.keys() - set(learner.regimes)):
            for side, new in (("trained", False), ("new", True)):
                adapted = learner.adapted(name, self.others, self.lessons[name], new)
                found[side] |= adapted.measure({name: held_out[name]})["errors"]
        return found

    @cached_property
    def lessons(self) -> dict[str, list[Frames]]:
        """A batch a step of each regime that some mix has not met."""
        steps, size = self.study.plasticity, self.study.samples
        keys = [(self.seed, "plasticity", step, number) for step in range(steps) for number in range(size)]
        return {n: [{n: part} for part in r.samples(keys).split(size)] for n, r in self.others.items()}

    def _keep(self) -> None:
        tensors = {f"{name}:{key}": value.contiguous().clone()
                   for name, learner in zip(self.names, self.learners, strict=True)
                   for key, value in learner.state().items()}  # fmt: skip
        with atomic_path(self.path) as path:
            save_file(tensors, path, {"step": str(self.done), "runs": dumps(self._identities())})

    def _restore(self) -> int:
        """The step to go on from: 0 where no state of these very runs, and maybe others, is kept."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            meta = file.metadata()
        kept = parse_json(meta["runs"], str(self.path))
        own = self._identities()
        if not isinstance(kept, dict) or any(kept.get(name) != identity for name, identity in own.items()):
            return 0
        tensors = load_file(self.path)
        for name, learner in zip(self.names, self.learners, strict=True):
            own = {key.removeprefix(f"{name}:"): v for key, v in tensors.items() if key.startswith(f"{name}:")}
            learner.restore(own)
        return int(meta["step"])

    def _identities(self) -> dict[str, Any]:
        return {learner.run.name: learner.run.identity() for learner in self.learners}


@ieee_float32()
def carry_out(job: dict[str, Any], device: torch.device, stop: Event) -> bool:
    """Train and measure the runs of a job; False if it was stopped."""
    study = MapConfig.model_validate(job["study"])
    runs = [run for run in by_group(expand(study))[job["group"]] if run.name in job["runs"] and not run.finished]
    if not runs:
        return True
    group = Group(runs, study.folder / "states" / f"{job['group']}.safetensors", device)
    return group.train(stop) and group.finish(stop)


def main() -> int:
    job, stop = begin_worker(), Event()
    signals.hold()
    for number in signals.STOPS:
        signal.signal(number, lambda *_: stop.set())
    return 0 if carry_out(job, torch.device(pick_device("auto")), stop) else STOPPED


if __name__ == "__main__":
    run_ranks(main)
