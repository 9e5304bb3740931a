"""Studies of composition that all tests of the folder may read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from known_family import MOE_POT, Known, build_known


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A dense family; read it, never change it."""
    return build_known(tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="session")
def known_sparse(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The same with routed experts."""
    return build_known(tmp_path_factory.mktemp("sparse"), MOE_POT)
