"""Whether a statement may have been done although its connection was lost."""

from __future__ import annotations

import re
from typing import Any, Final

import psycopg

# Where a semicolon or a keyword means nothing: in literals, names, comments.
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
