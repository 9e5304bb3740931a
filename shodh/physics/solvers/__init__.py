"""Discretisations and their stability limits; the regimes are built of them."""
