"""Merge expert folders into one, tensor by tensor; whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shodh import __version__
from shodh.checkpoint.convert import check_target, progress_bar, whole_or_absent
from shodh.checkpoint.description import ModelDescription, Source, write_pretrained, written_dtypes
from shodh.core.errors import CheckpointError, ConfigError
from shodh.core.strict_json import dumps
from shodh.core.weights import DTYPES, MAX_SHARD_SIZE, LazyWeights
from shodh.merge import baselines
from shodh.merge.diagnostics import diagnose
from shodh.merge.experts import Expert, check_family, open_expert
from shodh.merge.recipe import ALONG, Recipe
from shodh.merge.span import compose, curve, decompose, plane


@dataclass(frozen=True)
class Merged:
    """What was written."""

    out: str
    files: list[str]
    tensors: int
    bytes: int
    merge: dict[str, Any]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def merged_weights(anchor: LazyWeights, experts: Sequence[LazyWeights], recipe: Recipe) -> LazyWeights:
    """The weights of a recipe, computed when they are read; experts in the order of their coordinates.

    Raises
    ------
    CheckpointError, ConfigError
        Architectures differ, or the recipe does not fit the number of experts.
    """
    if recipe.method not in ALONG:
        return _baseline(anchor, experts, recipe)
    if recipe.coordinates is None:
        raise ConfigError(f"method {recipe.method} needs a coordinate")
    coordinates = recipe.coordinates
    if recipe.method == "wrong_sign":
        coordinates = coordinates.negated()
    if len(coordinates.default) == 2:
        return plane(experts, recipe.positions).at(coordinates)
    if len(experts) == 2 and recipe.positions is None:
        shared, direction = decompose(anchor, *experts)
        if recipe.method == "random_direction":
            direction = baselines.random_direction(direction, recipe.seed)
        return compose(anchor, shared, direction, coordinates)
    if recipe.method == "random_direction":
        raise ConfigError(f"a random direction is drawn for two experts, and there are {len(experts)}")
    if recipe.positions is None:
        raise ConfigError(f"a curve through {len(experts)} experts needs their positions")
    return curve(experts, recipe.positions, recipe.curve).at(coordinates)


def _baseline(anchor: LazyWeights, experts: Sequence[LazyWeights], recipe: Recipe) -> LazyWeights:
    if recipe.method == "average":
        return baselines.average(experts)
    makers: dict[str, Callable[..., LazyWeights]] = {
        "task_arithmetic": baselines.task_arithmetic,
        "ties": baselines.ties,
        "dare": baselines.dare,
    }
    if recipe.method not in makers:
        raise ConfigError(f"method {recipe.method!r}: expected one of {', '.join((*ALONG, 'average', *makers))}")
    settings = {key: getattr(recipe, key) for key in ("density", "scaling") if getattr(recipe, key) is not None}
    if recipe.method == "task_arithmetic" and "density" in settings:
        raise ConfigError("task arithmetic has no density; ties and dare have")
    if recipe.method == "dare":
        settings["seed"] = recipe.seed
    return makers[recipe.method](anchor, experts, **settings)


def open_family(anchor: Path, experts: Sequence[Path], *, any_anchor: bool = False) -> tuple[Expert, list[Expert]]:
    """Anchor and experts, opened and compared (`check_family`)."""
    first, *others = (open_expert(path) for path in (anchor, *experts))
    check_family(first, others, any_anchor=any_anchor)
    return first, others


def merge_experts(
    anchor: Expert,
    experts: Sequence[Expert],
    recipe: Recipe,
    out: Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Merged:
    """Write the merged model as a folder that `shodh.from_pretrained` loads like any other.

    Raises
    ------
    CheckpointError
        ``out`` exists, or is one of the sources.
    """
    if out.resolve() in [e.path.resolve() for e in (anchor, *experts)]:
        raise CheckpointError(f"{out} is one of the folders to be merged; choose another")
    check_target(out, overwrite)
    weights = merged_weights(anchor.weights, [e.weights for e in experts], recipe)
    description = _describe(anchor, experts, recipe, out)
    dtypes = written_dtypes(description, weights, DTYPES[description.dtype])
    size = sum(t.numel * dtypes[name].itemsize for name, t in weights.items())
    with whole_or_absent(out) as partial, progress_bar("merge", size) as progress:
        files = write_pretrained(partial, description, weights, dtypes, max_shard_size, progress=progress)
    assert description.merge is not None
    return Merged(str(out), [file.name for file in files], len(dtypes), size, description.merge)


def _describe(anchor: Expert, experts: Sequence[Expert], recipe: Recipe, out: Path) -> ModelDescription:
    """The anchor's description, with how the merged model was made."""

    def origin(expert: Expert) -> dict[str, str]:
        return {"name": expert.name, "sha256": expert.description.source.sha256}

    merge = {
        **recipe.to_dict(),
        "anchor": origin(anchor),
        "experts": [origin(e) for e in experts],
        "shodh": __version__,
    }
    digest = hashlib.sha256(dumps(merge, sort_keys=True).encode()).hexdigest()
    source = Source(name=out.name, sha256=digest, init_from=anchor.description.source.sha256)
    return anchor.description.model_copy(update={"source": source, "merge": merge})


def diagnose_experts(anchor: Expert, low: Expert, high: Expert) -> dict[str, Any]:
    """`shodh.merge.diagnose` of two opened experts, with a progress bar."""
    size = sum(t.numel * t.dtype.itemsize for e in (anchor, low, high) for t in e.weights.values())
    with progress_bar("diagnose", size) as progress:
        return diagnose(anchor.weights, low.weights, high.weights, progress)
