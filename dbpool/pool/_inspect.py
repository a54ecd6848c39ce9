"""inspect: may an idle connection be lent? It answers, and changes nothing in the pool."""

from __future__ import annotations

import enum
from time import monotonic
from typing import Any

from dbpool.holders import ConnectionRecord
from dbpool.liveness import Liveness, check_socket


class Verdict(enum.Enum):
    """What an inspection found."""

    USABLE = "usable"
    UNSURE = "unsure"  # only a ping can tell
    EXPIRED = "expired"
    DEAD = "dead"


def inspect(conn: Any, ping_after: float, *, is_failing: bool) -> Verdict:
    """Return whether *conn* may be lent, without a round trip.

    One idle for *ping_after* seconds needs a ping. While connects fail (*is_failing*) one past its
    lifetime is better than none. What the server sent meanwhile is read into libpq's buffer.
    """
    record: ConnectionRecord = conn._record
    now = monotonic()
    if now >= record.expires_at and not is_failing:
        return Verdict.EXPIRED
    found = check_socket(conn, record.readable)
    if found is Liveness.DEAD:
        return Verdict.DEAD
    is_old = now - record.idle_since >= ping_after
    return Verdict.UNSURE if is_old or found is Liveness.UNKNOWN else Verdict.USABLE
