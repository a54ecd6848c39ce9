"""Timing: repetitions of all peers interleaved, medians with their spread, one CPU for all."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

from bench._report import Cell


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Keep this process, and what it starts, on one CPU: placement alone moves such ratios."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def interleaved(
    calls: Mapping[str, Callable[[], object]], times: int, rounds: int
) -> dict[str, list[float]]:
    """Return seconds per call, *rounds* figures of *times* calls each, by name.

    The peers take turns, so that whatever the machine is doing besides meets them all.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(max(1, times // 10)):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            gc.collect()
            gc.disable()
            started = time.perf_counter()
            for _ in range(times):
                call()
            figures[name].append((time.perf_counter() - started) / times)
            gc.enable()
    return figures


def against(figures: Mapping[str, list[float]], base: str) -> dict[str, Cell]:
    """Return a cell for each peer: its median, spread, and ratio to *base* in the same round."""
    cells = {}
    for name, seconds in figures.items():
        ratio = median(mine / theirs for mine, theirs in zip(seconds, figures[base], strict=True))
        spread = (max(seconds) - min(seconds)) / 2 / median(seconds)
        text = f"{median(seconds) * 1e6:.2f} us ±{spread:.0%} ({ratio:.2f} x)"
        cells[name] = Cell(text, {"median": median(seconds), "rounds": seconds, "ratio": ratio})
    return cells
