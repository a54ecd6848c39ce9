"""What an error says about the statement that met it: may it have been done, may it be sent again.

Part of the one place that touches protected members of psycopg, see `_supply`.
"""

from __future__ import annotations

import re
from typing import Any, Final

import psycopg
from psycopg.pq import TransactionStatus

# What a semicolon or a keyword means nothing in: literals, names, comments.
_OPAQUE: Final = rb"""'(?:[^']|'')*'|"[^"]*"|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$"""
_READING: Final = rb"[\s(]*(?:select|show|table|values)\b[^;]*[;\s]*"


def is_lost_unanswered(conn: Any, error: psycopg.Error) -> bool:
    """Whether the connection was lost before any answer of the server's to what it was sent.

    SQLSTATE class 08 is the answer of a pooler that lost the server. What cannot write has
    nothing to be uncertain about.
    """
    parameter = conn.pgconn.parameter_status
    is_read_only = conn.read_only or parameter(b"in_hot_standby") == b"on"
    if conn.read_only is None:
        is_read_only |= parameter(b"default_transaction_read_only") == b"on"
    return bool(conn.closed and (error.sqlstate or "08")[:2] == "08" and not is_read_only)


def is_reading(statement: bytes) -> bool:
    """Whether it begins with SELECT, SHOW, TABLE or VALUES; comments and parentheses may precede.

    Where that cannot be told, as of several statements in one or of nested comments, it is not.
    """
    if b"\\" in statement and b";" in statement:
        return False
    text = re.sub(_OPAQUE, b" ", statement, flags=re.DOTALL)
    return b"*/" not in text and bool(re.fullmatch(_READING, text, re.IGNORECASE | re.DOTALL))


def is_stale_plan(error: BaseException | None) -> bool:
    """Whether a plan was refused because a table's columns have changed since it was made."""
    return (
        isinstance(error, psycopg.errors.FeatureNotSupported)
        and error.diag.source_function == "RevalidateCachedQuery"
    )


def forget_if_refused(error: psycopg.Error, conn: Any, converted: Any) -> None:
    """Forget psycopg's prepared statements if one was refused before any of it was done, in autocommit.

    Else raise *error*: a procedure that commits first and then meets a stale plan has a context.
    """
    is_idle = conn.pgconn.transaction_status == TransactionStatus.IDLE
    is_psycopgs = conn._prepared.key(converted) in conn._prepared._names
    if not (is_stale_plan(error) and is_idle and is_psycopgs and not error.diag.context):
        raise error
    conn._prepared.clear()
