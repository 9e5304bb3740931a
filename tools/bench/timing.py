"""How contestants are timed: in turn, in one process, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Name, Times = TypeVar("Name"), TypeVar("Times")


def clock(device: torch.device) -> float:
    """Seconds of the clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(call: Callable[[], Any], device: torch.device, before: Callable[[], Any] = lambda: None) -> float:
    """Of one call, on a card by its own clock; ``before`` it, untimed, something else is done."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
    before()
    began = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - began
    del result
    return elapsed


def in_turns(calls: Mapping[Name, Callable[[], Times]], rounds: int, warm_up: int = 2) -> dict[Name, list[Times]]:
    """What each call returns, its seconds, in every round after some that warm up.

    Back and forth, so that a slow drift of the machine favours no end of the list.
    """
    times: dict[Name, list[Times]] = {name: [] for name in calls}
    for number in tqdm(range(-warm_up, rounds), desc="rounds", disable=not sys.stderr.isatty()):
        for name in list(calls) if number % 2 else reversed(list(calls)):
            taken = calls[name]()
            if number >= 0:
                times[name].append(taken)
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and the ends of the middle half."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of two contestants, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]
