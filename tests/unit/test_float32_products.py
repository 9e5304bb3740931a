"""Float32 products are in single precision wherever the project trains or measures, and the user's setting is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from shodh.core.precision import OPERATIONS, float32_products, ieee_float32, keep_ieee

EXACT = dict.fromkeys(OPERATIONS, "ieee")


@pytest.fixture
def allowed() -> Iterator[dict[str, str]]:
    """The setting of a user who allows TF32 for matrix products, where torch allows it for convolutions."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield float32_products()
    torch.backends.cuda.matmul.fp32_precision = before


def test_setting_of_the_caller_comes_back_also_after_an_error(allowed: dict[str, str]) -> None:
    assert allowed["cuda.matmul"] == allowed["cudnn.conv"] == "tf32"
    with pytest.raises(ZeroDivisionError), ieee_float32():
        assert float32_products() == EXACT
        raise ZeroDivisionError
    assert float32_products() == allowed


def test_library_that_allows_tf32_meanwhile_is_overruled_and_named(
    allowed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with ieee_float32(), caplog.at_level(logging.WARNING, "shodh"):
        keep_ieee()
        assert caplog.records == []
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        keep_ieee()
        assert "cudnn.conv" in caplog.text and float32_products() == EXACT
    assert float32_products() == allowed


def test_no_deprecated_setting_is_touched(recwarn: pytest.WarningsRecorder) -> None:
    with ieee_float32():
        float32_products()
    assert not recwarn.list
