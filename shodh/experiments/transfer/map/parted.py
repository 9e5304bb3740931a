"""A dense model some of whose parameters each regime has for itself: what sharing which of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from shodh.core.errors import ConfigError
from shodh.models.operator import LatentTransformer, OperatorOutput


class PartedTransformer(nn.Module):
    """One model a regime, of which all share the parameters that no pattern names.

    Parameters
    ----------
    model : LatentTransformer
        Without routed experts; its weights are those that all regimes start from.
    regimes : int
    own : sequence of str
        Shell patterns of parameter names, such as ``blocks.*.attention.*``.

    Raises
    ------
    ConfigError
        A pattern names no parameter.
    """

    def __init__(self, model: LatentTransformer, regimes: int, own: Sequence[str]) -> None:
        super().__init__()
        names = [name for name, _ in model.named_parameters()]
        for pattern in own:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"study.apart: {pattern!r} matches no parameter; they are {', '.join(names)}")
        models = [model, *(deepcopy(model) for _ in range(regimes - 1))]
        for name, parameter in model.named_parameters():
            if not any(fnmatchcase(name, pattern) for pattern in own):
                path, _, leaf = name.rpartition(".")
                for other in models[1:]:
                    setattr(other.get_submodule(path), leaf, parameter)
        self.models = nn.ModuleList(models)

    def forward(self, history: Tensor, static: Tensor, labels: Tensor) -> OperatorOutput:
        """As the model's; ``labels`` ``[B]`` are regimes."""
        places = [(labels == number).nonzero()[:, 0] for number in range(len(self.models))]
        pairs = zip(self.models, places, strict=True)
        parts = [model(history[rows], static[rows]).latent for model, rows in pairs if len(rows)]
        order = torch.cat(places).argsort()
        return OperatorOutput(torch.cat(parts)[order], [])
