"""Solvers of the built-in regimes and the operators they share.

``get_regime("open_channel", re_tau=150.0).simulate(seeds=[0, 1], grid=(32, 32, 32), frames=12)``
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import typing
from collections.abc import Iterable
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from shodh.core.errors import ConfigError
from shodh.physics import regimes
from shodh.physics.regime import Regime

__all__ = ["REGIMES", "Regime", "get_regime", "parse_parameter"]


def _find_regimes() -> dict[str, type[Any]]:
    """Classes of `shodh.physics.regimes` that declare a ``name``, by that name."""
    found: dict[str, type[Any]] = {}
    for module in sorted(pkgutil.iter_modules(regimes.__path__), key=lambda m: m.name):
        content = vars(importlib.import_module(f"{regimes.__name__}.{module.name}"))
        for kind in content.values():
            if (
                isinstance(kind, type)
                and kind.__module__ == content["__name__"]
                and isinstance(getattr(kind, "name", None), str)
            ):
                found[kind.name] = kind  # type: ignore[attr-defined]
    return found


#: Every built-in regime by its name.
REGIMES: dict[str, type[Any]] = _find_regimes()


def get_regime(name: str, **parameters: Any) -> Regime:
    """Regime ``name`` with some parameters changed from their defaults.

    Raises
    ------
    ConfigError
        For an unknown regime or parameter (with the nearest match), or a value that cannot be used.
    """
    if name not in REGIMES:
        raise ConfigError(f"unknown regime {name!r}{_nearest(name, REGIMES)}; available: {', '.join(sorted(REGIMES))}")
    known = {field.name for field in dataclasses.fields(REGIMES[name])}
    for key in parameters:
        if key not in known:
            _refuse_parameter(name, key, known)
    regime: Regime = REGIMES[name](**parameters)
    return regime


def parse_parameter(name: str, key: str, text: str) -> Any:
    """Value of the parameter ``key`` of regime ``name`` written as text; lists as ``400,400,400``.

    Raises
    ------
    ConfigError
        For an unknown regime or parameter, or text that is not of the parameter's type.
    """
    get_regime(name)
    kinds = typing.get_type_hints(REGIMES[name])
    known = {field.name for field in dataclasses.fields(REGIMES[name])}
    if key not in known:
        _refuse_parameter(name, key, known)
    value: Any = text.split(",") if "tuple" in str(kinds[key]) else text
    try:
        return TypeAdapter(kinds[key]).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name}.{key}={text}: {error.errors()[0]['msg'].lower()}") from error


def _refuse_parameter(name: str, key: str, known: Iterable[str]) -> NoReturn:
    available = ", ".join(sorted(known))
    raise ConfigError(f"regime {name!r} has no parameter {key!r}{_nearest(key, known)}; available: {available}")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
