"""OpenTelemetry for pools: the metrics of its conventions, and spans for slow steps.

It needs only the package opentelemetry-api. Without an SDK nothing is recorded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dbpool._per_process import PerProcess
from dbpool._threads import run_in_thread
from dbpool.errors import ConfigError
from dbpool.pool import Pool, _fork

try:
    from opentelemetry import metrics, trace
except ImportError as ex:  # pragma: no cover - tried in an environment without it
    raise ConfigError(
        "opentelemetry is missing: metrics and spans need the package opentelemetry-api"
    ) from ex

from dbpool.opentelemetry._meter import Meter
from dbpool.opentelemetry._tracer import Tracer

__all__ = ["flush", "instrument", "uninstrument"]

logger = logging.getLogger("dbpool")

Pools = Pool[Any] | Mapping[str, Pool[Any]]

_FLUSH_TIMEOUT: Final = 5.0  # seconds

# Kept for ever: a provider creates each instrument once, with the callback of its first meter.
_meters: dict[metrics.MeterProvider, Meter] = {}
_global: list[Meter] = []  # the meter of the global provider, also from before that was set
_traced: set[trace.TracerProvider] = set()
_lock = PerProcess(threading.Lock)


def instrument(
    pools: Pools,
    meter_provider: metrics.MeterProvider | None = None,
    tracer_provider: trace.TracerProvider | None = None,
) -> None:
    """Record metrics and spans of *pools*: a pool, or a mapping of pools such as `Databases`.

    By default they go to the global providers, which may be set later. Each process records only
    its own pools. Histograms count every checkout when the connection is returned, also those from
    before this call. Another call changes the providers.
    """
    found = _each(pools)
    with _lock():
        meter = _meter_of(meter_provider)
        tracer = Tracer(tracer_provider or trace.get_tracer_provider())
        _traced.add(tracer.provider)
        for other in {*_meters.values()} - {meter}:
            other.remove(found)
        for pool in found:
            meter.add(pool)
            pool.trace = tracer


def uninstrument(pools: Pools | None = None) -> None:
    """Stop recording *pools*, by default all. Checkouts that have ended are still recorded."""
    found = _fork.list_pools() if pools is None else _each(pools)
    with _lock():
        for meter in {*_meters.values()}:
            meter.remove(found)
        for pool in found:
            vars(pool).pop("trace", None)


def flush(timeout: float = _FLUSH_TIMEOUT) -> bool:
    """Make the providers export what they have; return whether they did within *timeout* seconds.

    This covers the global providers and all that `instrument` was ever given. It skips a provider
    without `force_flush`. The gunicorn hooks call `flush` when a worker exits.
    """
    current = metrics.get_meter_provider(), trace.get_tracer_provider()  # proxies cannot flush
    providers: set[Any] = {*_meters, *_traced, *current}
    flushes = [f for each in providers if (f := getattr(each, "force_flush", None)) is not None]
    thread = threading.Thread(None, _flush, "dbpool-flush", (flushes,), daemon=True)
    try:
        run_in_thread(thread.start)
    except RuntimeError:  # out of threads, or the interpreter is ending: nothing bounds it then
        _flush(flushes)
        return True
    thread.join(timeout)
    return not thread.is_alive()


def _flush(flushes: Iterable[Any]) -> None:
    for force_flush in flushes:
        try:
            force_flush()
        except Exception as ex:  # noqa: BLE001  # of any provider; the others still flush
            logger.warning("OpenTelemetry: a provider cannot flush: %s", type(ex).__name__)


def _meter_of(provider: metrics.MeterProvider | None) -> Meter:
    """Return the meter of a provider, always the same: each instrument takes only one callback."""
    current = metrics.get_meter_provider()
    provider = provider or current
    found = _meters.get(provider)
    if found is None and provider is current and _global:
        found = _global[0]
    if found is None:
        found = Meter(provider)
    _meters[provider] = found
    if provider is current:
        _global[:] = [found]
    return found


def _each(pools: Pools) -> list[Pool[Any]]:
    found = [*pools.values()] if isinstance(pools, Mapping) else [pools]
    for pool in found:
        if not isinstance(pool, Pool):
            raise TypeError(f"only a dbpool.Pool can be instrumented, not {type(pool).__name__}")
    return found
