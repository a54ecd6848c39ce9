"""Histograms and snapshots are exact and bounded, and merge in any order."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.metrics import (
    BOUNDS,
    BreakerSnapshot,
    Histogram,
    HistogramSnapshot,
    HolderSnapshot,
    Metrics,
    Snapshot,
)
from dbpool.report import merge, read_snapshot

DURATIONS = st.floats(0, 1e9)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    metrics = Metrics()
    for name in ("checkouts", "dead", "idle", "returned_late", "circuit_opened"):
        setattr(metrics, name, draw(st.integers(0, 1000)))
    for seconds in draw(st.lists(DURATIONS, max_size=5)):
        metrics.wait.add(seconds)
    active, idle, connecting = (draw(st.integers(0, 20)) for _ in range(3))
    return metrics.snapshot(
        draw(st.lists(DURATIONS, max_size=3)),
        state=draw(st.sampled_from(["starting", "up", "down", "stopped"])),
        size=active + idle + connecting,
        active=active,
        idle=idle,
        connecting=connecting,
        waiting=draw(st.integers(0, 9)),
        min_size=1,
        max_size=10,
        breaker=BreakerSnapshot(
            draw(st.sampled_from(["closed", "open", "half-open"])),
            draw(st.none() | st.just(1.5) | st.just(2.5)),
        ),
        holders=tuple(
            HolderSnapshot(thread, seconds, "a.py:1 f")
            for thread, seconds in draw(
                st.lists(st.tuples(st.sampled_from("abc"), DURATIONS), max_size=30)
            )
        ),
    )


def longest(snapshot: Snapshot) -> tuple[float, ...]:
    return tuple(sorted((holder.seconds for holder in snapshot.holders), reverse=True))[:20]


@given(snapshots(), snapshots(), snapshots())
def test_merging_is_associative(a: Snapshot, b: Snapshot, c: Snapshot) -> None:
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert longest(left) == longest(right)
    assert left == right


@given(snapshots(), snapshots())
def test_merging_is_commutative_and_adds_up(a: Snapshot, b: Snapshot) -> None:
    merged = merge(a, b)
    assert merged == merge(b, a)
    assert merged.active + merged.idle + merged.connecting == merged.size == a.size + b.size
    assert merged.counters.checkouts == a.counters.checkouts + b.counters.checkouts
    assert merged.wait.count == a.wait.count + b.wait.count


@given(snapshots())
def test_a_snapshot_survives_json(snapshot: Snapshot) -> None:
    data = json.loads(json.dumps(snapshot.to_json()))
    assert read_snapshot(data) == snapshot
    assert hash(read_snapshot(data)) == hash(snapshot)


@given(snapshots())
def test_merging_with_an_empty_snapshot_changes_nothing(snapshot: Snapshot) -> None:
    merged = merge(Snapshot(), snapshot)
    assert merged.wait == snapshot.wait
    assert merged.counters == snapshot.counters
    assert (merged.state, merged.size) == (snapshot.state, snapshot.size)


@given(st.lists(st.floats(1e-6, 1000.0), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_off_by_a_third_at_most(durations: list[float], q: float) -> None:
    histogram = Histogram()
    for seconds in durations:
        histogram.add(seconds)
    ranked = sorted(durations)
    index = max(0, min(len(ranked) - 1, int(q * len(ranked) + 0.9999999) - 1))
    found = histogram.snapshot().quantile(q)
    assert ranked[index] / 1.34 - 1e-6 <= found <= ranked[index] * 1.34 + 1e-6
    assert found <= max(durations)


@given(st.lists(DURATIONS, max_size=9), st.data())
def test_a_sum_does_not_fall_when_a_pending_wait_ends(
    waits: list[float], data: st.DataObject
) -> None:
    metrics = Metrics()
    before = metrics.snapshot(waits).wait
    metrics.finished = [(wait, 0.0, None, None, 0) for wait in data.draw(st.permutations(waits))]
    assert metrics.snapshot([]).wait == before
    assert before.sum == pytest.approx(sum(waits), rel=1e-12, abs=1e-8)


def test_bounds_are_logarithmic_from_a_microsecond_to_a_thousand_seconds() -> None:
    assert BOUNDS[0] == pytest.approx(1e-6)
    assert BOUNDS[-1] == pytest.approx(1e3)
    for lower, upper in pairwise(BOUNDS):
        assert upper / lower == pytest.approx(10 ** (1 / 8))


def test_durations_beyond_the_bounds_are_counted() -> None:
    histogram = Histogram()
    for seconds in (0.0, 1e-9, 1e6):
        histogram.add(seconds)
    snapshot = histogram.snapshot()
    assert snapshot.count == 3
    assert snapshot.quantile(1.0) == snapshot.max == 1e6


def test_an_empty_histogram_has_zero_quantiles() -> None:
    assert HistogramSnapshot().to_json() == {
        "count": 0, "sum": 0.0, "sum_ns": 0, "max": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0, "buckets": []
    }  # fmt: skip


def test_pending_waits_are_counted_only_in_a_snapshot() -> None:
    metrics = Metrics()
    snapshot = metrics.snapshot([0.5, 0.25], state="up")
    assert snapshot.counters.checkouts == snapshot.wait.count == 2
    assert snapshot.wait.max == 0.5
    assert metrics.snapshot([], state="up").wait.count == 0


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"state": "up"},
        Snapshot(state="up").to_json() | {"state": "dancing"},
        Snapshot(state="up").to_json() | {"wait": {"buckets": [1] * 999, "sum_ns": 0, "max": 0}},
    ],
)
def test_a_malformed_snapshot_is_a_value_error(data: object) -> None:
    with pytest.raises(ValueError):
        read_snapshot(data)  # type: ignore[arg-type]


def test_a_pools_metrics_are_small() -> None:
    metrics = Metrics()
    for n in range(100_000):
        metrics.wait.add(n / 1000)
    metrics.finished = [(n / 1000, n / 100, None, None, 0) for n in range(Metrics.BATCH)]
    rows = [metrics.finished, *metrics.finished]
    rows += [h.counts for h in (metrics.wait, metrics.use, metrics.connect)]
    numbers = {id(each): each for row in rows[1:] for each in row}  # count each object once
    size = sum(map(sys.getsizeof, [*rows, *numbers.values()]))
    assert size < 16 * 1024
