"""The report for Prometheus, with the names of OpenTelemetry's `db.client.connection.*`.

All other names begin with `dbpool_`. This needs the package prometheus-client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from dbpool.diagnosis import CODES, Severity
from dbpool.diagnosis.endpoints import totals
from dbpool.errors import ConfigError
from dbpool.metrics import BOUNDS, REASONS, HistogramSnapshot, Snapshot
from dbpool.report import Process, Report

try:
    from prometheus_client import Metric
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector
except ImportError as ex:  # pragma: no cover - tried in an environment without it
    raise ConfigError(
        "prometheus_client is missing: metrics need the package prometheus-client"
    ) from ex

__all__ = ["PoolCollector", "expose"]

_ALARMING: Final = frozenset({Severity.WARNING, Severity.CRITICAL})
_FORMATS: Final = frozenset({"application/openmetrics-text", "text/plain"})
_QUALITY: Final = re.compile(r";\s*q=([01](?:\.[0-9]{0,3})?)\s*(?:;|$)", re.ASCII | re.IGNORECASE)
_POOL: Final = "pool_name"
_BUCKET_STEP: Final = 4  # of our bounds every fourth is exposed: two to a decade
_SIZES: Final = {
    "db_client_connection_max": ("max_size", "Largest number of connections allowed"),
    "db_client_connection_idle_min": ("min_size", "Number of connections that stay open when idle"),
    "db_client_connection_pending_requests": ("waiting", "Callers waiting for a connection"),
    "dbpool_connecting": ("connecting", "Connections being made, or waiting for their next try"),
}
_TIMES: Final = {
    "create_time": ("connect", "Time it took to make a connection"),
    "wait_time": ("wait", "Time it took to obtain a connection"),
    "use_time": ("use", "Time between obtaining a connection and returning it"),
}
_TOTALS: Final = {
    "dbpool_checkouts": ("checkouts", "Connections handed out"),
    "db_client_connection_timeouts": ("timeouts", "Callers that got no connection in time"),
    "dbpool_nested": ("nested", "Callers that got no connection in time while they held another"),
    "dbpool_rejected": ("rejected", "Callers refused: outage, full queue, or closing"),
    "dbpool_connects": ("connects", "Connections made"),
    "dbpool_connect_failures": ("connect_failures", "Failed attempts to connect"),
    "dbpool_retries": ("retries", "Transactions run again"),
    "dbpool_leaks": ("leaks", "Connections forgotten by their holders"),
    "dbpool_held_long": ("held_long", "Connections held for longer than leak_after"),
    "dbpool_returned_late": ("returned_late", "Connections returned after being held for too long"),
    "dbpool_circuit_opened": ("circuit_opened", "Times the breaker opened"),
}
_OF_ENDPOINTS: Final = {  # in the order of `totals`
    "checkouts": "Connections returned by an endpoint, or outside of requests by a line of code",
    "use_seconds": "Time for which an endpoint held connections",
    "gave_up": "Callers in an endpoint that got no connection",
}


class PoolCollector(Collector):
    """A collector for your own registry.

    Both arguments are called at each scrape; if one raises, the scrape fails. *report* returns a
    `Report`, or the JSON of one, as `app.extensions["dbpool"].processes.collect` does. *findings*
    returns the current findings, as `monitor.findings` does there; without it, `dbpool_finding` is
    always 0.
    """

    def __init__(
        self,
        report: Callable[[], Report | Mapping[str, Any]],
        findings: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        if not callable(report):
            raise TypeError(f"report must be callable, not {type(report).__name__}")
        self._report = report
        self._findings = findings

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families; all times are in seconds."""
        report = self._report()
        found = report if isinstance(report, Report) else Report.from_json(report)
        yield from _families(found)
        yield _findings(found, self._findings())

    def describe(self) -> Iterator[Metric]:
        """Yield the families without values, so that registering needs no report."""
        yield from _families(Report({}))
        yield _findings(Report({}), ())


def _families(report: Report) -> Iterator[Metric]:
    pools = report.pools
    yield _count(pools)
    for name, (field, about) in _SIZES.items():
        gauge = GaugeMetricFamily(name, about, labels=[_POOL])
        for pool, snapshot in pools.items():
            gauge.add_metric([pool], getattr(snapshot, field))
        yield gauge
    for name, (field, about) in _TOTALS.items():
        counter = CounterMetricFamily(name, about, labels=[_POOL])
        for pool, snapshot in pools.items():
            counter.add_metric([pool], getattr(snapshot.counters, field))
        yield counter
    for name, (field, about) in _TIMES.items():
        histogram = HistogramMetricFamily(
            f"db_client_connection_{name}_seconds", about, labels=[_POOL]
        )
        for pool, snapshot in pools.items():
            times: HistogramSnapshot = getattr(snapshot, field)
            histogram.add_metric([pool], buckets=_buckets(times), sum_value=times.sum_ns / 1e9)
        yield histogram
    yield _discarded(pools)
    yield _breaker(pools)
    yield from _endpoints(report)
    yield _ages(report.processes)


def _count(pools: Mapping[str, Snapshot]) -> Metric:
    # OpenTelemetry's `count`; Prometheus keeps that suffix for histograms.
    gauge = GaugeMetricFamily(
        "db_client_connections", "Connections by state", labels=[_POOL, "state"]
    )
    for pool, snapshot in pools.items():
        gauge.add_metric([pool, "idle"], snapshot.idle)
        gauge.add_metric([pool, "used"], snapshot.active)
    return gauge


def _findings(report: Report, findings: Iterable[Mapping[str, Any]]) -> Metric:
    gauge = GaugeMetricFamily(
        "dbpool_finding",
        "1 while that diagnosis is a warning or worse; one without a pool concerns the host",
        labels=[_POOL, "code"],
    )
    alarming = [each for each in findings if each.get("severity") in _ALARMING]
    found = {(each.get("pool") or "", each.get("code")) for each in alarming}
    for pool in (*report.pools, ""):
        for code in CODES:
            gauge.add_metric([pool, code], int((pool, code) in found))
    return gauge


def _endpoints(report: Report) -> Iterator[Metric]:
    """Yield the use by endpoint, which is empty unless the report was asked for it."""
    families = [
        CounterMetricFamily(f"dbpool_endpoint_{name}", about, labels=[_POOL, "endpoint"])
        for name, about in _OF_ENDPOINTS.items()
    ]
    for pool, rows in report.usage.items():
        for endpoint, *values in totals(rows):
            for family, value in zip(families, values, strict=True):
                family.add_metric([pool, endpoint], value)
    yield from families


def _discarded(pools: Mapping[str, Snapshot]) -> Metric:
    counter = CounterMetricFamily(
        "dbpool_discarded", "Connections closed or lost", labels=[_POOL, "reason"]
    )
    for pool, snapshot in pools.items():
        for reason in REASONS:
            counter.add_metric([pool, reason], snapshot.counters.discarded[reason])
    return counter


def _breaker(pools: Mapping[str, Snapshot]) -> Metric:
    gauge = GaugeMetricFamily(
        "dbpool_breaker_open",
        "1 while callers are refused because the database is unavailable",
        labels=[_POOL],
    )
    for pool, snapshot in pools.items():
        gauge.add_metric([pool], int(snapshot.breaker.state != "closed"))
    return gauge


def _ages(processes: Iterable[Process]) -> Metric:
    gauge = GaugeMetricFamily(
        "dbpool_process_age_seconds", "Time since a process last reported", labels=["pid"]
    )
    for process in processes:
        gauge.add_metric([str(process.pid)], process.age)
    return gauge


def _buckets(times: HistogramSnapshot) -> list[tuple[str, float]]:
    totals = list(accumulate(times.counts))
    bounds = [(f"{BOUNDS[n]:.3g}", totals[n]) for n in range(0, len(BOUNDS), _BUCKET_STEP)]
    return [*bounds, ("+Inf", totals[-1])]


def expose(
    report: Report | Mapping[str, Any],
    accept: str = "",
    findings: Collection[Mapping[str, Any]] = (),
) -> tuple[bytes, str]:
    """Return the exposition of a report, and its content type by the client's `Accept`.

    *findings* are those of `/stats`.
    """
    try:
        encode, content_type = choose_encoder(_preferred(accept))
    except (TypeError, ValueError):  # for example a version that is no number
        encode, content_type = choose_encoder("")
    return encode(PoolCollector(lambda: report, lambda: findings)), content_type


def _preferred(accept: str) -> str:
    """Return the format in an `Accept` that the client likes best, "" for any other.

    prometheus_client takes the first, whatever its `q`.
    """
    known = [each for each in accept.split(",") if each.partition(";")[0].strip() in _FORMATS]
    best = max(known, key=_quality, default="")
    return best if _quality(best) > 0.0 else ""


def _quality(accepted: str) -> float:
    found = _QUALITY.search(accepted)
    return float(found[1]) if found else 1.0
