"""One place says how many cards there are; ranks, jobs side by side and the demo go by it. No card is needed here."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shodh.core import devices
from shodh.core.errors import ConfigError
from shodh.train.runtime import start_distributed

ROOT = Path(__file__).resolve().parents[2]
PLACE = {"RANK": "15", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables, and a machine without cards."""
    for name in (*LAUNCHED, "DS_ACCELERATOR", "SHODH_CARDS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # So that whatever the code sets is gone after the test.
        monkeypatch.delenv(name)
    put_cards(monkeypatch, 0)
    return monkeypatch


def put_cards(monkeypatch: pytest.MonkeyPatch, cards: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)


@pytest.mark.parametrize(
    ("cards", "environment", "expected"),
    [
        (0, {}, 0),
        (3, {}, 3),
        (3, {"SHODH_CARDS": "1"}, 1),
        (0, {"SHODH_CARDS": "1"}, 1),
        (3, {"SHODH_CARDS": "0"}, 0),
        (3, {"DS_ACCELERATOR": "cpu"}, 0),
        (3, {"DS_ACCELERATOR": "cpu", "SHODH_CARDS": "1"}, 0),
    ],
)
def test_number_of_cards_and_of_ranks(
    machine: pytest.MonkeyPatch,
    cards: int,
    environment: dict[str, str],
    expected: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_cards(machine, cards)
    for name, value in environment.items():
        machine.setenv(name, value)
    assert devices.count_cards() == expected
    assert devices.main(["--ranks", "2"]) == 0
    assert capsys.readouterr().out == f"{min(2, expected or 2)}\n"


@pytest.mark.parametrize("value", ["", "-1", "one", "1.5"])
def test_number_of_cards_that_is_none(machine: pytest.MonkeyPatch, value: str) -> None:
    machine.setenv("SHODH_CARDS", value)
    with pytest.raises(ConfigError, match=f"SHODH_CARDS={value}: expected"):
        devices.count_cards()


@pytest.mark.parametrize(
    ("cards", "environment", "ranks"),
    [
        (1, {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", **PLACE}, 2),  # torchrun
        (2, {"LOCAL_SIZE": "4", "LOCAL_RANK": "1", **PLACE}, 4),  # deepspeed
        (1, {"LOCAL_RANK": "1", **PLACE}, 2),  # by hand: this rank has no card
    ],
)
def test_more_ranks_than_cards_are_refused_before_they_connect(
    machine: pytest.MonkeyPatch, cards: int, environment: dict[str, str], ranks: int
) -> None:
    put_cards(machine, cards)
    for name, value in environment.items():
        machine.setenv(name, value)
    with pytest.raises(devices.CardsError, match=f"^{ranks} ranks .* {cards} CUDA device.* --num_gpus {cards}"):
        start_distributed()
    assert not dist.is_initialized()
    machine.setenv("DS_ACCELERATOR", "cpu")
    devices.check_ranks()


@pytest.mark.parametrize(
    "environment", [{}, {"LOCAL_SIZE": "8", "LOCAL_RANK": "0", **PLACE}, {"LOCAL_RANK": "7", **PLACE}]
)
def test_ranks_that_have_a_card_each_may_start(machine: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        machine.setenv(name, value)
    devices.check_ranks()  # A CPU takes any number.
    put_cards(machine, 8)
    devices.check_ranks()


@pytest.mark.parametrize(
    ("cards", "visible", "expected"),
    [(0, "0,1", [None] * 3), (1, None, ["0", "0", "0"]), (2, None, ["0", "1", "0"]), (2, "5,3", ["5", "3", "5"])],
)
def test_jobs_get_cards_in_turn(
    machine: pytest.MonkeyPatch, cards: int, visible: str | None, expected: list[str | None]
) -> None:
    put_cards(machine, cards)
    if visible is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [devices.card_environment(place).get("CUDA_VISIBLE_DEVICES") for place in range(3)] == expected


def test_process_group_is_bound_to_its_card(machine: pytest.MonkeyPatch) -> None:
    """Also of a single rank, where DeepSpeed alone would leave NCCL to guess; with DeepSpeed's patience."""
    import deepspeed

    given: dict[str, Any] = {}
    put_cards(machine, 2)
    for name, number in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}.items():
        machine.setenv(name, number)
    machine.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    machine.setattr(dist, "init_process_group", lambda backend, **kwargs: given.update(backend=backend, **kwargs))
    machine.setattr(deepspeed, "init_distributed", lambda backend, **_: given.update(deepspeed=backend))
    device = start_distributed()
    assert device == given["device_id"] == given["current"] == torch.device("cuda", 1)
    assert given["backend"] == given["deepspeed"] == "nccl" and given["timeout"] == timedelta(minutes=10)


def test_error_with_a_process_group_ends_without_its_destructors(tmp_path: Path) -> None:
    """NCCL's would warn that the group was not destroyed, and could wait for ranks that are gone."""
    code = (
        "import atexit, sys\n"
        "import torch.distributed as dist\n"
        "from shodh.train.runtime import run_ranks\n"
        "atexit.register(lambda: print('the interpreter ended as usual'))\n"
        "def main():\n"
        f"    dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "    raise RuntimeError('a bug')\n"
        "run_ranks(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr
    assert done.stdout == ""
