"""Losses; what is reported is measured by `shodh.schema.measures`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from shodh.config import TokenizerLoss
from shodh.schema.fields import Field, field_slices
from shodh.schema.measures import mean_over


def relative_l2_by_channel(
    prediction: Tensor, target: Tensor, floor: float = 1e-2, *, exists: Tensor | None = None
) -> Tensor:
    """L2RE of each channel of each sample, ``[B, C, *grid] -> [B, C]``: the loss of DPOT and MoE-POT is its mean.

    A target whose root mean square is below ``floor`` counts as if it had it: normalised fields are of the order of
    one, and a channel at rest must not outweigh all others.

    Parameters
    ----------
    exists : Tensor, optional
        True in the cells that count, in a shape that broadcasts with the target.
    """
    error, norm = (mean_over(x.square(), exists, 2) for x in (prediction - target, target))
    return (error + 1e-16).sqrt() / norm.clamp(min=floor**2).sqrt()


def _relative_square(error: Tensor, target: Tensor, floor: float) -> Tensor:
    """Mean square of an error over that of its target, a sample each; small targets count as ``floor``."""
    return error.square().flatten(1).mean(1) / (target.square().flatten(1).mean(1) + floor)


def _relative_variance(error: Tensor, target: Tensor, floor: float) -> Tensor:
    """Mean square of an error over the variance of its target by channel, ``[B, C, ...] -> [B]``: their mean."""
    deviation = target - target.flatten(2).mean(2).view(*target.shape[:2], *(1,) * (target.ndim - 2))
    return (error.square().flatten(2).mean(2) / (deviation.square().flatten(2).mean(2) + floor)).mean(1)


KINDS = ("vrmse", "relative_l2", "gradient", "spectral")


def reconstruction_terms(
    prediction: Tensor, target: Tensor, fields: Sequence[Field], kinds: Collection[str] = KINDS
) -> dict[str, Tensor]:
    """Squared relative errors by field, ``[B]`` each: ``vrmse/<f>``, ``relative_l2/<f>``, and so on of `KINDS`.

    Each term is relative to the same measure of the target (floor 1e-2), so that no regime and no field outweighs
    another: ``vrmse`` to the variance in space, component by component, as The Well has it, so that neither a mean flow
    nor a strong component hides the error of a weak one. ``gradient`` is of one-sided differences, ``spectral`` of log
    magnitudes of the discrete Fourier transform. Fields are given in units of their components
    (`shodh.schema.domain.channel_units`).
    """
    floor = 1e-2
    terms = {}
    for name, channels in field_slices(fields).items():
        u, v = prediction[:, channels], target[:, channels]
        if "vrmse" in kinds:
            terms[f"vrmse/{name}"] = _relative_variance(u - v, v, floor)
        if "relative_l2" in kinds:
            terms[f"relative_l2/{name}"] = _relative_square(u - v, v, floor)
        if "gradient" in kinds:
            gradient = [_relative_square((u - v).diff(dim=d), v.diff(dim=d), floor) for d in (2, 3, 4)]
            terms[f"gradient/{name}"] = torch.stack(gradient).mean(0)
        if "spectral" in kinds:
            cells = v[0, 0].numel()
            spectra = [(torch.fft.rfftn(w.float(), dim=(2, 3, 4)).abs() / cells + 1e-4).log() for w in (u, v)]
            terms[f"spectral/{name}"] = (spectra[0] - spectra[1]).square().flatten(1).mean(1)
    return terms


def weigh_fields(terms: dict[str, Tensor], presence: Tensor, fields: Sequence[Field]) -> dict[str, Tensor]:
    """Terms ``[B]`` by field, zero where a field is absent, the others raised so that every sample weighs the same.

    ``presence`` is ``[B, F]``. The mean over all fields of the result is, for each sample, the mean over its own ones;
    where all are present nothing changes.
    """
    weight = presence * (presence.shape[1] / presence.sum(1, keepdim=True))
    column = {f.name: number for number, f in enumerate(fields)}
    return {name: term * weight[:, column[name.split("/", 1)[1]]] for name, term in terms.items()}


def weighted_kinds(weights: TokenizerLoss) -> list[str]:
    """The `KINDS` that a loss has in it."""
    return [kind for kind in KINDS if getattr(weights, kind)]


def reconstruction_loss(terms: dict[str, Tensor], weights: TokenizerLoss) -> Tensor:
    """Weighted mean over fields and samples of `reconstruction_terms`."""
    total = torch.zeros((), device=next(iter(terms.values())).device)
    for kind in weighted_kinds(weights):
        chosen = [term.mean() for name, term in terms.items() if name.startswith(kind + "/")]
        total = total + getattr(weights, kind) * torch.stack(chosen).mean()
    return total
