"""The model card: what a model is, what it was measured to do, how to load it, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shodh.schema.conditions import Condition
from shodh.schema.fields import Field
from shodh.schema.space import Space

_HEAD = """---
library_name: shodh
tags: [physics, pde, mixture-of-experts, foundation-model]
---

# {name}

A Shodh model: {what}, written in {dtype}.

| | |
| --- | --- |
| regimes | {regimes} |
| fields | {fields} |{conditions}
| grid | {grid} |
| parameters, total | {total:,} |
| parameters, active a token | {active:,} |
| training step | {step} |
| weights | {weights} |
| seed | {seed} |

## Load it

```python
import shodh

model = shodh.from_pretrained("path/to/this/folder")
following = model.predict(fields, static, regime="{regime}"{told})  # physical units in, physical units out
```

`fields` is `[batch, {history}, channels, *grid]`, oldest frame first, in the order of the fields above, a vector taking
one channel an axis; `static` is `[batch, static channels, *grid]`. {places}
DeepSpeed is not needed.
"""

_FACES = """Scalars live at cell centres, component i of a
vector on the upper face of its cell along axis i; `placement="center"` averages those at
cell centres onto the faces."""
_CENTRES = "Values live at cell centres."

_TAIL = """
## Limits

- It knows the regimes, fields, grid and boundaries listed here, and nothing was measured outside them.
- {divergence}
- Errors grow along a rollout: look at the numbers above before you trust long ones.
- Training data, seeds and settings stand under `run` in `config.json`.

The code of Shodh is under Apache-2.0; the licence of these weights is for those who trained them to state.
"""

_DECODED = (
    "A velocity that is solenoidal conserves mass by construction; no-slip inside solids is learned, not enforced."
)
_EMITTED = "Fields are emitted as they are: neither conservation of mass nor no-slip inside solids is enforced."


def model_card(description: Mapping[str, Any], space: Space, numbers: Mapping[str, Any] | None = None) -> str:
    """Markdown for a ``config.json`` and its space; ``numbers``: an evaluation's ``metrics.json``, if there is one."""
    run, parameters = description["run"], description["parameters"]
    what = " and ".join(description["parts"])
    decoded = "tokenizer" in description["parts"]
    card = _HEAD.format(
        name=run["name"],
        what=what,
        dtype=description["dtype"],
        regimes=", ".join(space.names),
        fields=", ".join(_describe_field(f) for f in space.fields),
        grid=" x ".join(str(n) for n in run["data"]["grid"]),
        total=parameters["total"],
        active=parameters["active"],
        step=description["source"]["step"] if description["source"]["step"] is not None else "unknown",
        weights="exponential moving average over the training" if description["source"].get("ema") else "of that step",
        seed=run["seed"],
        history=run["data"]["history"],
        regime=space.names[0],
        conditions=f"\n| conditions | {', '.join(map(_describe_condition, space.conditions))} |"
        * bool(space.conditions),
        told=_told(space),
        places=_FACES if any(f.placement == "face" for f in space.fields) else _CENTRES,
    )
    if description.get("merge"):
        card += _merged(description["merge"])
    rows = list(_rows((numbers or {}).get("regimes", {})))
    if rows:
        split = (numbers or {}).get("split", "held-out")
        rounded = (
            ""
            if description["dtype"] == "fp32"
            else f", with the run's own weights; here they are {description['dtype']}"
        )
        card += f"\n## Measured\n\nOn the {split} split, one model step{rounded}; lower is better.\n\n"
        card += "| regime | measure | model | persistence |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    else:
        card += "\n## Measured\n\nNo numbers of `launch/evaluate.py` came with these weights.\n"
    return card + _TAIL.format(divergence=_DECODED if decoded else _EMITTED)


def _merged(merge: Mapping[str, Any]) -> str:
    """How a merged model was made; nobody trained it."""
    experts = ", ".join(expert["name"] for expert in merge["experts"])
    where = f" at coordinate {merge['coordinates']['default']}" if "coordinates" in merge else ""
    return (
        f"\n## Merged\n\nNot trained: merged from the experts {experts} of the anchor {merge['anchor']['name']} "
        f"({merge['method']}{where}). All settings and checksums stand under `merge` in `config.json`.\n"
    )


def _describe_condition(condition: Condition) -> str:
    values = [value for _, *ends in condition.ranges for value in ends]
    return f"{condition.name} {min(values):g} to {max(values):g}" if values else condition.name


def _told(space: Space) -> str:
    """The argument that `predict` needs of the first regime."""
    first = ((c.name, c.range_of(space.names[0])) for c in space.conditions)
    given = {name: float(f"{there[0]:g}") for name, there in first if there is not None and there[0] < there[1]}
    return f", conditions={given}" if given else ""


def _describe_field(field: Field) -> str:
    words = [w for w in ("solenoidal", "static") if getattr(field, w)] + [field.kind]
    return f"{field.name} ({' '.join(words)})"


def _rows(regimes: Mapping[str, Any]) -> Iterator[str]:
    """One row a measure that has a value for the model and one for persistence."""
    for regime, tree in regimes.items():
        for path, node in _measures(tree):
            yield f"| {regime} | {path} | {node['model']:.4g} | {node['persistence']:.4g} |"


def _measures(tree: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, float]]]:
    if not isinstance(tree, Mapping):
        return
    if isinstance(tree.get("model"), float) and isinstance(tree.get("persistence"), float):
        yield path, tree
        return
    for name, node in tree.items():
        yield from _measures(node, f"{path} {name}".strip())
