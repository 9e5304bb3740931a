"""What theory says that no solution of a regime does: declared beside its fields, checked by the generator."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Interval that every value of a field lies in, its scheme's over- and undershoots included."""

    field: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Energy:
    """Half the mean square of the fields together, which nothing but a source raises.

    With ``q = sqrt(2 E)`` a source of root mean square ``growth`` obeys ``dq/dt <= growth``; one of a given ``power``
    obeys ``dE/dt <= power``. Without either the energy never grows.

    Parameters
    ----------
    name : str
    fields : tuple of str
    growth, power : float
    tolerance : float
        Relative; stored fields are interpolated to faces and rounded.
    """

    name: str
    fields: tuple[str, ...]
    growth: float = 0.0
    power: float = 0.0
    tolerance: float = 0.01

    def bound(self, first: float, elapsed: float) -> float:
        """Largest energy a time ``elapsed`` after it was ``first``."""
        norm = math.sqrt(2.0 * first) + self.growth * elapsed
        return (0.5 * norm**2 + self.power * elapsed) * (1.0 + self.tolerance)


@dataclass(frozen=True)
class Limit:
    """Diagnostic of the solver whose modulus stays at or below a value."""

    diagnostic: str
    most: float


@dataclass(frozen=True)
class Bounds:
    """All that is checked of a regime, besides that values are finite and solenoidal fields have no divergence.

    Parameters
    ----------
    ranges, energies, limits : tuples
    divergence : float
        Largest ``|div u|`` of a solenoidal field, in units of ``eps * sum_i max(|u_i|, speed) / h_i`` with the ``eps``
        of fp32.
    speed : float
        The unit of velocity: a flow at rest has rounding of the forces that drive it, not of its own.
    """

    ranges: tuple[Range, ...] = ()
    energies: tuple[Energy, ...] = ()
    limits: tuple[Limit, ...] = ()
    divergence: float = 64.0
    speed: float = 1.0


#: No step exceeds its limit of stability; holds for all regimes that have steps.
STABLE = Limit("limit_share", 1.0)
