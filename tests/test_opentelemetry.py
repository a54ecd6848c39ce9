"""Metrics and spans for OpenTelemetry: exact numbers, causes, and no cost without a provider."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool import DatabaseUnavailable, Pool, PoolExhausted
from dbpool.metrics import BOUNDS, Histogram
from tests.fake import FakeServer
from tests.pools import MakePool
from tests.scripts import python
from tests.test_hot_path import calls_of, check_out
from tests.threads import Task, run_in_threads
from tests.waiting import until

pytest.importorskip("opentelemetry.sdk")
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import Histogram as SDKHistogram
from opentelemetry.sdk.metrics import MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import db_attributes
from opentelemetry.semconv._incubating.metrics import db_metrics

from dbpool.opentelemetry import instrument, uninstrument
from dbpool.opentelemetry._meter import BOUNDARIES, gained

POOL_NAME = "db.client.connection.pool.name"
Points = dict[tuple[str, ...], Any]


class Telemetry:
    """Providers that keep all metrics and spans in memory."""

    def __init__(self, **options: Any) -> None:
        self.readers = [InMemoryMetricReader(**options), InMemoryMetricReader(**options)]
        self.meters = MeterProvider(self.readers, shutdown_on_exit=False)
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))

    def instrument(self, pools: Any) -> None:
        instrument(pools, self.meters, self.tracers)

    def metrics(self, reader: int = 0) -> dict[str, Any]:
        """Collect: the metrics by name."""
        data = self.readers[reader].get_metrics_data()
        found: dict[str, Any] = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                found |= {metric.name: metric for metric in scope.metrics}
        return found

    def points(self, name: str, reader: int = 0) -> Points:
        """Collect: the points of one metric by the values of their attributes."""
        metric = self.metrics(reader).get(f"db.client.connection.{name}")
        found = metric.data.data_points if metric else ()
        return {tuple(str(v) for v in point.attributes.values()): point for point in found}

    def value(self, name: str, *key: str) -> Any:
        return self.points(name)[key or ("default",)].value

    def count(self, name: str, pool: str = "default") -> int:
        found = self.points(name).get((pool,))
        return found.count if found else 0

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    uninstrument()  # ends the thread at once
    telemetry.meters.shutdown()
    telemetry.tracers.shutdown()


def use(pool: Pool[Any], number: int) -> None:
    for _ in range(number):
        with pool.connection():
            pass


def refused(pool: Pool[Any], timeout: float = 0.05) -> BaseException:
    return Task(pool.getconn, timeout).error()


# What is recorded


durations = st.lists(st.floats(0.0, 5000.0, allow_subnormal=False) | st.sampled_from(BOUNDS))


@given(durations, durations)
def test_buckets_count_and_sum_of_the_increase_are_exact(
    before: list[float], after: list[float]
) -> None:
    histogram = Histogram()
    for seconds in before:
        histogram.add(seconds)
    old = histogram.snapshot()
    for seconds in after:
        histogram.add(seconds)
    found = [value for value, number in gained(old, histogram.snapshot()) for _ in range(number)]
    buckets = [bisect_left(BOUNDS, value) for value in found]
    assert sorted(buckets) == sorted(bisect_left(BOUNDS, value) for value in after)
    # The pool counts whole nanoseconds.
    assert sum(found) == pytest.approx(sum(after), rel=1e-9, abs=1e-9 * (len(after) + 1))
    assert max(found, default=0.0) <= histogram.max


def test_a_single_duration_is_recorded_exactly() -> None:
    histogram = Histogram()
    histogram.add(0.001234567)
    assert [*gained(Histogram().snapshot(), histogram.snapshot())] == [(0.001234567, 1)]


def test_the_instruments_are_those_of_the_conventions(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    conventions = {
        value
        for name, value in vars(db_metrics).items()
        if name.startswith("DB_CLIENT_CONNECTION_") and isinstance(value, str)
    }
    with fake.pool() as pool:
        telemetry.instrument(pool)
        use(pool, 1)
        found = telemetry.metrics()
        assert found.keys() == conventions
        units = {
            name.removeprefix("db.client.connection."): each.unit for name, each in found.items()
        }
        assert units == {
            "count": "{connection}", "max": "{connection}", "idle.max": "{connection}",
            "idle.min": "{connection}", "pending_requests": "{request}", "timeouts": "{timeout}",
            "wait_time": "s", "use_time": "s", "create_time": "s",
        }  # fmt: skip
        kinds = {name: type(each.data).__name__ for name, each in found.items()}
        assert {name for name, kind in kinds.items() if kind == "Histogram"} == {
            name for name in conventions if name.endswith("_time")
        }
        monotonic = {name for name, each in found.items() if getattr(each.data, "is_monotonic", 0)}
        assert monotonic == {"db.client.connection.timeouts"}
        names = {
            key for each in found.values() for p in each.data.data_points for key in p.attributes
        }
        assert names == {
            db_attributes.DB_CLIENT_CONNECTION_POOL_NAME,
            db_attributes.DB_CLIENT_CONNECTION_STATE,
        }
        assert telemetry.points("wait_time")["default",].explicit_bounds == BOUNDARIES


def test_sizes_are_the_pools_sizes(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool(min_size=1, max_size=2, name="orders") as pool:
        telemetry.instrument(pool)
        with pool.connection():
            with pool.connection():
                waiter = Task(pool.getconn, 10.0)
                until(lambda: pool.stats().waiting == 1)
                assert telemetry.value("count", "orders", "used") == 2
                assert telemetry.value("pending_requests", "orders") == 1
                assert telemetry.value("max", "orders") == 2
            pool.putconn(waiter.result())
            assert telemetry.value("count", "orders", "used") == 1
            assert telemetry.value("count", "orders", "idle") == 1
        pool.resize(3, 7)
        assert telemetry.value("max", "orders") == telemetry.value("idle.max", "orders") == 7
        assert telemetry.value("idle.min", "orders") == 3
    assert telemetry.value("count", "orders", "used") == 0
    assert telemetry.value("max", "orders") == 0, "a closed pool has no room"


def test_timeouts_are_counted(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        telemetry.instrument(pool)
        with pool.connection():
            assert isinstance(refused(pool), PoolExhausted)
            assert isinstance(refused(pool), PoolExhausted)
        assert telemetry.value("timeouts") == 2


@pytest.mark.parametrize(
    "temporality", [AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA]
)
def test_concurrent_collections_neither_lose_nor_double_checkouts(
    fake: FakeServer, temporality: AggregationTemporality
) -> None:
    preferred = {SDKHistogram: temporality, ObservableCounter: temporality}
    telemetry = Telemetry(preferred_temporality=preferred)
    found = [0, 0]

    def collect(reader: int) -> None:
        for point in telemetry.points("use_time", reader).values():
            is_delta = temporality == AggregationTemporality.DELTA
            found[reader] = point.count + is_delta * found[reader]

    with fake.pool(max_size=4) as pool:
        telemetry.instrument(pool)
        workers = [Task(use, pool, 2000) for _ in range(4)]
        while any(worker.is_running for worker in workers):
            collect(0)
            collect(1)
        for worker in workers:
            worker.result()
        collect(0)
        collect(1)
        assert found == [8000, 8000] == [pool.stats().counters.checkouts] * 2
    uninstrument()
    telemetry.meters.shutdown()


def test_buckets_and_sums_are_the_pools(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool(max_size=4) as pool:
        telemetry.instrument(pool)
        for _ in range(5):
            run_in_threads(4, use, pool, 50)
            telemetry.metrics()
        now = pool.stats()
        for name, field in (("wait_time", now.wait), ("use_time", now.use)):
            point = telemetry.points(name)["default",]
            own = [sum(field.counts[max(0, n - 3) : n + 1]) for n in range(0, len(BOUNDS), 4)]
            assert point.bucket_counts == (*own, field.counts[-1])
            assert point.sum == pytest.approx(field.sum)
            assert point.max <= field.max


def test_checkouts_before_instrumenting_are_counted(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool() as pool:
        use(pool, 3)
        telemetry.instrument(pool)
        assert telemetry.count("use_time") == 3


def test_an_instrumented_checkout_makes_no_more_calls(dsn: str, telemetry: Telemetry) -> None:
    with Pool(dsn, min_size=2, max_size=2) as pool:
        pool.wait()
        check_out(pool)
        before = calls_of(lambda: check_out(pool))
        telemetry.instrument(pool)
        telemetry.metrics()
        assert calls_of(lambda: check_out(pool)) == before
        uninstrument(pool)


# Which pools


def test_instrumenting_twice_changes_nothing(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool() as pool:
        telemetry.instrument(pool)
        telemetry.instrument({"default": pool})
        use(pool, 5)
        assert telemetry.count("use_time") == 5
        assert len(telemetry.spans("dbpool.acquire")) == 1
        uninstrument(pool)
        uninstrument(pool)
        use(pool, 5)
        assert telemetry.count("use_time") == 5
        assert telemetry.points("count") == {}


def test_a_pool_that_is_instrumented_again_is_not_counted_twice(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    with fake.pool(max_size=1) as pool:
        telemetry.instrument(pool)
        use(pool, 2)
        uninstrument(pool)
        use(pool, 3)
        telemetry.instrument(pool)
        assert telemetry.count("use_time") == 5 == pool.stats().use.count


def test_checkouts_before_uninstrumenting_are_recorded(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    with fake.pool() as pool:
        telemetry.instrument(pool)
        use(pool, 4)
        uninstrument(pool)
    assert telemetry.count("use_time") == 4


def test_instrumenting_with_another_provider_takes_over(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    other = Telemetry()
    with fake.pool() as pool:
        telemetry.instrument(pool)
        use(pool, 2)
        other.instrument(pool)
        use(pool, 1)
        assert telemetry.count("use_time") == 2
        assert other.count("use_time") == 3, "all checkouts since the pool opened"
    uninstrument()
    other.meters.shutdown()


def test_several_pools_are_distinguished_by_name(telemetry: Telemetry, fake: FakeServer) -> None:
    pools = {name: fake.pool(name=name) for name in ("default", "replica")}
    telemetry.instrument(pools)
    for number, pool in enumerate(pools.values(), 1):
        use(pool, number)
    assert telemetry.count("use_time", "default") == 1
    assert telemetry.count("use_time", "replica") == 2
    for pool in pools.values():
        pool.close()


def test_pools_with_one_name_are_summed_and_no_total_falls(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    def generation() -> None:
        with fake.pool(max_size=1) as pool:
            telemetry.instrument(pool)
            use(pool, 2)
            with pool.connection():
                refused(pool)
                assert telemetry.value("count", "default", "used") == 1
            use(pool, 1)

    for number in (1, 2, 3):
        generation()
        assert telemetry.count("use_time") == 4 * number
        assert telemetry.value("timeouts") == number
    with fake.pool(max_size=3) as one, fake.pool(max_size=5) as two:
        telemetry.instrument(one)
        telemetry.instrument(two)
        assert telemetry.value("max") == 8


def test_the_last_checkouts_of_a_dropped_pool_are_counted(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    def script() -> weakref.ref[Pool[Any]]:
        with fake.pool() as pool:
            telemetry.instrument(pool)
            telemetry.metrics()
            use(pool, 7)
            return weakref.ref(pool)

    gc.disable()
    try:
        pool = script()
        until(lambda: pool() is None)  # a worker may hold it for a moment
    finally:
        gc.enable()
    assert telemetry.count("use_time") == 7
    assert telemetry.points("count") == {}


def test_only_pools_can_be_instrumented() -> None:
    with pytest.raises(TypeError, match=r"only a dbpool\.Pool can be instrumented, not str"):
        instrument("postgresql://user:secret@host/db")  # type: ignore[arg-type]


# Providers that fail, or are missing


class Broken(metrics.NoOpMeterProvider, trace.NoOpTracerProvider):
    """Raises in every method."""

    def get_meter(self, *args: Any, **kwargs: Any) -> Any:
        return BrokenMeter("broken")

    def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
        return BrokenTracer()

    def force_flush(self) -> None:
        raise RuntimeError("secret")


class BrokenMeter(metrics.NoOpMeter):
    callbacks: list[Callable[[Any], Any]] = []
    records = 0

    def create_histogram(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def create_observable_counter(self, name: str, callbacks: Any = None, *args: Any) -> Any:
        self.callbacks += callbacks

    def record(self, *args: Any) -> None:
        type(self).records += 1
        raise RuntimeError("secret")


class BrokenTracer(trace.NoOpTracer):
    def start_span(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret")


def test_providers_that_raise_do_no_harm(
    fake: FakeServer, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    from dbpool.opentelemetry import flush

    pool, broken = make_pool(fake), Broken()
    instrument(pool, broken, broken)
    use(pool, 3)
    for collect in BrokenMeter.callbacks * 2:
        [*collect(None)]
    assert BrokenMeter.records == 1, "it was recorded again"
    assert flush()
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert sorted(warnings) == [
        "OpenTelemetry: a provider cannot flush: RuntimeError",
        "OpenTelemetry: recording failed: RuntimeError",
        "OpenTelemetry: tracing failed: RuntimeError",
    ]
    uninstrument(pool)


def test_a_provider_without_a_meter_changes_nothing(telemetry: Telemetry, fake: FakeServer) -> None:
    class NoMeter(metrics.NoOpMeterProvider):
        def get_meter(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no meter")

    with fake.pool() as pool:
        telemetry.instrument(pool)
        with pytest.raises(RuntimeError, match="no meter"):
            instrument(pool, NoMeter())
        use(pool, 2)
        assert telemetry.count("use_time") == 2


def test_a_collection_does_not_deadlock_with_a_providers_lock(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider holds a lock while it collects, which recording a value needs too."""
    lock, recording, collecting = threading.Lock(), threading.Event(), threading.Event()

    class Locking(metrics.NoOpMeterProvider, metrics.NoOpMeter):
        def __init__(self) -> None:
            super().__init__("locking")
            self.callbacks: list[Callable[[Any], Any]] = []

        def get_meter(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def create_histogram(self, *args: Any, **kwargs: Any) -> Any:
            return self

        def create_observable_counter(self, name: str, callbacks: Any = None, *args: Any) -> Any:
            self.callbacks += callbacks

        def record(self, *args: Any) -> None:
            recording.set()
            collecting.wait(20.0)
            with lock:
                pass

        def collect(self) -> list[Any]:
            with lock:
                collecting.set()
                return [*self.callbacks[0](None)]

    monkeypatch.setattr("dbpool.opentelemetry._meter.LOCK_TIMEOUT", 0.1)
    provider = Locking()
    with fake.pool() as pool:
        instrument(pool, provider)
        use(pool, 1)
        removing = Task(uninstrument, pool)
        assert recording.wait(20.0)
        assert [each.value for each in provider.collect()] == [0]
        removing.result()


GLOBAL = """
import sys, threading
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from dbpool.opentelemetry import flush, instrument
from tests.fake import FakeServer

def use(pool, number):
    for _ in range(number):
        with pool.connection():
            pass

def counts(reader):
    data = reader.get_metrics_data()
    metrics = data.resource_metrics[0].scope_metrics[0].metrics if data else ()
    return {m.name[21:]: [p.count for p in m.data.data_points]
            for m in metrics if m.name.endswith("_time")}

reader = InMemoryMetricReader()
pool = FakeServer().pool()
"""


def output_of(script: str, **env: str) -> str:
    done = python("-W", "error", "-c", GLOBAL + script, env=env, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_nothing_runs_before_a_provider_is_set() -> None:
    script = """
instrument(pool)
use(pool, 2)
print([t.name for t in threading.enumerate() if "telemetry" in t.name], flush())
print([name for name in sys.modules if name == "opentelemetry.sdk.trace"])
provider = MeterProvider([reader])
metrics.set_meter_provider(provider)
instrument(pool)
instrument(pool, meter_provider=provider)
use(pool, 3)
print(counts(reader)["use_time"], flush())
pool.close()
"""
    assert output_of(script).splitlines() == ["[] True", "[]", "[5] True"]


def test_a_disabled_sdk_records_nothing() -> None:
    script = """
metrics.set_meter_provider(MeterProvider([reader]))
instrument(pool)
use(pool, 2)
print(counts(reader), flush())
pool.close()
"""
    assert output_of(script, OTEL_SDK_DISABLED="true") == "{} True"


def test_the_error_names_the_missing_package() -> None:
    script = """
import sys
sys.modules["opentelemetry"] = None
import dbpool, dbpool.gunicorn, dbpool.pool
try:
    import dbpool.opentelemetry
except dbpool.ConfigError as ex:
    print(ex)
"""
    output = python("-c", script, check=True).stdout
    assert "need the package opentelemetry-api" in output


# Forks


FORK = """
import json, os
provider = MeterProvider([reader])
use(pool, 2)
instrument(pool, provider)
{parent}
sys.stdout.flush()
if os.fork() == 0:
    if {own}:
        reader = InMemoryMetricReader()
        instrument(pool, MeterProvider([reader]))
    use(pool, 3)
    print("child", counts(reader)["use_time"], flush=True)
    pool.close()
    os._exit(0)
os.wait()
print("parent", counts(reader)["use_time"])
pool.close()
"""


@pytest.mark.parametrize("own", [True, False])
def test_a_forked_child_starts_at_zero(own: bool) -> None:
    script = FORK.format(parent="", own=own)
    assert output_of(script, PYTHONWARNINGS="ignore").splitlines() == ["child [3]", "parent [2]"]


def test_a_child_warns_if_it_reports_its_parents_numbers_again() -> None:
    script = GLOBAL + FORK.format(parent="counts(reader)", own=False)
    done = python("-c", script, env={"PYTHONWARNINGS": "ignore"}, check=True)
    warning = "OpenTelemetry: the provider is the parent's: this process reports again"
    assert done.stderr.count(warning) == 1


def test_a_child_may_be_forked_in_the_middle_of_a_collection() -> None:
    script = """
import os
instrument(pool, MeterProvider([reader]))
use(pool, 20000)
collecting = threading.Thread(target=counts, args=(reader,))
collecting.start()
for _ in range(5):
    if os.fork() == 0:
        reader = InMemoryMetricReader()
        instrument(pool, MeterProvider([reader]))
        use(pool, 3)
        os._exit(counts(reader)["use_time"] != [3])
    print(os.wait()[1])
collecting.join()
pool.close()
"""
    assert output_of(script, PYTHONWARNINGS="ignore").split() == ["0"] * 5


# Exporting at the end


EXPORTING = """
import io, time
from types import SimpleNamespace
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from dbpool.gunicorn import worker_exit

exported = io.StringIO()
reader = PeriodicExportingMetricReader(ConsoleMetricExporter(exported), 1e7)
instrument(pool, MeterProvider([reader], shutdown_on_exit=False))
use(pool, 5)
"""


def test_the_hooks_export_when_a_worker_exits() -> None:
    script = """
worker_exit(SimpleNamespace(pid=0), None)
print(exported.getvalue().count('"count": 5'), pool.closed)
"""
    assert output_of(EXPORTING + script) == "2 True"


def test_spans_of_a_provider_that_was_set_late_are_exported_too() -> None:
    script = """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans, tracers = InMemorySpanExporter(), TracerProvider()
tracers.add_span_processor(BatchSpanProcessor(spans, schedule_delay_millis=1e7))
pool = FakeServer().pool()
instrument(pool, MeterProvider([InMemoryMetricReader()]))
trace.set_tracer_provider(tracers)
use(pool, 1)
print(flush(), sorted(span.name for span in spans.get_finished_spans()))
pool.close()
"""
    assert output_of(EXPORTING + script) == "True ['dbpool.acquire', 'dbpool.connect']"


def test_the_wait_for_a_hanging_exporter_is_bounded() -> None:
    script = """
class Hanging(ConsoleMetricExporter):
    def export(self, *args, **kwargs):
        time.sleep(1000)

reader = PeriodicExportingMetricReader(Hanging(), 1e7)
instrument(pool, MeterProvider([reader], shutdown_on_exit=False))
print(flush(0.2))
"""
    assert output_of(EXPORTING + script) == "False"


# Spans


def test_an_acquire_that_waits_is_a_span_of_its_callers(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    with fake.pool(max_size=1) as pool:
        use(pool, 1)
        telemetry.instrument(pool)
        use(pool, 3)
        assert telemetry.spans("dbpool.acquire") == [], "a checkout without a wait made a span"

        def request() -> int:
            with telemetry.tracers.get_tracer("app").start_as_current_span("request") as span:
                pool.putconn(pool.getconn(10.0))
                return span.get_span_context().span_id

        with pool.connection():
            waiter = Task(request)
            until(lambda: pool.stats().waiting == 1)
        parent = waiter.result()
        (span,) = telemetry.spans("dbpool.acquire")
        assert span.parent is not None
        assert span.parent.span_id == parent
        assert span.attributes == {"db.system.name": "postgresql", POOL_NAME: "default"}
        assert span.status.is_unset


def test_the_span_of_a_failed_wait_has_the_reason(telemetry: Telemetry, fake: FakeServer) -> None:
    with fake.pool(max_size=1) as pool:
        use(pool, 1)
        telemetry.instrument(pool)
        with pool.connection():
            refused(pool)
    (span,) = telemetry.spans("dbpool.acquire")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "dbpool.PoolExhausted"
    assert span.attributes["dbpool.connect.failures"] == 0
    assert not span.status.is_ok
    assert "held longest" in str(span.status.description)
    assert "[DBE01]" in str(span.status.description)
    assert span.events == ()


def test_a_traced_wait_keeps_no_object_of_its_caller_alive(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    class Held:
        pass

    def caller(pool: Pool[Any]) -> weakref.ref[Held]:
        held = Held()
        with pytest.raises(PoolExhausted):
            pool.getconn(0.05)
        return weakref.ref(held)

    with fake.pool(max_size=1) as pool:
        telemetry.instrument(pool)
        gc.disable()
        try:
            with pool.connection():
                assert caller(pool)() is None
        finally:
            gc.enable()


def test_the_span_of_a_failed_connect_has_kind_and_attempt(
    telemetry: Telemetry, fake: FakeServer
) -> None:
    fake.refuse('FATAL:  password authentication failed for user "app"')
    with fake.pool("host=h user=app password=hunter2secret", min_size=0) as pool:
        telemetry.instrument(pool)
        assert isinstance(refused(pool, 5.0), DatabaseUnavailable)
    (span, *_) = telemetry.spans("dbpool.acquire")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "dbpool.DatabaseMisconfigured"
    assert span.attributes["dbpool.failure.kind"] == "password"
    assert int(str(span.attributes["dbpool.connect.failures"])) >= 1
    (span, *_) = telemetry.spans("dbpool.connect")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "psycopg.OperationalError"
    assert span.attributes["dbpool.failure.kind"] == "password"
    assert span.attributes["dbpool.connect.attempt"] == 1
    assert "password authentication failed" in str(span.status.description)


def test_attempts_are_numbered_until_one_succeeds(telemetry: Telemetry, fake: FakeServer) -> None:
    fake.refuse()
    with fake.pool(outage_grace=5.0) as pool:
        telemetry.instrument(pool)
        waiter = Task(use, pool, 1)
        until(lambda: len(telemetry.spans("dbpool.connect")) >= 3)
        fake.accept()
        waiter.result()
        found = [dict(span.attributes or {}) for span in telemetry.spans("dbpool.connect")]
        numbers = [each["dbpool.connect.attempt"] for each in found]
        assert numbers[: len(found)] == [*range(1, len(found) + 1)]
        assert "dbpool.failure.kind" not in found[-1]
        (acquire,) = telemetry.spans("dbpool.acquire")
        assert acquire.status.is_unset


def test_the_span_of_a_connect_has_the_servers_address(telemetry: Telemetry, dsn: str) -> None:
    with Pool(dsn, min_size=1) as pool:
        telemetry.instrument(pool)
        info = pool.run(lambda conn: (conn.info.host, conn.info.port, conn.info.dbname))
    (span, *_) = telemetry.spans("dbpool.connect")
    found = dict(span.attributes or {})
    names = ("server.address", "server.port", "db.namespace")
    assert tuple(map(found.get, names)) == info


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://app:hunter2secret@127.0.0.1:1/shop",
        lambda: "postgresql://app:hunter2secret@127.0.0.1:port/shop",  # a callable is not checked
        lambda: "host=postgresql://app:hunter2secret@h/shop",
        "host=127.0.0.1 port=1 sslpassword=hunter2secret",
        "host=127.0.0.1 port=1 sslmode=hunter2secret",
    ],
)
def test_no_span_shows_a_secret(telemetry: Telemetry, conninfo: Any) -> None:
    with Pool(conninfo, min_size=0, outage_grace=0.1) as pool:
        telemetry.instrument(pool)
        refused(pool, 1.0)
    spans = telemetry.spans("dbpool.connect") + telemetry.spans("dbpool.acquire")
    assert len(spans) >= 2
    assert "hunter2" not in " ".join(span.to_json() for span in spans)


def test_pending_data_can_be_flushed_at_the_interpreters_exit() -> None:
    """From Python 3.12 on no thread can be started at that time."""
    script = """
import atexit, threading
from dbpool.opentelemetry import flush

def refuse(*args, **kwargs):
    raise RuntimeError("can't create new thread at interpreter shutdown")

class Provider:
    def force_flush(self):
        print("flushed")

from opentelemetry import metrics

metrics.get_meter_provider = Provider
threading.Thread.start = refuse
print(flush())
"""
    assert python("-c", script, check=True).stdout == "flushed\nTrue\n"
