"""Connections without a server, for tests of what a pool does around them."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import closing
from types import SimpleNamespace
from typing import Any, Self

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus


class FakePGconn:
    """What a pool and psycopg ask of libpq's connection."""

    backend_pid = 1
    pipeline_status = 0
    used_password = needs_password = False
    password = error_message = b""
    host = hostaddr = db = user = b""
    port = b"1"
    _encoding = "utf-8"

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.socket = self._ours.fileno()
        self.status = ConnStatus.OK
        self.transaction_status = TransactionStatus.IDLE
        self.notice_handler = self.notify_handler = None
        self.info: list[Any] = []

    def parameter_status(self, name: bytes) -> bytes:
        return b"off"

    def finish(self) -> None:
        self.status, self.transaction_status = ConnStatus.BAD, TransactionStatus.UNKNOWN
        self._ours.close()
        self._theirs.close()

    def __del__(self) -> None:
        self.finish()

    def hang_up(self) -> None:
        """Be a server that goes away."""
        self._theirs.close()

    def consume_input(self) -> None:
        if not self._ours.recv(1):
            self.status = ConnStatus.BAD
            raise psycopg.OperationalError("the server is gone")

    def send_query(self, query: bytes) -> None:
        self._answers = [SimpleNamespace(status=ExecStatus.EMPTY_QUERY), None]

    def flush(self) -> int:
        return 0

    def get_result(self) -> Any:
        return self._answers.pop(0)

    def is_busy(self) -> bool:
        return False

    def notifies(self) -> None:
        return None


class FakeCursor:
    """Answers every statement with one row."""

    rowcount = 1

    def __init__(self, connection: Any, **how: Any) -> None:
        pass

    def execute(self, *what: Any, **how: Any) -> Self:
        return self

    def fetchone(self) -> tuple[int]:
        return (1,)

    def fetchall(self) -> list[tuple[int]]:
        return [(1,)]


class FakeConnection(psycopg.Connection[Any]):
    """Connects to nothing, at once."""

    def __init__(self) -> None:
        super().__init__(FakePGconn())  # type: ignore[arg-type]
        self.cursor_factory = FakeCursor  # type: ignore[assignment]

    @classmethod
    def connect(cls, *where: Any, **how: Any) -> Self:
        return cls()

    def wait(self, gen: Generator[Any, Any, Any], *how: Any, **more: Any) -> Any:
        with closing(gen):
            self.pgconn.transaction_status = TransactionStatus.IDLE  # type: ignore[misc]
