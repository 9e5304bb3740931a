"""Figures that others published stand in the report of their regimes alone."""

from __future__ import annotations

from typing import Any

import pytest

from shodh.evaluate.report import error_table

ERROR = {"model": 0.5, "persistence": 1.0}


@pytest.mark.parametrize(
    ("regimes", "published"), [(("taylor_green", "heat"), False), (("heat", "open_channel"), True)]
)
def test_published_errors_are_shown_where_there_are_some(regimes: tuple[str, ...], published: bool) -> None:
    metrics: dict[str, Any] = {"regimes": {name: {"latent_mse": ERROR, "decoded_mse": ERROR} for name in regimes}}
    table = error_table(metrics)
    assert ("published" in table.header) == published
    assert all(len(row) == len(table.header) for row in table.rows)
    if published:
        assert [row[-1] for row in table.rows] == [None, None, 2.46e-5, 2.48e-6]
