"""Fair timing of several ways to do one thing: in one process, in turns, so that a machine's drift meets all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count.

    Every other round goes through them backwards, so that none always follows the same neighbour.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants) if number % 2 else reversed(contestants):
            elapsed = seconds(contestants[name], device)
            if number > 0:
                times[name].append(elapsed)
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
