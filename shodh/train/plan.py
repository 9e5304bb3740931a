"""What a run will need, before it is started: parameters, memory, tokens, traffic, groups. Touches no data.

Weights are built on the meta device, so nothing is allocated. Memory of activations is an estimate from the tensors
that a block keeps for its backward pass, and of operators on fields so is the work of a step, six operations a weight
and token; everything else is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shodh.config import RunConfig
from shodh.core.topology import Topology, plan_topology
from shodh.models.factory import build_operator
from shodh.models.field_space import FieldSpace
from shodh.models.fno import PROJECTION
from shodh.moe.groups import decay_groups, is_routed_expert
from shodh.train.engine import load_deepspeed_config

GPU_MEMORY_GIB = 80.0
PEAK_FLOPS = {"bf16": 989e12, "fp32": 67e12}  # H100 SXM, dense, NVIDIA's data sheet
ASSUMED_UTILISATION = 0.35


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


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
    memory: Memory
    flops_per_step: float
    all_to_all_bytes: float
    gradient_bytes: float


def _memory(config: RunConfig, topology: Topology, stage: int, dense: int, experts: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimiser on a rank; ZeRO shards dense weights over all ranks, and experts over
    the ranks that hold the same ones."""
    bf16 = config.operator.train.precision == "bf16"
    width = 2 if bf16 else 4
    weights = gradients = optimizer = 0.0
    for count, ranks in ((dense, topology.world_size), (experts / topology.ep_size, topology.expert_replicas)):
        weights += count * width / (ranks if stage >= 3 else 1)
        gradients += count * 4 / (ranks if stage >= 2 else 1)  # summed in float32
        optimizer += count * (12 if bf16 else 8) / ranks
    return weights, gradients, optimizer


def _activation_bytes(config: RunConfig, micro_batch: int, tokens: int) -> float:
    operator, experts = config.operator, config.operator.experts
    width = 2 if operator.train.precision == "bf16" else 4
    if not config.has_tokenizer:
        return float(micro_batch * width * _kept_in_field_space(config, tokens))
    hidden = experts.hidden * (experts.num_shared + experts.top_k)
    # Kept for the backward pass of a block, per token: two norms' inputs and outputs, q, k, v, the attention's output,
    # the routed copy in and out, and gate, up and product of every active expert.
    block = (10 + 2 * experts.top_k) * operator.dim + 3 * hidden
    if operator.activation_checkpointing:
        kept = operator.depth * operator.dim + block
    else:
        kept = operator.depth * block
    return float(micro_batch * tokens * kept * width)


def _kept_in_field_space(config: RunConfig, tokens: int) -> float:
    """Numbers that an operator on fields keeps of a sample for its backward pass."""
    operator, experts = config.operator, config.operator.experts
    space = FieldSpace.of(config)
    cells = math.prod(space.grid)
    given = space.history * space.channels + space.static + space.ndim
    if operator.kind == "unet":  # Two convolutions, norms and activations, on the way down and up; levels halve it.
        return cells * (given + 16.0 * operator.dim)
    if operator.kind == "fno":  # Input, spectrum, both branches and activation of a block; the hidden layer at the end.
        return cells * (given + 5.0 * operator.depth * operator.dim + 2 * PROJECTION * operator.dim)
    # Two norms, the spectrum with its activation, shared features and experts; frames in patches; the decoder.
    block = 14.0 * operator.dim + 2 * operator.field.mlp + 3 * (experts.num_shared + experts.top_k) * experts.hidden
    if operator.kind == "dpot":
        block = 14.0 * operator.dim + 2 * operator.field.mlp
    blocks = operator.depth * operator.dim + block if operator.activation_checkpointing else operator.depth * block
    frames = space.history * (cells * (space.channels + space.static + space.ndim + 1) + 3.0 * tokens * operator.dim)
    return tokens * blocks + frames + 4.0 * cells * operator.field.decoder


def make_plan(config: RunConfig, nodes: int | None = None, gpus_per_node: int | None = None) -> Plan:
    """Plan the operator's training for a cluster (by default the one in ``config.parallel``).

    Raises
    ------
    TopologyError, ConfigError
        As the run itself would.
    """
    gpus = gpus_per_node or config.parallel.gpus_per_node
    operator, experts = config.operator, config.operator.experts
    train = operator.train
    world = (nodes or config.parallel.nodes) * gpus
    topology = plan_topology(world, config.parallel.ep_size, experts.num_experts, train.global_batch, train.micro_batch)
    stage = load_deepspeed_config(config.deepspeed, train, topology)["zero_optimization"]["stage"]
    with torch.device("meta"):
        model = build_operator(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(n for name, n in sizes.items() if is_routed_expert(name))
    dense = sum(sizes.values()) - routed
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
    rank_tokens = tokens * topology.micro_batch * topology.accumulation
    attends = config.has_tokenizer and operator.mixer == "attention"
    attention = 12 * operator.depth * tokens * operator.dim if attends else 0  # forward and backward, per token
    away = (topology.ep_size - 1) / topology.ep_size
    return Plan(
        config=config,
        topology=topology,
        gpus_per_node=gpus,
        zero_stage=stage,
        dense_parameters=dense,
        expert_parameters=routed,
        active_parameters=active,
        groups=groups,
        tokens_per_sample=tokens,
        memory=Memory(
            *_memory(config, topology, stage, dense, routed),
            _activation_bytes(config, topology.micro_batch, tokens),
        ),
        flops_per_step=(6.0 * active + attention) * tokens * topology.global_batch,
        all_to_all_bytes=4.0 * away * operator.depth * rank_tokens * experts.top_k * operator.dim * width,
        gradient_bytes=2.0 * 4 * (dense + routed / topology.ep_size),
    )


def _size(count: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


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
    config, topology, memory = plan.config, plan.topology, plan.memory
    train = config.operator.train
    experts = config.operator.experts
    nodes = max(1, topology.world_size // plan.gpus_per_node)
    step_s = plan.flops_per_step / (topology.world_size * PEAK_FLOPS[train.precision] * ASSUMED_UTILISATION)
    utilisation = f"{ASSUMED_UTILISATION:.0%} of {PEAK_FLOPS[train.precision] / 1e12:.0f}"
    fits = memory.total / 2**30 < 0.9 * GPU_MEMORY_GIB
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
        "memory of a rank",
        f"  weights               {_bytes(memory.weights)}",
        f"  gradients             {_bytes(memory.gradients)}",
        f"  optimiser             {_bytes(memory.optimizer)}",
        f"  activations (est.)    {_bytes(memory.activations)}"
        + (", checkpointed" if config.operator.activation_checkpointing else ""),
        f"  sum                   {_bytes(memory.total)}"
        + (
            ""
            if fits
            else f": does NOT fit in {GPU_MEMORY_GIB:.0f} GB; more nodes, a higher ZeRO stage, a smaller "
            "micro_batch or activation_checkpointing"
        ),
        "",
        "work and traffic of a step",
        f"  floating point        {plan.flops_per_step / 1e12:.2f} TFLOP, forward and backward",
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
