"""What a tensor is a part of, by its exchange-format name."""

from __future__ import annotations

import re

ROUTED_EXPERTS = "routed experts"
OTHER = "other"
#: The first pattern that is found in a name decides.
_COMPONENTS = {
    "tokenizer": r"^tokenizer\.",
    "router": r"\.(router|gate)\.",
    ROUTED_EXPERTS: r"\.experts\.",
    "shared experts": r"\.shared_experts\.",
    "attention or mixing": r"\.(attention|mixer|mixing|spectral|local|fno_blocks|convs?)\.",
    "feed-forward": r"\.(feed_forward|mlp|channel_mlp)\.",
    "embeddings": r"(^|\.)(embed|embedding|patch|position|lift|temporal|aggregat)",
    "output": r"(^|\.)(head|hidden|decode|decoder|projection|norm)\.",
}
COMPONENTS = (*_COMPONENTS, OTHER)
_LAYER = re.compile(r"^(.*?\b(?:blocks|layers|convs)\.\d+)\.")


def component(name: str) -> str:
    """One of `COMPONENTS`."""
    return next((what for what, pattern in _COMPONENTS.items() if re.search(pattern, name)), OTHER)


def layer(name: str) -> str:
    """``operator.blocks.3`` for whatever lies in a block; else the part before the tensor's own name."""
    match = _LAYER.match(name)
    return match.group(1) if match else name.rpartition(".")[0] or name
