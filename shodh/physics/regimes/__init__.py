"""The built-in regimes, one subject a file. `shodh.physics.REGIMES` finds every class here that has a ``name``."""
