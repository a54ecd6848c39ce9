"""Pool sizes: the arithmetic of limits, and the queueing model against a simulation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from heapq import heapify, heapreplace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.metrics import BreakerSnapshot, Histogram, Metrics, Snapshot
from dbpool.sizing import TARGET, Demand, Limit, Load, Verdict, connections_needed, measure
from dbpool.sizing._queueing import erlang_c

ARRIVALS = 60_000

small = st.integers(1, 40)
loads = st.builds(
    Load, rate=st.floats(0.1, 2000), hold=st.floats(1e-4, 0.5), variation=st.floats(0, 20)
).filter(lambda load: load.busy < 200)


# The arithmetic


def verdict(capacity: int, *demands: Demand, reserved: int = 0, others: int = 0) -> Verdict:
    limit = Limit("it", "max_connections", capacity, reserved, others)
    return Verdict(limit, demands)


def demand(processes: int, max_size: int, name: str = "default", monitors: int = 0) -> Demand:
    return Demand(name, processes, max_size, f"SIZE_OF_{name}", monitors=monitors)


@given(
    processes=small,
    max_size=small,
    monitors=st.integers(0, 3),
    most=st.integers(0, 4000),
    others=st.integers(0, 200),
)
def test_a_size_that_fits_leaves_room_for_a_deploy(
    processes: int, max_size: int, monitors: int, most: int, others: int
) -> None:
    wanted = demand(processes, max_size, monitors=monitors)
    found = verdict(most, wanted, reserved=3, others=others)
    assert found.fits == (2 * (processes * max_size + monitors) + others + 3 <= most)
    assert bool(found.advice) == (not found.fits)


@given(
    processes=small,
    max_size=small,
    monitors=st.integers(0, 3),
    most=st.integers(1, 4000),
    others=st.integers(0, 200),
)
def test_the_advised_size_is_the_largest_that_fits(
    processes: int, max_size: int, monitors: int, most: int, others: int
) -> None:
    def of_size(size: int, most: int = most) -> Verdict:
        return verdict(most, demand(processes, size, monitors=monitors), others=others)

    found = of_size(max_size)
    if found.advice.startswith("set "):
        advised = int(found.advice.split(" to ")[1].split(",")[0])
        assert advised < max_size
        assert of_size(advised).fits
        assert not of_size(advised + 1).fits
    raised = found.advice.rpartition("max_connections to ")[2].split(",")[0]
    if raised:
        assert of_size(max_size, int(raised)).fits
        assert not of_size(max_size, int(raised) - 1).fits


def test_a_warning_names_the_numbers_and_the_settings() -> None:
    found = verdict(100, demand(4, 10), demand(4, 5, "replica"), reserved=3, others=12)
    assert found.warning == (
        "more connections are configured than fit during a deploy: it allows 85 connections (100,"
        " minus 3 reserved and 12 in use by others); the pools may open 4 x 10 (default) + 4 x 5"
        " (replica) = 60, or 120 during a deploy. To fix it, set SIZE_OF_default and"
        " SIZE_OF_replica to 5, or raise max_connections to 135"
    )
    assert "than fit:" in verdict(50, demand(4, 20)).warning


def test_if_no_size_fits_fewer_processes_are_advised() -> None:
    assert verdict(10, demand(8, 4)).advice.startswith("run fewer processes")


# The queue


def test_erlang_c_has_the_values_of_textbooks() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.409, abs=0.001)
    assert erlang_c(5, 5.0) == 1.0


@given(load=loads, threads=st.integers(1, 64))
def test_more_load_never_needs_fewer_and_threads_bound_the_size(load: Load, threads: int) -> None:
    open_loop = connections_needed(load)
    assert open_loop >= load.busy
    assert connections_needed(load, times=2.0) >= open_loop
    assert connections_needed(load, threads) <= threads
    assert connections_needed(load, threads) <= connections_needed(load, threads, times=2.0)


@given(load=loads)
def test_a_longer_allowed_wait_never_needs_more(load: Load) -> None:
    assert connections_needed(load, target=0.05) <= connections_needed(load, target=0.005)


def test_threads_that_never_pause_need_one_connection_each() -> None:
    """A pool of two is always full; the waits show that more threads want connections."""
    assert connections_needed(Load(rate=20, hold=0.1, wait=0.7), threads=16) == 16


Draw = Callable[[random.Random], float]

# Mean and distribution of hold times, arrivals per second: from light to nine busy connections.
LOADS: dict[str, tuple[Draw, float]] = {
    "exponential": (lambda r: r.expovariate(100), 300.0),
    "constant": (lambda r: 0.02, 200.0),
    "short and frequent": (lambda r: r.expovariate(500), 1500.0),
    "nine quick, one slow": (lambda r: 0.05 if r.random() < 0.1 else 0.002, 250.0),
    "long": (lambda r: r.lognormvariate(-2.2, 0.8), 60.0),
}


def open_queue(draw: Draw, rate: float, size: int) -> tuple[float, Histogram]:
    """Simulate Poisson arrivals at *size* connections; return p95 of the wait, and hold times."""
    rng, now = random.Random(1), 0.0
    free = [0.0] * size
    heapify(free)
    waits, holds = [], Histogram()
    for _ in range(ARRIVALS):
        now += rng.expovariate(rate)
        started = max(now, free[0])
        hold = draw(rng)
        heapreplace(free, started + hold)
        waits.append(started - now)
        holds.add(hold)
    return sorted(waits)[int(0.95 * ARRIVALS)], holds


def closed_queue(draw: Draw, think: float, size: int, threads: int) -> tuple[float, Load]:
    """Simulate threads that pause and ask again; return p95 of the wait, and the load."""
    rng = random.Random(2)
    next_requests = [rng.expovariate(1 / think) for _ in range(threads)]
    heapify(next_requests)
    free = [0.0] * size
    heapify(free)
    waits, holds, now = [], Histogram(), 0.0
    for _ in range(ARRIVALS):
        now = next_requests[0]
        started = max(now, free[0])
        hold = draw(rng)
        heapreplace(free, started + hold)
        heapreplace(next_requests, started + hold + rng.expovariate(1 / think))
        waits.append(started - now)
        holds.add(hold)
    load = Load(ARRIVALS / now, holds.sum_ns / 1e9 / ARRIVALS, 1.0, sum(waits) / ARRIVALS)
    return sorted(waits)[int(0.95 * ARRIVALS)], load


def knee(p95: Callable[[int], float], start: int = 1) -> int:
    """Return the smallest size at which the 95th percentile of waits is below the target."""
    size = start
    while p95(size) >= TARGET:
        size += 1
    return size


@pytest.mark.parametrize("name", LOADS)
def test_the_advised_size_is_within_one_of_the_simulations_knee(name: str) -> None:
    draw, rate = LOADS[name]
    _, holds = open_queue(draw, rate, 64)
    report = reported(holds, seconds=ARRIVALS / rate)
    found = measure(empty(), report, "default")
    assert found.load is not None
    expected = knee(lambda size: open_queue(draw, rate, size)[0], start=int(found.load.busy) + 1)
    assert abs((found.needs() or 0) - expected) <= 1


@pytest.mark.parametrize(("think", "threads"), [(0.04, 16), (0.01, 16), (0.1, 40), (0.005, 8)])
@pytest.mark.parametrize("size", [3, 64])
def test_with_threads_the_advised_size_is_within_one_of_the_knee(
    think: float, threads: int, size: int
) -> None:
    """Also with figures of a pool that is much too small, for which the open queue is wrong."""

    def draw(rng: random.Random) -> float:
        return rng.expovariate(100)

    _, load = closed_queue(draw, think, size, threads)
    expected = knee(lambda size: closed_queue(draw, think, size, threads)[0])
    assert abs(connections_needed(load, threads) - expected) <= 1


# The load between two reports


def empty() -> dict[str, Any]:
    return reported(Histogram(), seconds=0.0)


def reported(use: Histogram, seconds: float, processes: int = 1, **changes: Any) -> dict[str, Any]:
    snapshot = Snapshot(
        state="up", max_size=10 * processes, use=use.snapshot(), wait=Metrics().wait.snapshot()
    ).to_json()
    pids = [{"pid": pid, "age": 0.5, "uptime": seconds} for pid in range(processes)]
    return {
        "time": 1000.0 + seconds,
        "processes": pids,
        "pools": {"default": snapshot | changes},
    }


def used(times: int, hold: float = 0.01) -> Histogram:
    histogram = Histogram()
    for _ in range(times):
        histogram.add(hold)
    return histogram


def test_a_pool_with_waiting_callers_is_never_large_enough() -> None:
    """Two connections are always in use, so the real demand is unknown."""
    busy = reported(used(2000), 10.0)
    busy["pools"]["default"] |= {
        "max_size": 2,
        "wait": used(2000, hold=0.07).snapshot().to_json(),
    }
    found = measure(empty(), busy, "default")
    assert found.is_too_small
    assert found.needs() == found.max_size + 1 or (found.needs() or 0) > found.max_size
    idle = reported(used(200_000, hold=1e-5), 10.0)
    idle["pools"]["default"] |= {"max_size": 6, "wait": used(2000, hold=0.07).snapshot().to_json()}
    assert measure(empty(), idle, "default").needs() == 7
    assert measure(empty(), idle, "default").needs(threads=4) == 1


def test_a_very_large_number_of_threads_is_no_problem() -> None:
    load = Load(rate=3000, hold=0.5)
    assert 1500 < connections_needed(load) < 1700
    assert 1500 < connections_needed(load, threads=10_000) < 1700


def test_a_load_is_the_share_of_one_process() -> None:
    found = measure(empty(), reported(used(6000), 10.0, processes=3), "default")
    assert found.load is not None
    assert found.load.rate == pytest.approx(200)
    assert found.load.busy == pytest.approx(2.0)
    assert found.load.variation < 0.1
    assert (found.processes, found.max_size) == (3, 10)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (reported(used(999), 10.0), "999 of 1000 needed checkouts in 10 s"),
        (reported(used(5000), 10.0, state="down"), "the pool is down"),
        (
            reported(
                used(5000),
                10.0,
                breaker=asdict(BreakerSnapshot("open", since=1.0)),
            ),
            "its breaker is open",
        ),
        ({**reported(used(5000), 10.0), "pools": {}}, "the pool is not running"),
        (
            reported(used(5000), 10.0)
            | {
                "findings": [
                    {"pool": "default", "severity": "critical", "code": "DB04", "text": "a lock"}
                ]
            },
            "DB04 was found: a lock",
        ),
    ],
)
def test_without_enough_data_no_size_is_advised(report: dict[str, Any], reason: str) -> None:
    found = measure(empty(), report, "default")
    assert found.needs() is found.needs(16) is None
    assert str(found.reason).startswith(f"not enough data: {reason}")


def test_a_notice_or_another_pools_finding_is_no_reason() -> None:
    others = [
        {"pool": "default", "severity": "notice", "code": "DB12", "text": "stalled"},
        {"pool": "default", "severity": "warning", "code": "DB11", "text": "60 are configured"},
        {"pool": "replica", "severity": "critical", "code": "DB01", "text": "down"},
    ]
    report = reported(used(5000), 10.0) | {"findings": others}
    assert measure(empty(), report, "default").needs() is not None


def test_counters_that_fell_give_no_load() -> None:
    found = measure(reported(used(5000), 0.0), reported(used(2000), 10.0), "default")
    assert found.reason == "not enough data: its counters were reset in that time"
