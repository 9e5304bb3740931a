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

from shodh.config import RunConfig, TrainConfig
from shodh.core.devices import local_world_size
from shodh.core.distributed import world_size
from shodh.core.errors import ConfigError, TopologyError
from shodh.core.topology import Topology, plan_topology
from shodh.models.factory import build_tokenizer, count_parameters, operator_shapes
from shodh.moe.groups import decay_groups, is_routed_expert
from shodh.train.cluster import CARD_MEMORY, Layout, StepPlan, achieved_rate, plan_step, scaled
from shodh.train.engine import load_deepspeed_config
from shodh.train.rehearsal import Rehearsal, rehearse_operator, rehearse_tokenizer

GPU_MEMORY_GIB = CARD_MEMORY / 2**30
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
    """Everything that `shodh.train.plan_text` prints."""

    stage: Stage
    tokenizer: Stage | None
    gpus_per_node: int
    active_parameters: int
    groups: list[tuple[str, int, int]]
    tokens_per_sample: int

    @cached_property
    def step(self) -> StepPlan:
        """Bytes and seconds of a step; rehearses it."""
        return self.stage.step(self.gpus_per_node)


def _memory(
    zero: Mapping[str, Any], topology: Topology, dense: int, experts: int, train: TrainConfig, activations: int
) -> Memory:
    """Of a rank; ZeRO shards dense weights over all ranks, and experts over the ranks that hold the same ones.

    As the engine's tensors were counted (tests/distributed/test_plan_of_engine.py): master weights are float32 and
    apart, of a float32 run too.
    """
    width, stage = 2 if train.precision == "bf16" else 4, zero.get("stage", 0)
    # Where ZeRO 2 accumulates in float32, a micro-batch's share lies beside the sum of those before it.
    alone = topology.accumulation == 1
    sums = 2 if stage == 2 and width == 4 and not alone else 1
    weights = gradients = optimizer = 0.0
    for count, ranks in ((dense, topology.world_size), (experts / topology.ep_size, topology.expert_replicas)):
        weights += count * width / (ranks if stage >= 3 else 1)
        # Summed in float32; ZeRO 1 keeps those of other ranks from one micro-batch to the next.
        gradients += sums * count * 4 / (ranks if stage >= 2 or alone else 1)
        optimizer += count * kept_bytes(train) / ranks
    # Gradients on their way to other ranks: DeepSpeed's defaults where the file says nothing.
    bucket = float(zero.get("reduce_bucket_size", 500_000_000))
    if stage >= 3:  # A bucket of sums, and the weights that were gathered, which live to the backward pass.
        live = min(dense + experts / topology.ep_size, float(zero.get("stage3_max_live_parameters", 1e9)))
        buffers = 4 * bucket + width * live
    else:
        buckets = 2 if zero.get("overlap_comm", False) else 1
        buffers = buckets * (4 if stage == 1 else width) * bucket
        if stage == 2 and width == 2:  # They are sent in float32.
            buffers += 4 * min(bucket, dense + experts / topology.ep_size)
    return Memory(weights, gradients, optimizer, buffers, activations)


def train_of(config: RunConfig, of_tokenizer: bool) -> TrainConfig:
    """Settings of a training stage."""
    return (config.tokenizer if of_tokenizer else config.operator).train


def kept_bytes(train: TrainConfig) -> int:
    """Of the optimiser for a parameter: master weight, two moments and perhaps an average, float32."""
    return 16 if train.ema else 12


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
        return train_of(self.config, self.of_tokenizer)

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
        return kept_bytes(self.train) * (self.dense_parameters + self.expert_parameters)

    @property
    def flops_per_step(self) -> float:
        """Of all ranks, forward and backward, with what is computed again."""
        return float(self.rehearsal.flops) * self.topology.world_size * self.topology.accumulation

    def step(self, cards: int) -> StepPlan:
        """Bytes and seconds of a step on nodes of so many cards."""
        return plan_step(self._layout, self.zero, self.topology, cards)

    @property
    def _layout(self) -> Layout:
        operator, topology, train = self.config.operator, self.topology, self.train
        width = 2 if train.precision == "bf16" else 4
        rate = achieved_rate(self.config, train, self.of_tokenizer)
        flops = float(self.rehearsal.flops) * topology.accumulation
        again = not self.of_tokenizer and checkpoints(self.config)
        rows, layers, shared, routed = 0, 0, 0.0, 0.0
        if self.expert_parameters:
            model = operator_shapes(self.config)
            passes = topology.accumulation * operator.unroll.steps
            layers = passes * operator.depth
            tokens = passes * topology.micro_batch * math.prod(model.token_grid)
            rows = tokens * operator.depth * operator.experts.top_k * operator.dim * width
            shared = 2.0 * tokens * sum(p.numel() for n, p in model.named_parameters() if ".shared_experts." in n)
            routed = 2.0 * tokens * self.expert_parameters * operator.experts.top_k / operator.experts.num_experts
        return Layout(
            flops,
            rate,
            self.dense_parameters,
            self.expert_parameters,
            rows,
            layers,
            again,
            shared,
            routed,
            width,
            kept_bytes(train),
        )

    def fits(self, memory: float = GPU_MEMORY_GIB * 2**30) -> bool:
        """Whether a tenth of a device's memory is left, for its library, fragments and what other ranks send."""
        return self.memory.total < 0.9 * memory

    def remedy(self) -> str:
        """A setting with which it would fit on a card; the first of the cheapest that does."""
        for name, changed in self._alternatives():
            if changed.fits():
                return f"{name} would ({in_gib(changed.memory.total)})"
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


def in_gib(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


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
    return kept if stage_of(kept, world).fits(memory) else with_checkpointing(config, True)


def plan_ranks(config: RunConfig, world: int, of_tokenizer: bool = False) -> tuple[Topology, dict[str, Any]]:
    """How the ranks of a training stage are laid out, and the DeepSpeed configuration of it.

    Raises
    ------
    TopologyError, ConfigError
        Ranks, experts, batch and ZeRO stage do not go together; or there is no tokenizer.
    """
    if of_tokenizer and not config.has_tokenizer:
        raise ConfigError(f"operator.kind={config.operator.kind} works on the fields themselves, without a tokenizer")
    train = train_of(config, of_tokenizer)
    experts = (1, 0) if of_tokenizer else (config.parallel.ep_size, config.operator.experts.num_experts)
    topology = plan_topology(world, *experts, train.global_batch, train.micro_batch)
    return topology, load_deepspeed_config(config.deepspeed, train, topology)


def stage_of(config: RunConfig, world: int, of_tokenizer: bool = False) -> Stage:
    """A training stage on so many ranks. Errors as `plan_ranks`."""
    topology, deepspeed = plan_ranks(config, world, of_tokenizer)
    return Stage(config, topology, deepspeed["zero_optimization"], *_sizes(config, of_tokenizer), of_tokenizer)


def _sizes(config: RunConfig, of_tokenizer: bool = False) -> tuple[int, int]:
    """Parameters of a model on every rank, and in routed experts."""
    with torch.device("meta"):
        model = build_tokenizer(config) if of_tokenizer else operator_shapes(config)
    counts = count_parameters(model, config.operator.experts)
    return counts.total - counts.routed, counts.routed


def planned_ranks(config: RunConfig, nodes: int | None, gpus_per_node: int | None) -> tuple[int, int]:
    """Ranks, and those of a node: as asked for, else as a launcher started them, else as configured."""
    here = local_world_size()
    if nodes is None and gpus_per_node is None and (here is not None or world_size() > 1):
        return world_size(), here or min(world_size(), config.parallel.gpus_per_node)
    gpus = gpus_per_node or config.parallel.gpus_per_node
    return (nodes or config.parallel.nodes) * gpus, gpus


def make_plan(config: RunConfig, nodes: int | None = None, gpus_per_node: int | None = None) -> Plan:
    """Plan the training of a run for a cluster: by default the ranks that a launcher started, or ``config.parallel``.

    Raises
    ------
    TopologyError, ConfigError
        As the run itself would.
    """
    world, gpus = planned_ranks(config, nodes, gpus_per_node)
    experts, train = config.operator.experts, config.operator.train
    config = decide_checkpointing(config, world, GPU_MEMORY_GIB * 2**30)
    stage = stage_of(config, world)
    tokenizer = None
    if config.has_tokenizer:
        with suppress(TopologyError):  # It may be trained on fewer ranks.
            tokenizer = stage_of(config, world, of_tokenizer=True)
    model = operator_shapes(config)
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[tuple[str, int, int]] = []
    for group in decay_groups(model, train.weight_decay):
        for routed, name in ((False, group["name"]), (True, f"experts (ep_size_{stage.topology.ep_size})")):
            own = [p.numel() for p in group["params"] if is_routed_expert(names[id(p)]) == routed]
            groups += [(name, len(own), sum(own))] if own else []
    return Plan(stage, tokenizer, gpus, count_parameters(model, experts).active, groups, math.prod(model.token_grid))


def plan_scaling(config: RunConfig, most: int) -> list[Stage]:
    """The training of an operator on 1, 2, 4 ... cards, up to ``most``; its batch grows where it cannot be shared out.

    Raises
    ------
    ConfigError
        As the run itself would.
    """
    train, experts = config.operator.train, config.operator.experts.num_experts
    alone = plan_topology(1, 1, experts, train.global_batch, train.micro_batch)
    zero = load_deepspeed_config(config.deepspeed, train, alone)["zero_optimization"]
    sizes = _sizes(config)
    found = []
    for world in (2**power for power in range(most.bit_length())):
        stage = Stage(config, scaled(alone, world, config.parallel.ep_size, experts), zero, *sizes)
        if config.operator.activation_checkpointing == "auto":
            stage = replace(stage, config=with_checkpointing(config, False))
            stage = stage if stage.fits() else replace(stage, config=with_checkpointing(config, True))
        found.append(stage)
    return found
