"""Divergence-free decoding of velocity fields, and the discrete operators that match it."""

from shodh.ops import extension
from shodh.ops.decode import checked, curl, decode_velocity, divergence, face_flux
from shodh.ops.helmholtz import helmholtz_potential

__all__ = ["checked", "curl", "decode_velocity", "divergence", "face_flux", "helmholtz_potential"]

extension.load()
