"""Fifteen minutes of history: merged steps, clock jumps, damaged rows, and bounded sizes."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool.diagnosis._rows import HEADER, LARGEST, ROW, Layout, decode, encode, header, known_names
from dbpool.diagnosis.history import (
    BOUNDS,
    NUMBERS,
    STEP,
    STEPS,
    TIMES,
    Buckets,
    History,
    Recorder,
    Step,
    merged,
    slot_of,
)
from dbpool.diagnosis.journal import LINES, Journal, Line, Reporter
from dbpool.metrics import Metrics, Snapshot

NOW = 5000.0


class Pool:
    """Stands in for a pool; the tests change its numbers."""

    def __init__(self) -> None:
        self.metrics = Metrics()

    def use(self, number: int, wait: float = 0.001, use: float = 0.02) -> None:
        for _ in range(number):
            self.metrics.checkouts += 1
            self.metrics.wait.add(wait)
            self.metrics.use.add(use)

    def stats(self, **sizes: int) -> Snapshot:
        return self.metrics.snapshot([], state="up", **sizes)


# Steps of a pool


def test_a_step_holds_what_happened_in_its_five_seconds() -> None:
    pool, recorder = Pool(), Recorder(started=NOW - 500)
    pool.use(7)
    assert recorder.sample(pool.stats(active=2, size=4), NOW) is None
    pool.use(3, wait=0.5)
    pool.metrics.timeouts += 2
    pool.metrics.rejected += 1
    pool.metrics.connects += 4
    pool.metrics.leaks += 1
    assert recorder.sample(pool.stats(active=4, size=4, waiting=5), NOW + 2) is None
    finished = recorder.sample(pool.stats(), NOW + STEP)
    assert finished is not None
    slot, step = finished
    assert slot == slot_of(NOW)
    assert (step.in_use, step.size, step.waiting) == (3.0, 4.0, 5)
    assert (step.checkouts, step.refused, step.connects, step.forgotten) == (3, 3, 4, 1)
    assert (step.settled_checkouts, step.settled_connects) == (3, 4)
    assert step.wait.count == 3
    assert step.wait.mean == pytest.approx(0.5)
    assert step.use.seconds == pytest.approx(0.06)


def test_the_first_connects_of_a_new_worker_are_not_counted_as_churn() -> None:
    pool, recorder = Pool(), Recorder(started=NOW - 10)
    recorder.sample(pool.stats(), NOW)
    pool.metrics.connects += 4
    finished = recorder.sample(pool.stats(), NOW + STEP)
    assert finished is not None
    assert (finished[1].connects, finished[1].settled_connects) == (4, 0)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 2 * STEP, -3 * STEP])
def test_a_clock_jump_leaves_a_gap_and_invents_no_counts(jump: float) -> None:
    pool, recorder, history = Pool(), Recorder(), History()
    for second in range(20):
        pool.use(1)
        if finished := recorder.sample(pool.stats(), NOW + second):
            history.add(*finished)
    assert sum(step.checkouts for step in history.steps.values()) == 15
    pool.use(1000)  # during the jump
    for second in range(20):
        pool.use(1)
        if finished := recorder.sample(pool.stats(), NOW + 20 + jump + second):
            history.add(*finished)
    assert sum(step.checkouts for step in history.steps.values()) <= 15 + 20
    assert len(history.steps) <= STEPS


def test_counters_that_restart_count_from_zero() -> None:
    pool, recorder = Pool(), Recorder()
    pool.use(100)
    recorder.sample(pool.stats(), NOW)
    other = Pool()
    other.use(3)
    finished = recorder.sample(other.stats(), NOW + STEP)
    assert finished is not None
    assert (finished[1].checkouts, finished[1].use.count) == (3, 3)


# Merging

SMALL = st.integers(0, 1000)
BUCKETS = st.builds(
    Buckets,
    st.lists(SMALL, min_size=12, max_size=12).map(tuple),
    st.integers(0, 1000).map(float),  # sums of whole numbers do not depend on their order
)
STEP_ST = st.builds(Step, **dict.fromkeys(NUMBERS, SMALL), **dict.fromkeys(TIMES, BUCKETS))
HISTORIES = st.dictionaries(st.integers(800, 1000), STEP_ST, max_size=5).map(History)


@given(HISTORIES, HISTORIES, HISTORIES)
def test_histories_merge_in_any_order(a: History, b: History, c: History) -> None:
    assert a.merge(b, c) == a.merge(b).merge(c) == c.merge(a.merge(b)) == b.merge(c, a)


@given(st.lists(HISTORIES, min_size=1, max_size=4))
def test_a_merged_step_is_the_sum_of_its_processes(histories: list[History]) -> None:
    total = merged({"default": each} for each in histories)["default"]
    for slot in range(800, 1001):
        parts = [each.steps[slot] for each in histories if slot in each.steps]
        assert (slot in total.steps) == bool(parts)
        if parts:
            assert total.steps[slot].checkouts == sum(part.checkouts for part in parts)
            assert total.steps[slot].wait.count == sum(part.wait.count for part in parts)


def test_percentiles_of_many_processes_are_those_of_all_their_durations() -> None:
    quick, slow = Pool(), Pool()
    quick.use(99, wait=0.0005)
    slow.use(1, wait=5.0)
    empty_buckets = Pool().stats().wait
    both = Buckets.between(empty_buckets, quick.stats().wait).merge(
        Buckets.between(empty_buckets, slow.stats().wait)
    )
    median, last = both.quantile(0.5), both.quantile(0.999)
    assert median is not None
    assert last is not None
    assert median < 0.001
    assert last > 3.0
    assert Buckets().quantile(0.95) is None


@given(st.lists(st.floats(1e-5, 50), min_size=1, max_size=50))
def test_a_quantile_is_in_the_bucket_of_the_duration(durations: list[float]) -> None:
    pool = Pool()
    for each in durations:
        pool.use(1, wait=each)
    found = Buckets.between(Pool().stats().wait, pool.stats().wait).quantile(0.95)
    exact = sorted(durations)[-(-95 * len(durations) // 100) - 1]
    edges = [0.0, *BOUNDS, 100.0]
    assert found is not None
    lower, upper = next((a, b) for a, b in pairwise(edges) if a < exact <= b)
    assert lower * 0.999 <= found <= upper * 1.001


# Bounds


@cache
def full_history() -> History:
    chance = random.Random(7)
    history = History()
    for slot in range(slot_of(NOW) - 400, slot_of(NOW)):
        counts = tuple(chance.randrange(5000) for _ in range(12))
        buckets = Buckets(counts, chance.random() * 100)
        numbers = {name: chance.randrange(60_000) for name in NUMBERS}
        history.add(slot, Step(**numbers, wait=buckets, use=buckets, connect=buckets))
    return history


def test_a_history_keeps_a_quarter_of_an_hour() -> None:
    history = full_history()
    assert len(history.steps) == STEPS == 900 / STEP
    assert None not in history.last(NOW)
    assert len(history.last(NOW, 12)) == 12
    assert history.last(NOW + 60)[-12:] == [None] * 12


def test_its_series_are_of_one_length_and_small() -> None:
    series = full_history().to_json(NOW)
    assert {len(values) for values in series.values()} == {STEPS}
    assert len(json.dumps(series, separators=(",", ":"))) < 12 * 1024
    empty = History().to_json(NOW)
    assert all(values == [None] * STEPS for values in empty.values())


@pytest.mark.parametrize("pools", [1, 2, 3, 16])
def test_a_files_size_is_bounded_for_any_number_of_pools(pools: int) -> None:
    assert Layout(pools, STEPS).size <= LARGEST < 64 * 1024
    assert Layout(2, STEPS).ring == STEPS
    assert ROW * pools / STEP < 1024  # bytes a second


# Rows


def file_of(history: History, names: tuple[str, ...] = ("default",)) -> bytes:
    """A file in which each pool has this history."""
    layout = Layout(len(names), STEPS)
    data = bytearray(layout.size)
    data[:HEADER] = header(names, STEPS, pid=7)
    for n in range(len(names)):
        for slot, step in history.steps.items():
            at = layout.place(n, slot)
            data[at : at + ROW] = encode(slot, step)
    return bytes(data)


def test_the_number_and_length_of_names_are_bounded() -> None:
    names = known_names([f"{'x' * 30}{n}" * 3 for n in range(100)])
    assert len(names) <= 16
    assert len(header(names, STEPS)) == HEADER
    assert decode(header(names, STEPS))[0]["pools"] == names


def test_a_file_is_read_as_it_was_written() -> None:
    history = full_history()
    known, pools = decode(file_of(history, ("default", "replica")))
    assert known == {"pools": ["default", "replica"], "rows": STEPS, "pid": 7}
    for name in ("default", "replica"):
        assert pools[name].steps.keys() == history.steps.keys()
        for slot, step in history.steps.items():
            read = pools[name].steps[slot]
            assert [getattr(read, n) for n in NUMBERS] == [getattr(step, n) for n in NUMBERS]
            assert read.wait.counts == step.wait.counts
            assert read.wait.seconds == pytest.approx(step.wait.seconds, rel=1e-6)


def test_counts_too_large_for_a_row_keep_their_percentiles() -> None:
    counts = (5_000_000, 0, 100_000, *[0] * 9)
    row = History({1000: Step(wait=Buckets(counts, 1e12), retries=10**9, checkouts=10**12)})
    step = decode(file_of(row))[1]["default"].steps[1000]
    assert step.wait.quantile(0.95) == pytest.approx(Buckets(counts).quantile(0.95) or 0, rel=0.01)
    assert (step.retries, step.checkouts) == (2**16 - 1, 2**32 - 1)


@given(st.data())
def test_damaged_rows_are_gaps_and_break_nothing(data: st.DataObject) -> None:
    history = full_history()
    content = file_of(history)
    at = data.draw(st.integers(HEADER, len(content) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=300))
    damaged = (content[:at] + noise + content[at + len(noise) :])[: len(content)]
    found = decode(damaged)[1]["default"].steps
    damaged_rows = {(at - HEADER) // ROW, (min(at + len(noise), len(content)) - 1 - HEADER) // ROW}
    intact = {slot: step for slot, step in found.items() if (slot % STEPS) not in damaged_rows}
    assert len(intact) >= STEPS - 2 - len(noise) // ROW
    for slot, step in intact.items():
        assert step.checkouts == history.steps[slot].checkouts
    cut = data.draw(st.integers(HEADER, len(content)))
    assert decode(content[:cut])[1]["default"].steps.keys() <= history.steps.keys()


@given(st.binary(max_size=2000))
def test_malformed_histories_are_rejected(data: bytes) -> None:
    with pytest.raises(ValueError, match="history"):
        decode(data)


def test_steps_before_the_systems_start_are_left_out() -> None:
    history = full_history()
    assert history.around(NOW) == history
    assert history.around(60.0) == History()
    assert history.around(NOW + 895) == History(dict([max(history.steps.items())]))


# The journal


def state(**changes: object) -> dict[str, object]:
    breaker = {"state": "closed", "since": None, "last_error": None}
    counters = {"leaks": 0, "circuit_opened": 0}
    known = {"state": "up", "active": 1, "max_size": 4, "waiting": 0}
    return {**known, "breaker": breaker, "counters": counters, **changes}


def report(pool: dict[str, object], workers: dict[int, float] | None = None) -> dict[str, object]:
    processes = [{"pid": p, "uptime": up, "age": 0.1} for p, up in (workers or {}).items()]
    return {"pools": {"default": pool}, "processes": processes}


def test_an_outage_is_two_lines_with_cause_and_duration() -> None:
    reporter, lines = Reporter(), []
    down = state(
        state="down", breaker={"state": "open", "since": 98.0, "last_error": "connection refused"}
    )
    for second, pool in enumerate([state(), down, down, down, state(), state()]):
        lines += reporter.look(report(pool), 100.0 + second)
    assert [(line.event, line.text) for line in lines] == [
        ("down", "down: connection refused"),
        ("back", "back after 6.0 s"),
    ]


def test_full_leaked_resized_and_a_short_outage_are_lines() -> None:
    reporter = Reporter()
    reporter.look(report(state()), 100.0)
    full = state(active=4, waiting=3)
    assert [line.event for line in reporter.look(report(full), 101.0)] == ["full"]
    assert reporter.look(report(full), 102.0) == []
    later = state(counters={"leaks": 2, "circuit_opened": 1}, max_size=8)
    lines = reporter.look(report(later), 103.0)
    assert {line.event: line.text for line in lines} == {
        "back": "down and back between two looks",
        "relieved": "nobody waits any more, after 2.0 s",
        "forgotten": "2 connections forgotten by the application",
        "resized": "max_size of all workers went from 4 to 8",
    }


def test_workers_that_start_and_end_are_lines() -> None:
    reporter = Reporter()
    assert reporter.look(report(state(), {1: 50.0, 2: 50.0}), 100.0) == []
    assert reporter.look(report(state(), {1: 51.0, 2: 51.0}), 101.0) == []
    lines = reporter.look(report(state(), {1: 0.5, 3: 0.5}), 102.0)
    assert sorted(line.text for line in lines) == [
        "worker 1 started", "worker 2 ended", "worker 3 started",
    ]  # fmt: skip


def test_a_journal_keeps_a_hundred_lines_and_merges_in_any_order() -> None:
    lines = [Line(float(n), "default", "down", f"n{n}") for n in range(250)]
    evens, odds = Journal(lines[::2]), Journal(lines[1::2])
    both = evens.merge(odds, evens)
    assert both.lines == odds.merge(evens).lines
    assert len(both.lines) == LINES
    assert both.to_json()[0] == {
        "time": 249.0, "pool": "default", "event": "down", "text": "n249",
    }  # fmt: skip
    assert Journal.from_json(both.to_json()).lines == both.lines


def test_lines_are_short_printable_and_without_secrets() -> None:
    reporter = Reporter()
    reporter.look(report(state()), 100.0)
    error = "postgresql://me:hunter22@db\x1b[1m " + "x" * 500
    down = state(state="down", breaker={"state": "open", "since": 1.0, "last_error": error})
    (line,) = reporter.look(report(down), 101.0)
    assert "hunter22" not in line.text
    assert line.text.isprintable()
    assert len(line.text) <= 120
    many = Journal(Line(1e9 + n, "default", "down", line.text) for n in range(200))
    assert len(json.dumps(many.to_json())) < 24 * 1024


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.floats(),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x)))  # fmt: skip
def test_a_malformed_journal_breaks_nothing(data: object) -> None:
    json.dumps(Journal.from_json(data).to_json())
    Reporter().look({"pools": data, "processes": data}, 1.0)


def test_the_last_minute_has_its_own_percentiles() -> None:
    minute = full_history().minute(NOW)
    assert minute.keys() == {"wait", "use", "connect"}
    for times in minute.values():
        low, middle, high = (times[f"p{q}"] or 0.0 for q in (50, 95, 99))
        assert times["count"]
        assert 0.0 < low <= middle <= high
    empty_buckets = {"count": 0, "p50": None, "p95": None, "p99": None}
    assert full_history().minute(NOW + 65)["use"] == empty_buckets, "older durations were counted"
