"""Pure functions that make the pool's exceptions out of a snapshot: what happened, and why."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import psycopg
from psycopg_pool import PoolClosed, TooManyRequests

from dbpool import holders
from dbpool.breaker import Breaker
from dbpool.errors import (
    DatabaseMisconfigured,
    DatabaseUnavailable,
    PoolError,
    PoolExhausted,
    classify,
    describe,
    is_permanent,
    sanitize,
)
from dbpool.holders import ConnectionRecord
from dbpool.liveness import is_active, is_retransmitting
from dbpool.metrics import Snapshot


def no_answer(seconds: float) -> psycopg.OperationalError:
    """Build the error of an attempt that has no answer yet."""
    span = f"for {seconds:.1f} s" if seconds >= 0.1 else "yet"
    return psycopg.errors.ConnectionTimeout(f"no answer from the server {span}")


def closed(name: str, *, was_opened: bool) -> PoolClosed:
    """Build the error of a checkout from a closed pool."""
    return PoolClosed(f"the pool {name!r} is {'already closed' if was_opened else 'not open yet'}")


def too_many(name: str, snapshot: Snapshot, max_waiting: int) -> TooManyRequests:
    """Build the error of a caller who may not wait beside the others."""
    return TooManyRequests(
        f"pool {name!r}: {snapshot.waiting} waiting already, max_waiting is {max_waiting};"
        f" {snapshot.active} of {snapshot.max_size} connections checked out"
    )


def unavailable(
    name: str,
    snapshot: Snapshot,
    breaker: Breaker,
    *,
    silent_since: float = 0.0,
    cause: BaseException | None = None,
) -> DatabaseUnavailable:
    """Build DatabaseUnavailable; without a failed connect its cause is "no answer".

    *silent_since* is when the server answered last, 0 if that does not matter; a *cause* of the
    caller's counts instead of the last failed connect.
    """
    seconds, kind, reason = breaker.failing_for, breaker.kind, breaker.error
    silent_since = min(breaker.pending(), default=silent_since)
    if cause is not None:
        kind, reason = classify(cause), sanitize(cause)
    elif reason is None and silent_since:
        seconds, kind = breaker.clock() - silent_since, "timeout"
        reason = no_answer(seconds)
    cls = DatabaseMisconfigured if is_permanent(kind) else DatabaseUnavailable
    span = f" for {seconds:.1f} s" if seconds >= 0.1 else ""
    error = cls(
        f"pool {name!r}: no connection to the database{span}"
        f"{'' if kind == 'unknown' else f' ({kind})'}:"
        f" {'none was made in time' if reason is None else describe(reason)}",
        pool=name,
        snapshot=snapshot,
        kind=kind,
        since=time.time() - seconds,
        retry_after=breaker.retry_after or 0.0,
    )
    error.__cause__ = reason
    return error


def timed_out(
    name: str,
    snapshot: Snapshot,
    breaker: Breaker,
    seconds: float,
    *,
    held_by_caller: int,
    suspicion: str,
) -> PoolError:
    """Build the error of a caller who waited *seconds*, and holds that many connections itself.

    PoolExhausted only if every connection is checked out and making one does not fail, else
    DatabaseUnavailable. *suspicion* says what may keep the holders, if anything is known.
    """
    if breaker.is_failing or snapshot.connecting or snapshot.active < snapshot.max_size:
        return unavailable(name, snapshot, breaker)
    if not snapshot.holders and breaker.last_alive_at < breaker.clock() - seconds:
        # All connections are being asked whether they are alive, and none has answered.
        return unavailable(name, snapshot, breaker, silent_since=breaker.last_alive_at)
    n = held_by_caller
    nested = (
        f"; nested: this thread itself holds {n}, and n threads that hold {n + 1} at once"
        f" need a max_size of at least n * {n} + 1"
    )
    return PoolExhausted(
        f"pool {name!r}: no connection within {seconds:.2f} s: {snapshot.active} of"
        f" {snapshot.max_size} checked out, {snapshot.idle} idle, {snapshot.waiting - 1} more"
        f" waiting; held longest: {holders.group(snapshot.holders) or 'unknown'}"
        f"{nested if n else suspicion}",
        pool=name,
        snapshot=snapshot,
    )


def suspicion(
    held: Collection[ConnectionRecord], breaker: Breaker, seconds: float
) -> tuple[str, bool]:
    """Say what to suspect if no connection came back for *seconds* and statements run on some.

    Returns also whether TCP knows that the network is silent.
    """
    since = breaker.clock() - seconds
    if breaker.last_alive_at >= since or not any(is_active(record.conn) for record in held):
        return "", False
    silent = sum(is_retransmitting(record.fd) for record in held if record.is_open)
    sockets = f": {silent} of {len(held)} sockets wait for acknowledgements" if silent else ""
    text = f"; none came back in that time: slow statements or a silent network{sockets}"
    return text, bool(silent)


def server_lost(ex: Any) -> bool:
    """Whether a pooler says by *ex* that it cannot reach the server."""
    return "login has been failing" in str(ex)
