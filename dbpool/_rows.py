"""Rows of what the library itself asks a server: text is text in whatever encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from psycopg import Cursor
from psycopg.rows import RowFactory, RowMaker

R = TypeVar("R")


def decoded(factory: RowFactory[R]) -> RowFactory[R]:
    """Return *factory* for rows of text, which psycopg returns as bytes where it is in SQL_ASCII."""

    def row_factory(cursor: Cursor[Any]) -> RowMaker[R]:
        make = factory(cursor)

        def make_row(values: Sequence[Any]) -> R:
            return make([x.decode(errors="replace") if isinstance(x, bytes) else x for x in values])

        return make_row

    return row_factory
