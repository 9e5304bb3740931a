"""What a run will need, before it is started: parameters, memory, tokens, traffic, groups. Touches no data.

Weights are built, and a step is rehearsed, on the meta device (`shodh.train.rehearsal`): nothing is allocated and
nothing estimated but the engine's own buffers. What a device's library and fragments of free memory take is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from shodh.config import RunConfig, TrainConfig, dump_config
from shodh.core.distributed import rank
from shodh.core.errors import ConfigError, TopologyError
from shodh.core.topology import Topology, plan_topology
from shodh.models.factory import build_tokenizer, operator_shapes
from shodh.models.field_space import FieldSpace
from shodh.moe.groups import decay_groups, is_routed_expert
from shodh.train.engine import load_deepspeed_config
from shodh.train.rehearsal import Rehearsal, rehearse_operator, rehearse_tokenizer

GPU_MEMORY_GIB = 80.0
PEAK_FLOPS = {"bf16": 989e12, "fp32": 67e12}  # H100 SXM, dense, NVIDIA's data sheet
ASSUMED_UTILISATION = 0.35
_REHEARSED: dict[tuple[str, int, bool], Rehearsal] = {}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Plan:
    """Everything `describe_plan` prints."""

    config: RunConfig
    topology: Topology
    gpus_per_node: int
    zero_stage: int
    dense_parameters: int
    expert_parameters: int
    active_parameters: int
    groups: list[tuple[str, int, int]]
    tokens_per_sample: int
    stage: Stage
    tokenizer: Stage | None
    all_to_all_bytes: float
    gradient_bytes: float


def _memory(
    zero: Mapping[str, Any], topology: Topology, dense: int, experts: int, train: TrainConfig, activations: int
) -> Memory:
    """Of a rank; ZeRO shards dense weights over all ranks, and experts over the ranks that hold the same ones."""
    width, stage = 2 if train.precision == "bf16" else 4, zero.get("stage", 0)
    kept = 16 if train.ema else 12  # master weights, two moments and perhaps an average, float32
    weights = gradients = optimizer = 0.0
    for count, ranks in ((dense, topology.world_size), (experts / topology.ep_size, topology.expert_replicas)):
        weights += count * width / (ranks if stage >= 3 else 1)
        gradients += count * 4 / (ranks if stage >= 2 else 1)  # summed in float32
        optimizer += count * kept / ranks
    # Gradients on their way to other ranks: DeepSpeed's defaults where the file says nothing.
    buckets = 2 if stage < 3 and zero.get("overlap_comm", False) else 1
    of_bucket = 4 if stage == 1 else width
    buffers = buckets * of_bucket * float(zero.get("reduce_bucket_size", 500_000_000))
    return Memory(weights, gradients, optimizer, buffers, activations)


@dataclass(frozen=True)
class Stage:
    """A training stage on a rank: its parameters, and a step of it, rehearsed when it is asked for."""

    config: RunConfig
    topology: Topology
    zero: Mapping[str, Any]
    dense_parameters: int
    expert_parameters: int
    of_tokenizer: bool = False

    @property
    def train(self) -> TrainConfig:
        return (self.config.tokenizer if self.of_tokenizer else self.config.operator).train

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """Of a micro-batch; equal steps are rehearsed once a process."""
        seen = self.config.model_dump_json(include={"data", "tokenizer", "operator", "finetune"})
        key = seen, self.topology.micro_batch, self.of_tokenizer
        if key not in _REHEARSED:
            rehearse = rehearse_tokenizer if self.of_tokenizer else rehearse_operator
            _REHEARSED[key] = rehearse(self.config, self.topology.micro_batch)
        return _REHEARSED[key]

    @property
    def memory(self) -> Memory:
        sizes = self.dense_parameters, self.expert_parameters
        return _memory(self.zero, self.topology, *sizes, self.train, self.rehearsal.peak)

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint on disk: weights and two moments in float32, and perhaps an average."""
        return (16 if self.train.ema else 12) * (self.dense_parameters + self.expert_parameters)

    @property
    def flops_per_step(self) -> float:
        """Of all ranks, forward and backward, with what is computed again."""
        return float(self.rehearsal.flops) * self.topology.world_size * self.topology.accumulation

    def fits(self, memory: float = GPU_MEMORY_GIB * 2**30) -> bool:
        """Whether a tenth of a device's memory is left, for its library, fragments and what other ranks send."""
        return self.memory.total < 0.9 * memory

    def remedy(self) -> str:
        """A setting with which it would fit on a card; the first of the cheapest that does."""
        for name, changed in self._alternatives():
            if changed.fits():
                return f"{name} would ({_bytes(changed.memory.total)})"
        return "no micro_batch, activation_checkpointing or ZeRO stage would: more GPUs, or a smaller model"

    def _alternatives(self) -> Iterator[tuple[str, Stage]]:
        name = "tokenizer" if self.of_tokenizer else "operator"
        again, config = self, self.config
        if not self.of_tokenizer and not checkpoints(config):
            config = with_checkpointing(config, True)
            again = replace(self, config=config)
            yield "operator.activation_checkpointing=true", again
        size = self.topology.micro_batch
        with_it = " with it" if again is not self else ""
        while size > 1:
            size = max(d for d in range(1, size) if size % d == 0)
            accumulation = self.topology.global_batch // (self.topology.world_size * size)
            topology = replace(self.topology, micro_batch=size, accumulation=accumulation)
            again = replace(self, config=config, topology=topology)
            yield f"{name}.train.micro_batch={size}{with_it}", again
        yield "ZeRO 3 with all of that", replace(again, zero={**self.zero, "stage": 3})


def checkpoints(config: RunConfig) -> bool:
    """Whether blocks are computed again for sure: ``auto`` is not decided here."""
    return config.operator.activation_checkpointing is True


def with_checkpointing(config: RunConfig, value: bool) -> RunConfig:
    """The run with ``activation_checkpointing`` decided."""
    operator = config.operator.model_copy(update={"activation_checkpointing": value})
    return config.model_copy(update={"operator": operator})


def decide_checkpointing(config: RunConfig, world: int, memory: float) -> RunConfig:
    """The run with ``activation_checkpointing: auto`` decided for devices of so many bytes."""
    if config.operator.activation_checkpointing != "auto":
        return config
    kept = with_checkpointing(config, False)
    return kept if operator_stage(kept, world).fits(memory) else with_checkpointing(config, True)


def plan_operator(config: RunConfig, world: int) -> tuple[Topology, dict[str, Any]]:
    """How an operator's ranks are laid out, and the DeepSpeed configuration of its training.

    Raises
    ------
    TopologyError, ConfigError
        Ranks, experts, batch and ZeRO stage do not go together.
    """
    train, experts = config.operator.train, config.operator.experts
    topology = plan_topology(world, config.parallel.ep_size, experts.num_experts, train.global_batch, train.micro_batch)
    return topology, load_deepspeed_config(config.deepspeed, train, topology)


def plan_tokenizer(config: RunConfig, world: int) -> tuple[Topology, dict[str, Any]]:
    """As `plan_operator`; ConfigError where there is no tokenizer."""
    if not config.has_tokenizer:
        raise ConfigError(f"operator.kind={config.operator.kind} works on the fields themselves, without a tokenizer")
    train = config.tokenizer.train
    topology = plan_topology(world, 1, 0, train.global_batch, train.micro_batch)
    return topology, load_deepspeed_config(config.deepspeed, train, topology)


def operator_stage(config: RunConfig, world: int) -> Stage:
    """The operator's training on so many ranks. Errors as `make_plan`."""
    topology, deepspeed = plan_operator(config, world)
    sizes = {name: p.numel() for name, p in operator_shapes(config).named_parameters()}
    routed = sum(n for name, n in sizes.items() if is_routed_expert(name))
    return Stage(config, topology, deepspeed["zero_optimization"], sum(sizes.values()) - routed, routed)


def tokenizer_stage(config: RunConfig, world: int) -> Stage:
    """The tokenizer's training on so many ranks. Errors as `make_plan`, and `ConfigError` where there is none."""
    topology, deepspeed = plan_tokenizer(config, world)
    with torch.device("meta"):
        size = sum(p.numel() for p in build_tokenizer(config).parameters())
    return Stage(config, topology, deepspeed["zero_optimization"], size, 0, of_tokenizer=True)


def make_plan(config: RunConfig, nodes: int | None = None, gpus_per_node: int | None = None) -> Plan:
    """Plan the training of a run for a cluster (by default the one in ``config.parallel``).

    Raises
    ------
    TopologyError, ConfigError
        As the run itself would.
    """
    gpus = gpus_per_node or config.parallel.gpus_per_node
    operator, experts = config.operator, config.operator.experts
    train = operator.train
    world = (nodes or config.parallel.nodes) * gpus
    config = decide_checkpointing(config, world, GPU_MEMORY_GIB * 2**30)
    stage = operator_stage(config, world)
    topology, dense, routed = stage.topology, stage.dense_parameters, stage.expert_parameters
    tokenizer = None
    if config.has_tokenizer:
        with suppress(TopologyError):  # It may be trained on fewer ranks.
            tokenizer = tokenizer_stage(config, world)
    model = operator_shapes(config)
    active = dense + (routed * experts.top_k // experts.num_experts if experts.num_experts else 0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[tuple[str, int, int]] = []
    for group in decay_groups(model, train.weight_decay):
        split = {
            group["name"]: [p for p in group["params"] if not is_routed_expert(names[id(p)])],
            f"experts (ep_size_{topology.ep_size})": [p for p in group["params"] if is_routed_expert(names[id(p)])],
        }
        groups += [(name, len(ps), sum(p.numel() for p in ps)) for name, ps in split.items() if ps]
    tokens = math.prod(model.token_grid)
    width = 2 if train.precision == "bf16" else 4
    rank_tokens = tokens * topology.micro_batch * topology.accumulation * operator.unroll.steps
    away = (topology.ep_size - 1) / topology.ep_size
    return Plan(
        config=config,
        topology=topology,
        gpus_per_node=gpus,
        zero_stage=stage.zero.get("stage", 0),
        dense_parameters=dense,
        expert_parameters=routed,
        active_parameters=active,
        groups=groups,
        tokens_per_sample=tokens,
        stage=stage,
        tokenizer=tokenizer,
        all_to_all_bytes=4.0 * away * operator.depth * rank_tokens * experts.top_k * operator.dim * width,
        gradient_bytes=2.0 * 4 * (dense + routed / topology.ep_size),
    )


def dry_run(
    config: RunConfig, nodes: int | None = None, gpus_per_node: int | None = None, *, of_tokenizer: bool = False
) -> str:
    """The plan and every setting, as text; nothing on ranks but the first. Errors as `make_plan`.

    Parameters
    ----------
    of_tokenizer : bool
        Refuse what the training of the tokenizer would refuse, too.
    """
    if of_tokenizer:
        parallel = config.parallel
        tokenizer_stage(config, (nodes or parallel.nodes) * (gpus_per_node or parallel.gpus_per_node))
    plan = describe_plan(make_plan(config, nodes, gpus_per_node))
    return f"{plan}\nsettings, every default written out\n\n{dump_config(config)}" if rank() == 0 else ""


def _size(count: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _memory_lines(title: str, stage: Stage) -> list[str]:
    memory = stage.memory
    again = not stage.of_tokenizer and checkpoints(stage.config)
    lacking = "" if stage.fits() else f": does NOT fit in {GPU_MEMORY_GIB:.0f} GB; {stage.remedy()}"
    return [
        title,
        f"  weights               {_bytes(memory.weights)}",
        f"  gradients             {_bytes(memory.gradients)}",
        f"  optimiser             {_bytes(memory.optimizer)}",
        f"  buffers of gradients  {_bytes(memory.buffers)}",
        f"  activations           {_bytes(memory.activations)} for {stage.topology.micro_batch} samples"
        + (", blocks computed again" if again else ""),
        f"  sum                   {_bytes(memory.total)}{lacking}",
        "",
    ]


def _group_lines(topology: Topology) -> list[str]:
    ep, replicas = topology.ep_size, topology.expert_replicas
    first = ", ".join(str(r) for r in range(min(ep, 8))) + (", ..." if ep > 8 else "")
    same = ", ".join(str(r * ep) for r in range(min(replicas, 4))) + (", ..." if replicas > 4 else "")
    return [
        f"  data parallel         1 group of {topology.world_size}: every rank its own samples",
        f"  expert parallel       {replicas} groups of {ep}: [{first}] ...: all-to-all of tokens",
        f"  expert data parallel  {ep} groups of {replicas}: [{same}] ...: gradients of one share of the experts",
    ]


def _describe_space(config: RunConfig) -> str:
    """Cells and channels of the fields, and what the operator is given instead of them."""
    if not config.has_tokenizer:
        space = FieldSpace.of(config)
        return f"{' x '.join(map(str, space.grid))}, {space.channels} channels, {space.static} static"
    latent = " x ".join(map(str, config.latent_grid))
    return f"{' x '.join(map(str, config.data.cells))} -> latents {config.tokenizer.latent_channels} x {latent}"


def describe_plan(plan: Plan) -> str:
    """The plan as text."""
    config, topology, flops = plan.config, plan.topology, plan.stage.flops_per_step
    train = config.operator.train
    experts = config.operator.experts
    nodes = max(1, topology.world_size // plan.gpus_per_node)
    step_s = flops / (topology.world_size * PEAK_FLOPS[train.precision] * ASSUMED_UTILISATION)
    utilisation = f"{ASSUMED_UTILISATION:.0%} of {PEAK_FLOPS[train.precision] / 1e12:.0f}"
    total = plan.dense_parameters + plan.expert_parameters
    feed_forward = "dense feed-forward of equal active size" if config.has_tokenizer else "dense"
    if experts.num_experts:
        feed_forward = (
            f"{experts.num_experts} routed experts, top-{experts.top_k}, {experts.num_shared} shared, "
            f"router {experts.router.kind} with {experts.router.score} scores"
        )
    lines = [
        f"plan of {config.name}: {nodes} x {plan.gpus_per_node} = {topology.world_size} ranks, EP {topology.ep_size}, "
        f"ZeRO {plan.zero_stage}, {train.precision}",
        "",
        f"  fields                {_describe_space(config)}, history {config.data.history}",
        f"  operator              {config.operator.kind}, {config.operator.depth} blocks, dim {config.operator.dim}, "
        f"{feed_forward}",
        f"  parameters            {_size(total)} in all: {_size(plan.dense_parameters)} on every rank, "
        f"{_size(plan.expert_parameters)} in experts; {_size(plan.active_parameters)} active per token",
        f"  batch                 {topology.global_batch} samples = {topology.world_size} ranks x "
        f"{topology.micro_batch} x {topology.accumulation} accumulated",
        f"  tokens                {plan.tokens_per_sample} a sample, "
        f"{_size(plan.tokens_per_sample * topology.global_batch)} a step, "
        f"{_size(plan.tokens_per_sample * topology.global_batch * train.steps)} in {train.steps} steps",
        "",
        *_memory_lines("memory of a rank", plan.stage),
        *(
            []
            if plan.tokenizer is None
            else _memory_lines("memory of a rank that trains the tokenizer", plan.tokenizer)
        ),
        "work and traffic of a step",
        f"  floating point        {flops / 1e12:.2f} TFLOP, forward and backward, with what is computed again",
        f"  all-to-all            {_bytes(plan.all_to_all_bytes)} sent by a rank",
        f"  gradients             {_bytes(plan.gradient_bytes)} sent by a rank",
        f"  time                  {1e3 * step_s:.1f} ms a step, {step_s * train.steps / 3600:.2f} h in all, if H100s",
        f"                        reach {utilisation} TFLOP/s (assumed, not measured)",
        "",
        "optimiser groups",
        *(f"  {name:<21} {tensors} tensors, {_size(count)} parameters" for name, tensors, count in plan.groups),
        "",
        "process groups",
        *_group_lines(topology),
    ]
    return "\n".join(lines) + "\n"
