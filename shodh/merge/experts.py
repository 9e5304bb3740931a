"""Expert folders of one family, opened to be merged: what must be equal is compared before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shodh.checkpoint.description import ModelDescription, find_pretrained, is_pretrained, read_pretrained
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.weights import LazyWeights
from shodh.merge.coordinates import ParameterMap
from shodh.merge.lazy import blocks, from_files
from shodh.merge.readout import Range

# How a model was trained does not change what its weights mean.
_TRAINING = {
    "operator": {"train", "loss", "input_noise", "random_shifts", "activation_checkpointing"},
    "operator.experts": {"balance"},
    "tokenizer": {"train", "run", "loss"},
}


@dataclass(frozen=True)
class Expert:
    """A converted folder: anchor or expert of a family."""

    path: Path
    description: ModelDescription
    weights: LazyWeights

    @property
    def name(self) -> str:
        return self.path.name

    def parameter(self, name: str | None) -> tuple[str, float] | None:
        """Name and value of the physical parameter it was trained at, as far as its configuration says."""
        family = self.description.config.family
        if family is None:
            return None
        chosen = name
        if chosen is None and len(family.parameters) == 1:
            chosen = next(iter(family.parameters))
        value = None if chosen is None else family.parameters.get(chosen)
        return (chosen, value) if chosen is not None and isinstance(value, float) else None


def open_expert(path: Path) -> Expert:
    """Map a converted folder, a checkpoint or a run; raises `CheckpointError` for anything else."""
    found = find_pretrained(path)
    if not found.exists() or not (is_pretrained(found) or found.is_file()):
        raise CheckpointError(f"{path} is not a converted folder; make one with tools/convert_checkpoint.py RUN OUT")
    description, tensors = read_pretrained(found)
    return Expert(path, description, from_files(tensors))


def check_family(anchor: Expert, experts: Sequence[Expert], *, any_anchor: bool = False) -> None:
    """Refuse experts that are not of one family with the anchor.

    Parameters
    ----------
    any_anchor : bool
        Accept experts whose metadata does not say which checkpoint they started from. One that names another is
        refused nevertheless.

    Raises
    ------
    CheckpointError
        Names the expert and what differs: dtype, architecture, normalisation, fields, family, anchor or tokenizer.
    """
    for expert in experts:
        for what, key, ours, theirs in _differences(anchor.description, expert.description):
            raise CheckpointError(
                f"{expert.path} and the anchor {anchor.path} differ in {what}: {key} is {_short(theirs)} and "
                f"{_short(ours)}; only experts of one model and one family can be merged"
            )
        _check_anchor(anchor, expert, any_anchor)
    for expert in experts:
        _check_tokenizer(anchor, expert)


def _differences(anchor: ModelDescription, expert: ModelDescription) -> Iterator[tuple[str, str, Any, Any]]:
    """What differs, the key, and both values."""
    yield from _compare("parts", "parts", anchor.parts, expert.parts)
    yield from _compare("precision", "dtype", anchor.dtype, expert.dtype)
    for section in ("operator", "tokenizer"):
        yield from _compare("architecture", section, anchor.run.get(section), expert.run.get(section))
    for key in ("grid", "history"):
        yield from _compare("architecture", f"data.{key}", anchor.run["data"].get(key), expert.run["data"].get(key))
    ours, theirs = anchor.space, expert.space
    yield from _compare("fields", "fields", ours.fields, theirs.fields)
    yield from _compare("fields", "ndim", ours.ndim, theirs.ndim)
    # An expert may have been fine-tuned on some of the regimes alone.
    known = [regime for regime in expert.regimes if regime in anchor.regimes]
    yield from _compare("regimes", "regimes", known, list(expert.regimes))
    for key, what in (("domain", "domains"), ("constants", "normalisation")):
        of = ({r["name"]: r[key] for r in space.to_dict()["regimes"] if r["name"] in known} for space in (ours, theirs))
        yield from _compare(what, key, *of)
    units = ([(c.name, c.log, c.mean, c.scale) for c in space.conditions] for space in (ours, theirs))
    yield from _compare("units", "conditions", *units)
    family, other = anchor.config.family, expert.config.family
    if family is not None and other is not None:
        yield from _compare("family", "family.name", family.name, other.name)
        yield from _compare("family", "family.parameters", sorted(family.parameters), sorted(other.parameters))


def _compare(what: str, key: str, ours: Any, theirs: Any) -> Iterator[tuple[str, str, Any, Any]]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in sorted((ours.keys() | theirs.keys()) - _TRAINING.get(key, set())):
            yield from _compare(what, f"{key}.{name}", ours.get(name), theirs.get(name))
    elif ours != theirs:
        yield what, key, ours, theirs


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_anchor(anchor: Expert, expert: Expert, any_anchor: bool) -> None:
    started, wanted = expert.description.source.init_from, anchor.description.source.sha256
    if started is None and not any_anchor:
        raise CheckpointError(
            f"{expert.path} does not say which checkpoint it was fine-tuned from (source.init_from in config.json); "
            f"if it was {anchor.path}, say so with --any-anchor"
        )
    if started is not None and started != wanted:
        raise CheckpointError(
            f"{expert.path} was fine-tuned from another checkpoint ({started[:12]}...) than the anchor {anchor.path} "
            f"({wanted[:12]}...)"
        )


def _check_tokenizer(anchor: Expert, expert: Expert) -> None:
    """Experts of different tokenizers live in different latent spaces."""
    for name, ours in anchor.weights.items():
        if not name.startswith("tokenizer."):
            continue
        for start, stop in blocks(ours.numel):
            if not torch.equal(ours.part(start, stop), expert.weights[name].part(start, stop)):
                raise CheckpointError(f"{expert.path} and the anchor {anchor.path} have different tokenizers ({name})")


def family_range(
    low: Expert,
    high: Expert,
    parameter: str | None = None,
    given: tuple[float, float] | None = None,
    scale: ParameterMap = "linear",
) -> Range:
    """Range of the parameter between two experts, as ``given`` or from their configurations.

    Raises
    ------
    ConfigError
        Metadata is missing, the experts speak of different parameters, or the range is empty.
    """
    if given is not None:
        return Range(parameter or "parameter", *given, scale)
    ends = []
    for expert in (low, high):
        end = expert.parameter(parameter)
        if end is None:
            wanted = "one physical parameter" if parameter is None else f"a value of {parameter!r}"
            raise ConfigError(
                f"{expert.path}: its configuration does not give {wanted} (family.parameters); name the parameters of "
                "both experts with --range LOW HIGH"
            )
        ends.append(end)
    if ends[0][0] != ends[1][0]:
        raise ConfigError(f"{low.path} was trained over {ends[0][0]!r} and {high.path} over {ends[1][0]!r}")
    return Range(ends[0][0], ends[0][1], ends[1][1], scale)
