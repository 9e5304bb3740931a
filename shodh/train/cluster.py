"""How long a step takes on a cluster of H100s, and what a rank sends: rows of experts, gradients, weights.

Work is rehearsed and bytes follow from what the engine does; rates are the constants below, and say whether they were
measured. No network between nodes was at hand: a time over InfiniBand is a plan, to be compared with the first run.

Bytes of DeepSpeed 0.19.8, counted at its collectives (tests/distributed/test_plan_of_engine.py), n parameters that R
ranks hold alike: ZeRO 1 sums gradients with one all-reduce of 4n a step, ZeRO 2 with one a micro-batch, ZeRO 3 with a
reduce-scatter of 4n a micro-batch; weights are gathered once a step (1, 2) or once a micro-batch (3). An expert layer
sends rows four times: out and back, forward and backward; twice more where blocks are computed again. All but those
on their way out in forward passes travel while experts are computed (`shodh.moe.mixture`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shodh.config import RunConfig, TrainConfig
from shodh.core.topology import Topology, fitting_ep_size

# Measured on one H100 80GB HBM3 (torch 2.11, CUDA 13.0).
PRODUCT_RATE = 798e12  # FLOP/s of a large bf16 product
COPY_RATE = 2.9e12  # bytes/s of a copy in its memory, read and written
# Shares of PRODUCT_RATE in a step of 32,768 tokens, dim 768: 192 and 135 ms for 45 TFLOP.
SHARE_SPARSE, SHARE_DENSE = 0.29, 0.42
# NVIDIA's data sheet, not measured.
FLOAT32_RATE = 67e12
CARD_MEMORY = 80 * 2**30
# Data sheet (450 GB/s a direction a card; one 400 Gbit/s port a card) times a share that is assumed, as are latencies.
LINK_SHARE = 0.8
MOST_CARDS = 1024


@dataclass(frozen=True)
class Link:
    """What a card sends with: bytes a second in one direction, and seconds of a round of messages."""

    rate: float
    latency: float


NVLINK = Link(450e9 * LINK_SHARE, 10e-6)
INFINIBAND = Link(50e9 * LINK_SHARE, 20e-6)

ASSUMPTIONS = (
    f"bf16 products {PRODUCT_RATE / 1e12:.0f} TFLOP/s, memory {COPY_RATE / 1e12:.1f} TB/s: measured on one H100",
    f"{SHARE_SPARSE:.0%} of that in sparse layers, {SHARE_DENSE:.0%} in dense ones: measured at dim 768, before expert "
    "layers were fused; a whole run took 1.6 times as long",
    f"float32 {FLOAT32_RATE / 1e12:.0f} TFLOP/s, NVLink 450 and InfiniBand 50 GB/s a card and direction: data sheets",
    f"of links {LINK_SHARE:.0%} is reached, at {1e6 * NVLINK.latency:.0f} and {1e6 * INFINIBAND.latency:.0f} us a "
    "message: assumed, and that what is sent behind products slows neither",
)


def achieved_rate(config: RunConfig, train: TrainConfig, of_tokenizer: bool = False) -> float:
    """FLOP/s of a card in training."""
    sparse = config.operator.experts.num_experts > 0 and not of_tokenizer
    share = SHARE_SPARSE if sparse else SHARE_DENSE
    return share * (PRODUCT_RATE if train.precision == "bf16" else FLOAT32_RATE)


@dataclass(frozen=True)
class StepPlan:
    """A step of one rank.

    Attributes
    ----------
    inside, outside : float
        Bytes of rows sent to ranks of the same node, and to others.
    reduced, gathered : float
        Bytes sent to sum gradients, and to spread new weights.
    compute, exchange, reduction, gathering, update : float
        Seconds of products, all-to-alls, gradient sums, weights, and the optimiser, each alone.
    hidden : float
        Of reduction and gathering, seconds that pass while products are computed (``overlap_comm``).
    covered : float
        Of the exchange, seconds that pass while experts are computed.
    """

    inside: float
    outside: float
    reduced: float
    gathered: float
    compute: float
    exchange: float
    reduction: float
    gathering: float
    update: float
    hidden: float
    covered: float

    @property
    def seconds(self) -> float:
        alone = self.compute + self.exchange + self.reduction + self.gathering + self.update
        return alone - self.hidden - self.covered


@dataclass(frozen=True)
class Layout:
    """What the times of a step depend on, beside the ranks.

    Attributes
    ----------
    flops : float
        Of a rank, forward and backward, all micro-batches.
    rate : float
        FLOP/s that they reach.
    dense, experts : int
        Parameters on every rank, and those of all experts together.
    row_bytes : float
        Of the rows that a rank sends in one direction of all expert layers, in all micro-batches, at home or away.
    layers : int
        Expert layers passed in a step, all micro-batches.
    again : bool
        Whether blocks are computed again.
    shared, routed : float
        FLOPs of a rank's shared and routed experts, in ``flops``, of one forward pass of all micro-batches.
    """

    flops: float
    rate: float
    dense: int
    experts: int
    row_bytes: float
    layers: int
    again: bool
    shared: float
    routed: float
    width: int
    kept: int


def peers_outside(topology: Topology, cards: int) -> int:
    """Ranks of an expert group on other nodes, for the rank that has most of them."""
    ep = topology.ep_size
    firsts = ((r // ep * ep, r) for r in range(min(topology.world_size, math.lcm(ep, cards))))
    return max(sum(peer // cards != r // cards for peer in range(first, first + ep)) for first, r in firsts)


def plan_step(layout: Layout, zero: Mapping[str, Any], topology: Topology, cards: int) -> StepPlan:
    """Bytes and seconds of a step on nodes of so many cards."""
    stage, accumulation, ep = zero.get("stage", 0), topology.accumulation, topology.ep_size
    compute = layout.flops / layout.rate
    backward = compute * (0.75 if layout.again else 2 / 3)
    passes = 6 if layout.again else 4
    outside = peers_outside(topology, cards)
    sent = [passes * layout.row_bytes * peers / ep for peers in (ep - 1 - outside, outside)]
    # Beside the rows: counts in each forward pass, and weights and their gradients in the backward pass.
    delay = 0.0 if ep == 1 else (INFINIBAND if outside else NVLINK).latency * layout.layers
    rows = max(sent[0] / NVLINK.rate, sent[1] / INFINIBAND.rate) / passes + delay
    exchange = passes * (rows + delay / 2) + delay
    # Outputs come back behind the shared experts, gradients go out behind their backward pass, which is twice the work,
    # and come back behind the gradients of the routed experts' weights. Nothing is computed while rows go out.
    shared, routed = layout.shared / layout.rate, layout.routed / layout.rate
    of_backward = min(rows, 2 * shared) + min(rows, routed)
    covered = (2 if layout.again else 1) * min(rows, shared) + of_backward
    # Dense weights over all ranks; experts over those that hold the same ones, of which a node has fewer.
    away = topology.world_size > cards
    of_node = min(topology.world_size, cards)
    groups = (
        (layout.dense, topology.world_size, of_node),
        (layout.experts / ep, topology.expert_replicas, max(1, of_node // ep)),
    )
    times = 1 if stage == 1 else accumulation  # that gradients are summed
    live = float(zero.get("stage3_max_live_parameters", 1e9))
    gathers = 1 if stage < 3 else accumulation * (1 if layout.dense + layout.experts / ep <= live else 2)
    reduced = gathered = reduction = gathering = last = 0.0
    for count, ranks, near in groups:
        if ranks == 1 or not count:
            continue
        rate = min(NVLINK.rate, near * INFINIBAND.rate) if away else NVLINK.rate
        rounds = (INFINIBAND if away else NVLINK).latency * math.ceil(math.log2(ranks))
        share = (ranks - 1) / ranks
        bucket = min(count, float(zero.get("reduce_bucket_size", 500_000_000)))
        one = (1 if stage == 3 else 2) * 4 * share  # bytes sent for a gradient
        reduced += times * one * count
        reduction += times * (one * count / rate + math.ceil(count / bucket) * rounds)
        gathered += gathers * layout.width * share * count
        gathering += gathers * (layout.width * share * count / rate + rounds)
        last = max(last, one * bucket / rate)
    hidden = 0.0
    if zero.get("overlap_comm", stage == 3):
        room = (backward - of_backward) / (accumulation if stage == 1 else 1)
        hidden = max(0.0, min(reduction - last, room))
        if stage == 3:
            hidden += min(gathering, compute - backward)
    elements = layout.dense / topology.world_size + layout.experts / ep / topology.expert_replicas
    update = elements * (2 * layout.kept + 4 + layout.width) / COPY_RATE
    return StepPlan(
        inside=sent[0],
        outside=sent[1],
        reduced=reduced,
        gathered=gathered,
        compute=compute,
        exchange=exchange,
        reduction=reduction,
        gathering=gathering,
        update=update,
        hidden=hidden,
        covered=covered,
    )


def scaled(topology: Topology, world: int, wanted_ep: int, experts: int) -> Topology:
    """The layout of the same global batch on so many ranks, or of the next larger one where it cannot be shared out.

    A micro-batch is at most that of ``topology``.
    """
    ep = fitting_ep_size(world, wanted_ep, experts)
    mine, most = -(-topology.global_batch // world), topology.micro_batch
    micro = max(size for size in range(1, min(most, mine) + 1) if mine % size == 0)
    return Topology(world, ep, micro, mine // micro)
