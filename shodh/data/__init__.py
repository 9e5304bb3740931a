"""Data: The Well files, statistics and normalisation, windows, the mixture of regimes, the latent cache.

The way of a sample: `WellFile` (one file) -> `RegimeSource` (the splits of a regime, fields by our names) ->
`WindowDataset` (normalised history and target) -> `MixtureSampler` and `MixtureLoader` (batches of several regimes).
`write_latents` and `LatentWindowDataset` put a cache of encoded snapshots in the place of the fields.
"""

from shodh.data.normalize import fit_normalizer
from shodh.data.latent_windows import LatentWindowDataset
from shodh.data.latents import data_identity, file_stems, latent_key, split_folder, write_latents
from shodh.data.loader import Batch, MixtureLoader
from shodh.data.mixture import MixtureSampler, batch_counts
from shodh.data.source import SPLITS, RegimeSource, Split
from shodh.data.stats import compute_statistics, read_stats, write_stats
from shodh.data.well import write_trajectories
from shodh.data.well_reader import WellFile
from shodh.data.windows import WindowDataset
from shodh.core.files import atomic_path, remove_partial_files

__all__ = [
    "SPLITS",
    "Batch",
    "LatentWindowDataset",
    "MixtureLoader",
    "MixtureSampler",
    "RegimeSource",
    "Split",
    "WellFile",
    "WindowDataset",
    "atomic_path",
    "batch_counts",
    "compute_statistics",
    "data_identity",
    "file_stems",
    "fit_normalizer",
    "latent_key",
    "read_stats",
    "remove_partial_files",
    "split_folder",
    "write_latents",
    "write_stats",
    "write_trajectories",
]
