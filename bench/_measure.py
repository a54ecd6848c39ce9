"""Timing: repetitions of all peers interleaved, medians with their spread, one CPU for all."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles

from bench._report import Cell


@contextlib.contextmanager
def one_cpu() -> Iterator[set[int]]:
    """Keep this process, and what it starts, on one CPU: placement alone moves such ratios.

    Yields the other CPUs, for load generators; the same one if there is no other.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # the first serves most interrupts
    try:
        yield before - {max(before)} or before
    finally:
        os.sched_setaffinity(0, before)


def interleaved(
    calls: Mapping[str, Callable[[], object]], times: int, rounds: int
) -> dict[str, list[float]]:
    """Return seconds per call, *rounds* figures of *times* calls each, by name.

    The peers take turns, many and short, so that other activity of the machine affects all of
    them; another peer begins each round.
    """
    turns = deque(calls.items())
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2 * times):
            call()
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        for name, call in turns:
            started = time.perf_counter()
            for _ in range(times):
                call()
            figures[name].append((time.perf_counter() - started) / times)
        gc.enable()
        turns.rotate()
    return figures


def against(figures: Mapping[str, list[float]], base: str) -> dict[str, Cell]:
    """Return a cell for each peer: its median, spread, and ratio to *base* in the same round."""
    cells = {}
    for name, seconds in figures.items():
        ratios = [
            value / base_value for value, base_value in zip(seconds, figures[base], strict=True)
        ]
        middle, ratio = median(seconds), median(ratios)
        text = (
            f"{middle * 1e6:.1f} us ±{spread(seconds) / middle:.0%}"
            f" ({ratio:.2f} x ±{spread(ratios):.2f})"
        )
        values = {"median": middle, "spread": spread(seconds), "ratio": ratio}
        cells[name] = Cell(text, {**values, "ratio_spread": spread(ratios), "rounds": len(seconds)})
    return cells


def spread(figures: Sequence[float]) -> float:
    """Return half the distance between the quartiles; 0 where there are too few."""
    if len(figures) < 3:
        return 0.0
    lower, _, upper = quantiles(figures, n=4)
    return (upper - lower) / 2
