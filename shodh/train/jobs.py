"""The two training jobs, from a configuration to a finished run folder; what ``launch/*.py`` call.

Resolve, check that it is the same run, load, apply the configured settings, and only then write the record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shodh.checkpoint.average import WeightAverage
from shodh.checkpoint.description import Kind
from shodh.checkpoint.optimizer_state import set_masters
from shodh.checkpoint.run_files import describe_operator_run, is_tokenizer, open_tokenizer, started_from
from shodh.checkpoint.weights import read_initial_weights, source_checksum
from shodh.config import RunConfig, TrainConfig
from shodh.core.devices import local_world_size
from shodh.core.distributed import from_first, gather, rank, together, world_size
from shodh.core.errors import CheckpointError
from shodh.core.precision import ieee_float32, keep_ieee
from shodh.core.topology import Topology
from shodh.core.weights import load_into
from shodh.data import MixtureLoader, Split
from shodh.data.identity import DataRecord
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.moe.groups import added_weights, freeze_others
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space
from shodh.train.attempts import attempt
from shodh.train.callbacks import (
    Averaging,
    Checkpoints,
    Experts,
    FirstStep,
    Profile,
    RoutingTrace,
    Selection,
    SkippedSteps,
    StepMetrics,
    StopSignal,
    Validation,
    Watching,
)
from shodh.train.callbacks.checkpoints import go_back
from shodh.train.callbacks.checkpoints import resume as resume_from
from shodh.train.callbacks.faults import RollBack
from shodh.train.callbacks.selection import check_measure
from shodh.train.compiling import compile_run, compiles
from shodh.train.data_identity import kept_choice
from shodh.train.datasets import Regimes, open_loaders, open_regimes, require_history
from shodh.train.decoded import decodes, with_fields
from shodh.train.engine import build_engine
from shodh.train.field_task import operator_task
from shodh.train.opening import kept_space, open_data
from shodh.train.plan import decide_checkpointing, plan_ranks, train_of
from shodh.train.preflight import preflight
from shodh.train.rank_logs import keep_rank_log
from shodh.train.run_folder import RunFolder
from shodh.train.runtime import start_distributed
from shodh.train.start import check_memory, claim, decide, device_memory, laid_out
from shodh.train.throughput import Throughput
from shodh.train.tokenizer_task import TokenizerTask, open_frames
from shodh.train.tokenizer_weights import fit_basis, publish_tokenizer
from shodh.train.trackers import check_trackers, openers
from shodh.train.trainer import Callback, Task, Trainer

log = logging.getLogger("shodh")


@dataclass(frozen=True)
class Job:
    """A training that all ranks have agreed on: what is asked, where it is kept, and the checkpoint it goes on from."""

    asked: RunConfig
    config: RunConfig  # as asked, with the layout of these ranks
    train: TrainConfig
    topology: Topology
    deepspeed: dict[str, Any]
    folder: RunFolder
    start: Path | None
    device: torch.device
    compile: bool
    profile: int
    of_tokenizer: bool

    @classmethod
    def begin(
        cls,
        asked: RunConfig,
        resume: str | None,
        profile: int,
        inputs: Mapping[str, Path | None],
        *,
        of_tokenizer: bool = False,
    ) -> Job:
        """Connect the ranks, follow rank 0's decision, check that they are alike, and lock the run folder. Collective.

        Raises
        ------
        CardsError, TopologyError, ConfigError
            See `start_distributed` and `plan_ranks`; told before the ranks connect.
        SharedError
            As `decide`, `preflight` and `claim`; nothing of the run was written.
        """
        folder = RunFolder(asked.tokenizer_dir if of_tokenizer else asked.run_dir)
        check_trackers(asked)
        if resume is None:
            plan_ranks(asked, world_size(), of_tokenizer)  # What does not fit together is told before ranks connect.
        device = start_distributed()
        more = [path for path in inputs.values() if path is not None]
        decision = from_first(lambda: decide(asked, folder, resume, more, device, of_tokenizer))
        config = laid_out(asked, decision.topology, of_tokenizer)
        try:
            with together():
                topology, deepspeed = plan_ranks(config, world_size(), of_tokenizer)
                compiled = compiles(config.compile, deepspeed["zero_optimization"]["stage"])
            arguments = {"resume": resume, "profile": profile, "deepspeed": deepspeed, **inputs}
            preflight(asked, arguments, decision, device)
        finally:
            if rank() == 0:
                decision.token.unlink(missing_ok=True)
        start = claim(folder, resume, decision.start)
        train = train_of(config, of_tokenizer)
        return cls(asked, config, train, topology, deepspeed, folder, start, device, compiled, profile, of_tokenizer)


@ieee_float32()
def train_tokenizer(config: RunConfig, resume: str | None = None, profile: int = 0) -> bool:
    """Train the autoencoder; its run folder then holds weights, normalisation and latent statistics.

    Returns False if a signal stopped it early.
    """
    job = Job.begin(config, resume, profile, {}, of_tokenizer=True)
    config, train, folder, topology, device = job.config, job.train, job.folder, job.topology, job.device
    with together():
        kept, choose = None, None
        if job.start is not None:
            kept, choose = _space_of_start(config, folder.path), kept_choice(folder.path)
    regimes = open_regimes(config, kept, choose=choose, shared=True)
    regimes = replace(regimes, space=regimes.space.unconditioned())
    with together():
        require_history(config, regimes)
        loaders = open_loaders(config, partial(open_frames, regimes), topology)
        task, record = TokenizerTask(config, regimes), partial(regimes.space.save, folder.path)
        check_measure(train.best, task.measures, regimes.names)
        with torch.device("meta"):
            check_memory(build_tokenizer(config), device)
        model = build_tokenizer(config)
    initialise(model, config.seed)
    with together():
        fit_basis(model, regimes)
    if not _run(config, job, model.to(device), task, regimes, loaders, record):
        return False
    with together():
        if rank() == 0:
            publish_tokenizer(config, regimes, folder, device)
    return True


def _space_of_start(config: RunConfig, folder: Path) -> Space | FieldNormalizer | None:
    """What the numbers meant when the training of a tokenizer began; None if constants are still made the same way.

    Raises
    ------
    CheckpointError
        A version that normalised masked fields otherwise began it, and did not keep how.
    """
    if (kept := kept_space(config, folder)) is not None:
        return kept
    if is_tokenizer(folder):
        return open_tokenizer(folder).space
    if masked := [f.name for f in config.data.fields if f.masked_by is not None]:
        raise CheckpointError(
            f"{folder} was begun by a version that normalised {', '.join(masked)} otherwise; train the tokenizer "
            "anew under another --set name=..., or finish it with that version"
        )
    return None


@ieee_float32()
def pretrain(
    config: RunConfig,
    resume: str | None = None,
    init_from: Path | None = None,
    profile: int = 0,
    kind: Kind | None = None,
) -> bool:
    """Train the operator, on cached latents or on fields; returns False if a signal stopped it early.

    Parameters
    ----------
    resume : str, optional
        ``"auto"`` goes on from the newest checkpoint of the run folder, if there is one; a path, from that one.
    init_from : Path, optional
        A checkpoint folder, converted folder or safetensors file whose weights a *new* run starts from, at any number
        of ranks, EP degree and ZeRO stage.
    profile : int
        Steps to profile; 0: none.
    kind : {"ema", "raw"}, optional
        Weights of ``init_from``: `shodh.checkpoint.description.read_pretrained`.
    """
    inputs = {"init_from": init_from, "tokenizer": config.tokenizer_dir if config.has_tokenizer else None}
    job = Job.begin(config, resume, profile, inputs)
    config, train, folder, topology, device = job.config, job.train, job.folder, job.topology, job.device
    with together():
        if init_from is not None:
            read_initial_weights(init_from, kind)  # Mapped, not read: what cannot be used is refused at once.
    regimes, trained, open_split = open_data(config, None if job.start is None else folder, device, init_from)
    with together():
        task = operator_task(config, regimes, open_split("train"), None if trained is None else trained.model)
        check_measure(train.best, task.measures, regimes.names)
        if trained is not None and decodes(train):
            open_split = with_fields(config, regimes, open_split)
        loaders = open_loaders(config, open_split, topology)
        with torch.device("meta"):
            check_memory(_bare_operator(config, topology.ep_size), device)
        decided = _decided(config, device)
        model, weights = _build_operator(decided, topology.ep_size, init_from, kind)

    def record() -> None:
        if job.start is None:
            folder.record_start(None if init_from is None else source_checksum(init_from, kind))
        tokenizer, sets = (None, None) if trained is None else (trained.weights, trained.field_sets)
        describe_operator_run(folder.path, job.asked, regimes.space, tokenizer, sets, started_from(folder.path))

    return _run(config, job, model.to(device), task, regimes, loaders, record, weights)


def _decided(config: RunConfig, device: torch.device) -> RunConfig:
    """The run with ``activation_checkpointing: auto`` decided by the device with the least memory. Collective."""
    if config.operator.activation_checkpointing != "auto":
        return config
    memory = min(gather(device_memory(device) // (1 if device.type == "cuda" else local_world_size() or world_size())))
    decided = decide_checkpointing(config, world_size(), memory)
    log.info("activation_checkpointing: auto is %s", str(decided.operator.activation_checkpointing).lower())
    return decided


def _bare_operator(config: RunConfig, ep_size: int) -> nn.Module:
    """The operator with this rank's experts, before its weights are set."""
    from shodh.moe.layer import expert_layer_factory

    return build_operator(config, expert_layer_factory(ep_size, rank() % ep_size), config.kernels)


def _build_operator(
    config: RunConfig, ep_size: int, init_from: Path | None, kind: Kind | None
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The operator with this rank's experts, freshly drawn or from given weights, and this rank's part of these.

    Experts that the configuration adds to given weights are freshly drawn; what is not to be trained is frozen.
    """
    from shodh.moe.layer import local_state

    model = _bare_operator(config, ep_size)
    initialise(model, config.seed)
    weights = None
    if init_from is not None:
        weights = local_state(model, {**added_weights(model), **read_initial_weights(init_from, kind)})
        load_into(model, weights, init_from)
    if config.finetune is not None:
        freeze_others(model, config.finetune)
    return model, weights


def _run(
    config: RunConfig,
    job: Job,
    model: nn.Module,
    task: Task,
    regimes: Regimes,
    loaders: Mapping[Split, MixtureLoader],
    record: Callable[[], object],
    weights: Mapping[str, Tensor] | None = None,
) -> bool:
    """Build the engine, load what it goes on from, write the record of the run (rank 0), and train.

    ``weights`` are those that the model was given, in their own precision.
    """
    from shodh.moe.layer import optimizer_groups

    train, topology, folder = job.train, job.topology, job.folder
    count = sum(p.numel() for p in model.parameters())
    if job.compile:
        log.info("compile: %d parts of the model", compile_run(model, task))
    engine = build_engine(model, optimizer_groups(model, train.weight_decay), train, job.deepspeed, config.kernels)
    keep_ieee()  # DeepSpeed or apex may have thought otherwise.
    if weights is not None:
        set_masters(engine, weights)
    with closing(loaders["train"]), closing(loaders["valid"]), closing(regimes):
        callbacks = _callbacks(config, job, task, regimes, loaders["valid"], engine.device)
        trainer = Trainer(engine, task, loaders["train"].iterate, train, topology, config.seed, callbacks)
        if train.ema:
            trainer.average = WeightAverage(engine, train.ema)
        if job.start is not None:
            resume_from(trainer, job.start, folder.checkpoints)
        with together():
            if rank() == 0:
                folder.create(job.asked, job.deepspeed)
                DataRecord.of(regimes.sources, folder.path).save()
                record()
        log.info(
            "%s: %.2f M parameters on a rank, %d ranks, EP %d, ZeRO %d, global batch %d = %d ranks x %d x %d",
            folder.path,
            count / 1e6,
            topology.world_size,
            topology.ep_size,
            job.deepspeed["zero_optimization"]["stage"],
            topology.global_batch,
            topology.world_size,
            topology.micro_batch,
            topology.accumulation,
        )
        keep_rank_log(folder.path, trainer.step)
        while not trainer.finished:
            try:
                with attempt(folder.path, "tokenizer" if job.of_tokenizer else "operator", trainer):
                    return trainer.fit()
            except RollBack as back:
                go_back(trainer, *back.args)
        return True


def _callbacks(
    config: RunConfig, job: Job, task: Task, regimes: Regimes, held_out: MixtureLoader, device: torch.device
) -> list[Callback]:
    """What happens beside the steps, in this order."""
    train, folder, names = job.train, job.folder, regimes.names
    throughput = Throughput(config, job.topology.world_size, device, job.of_tokenizer)
    metrics = StepMetrics(folder.path, train.log_every, throughput, partial(openers, config, folder.path))
    checkpoints = Checkpoints(folder, train)
    routing: list[Callback] = []
    if not job.of_tokenizer:
        experts = Experts(config.operator.experts, names, train.log_every, metrics)
        routing = [experts, RoutingTrace(config, names, job.topology, folder.routing)]
    faults = [FirstStep(), SkippedSteps(names, folder.path, checkpoints)]
    validation: list[Callback] = [Averaging(), Validation(task.measured, held_out.iterate, names, metrics)]
    if train.best is not None:
        validation.append(Selection(train.best))
    profile = [Profile(folder.path, job.profile)] if job.profile else []
    watching = [Watching(config.watchdog, folder.path)] if config.watchdog is not None else []
    return [*watching, *routing, metrics, *faults, *validation, StopSignal(folder.path), checkpoints, *profile]
