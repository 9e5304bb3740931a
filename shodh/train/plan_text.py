"""A plan as text: what ``--dry-run`` and ``shodh plan`` print."""

from __future__ import annotations

from collections.abc import Sequence

from shodh.config import RunConfig, dump_config
from shodh.core.distributed import rank
from shodh.core.topology import Topology
from shodh.models.field_space import FieldSpace
from shodh.train.cluster import ASSUMPTIONS, MOST_CARDS, StepPlan
from shodh.train.plan import (
    GPU_MEMORY_GIB,
    Plan,
    Stage,
    checkpoints,
    in_gib,
    make_plan,
    plan_scaling,
    planned_ranks,
    stage_of,
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
        stage_of(config, planned_ranks(config, nodes, gpus_per_node)[0], of_tokenizer=True)
    plan = describe_plan(make_plan(config, nodes, gpus_per_node))
    return f"{plan}\nsettings, every default written out\n\n{dump_config(config)}" if rank() == 0 else ""


def _size(count: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def _memory_lines(title: str, stage: Stage) -> list[str]:
    memory = stage.memory
    again = not stage.of_tokenizer and checkpoints(stage.config)
    lacking = "" if stage.fits() else f": does NOT fit in {GPU_MEMORY_GIB:.0f} GB; {stage.remedy()}"
    return [
        title,
        f"  weights               {in_gib(memory.weights)}",
        f"  gradients             {in_gib(memory.gradients)}",
        f"  optimiser             {in_gib(memory.optimizer)}",
        f"  buffers of gradients  {in_gib(memory.buffers)}",
        f"  activations           {in_gib(memory.activations)} for {stage.topology.micro_batch} samples"
        + (", blocks computed again" if again else ""),
        f"  sum                   {in_gib(memory.total)}{lacking}",
        "",
    ]


def _step_lines(step: StepPlan) -> list[str]:
    """What a rank sends and how long each part takes alone."""
    rows = (
        ("products", step.compute, ""),
        ("all-to-all", step.exchange, f"{in_gib(step.inside)} sent in the node, {in_gib(step.outside)} to others"),
        ("gradients", step.reduction, f"{in_gib(step.reduced)} sent"),
        ("new weights", step.gathering, f"{in_gib(step.gathered)} sent"),
        ("optimiser", step.update, ""),
        ("hidden of all-to-all", -step.covered, "behind experts"),
        ("hidden of the others", -step.hidden, "gradients and weights, behind products"),
    )
    return [f"  {name:<21} {1e3 * seconds:.1f} ms" + (f", {what}" if what else "") for name, seconds, what in rows]


def describe_scaling(config: RunConfig, cards: int, most: int = MOST_CARDS) -> str:
    """Step time, traffic and memory on 1, 2, 4 ... cards, as a table. Errors as `plan_scaling`."""
    head = ("cards", "EP", "batch", "micro x acc", "GiB", "products", "all-to-all", "gradients", "weights", "hidden")
    more = ("step", "rows sent", "other sent", "samples/s", "of best")
    rows, found = [], plan_scaling(config, most)
    steps = [stage.step(cards) for stage in found]
    speeds = [stage.topology.global_batch / step.seconds for stage, step in zip(found, steps, strict=True)]
    best = max(speed / stage.topology.world_size for stage, speed in zip(found, speeds, strict=True))
    for stage, step, speed in zip(found, steps, speeds, strict=True):
        topology = stage.topology
        times = (step.compute, step.exchange, step.reduction, step.gathering, step.hidden + step.covered, step.seconds)
        larger = "" if topology.global_batch == config.operator.train.global_batch else " *"
        rows.append(
            (
                str(topology.world_size),
                str(topology.ep_size),
                f"{topology.global_batch}{larger}",
                f"{topology.micro_batch} x {topology.accumulation}",
                f"{stage.memory.total / 2**30:.1f}{'' if stage.fits() else ' !'}",
                *(f"{1e3 * seconds:.1f}" for seconds in times),
                in_gib(step.inside + step.outside),
                in_gib(step.reduced + step.gathered),
                f"{speed:.4g}",
                f"{speed / topology.world_size / best:.0%}",
            )
        )
    lines = [
        f"plan of {config.name}, nodes of {cards} cards, ZeRO {found[0].zero.get('stage')}; ms a step, bytes a rank\n",
        _columns([(*head, *more), *rows]),
        "! does not fit; * the run's batch cannot be shared out over so many ranks: the next larger one",
        *(f"- {line}" for line in ASSUMPTIONS),
    ]
    return "\n".join(lines) + "\n"


def _columns(table: Sequence[Sequence[str]]) -> str:
    """Rows of text, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) for row in table) + "\n"


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
    stage, step = plan.stage, plan.step
    config, topology, flops = stage.config, stage.topology, stage.flops_per_step
    train = config.operator.train
    experts = config.operator.experts
    nodes = max(1, topology.world_size // plan.gpus_per_node)
    total = stage.dense_parameters + stage.expert_parameters
    feed_forward = "dense feed-forward of equal active size" if config.has_tokenizer else "dense"
    if experts.num_experts:
        feed_forward = (
            f"{experts.num_experts} routed experts, top-{experts.top_k}, {experts.num_shared} shared, "
            f"router {experts.router.kind} with {experts.router.score} scores"
        )
    lines = [
        f"plan of {config.name}: {nodes} x {plan.gpus_per_node} = {topology.world_size} ranks, EP {topology.ep_size}, "
        f"ZeRO {stage.zero.get('stage', 0)}, {train.precision}",
        "",
        f"  fields                {_describe_space(config)}, history {config.data.history}",
        f"  operator              {config.operator.kind}, {config.operator.depth} blocks, dim {config.operator.dim}, "
        f"{feed_forward}",
        f"  parameters            {_size(total)} in all: {_size(stage.dense_parameters)} on every rank, "
        f"{_size(stage.expert_parameters)} in experts; {_size(plan.active_parameters)} active per token",
        f"  batch                 {topology.global_batch} samples = {topology.world_size} ranks x "
        f"{topology.micro_batch} x {topology.accumulation} accumulated",
        f"  tokens                {plan.tokens_per_sample} a sample, "
        f"{_size(plan.tokens_per_sample * topology.global_batch)} a step, "
        f"{_size(plan.tokens_per_sample * topology.global_batch * train.steps)} in {train.steps} steps",
        "",
        *_memory_lines("memory of a rank", stage),
        *(
            []
            if plan.tokenizer is None
            else _memory_lines("memory of a rank that trains the tokenizer", plan.tokenizer)
        ),
        "work and traffic of a step",
        f"  floating point        {flops / 1e12:.2f} TFLOP, forward and backward, with what is computed again",
        *_step_lines(step),
        f"  time                  {1e3 * step.seconds:.1f} ms a step, {step.seconds * train.steps / 3600:.2f} h in all",
        *(f"                        - {line}" for line in ASSUMPTIONS),
        "",
        "optimiser groups",
        *(f"  {name:<21} {tensors} tensors, {_size(count)} parameters" for name, tensors, count in plan.groups),
        "",
        "process groups",
        *_group_lines(topology),
    ]
    return "\n".join(lines) + "\n"
