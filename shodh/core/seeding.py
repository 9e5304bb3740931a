"""Seeds that depend on what a number is for, never on the order in which numbers are drawn.

Everything random in the project is drawn from a generator named by a key, such as ``(seed, "noise", step, index)``.
So results depend neither on the number of ranks or workers nor on what ran before, and a resumed run needs no saved
random state.
"""

from __future__ import annotations

import hashlib

import torch

Key = int | str


def stable_seed(*key: Key) -> int:
    """A 63-bit seed, the same for the same key on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator for this key; draw on the CPU and move, so that devices agree."""
    return torch.Generator().manual_seed(stable_seed(*key))
