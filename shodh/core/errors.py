"""The errors a user can cause; everything else is a bug and keeps its traceback."""


class ShodhError(Exception):
    """Base of all errors that a command line answers with one line and exit code 2."""


class ConfigError(ShodhError):
    """A configuration key or value cannot be used."""


class DataError(ShodhError):
    """A data file is missing, damaged, or does not fit the configuration; the message names it."""


class CheckpointError(ShodhError):
    """A checkpoint is missing, incomplete, damaged, or of another model."""


class TopologyError(ShodhError):
    """Ranks, expert-parallel degree, batch or experts do not fit together."""


class ExtensionError(ShodhError):
    """A compiled back end was asked for by name and is not available."""


class NonFiniteError(ShodhError):
    """A field that must be finite holds NaN or infinity, or overflows its dtype."""


class UnstableError(ShodhError):
    """A solution left the bounds that theory gives it."""
