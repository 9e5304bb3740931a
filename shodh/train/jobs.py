"""The two training jobs, from a configuration to a finished run folder; what ``launch/*.py`` call."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shodh.checkpoint.folder import read_manifest, remove_leftovers, verify_checkpoint
from shodh.checkpoint.optimizer_state import set_masters
from shodh.checkpoint.run_files import describe_operator_run, is_tokenizer, open_tokenizer, write_tokenizer
from shodh.checkpoint.weights import read_initial_weights, read_weights, source_checksum
from shodh.config import RunConfig, TrainConfig, to_dict
from shodh.core.distributed import rank, together, world_size
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.precision import ieee_float32, keep_ieee
from shodh.core.topology import Topology, plan_topology
from shodh.core.weights import load_into
from shodh.data import WindowDataset
from shodh.data.identity import RECORD, DataRecord
from shodh.models.basis import PATCH, PatchBasis
from shodh.models.factory import build_operator, build_tokenizer
from shodh.models.init import initialise
from shodh.models.tokenizer import Tokenizer
from shodh.moe.groups import added_weights, freeze_others
from shodh.schema.domain import add_walls
from shodh.schema.normalize import FieldNormalizer
from shodh.schema.space import Space
from shodh.train.data_identity import kept_choice
from shodh.train.datasets import Regimes, open_regimes
from shodh.train.engine import build_engine, load_deepspeed_config
from shodh.train.field_task import FieldTask
from shodh.train.loop import Task, Trainer
from shodh.train.opening import kept_space, open_data
from shodh.train.operator_task import OperatorTask
from shodh.train.run_folder import RunFolder
from shodh.train.runtime import start_distributed
from shodh.train.tokenizer_task import TokenizerTask

log = logging.getLogger("shodh")


def find_start(folder: RunFolder, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises
    ------
    CheckpointError
        ``resume`` names no complete checkpoint.
    ConfigError
        A new run would overwrite an old one.
    """
    if resume is not None and resume != "auto":
        path = Path(resume)
        read_manifest(path)
        return path
    tag = folder.latest()
    if tag is not None and resume is None:
        raise ConfigError(
            f"{folder.path} already holds a run (checkpoint {tag}); go on with --resume auto, choose another "
            "--set name=..., or remove the folder"
        )
    return None if tag is None else folder.checkpoints / tag


def _claim(folder: RunFolder, resume: str | None, start: Path | None) -> None:
    """Make this job the only one that writes to the run folder, and check what it goes on from. Collective.

    Raises
    ------
    SharedError
        Another job is at work there, or a file of the checkpoint is missing or damaged.
    """
    with together():
        if rank() == 0 and folder.path.exists():  # A new folder is made, and owned, when all is checked.
            folder.own()
            remove_leftovers(folder.path)
            if find_start(folder, resume) != start:
                raise CheckpointError(f"{folder.path} changed while this job started; run the same command again")
    with together():
        if start is not None:
            verify_checkpoint(start, (rank(), world_size()))


def _check_same_run(config: RunConfig, folder: RunFolder) -> None:
    """A resumed run must learn the same thing from the same batches; where its data lie may change.

    Checked before anything is written into its folder.
    """
    if not (folder.path / "config.yaml").exists():
        return
    old, new = to_dict(folder.config()), to_dict(config)
    for tree in (old, new):
        for stage in ("tokenizer", "operator"):
            del tree[stage]["train"]  # How long and how fast may change; what is learned, and from what, may not.
        del tree["tokenizer"]["run"]
        if (folder.path / RECORD).exists():
            for regime in tree["data"]["regimes"]:
                del regime["path"]
    changed = [key for key in ("seed", "data", "tokenizer", "operator", "finetune") if old[key] != new[key]]
    if changed:
        raise ConfigError(
            f"{folder.path} was started with other settings of {' and '.join(changed)}; resume with its own "
            "config.yaml, or start a new run with --set name=..."
        )


def _check_memory(model: nn.Module, device: torch.device) -> None:
    """Refuse a model, on the meta device, whose float32 weights alone are more than this machine's memory."""
    needed = 4 * sum(p.numel() for p in model.parameters())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(
            f"the weights of a rank need {needed / 2**30:.4g} GiB in float32, and {device} has {there / 2**30:.4g}; "
            "use a smaller model, or a larger parallel.ep_size"
        )


def _run(
    config: RunConfig,
    train: TrainConfig,
    deepspeed: dict[str, Any],
    topology: Topology,
    folder: RunFolder,
    model: nn.Module,
    task: Task,
    start: Path | None,
    weights: Mapping[str, Tensor] | None = None,
) -> bool:
    """Build the engine, resume if asked, train; ``weights`` are those the model was given, in their own precision."""
    from shodh.moe.layer import optimizer_groups

    count = sum(p.numel() for p in model.parameters())
    engine = build_engine(model, optimizer_groups(model, train.weight_decay), train, deepspeed, config.kernels)
    keep_ieee()  # DeepSpeed or apex may have thought otherwise.
    if weights is not None:
        set_masters(engine, weights)
    trainer = Trainer(task, engine, train, topology, folder, config.seed)
    if start is not None:
        trainer.resume(start)
    log.info(
        "%s: %.2f M parameters on a rank, %d ranks, EP %d, ZeRO %d, global batch %d = %d ranks x %d x %d",
        folder.path,
        count / 1e6,
        topology.world_size,
        topology.ep_size,
        deepspeed["zero_optimization"]["stage"],
        topology.global_batch,
        topology.world_size,
        topology.micro_batch,
        topology.accumulation,
    )
    return trainer.step >= train.steps or trainer.fit()


@ieee_float32()
def train_tokenizer(config: RunConfig, resume: str | None = None) -> bool:
    """Train the autoencoder; its run folder then holds weights, normalisation and latent statistics.

    Returns False if a signal stopped it early.
    """
    if not config.has_tokenizer:
        raise ConfigError(f"operator.kind={config.operator.kind} works on the fields themselves, without a tokenizer")
    train = config.tokenizer.train
    topology = plan_topology(world_size(), 1, 0, train.global_batch, train.micro_batch)
    folder = RunFolder(config.tokenizer_dir)
    deepspeed = load_deepspeed_config(config.deepspeed, train, topology)
    start = find_start(folder, resume)
    if start is not None:
        _check_same_run(config, folder)
    device = start_distributed()
    _claim(folder, resume, start)
    with together():
        kept, choose = None, None
        if start is not None:
            kept, choose = _space_of_start(config, folder.path), kept_choice(folder.path)
        regimes = open_regimes(config, kept, choose=choose)
        task = TokenizerTask(config, regimes, topology)
        if rank() == 0:
            folder.create(config, deepspeed)
            regimes.space.save(folder.path)
            DataRecord.of(regimes.sources, folder.path).save()
    with together():
        with torch.device("meta"):
            _check_memory(build_tokenizer(config), device)
        model = build_tokenizer(config)
    initialise(model, config.seed)
    with together():
        fit_basis(model, regimes)
    if not _run(config, train, deepspeed, topology, folder, model.to(device), task, start):
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


def training_frames(regimes: Regimes, count: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """``(regime, item)`` of ``count`` frames of each regime, evenly over its training data; fewer if it has less."""
    for number, source in enumerate(regimes.sources):
        data = WindowDataset(source, "train", history=1, horizon=0, normalizer=regimes.normalizer)
        share = min(count, len(data))
        for index in torch.linspace(0, len(data) - 1, share).long().tolist():
            yield number, data[index]


def fit_basis(model: Tokenizer, regimes: Regimes, frames: int = 64, patches: int = 8192) -> None:
    """Set the tokenizer's linear part from training frames; rank 0 decides, so that all ranks have the same bits
    (another machine, or a GPU, finds the same to rounding).

    ``frames`` and ``patches`` are those of a regime. Each set of fields has a basis of its own, from the regimes that
    have these fields.
    """
    if rank() == 0:
        chosen: dict[int, list[Tensor]] = {}
        step = max(1, frames * math.prod(n // PATCH for n in regimes.sources[0].grid) // patches)
        for index, (number, item) in enumerate(training_frames(regimes, frames)):
            geometry = add_walls(item["static"][None], regimes.domains[number])
            head = int(model.head(geometry))
            fields = model.fill(item["fields"], geometry)[:, model.basis.channels[head]]
            rows = PatchBasis.patches(fields).flatten(2)[0].T
            # Each frame begins elsewhere: the step divides the grid, and would meet the same places in all of them.
            chosen.setdefault(head, []).append(rows[index % step :: step])
        for head, basis in enumerate(model.basis.heads.values()):
            basis.fit(torch.cat(chosen[head]))  # type: ignore[operator]
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.basis.buffers():
            value = buffer.to("cuda") if dist.get_backend() == "nccl" else buffer
            dist.broadcast(value, 0)
            buffer.copy_(value)


@torch.no_grad()
def _with_latent_statistics(
    config: RunConfig, regimes: Regimes, checkpoint: Path, device: torch.device
) -> dict[str, Tensor]:
    """Weights with mean and standard deviation of each latent channel put in, over training frames of each head."""
    model = build_tokenizer(config)
    state = read_weights(checkpoint)
    load_into(model, state, checkpoint)
    model.to(device).eval()
    parts: dict[int, list[Tensor]] = {}
    for number, item in training_frames(regimes, 128):
        geometry = add_walls(item["static"][None].to(device), regimes.domains[number])
        latent = model.encode(item["fields"].to(device), geometry)
        parts.setdefault(int(model.head(geometry)), []).append(latent[0].flatten(1).cpu())
    values = [torch.cat(parts[head], 1).double() for head in range(len(parts))]
    mean, std = (torch.stack(rows).float() for rows in ([v.mean(1) for v in values], [v.std(1) for v in values]))
    return {**state, "latent_mean": mean, "latent_std": std.clamp(min=1e-6)}


def publish_tokenizer(config: RunConfig, regimes: Regimes, folder: RunFolder, device: torch.device) -> None:
    """Make a run folder a pretrained tokenizer, from its newest checkpoint."""
    tag = folder.latest()
    if tag is None:
        raise CheckpointError(f"{folder.path} has no complete checkpoint to publish a tokenizer from")
    state = _with_latent_statistics(config, regimes, folder.checkpoints / tag, device)
    log.info("tokenizer written to %s", write_tokenizer(folder.path, config, regimes.space, state))


def plan_operator(config: RunConfig, world_size: int) -> tuple[Topology, dict[str, Any]]:
    """How an operator's ranks are laid out, and the DeepSpeed configuration of its training.

    Raises
    ------
    TopologyError, ConfigError
        Ranks, experts, batch and ZeRO stage do not go together.
    """
    train, experts = config.operator.train, config.operator.experts
    topology = plan_topology(
        world_size, config.parallel.ep_size, experts.num_experts, train.global_batch, train.micro_batch
    )
    return topology, load_deepspeed_config(config.deepspeed, train, topology)


@ieee_float32()
def pretrain(config: RunConfig, resume: str | None = None, init_from: Path | None = None) -> bool:
    """Train the operator, on cached latents or on fields; returns False if a signal stopped it early.

    Parameters
    ----------
    resume : str, optional
        ``"auto"`` goes on from the newest checkpoint of the run folder, if there is one; a path, from that one.
    init_from : Path, optional
        A checkpoint folder, converted folder or safetensors file whose weights a *new* run starts from, at any number
        of ranks, EP degree and ZeRO stage.
    """
    folder = RunFolder(config.run_dir)
    topology, deepspeed = plan_operator(config, world_size())
    start = find_start(folder, resume)
    if start is not None:
        _check_same_run(config, folder)
    if init_from is not None:
        read_initial_weights(init_from)  # Mapped, not read: what cannot be used is refused before ranks connect.
    device = start_distributed()
    _claim(folder, resume, start)
    regimes, trained, open_split = open_data(config, folder if start is not None else None, device, init_from)
    with together():
        if rank() == 0:
            folder.create(config, deepspeed)
            DataRecord.of(regimes.sources, folder.path).save()
            if start is None:
                folder.record_start(None if init_from is None else source_checksum(init_from))
            tokenizer = None if trained is None else trained.weights
            describe_operator_run(folder.path, config, regimes.space, tokenizer, folder.started_from())
    with together():
        step = 0 if start is None else int(read_manifest(start)["state"]["step"])
        kind = OperatorTask if config.has_tokenizer else FieldTask
        task = kind(config, regimes, open_split, topology, folder.routing, step)
        with torch.device("meta"):
            _check_memory(_bare_operator(config, topology.ep_size), device)
        model, weights = _build_operator(config, topology.ep_size, init_from)
    return _run(config, config.operator.train, deepspeed, topology, folder, model.to(device), task, start, weights)


def _bare_operator(config: RunConfig, ep_size: int) -> nn.Module:
    """The operator with this rank's experts, before its weights are set."""
    from shodh.moe.layer import expert_layer_factory

    return build_operator(config, expert_layer_factory(ep_size, rank() % ep_size), config.kernels)


def _build_operator(
    config: RunConfig, ep_size: int, init_from: Path | None
) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The operator with this rank's experts, freshly drawn or from given weights, and this rank's part of these.

    Experts that the configuration adds to given weights are freshly drawn; what is not to be trained is frozen.
    """
    from shodh.moe.layer import local_state

    model = _bare_operator(config, ep_size)
    initialise(model, config.seed)
    weights = None
    if init_from is not None:
        weights = local_state(model, {**added_weights(model), **read_initial_weights(init_from)})
        load_into(model, weights, init_from)
    if config.finetune is not None:
        freeze_others(model, config.finetune)
    return model, weights
