"""Fused kernels: found where they are NVIDIA's, refused by name where they are not."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from shodh.core.errors import ExtensionError
from shodh.models import kernels
from shodh.models.kernels import adamw, apex_attribute, describe_kernels, rms_norm


class FusedNorm(torch.nn.RMSNorm):
    """Stands in for apex's."""


class FusedAdam(torch.optim.AdamW):
    """Stands in for apex's, with its argument names."""

    def __init__(self, params: list, lr: float, betas: tuple[float, float], adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas)


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("apex")
    package.__spec__ = importlib.util.spec_from_loader("apex", None)
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", package)
    for name, attribute, value in (
        ("normalization", "FusedRMSNorm", FusedNorm),
        ("optimizers", "FusedAdam", FusedAdam),
    ):
        module = types.ModuleType(f"apex.{name}")
        setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, f"apex.{name}", module)


def hide_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)


def test_torch_serves_where_apex_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_apex(monkeypatch)
    assert type(rms_norm(8, "auto")) is torch.nn.RMSNorm
    assert describe_kernels("auto") == "RMSNorm: torch, AdamW: torch"
    assert type(adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], 1e-3, (0.9, 0.95))) is torch.optim.AdamW


def test_apex_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_apex(monkeypatch)
    with pytest.raises(ExtensionError, match="not PyPI's package of that name"):
        rms_norm(8, "apex")
    with pytest.raises(ExtensionError, match="FusedAdam"):
        adamw([], 1e-3, (0.9, 0.95), "apex")


def test_foreign_package_of_that_name_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('a web toolkit of 2013')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert importlib.util.find_spec("apex") is not None
    assert apex_attribute("normalization", "FusedRMSNorm") is None
    assert type(rms_norm(8, "auto")) is torch.nn.RMSNorm


@pytest.mark.usefixtures("fake_apex")
def test_apex_runs_where_it_is_found_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(rms_norm(8, "apex"), FusedNorm) and [n for n, _ in rms_norm(8, "apex").named_parameters()] == [
        "weight"
    ]
    assert isinstance(adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], 1e-3, (0.9, 0.95), "apex"), FusedAdam)
    assert type(rms_norm(8, "torch")) is torch.nn.RMSNorm
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        name = "apex" if cuda else "torch"
        assert describe_kernels("auto") == f"RMSNorm: {name}, AdamW: {name}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(apex_attribute("normalization", "FusedRMSNorm") is None, reason="NVIDIA's apex is not installed")
def test_apex_computes_what_torch_computes() -> None:
    x = torch.randn(7, 48, device="cuda")
    fused, plain = rms_norm(48, "apex").cuda(), rms_norm(48, "torch").cuda()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)
    weights = [torch.nn.Parameter(torch.ones(33, device="cuda")) for _ in range(2)]
    optimizers = [
        adamw([{"params": [w], "weight_decay": 0.1}], 1e-2, (0.9, 0.95), k)
        for w, k in zip(weights, ("apex", "torch"), strict=True)
    ]
    for step in range(5):
        gradient = torch.randn(33, generator=torch.Generator().manual_seed(step)).cuda()
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
