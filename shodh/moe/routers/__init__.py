"""Routers: which experts a token meets. One class a kind; `shodh.config.routers.ROUTERS` names them all.

Five kinds learn (a regime is recognised from the whole sample, a mechanism from the local patch):

``token``       p(e | token)
``context``     p(e | token + w * sample mean)
``two_level``   p(e) = p(group | sample mean) * p(e | group, token)
``operator``    p(e) = p(group | fingerprint) * p(e | group, token): by what moves the sample, not by its state
``noisy_topk``  as token, with Gaussian noise of a learned size on the logits in training (Shazeer, arXiv 1701.06538)

and three are controls: ``hash`` goes by the token's position, ``frozen`` is never trained, ``oracle`` is the one kind
that is given a regime label. Adding a kind: docs/routers.md.
"""

from pkgutil import resolve_name

from shodh.config import ExpertsConfig
from shodh.moe.routers.base import Router

__all__ = ["Router", "make_router"]


def make_router(config: ExpertsConfig, dim: int) -> Router:
    """The router of ``config.router.kind`` for tokens of width ``dim``."""
    router: Router = resolve_name(config.router.traits.where)(config, dim)
    return router
