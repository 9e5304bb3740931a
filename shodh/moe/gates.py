"""Gates: from the features of a token, or of a whole sample, to the logits of experts.

Every gate computes in float32, whatever the model's precision, and returns ``(logits, similarity)``: ``similarity`` is
the mean squared cosine between the rows that stand for two alternatives, measured where ZeRO-3 has the rows gathered.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shodh.config import RouterConfig
from shodh.core.seeding import Key, generator

REDUCTION = 16  # of the channel attention in the convolutional gate


def mean_squared_cosine(rows: Tensor) -> Tensor:
    """``||R R^T - I||_F^2 / (E (E - 1))`` of the unit rows of ``[E, D]``: 0 if orthogonal, 1 if parallel."""
    unit = F.normalize(rows, dim=-1)
    experts = rows.shape[0]
    off_diagonal = (unit @ unit.T).square() * (1 - torch.eye(experts, device=rows.device))
    return off_diagonal.sum() / max(1, experts * (experts - 1))


def scaled_cosine_reference(query: Tensor, rows: Tensor, log_scale: Tensor) -> Tensor:
    """``exp(log_scale) cos(query_t, row_e)``: ``[T, S], [E, S], [1] -> [T, E]``."""
    return log_scale.exp() * F.linear(F.normalize(query, dim=-1), F.normalize(rows, dim=-1))


def scaled_cosine(query: Tensor, rows: Tensor, log_scale: Tensor) -> Tensor:
    """`scaled_cosine_reference` with the same bits, and a backward of a third of its operations."""
    out: Tensor = _ScaledCosine.apply(query, rows, log_scale)
    return out


class _ScaledCosine(torch.autograd.Function):
    """With unit vectors ``q`` and ``p``, ``out = s q.p`` and its gradient ``g``: what normalising takes away along
    ``q`` is ``sum_e g out``, along ``p`` ``sum_t g out``, and the gradient of ``log s`` is the sum of all of them.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, rows: Tensor, log_scale: Tensor) -> Tensor:
        lengths = [torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-12) for v in (query, rows)]
        q, p = query / lengths[0], rows / lengths[1]
        scale = log_scale.exp()
        out = scale * (q @ p.t())
        ctx.save_for_backward(q, p, *lengths, scale, out)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, p, q_length, p_length, scale, out = ctx.saved_tensors
        along = gradient * out
        along_q, along_p = along.sum(1, keepdim=True), along.sum(0).unsqueeze(1)
        scaled = gradient * scale
        of_query = torch.addcmul(scaled @ p, q, along_q, value=-1).div_(q_length)
        of_rows = torch.addcmul(scaled.t() @ q, p, along_p, value=-1).div_(p_length)
        return of_query, of_rows, along_p.sum().view(1)


class Gate(nn.Module):
    """Logits of ``choices`` alternatives for each row of ``[..., dim]``.

    Parameters
    ----------
    score : {"cosine", "softmax"}
        ``tau * cos(W x, p)`` with a learned inverse temperature, or a linear map.
    """

    undecayed = ("prototypes", "log_temperature")

    def __init__(self, dim: int, choices: int, score: str, semantic_dim: int, temperature: float) -> None:
        super().__init__()
        self.score = score
        self.temperature = temperature
        self.measures_similarity = False
        if score == "cosine":
            self.projection = nn.Parameter(torch.empty(semantic_dim, dim))
            self.prototypes = nn.Parameter(torch.empty(choices, semantic_dim))
            # One element, not zero dimensions: a 0-dim parameter breaks DeepSpeed's bf16 broadcast on gloo.
            self.log_temperature = nn.Parameter(torch.empty(1))
        else:
            self.weight = nn.Parameter(torch.empty(choices, dim))

    def seeded_reset(self, *key: Key) -> None:
        """Draw the initial values from generators named by ``key``."""
        with torch.no_grad():
            for name, tensor in _own_tensors(self).items():
                if name == "log_temperature":
                    tensor.fill_(math.log(self.temperature))
                    continue
                std = 1.0 if name == "prototypes" else tensor.shape[1] ** -0.5
                draw = torch.empty(tensor.shape).normal_(0.0, std, generator=generator(*key, name))
                tensor.copy_(draw)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x.float()
        rows = (self.weight if self.score == "softmax" else self.prototypes).float()
        similarity = mean_squared_cosine(rows) if self.measures_similarity else None
        if self.score == "softmax":
            return F.linear(x, rows), similarity
        query = F.linear(x, self.projection.float())
        logits = scaled_cosine(query.flatten(0, -2), rows, self.log_temperature.float())
        return logits.unflatten(0, query.shape[:-1]), similarity


class Linear32(nn.Linear):
    """An affine map in float32. A module of its own, so that ZeRO-3 gathers its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias.float())


class _LayerNorm32(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class ConvGate(nn.Module):
    """MoE-POT's gate network (arXiv 2510.25803) on rows ``[..., dim]``.

    1x1 maps ``dim -> 2 dim``, norm, GELU, channel attention, ``2 dim -> dim``, norm, GELU, ``dim -> choices``; 1x1
    convolutions are linear maps of a row. The published batch norms couple the samples of a batch, so that decisions
    would depend on the micro-batch and the ranks: here they are layer norms over channels, with as many parameters.
    On pooled features the mean and the maximum that the channel attention adds are the same, hence its factor of 2.
    """

    def __init__(self, dim: int, choices: int) -> None:
        super().__init__()
        wide = 2 * dim
        self.measures_similarity = False
        self.expand = Linear32(dim, wide)
        self.expand_norm = _LayerNorm32(wide)
        self.squeeze = Linear32(wide, max(1, wide // REDUCTION))
        self.excite = Linear32(max(1, wide // REDUCTION), wide)
        self.reduce = Linear32(wide, dim)
        self.reduce_norm = _LayerNorm32(dim)
        self.weight = nn.Parameter(torch.empty(choices, dim))
        self.bias = nn.Parameter(torch.empty(choices))

    def seeded_reset(self, *key: Key) -> None:
        """Draw the last map; the others are drawn as any linear map."""
        with torch.no_grad():
            std = self.weight.shape[1] ** -0.5
            draw = torch.empty(self.weight.shape).normal_(0.0, std, generator=generator(*key, "weight"))
            self.weight.copy_(draw)
            self.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self.weight.float()
        wide = F.gelu(self.expand_norm(self.expand(x.float())))
        wide = wide * torch.sigmoid(2 * self.excite(F.gelu(self.squeeze(wide))))
        narrow = F.gelu(self.reduce_norm(self.reduce(wide)))
        similarity = mean_squared_cosine(rows) if self.measures_similarity else None
        return F.linear(narrow, rows, self.bias.float()), similarity


def make_gate(config: RouterConfig, dim: int, choices: int, alternatives: int) -> Gate | ConvGate:
    """The gate that a configuration asks for, with a logit for each of ``choices``.

    Frozen where it chooses among one alternative alone: its softmax is one whatever it learns.
    """
    gate: Gate | ConvGate
    if config.gate == "conv":
        gate = ConvGate(dim, choices)
    else:
        gate = Gate(dim, choices, config.score, config.semantic_dim, config.temperature)
    if alternatives == 1:
        freeze(gate)
    return gate


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and what `freeze` made of them, of a module without its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def freeze(module: nn.Module) -> None:
    """Make buffers of all parameters: saved and moved with the model, unknown to every optimiser and ZeRO stage."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
