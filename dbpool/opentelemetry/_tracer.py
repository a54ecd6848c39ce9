"""Tracer: spans for an acquire that waits, in its caller's span, and for each try to connect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

from dbpool import __version__
from dbpool.breaker import Attempt
from dbpool.errors import describe
from dbpool.pool import Pool
from dbpool.pool._connector import Failure

logger = logging.getLogger("dbpool")


class Tracer:
    """Replaces `Pool.trace`; whatever a provider raises, the pool goes on."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("dbpool", __version__)
        self._tries: WeakKeyDictionary[Attempt, int] = WeakKeyDictionary()
        self._has_failed = False

    def __call__(self, fn: Callable[..., Any], pool: Pool[Any], subject: Any) -> Any:
        """Call `fn(pool, subject)` in a span; the subject is an attempt to connect, or a waiter."""
        around = self._connect if isinstance(subject, Attempt) else self._wait
        return around(fn, pool, subject)

    def _wait(self, fn: Callable[..., Any], pool: Pool[Any], waiter: Any) -> Any:
        span = self._start("dbpool.acquire", pool, SpanKind.INTERNAL)
        failures = pool._store.metrics.connect_failures
        try:
            return fn(pool, waiter)
        except BaseException as ex:
            number = pool._store.metrics.connect_failures - failures
            self._fail(span, ex, getattr(ex, "kind", None), {"dbpool.connect.failures": number})
            raise
        finally:
            self._safely(span.end)

    def _connect(self, fn: Callable[..., Any], pool: Pool[Any], attempt: Attempt) -> Any:
        span = self._start("dbpool.connect", pool, SpanKind.CLIENT)
        self._tries[attempt] = number = self._tries.get(attempt, 0) + 1
        self._safely(span.set_attribute, "dbpool.connect.attempt", number)
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                made = fn(pool, attempt)
            if isinstance(made, Failure):
                self._fail(span, made.error, made.kind, {})
            else:
                self._safely(lambda: span.set_attributes(_server_of(made)))
            return made
        finally:
            self._safely(span.end)

    def _start(self, name: str, pool: Pool[Any], kind: SpanKind) -> Span:
        attributes = {"db.system.name": "postgresql", "db.client.connection.pool.name": pool.name}
        start = self._tracer.start_span
        span = self._safely(lambda: start(name, kind=kind, attributes=attributes))
        return span or trace.INVALID_SPAN

    def _fail(self, span: Span, ex: BaseException, kind: str | None, more: dict[str, Any]) -> None:
        """Record why it failed: an error's text holds no secret, and `describe` masks it again."""

        def fail() -> None:
            cls = type(ex)
            span.set_attribute("error.type", f"{cls.__module__}.{cls.__qualname__}")
            span.set_attributes(more | ({"dbpool.failure.kind": str(kind)} if kind else {}))
            span.set_status(Status(StatusCode.ERROR, describe(ex)))

        self._safely(fail)

    def _safely(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call *fn*; log the first error."""
        try:
            return fn(*args)
        except Exception as ex:  # noqa: BLE001  # of any provider
            if not self._has_failed:
                self._has_failed = True
                logger.warning("OpenTelemetry: tracing failed: %s", type(ex).__name__)
            return None


def _server_of(conn: Any) -> dict[str, Any]:
    info = conn.info
    return {"server.address": info.host, "server.port": info.port, "db.namespace": info.dbname}
