"""Solvers of the built-in regimes and the operators they share.

``get_regime("open_channel", re_tau=150.0).simulate(seeds=[0, 1], grid=(32, 32, 32), frames=12)``
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from shodh.errors import ConfigError
from shodh.physics.open_channel import OpenChannel
from shodh.physics.porous_media import PorousMedia
from shodh.physics.regime import Regime

REGIMES: dict[str, type[Any]] = {OpenChannel.name: OpenChannel, PorousMedia.name: PorousMedia}

__all__ = ["REGIMES", "OpenChannel", "PorousMedia", "Regime", "get_regime"]


def get_regime(name: str, **parameters: Any) -> Regime:
    """Regime ``name`` with some parameters changed from their defaults.

    Raises
    ------
    ConfigError
        For an unknown regime or parameter (with the nearest match), or a value that cannot be used.
    """
    if name not in REGIMES:
        raise ConfigError(f"unknown regime {name!r}{_nearest(name, REGIMES)}; available: {', '.join(sorted(REGIMES))}")
    known = {field.name: field for field in dataclasses.fields(REGIMES[name])}
    for key in parameters:
        if key not in known:
            raise ConfigError(
                f"regime {name!r} has no parameter {key!r}{_nearest(key, known)}; available: {', '.join(known)}"
            )
    regime: Regime = REGIMES[name](**parameters)
    return regime


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
