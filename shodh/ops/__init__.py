"""Divergence-free decoding of velocity fields, and the discrete operators that match it."""

from shodh.ops.decode import curl, decode_velocity, divergence, face_flux

__all__ = ["curl", "decode_velocity", "divergence", "face_flux"]
