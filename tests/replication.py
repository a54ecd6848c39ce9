"""A primary with a streaming standby, and writers that remember the outcome of each write."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import psycopg

from dbpool import CommitUncertain, Pool
from dbpool.embedded._programs import account_of, server_user, spawn

from .postgres import Server, binaries, new_directory, until
from .threads import Load

Outcome = Literal["acknowledged", "uncertain", "failed"]

TABLE = "create table appends (n bigint)"
APPEND = "insert into appends values (%s)"
APPEND_ONCE = "insert into appends select %s where not exists (select from appends where n = %s)"

# The primary acknowledges a commit only when the standby has it, so killing it loses no commit.
SYNCHRONOUS = {"synchronous_standby_names": "*"}


def make_standby(primary: Server) -> Server:
    """Copy a running primary, and start the copy as its standby. The caller closes it."""
    with (primary.data / "pg_hba.conf").open("a") as rules:
        rules.write("host replication postgres 127.0.0.1/32 trust\n")
    primary.reload()
    directory = new_directory()
    command = [binaries() / "pg_basebackup", "-D", directory / "data", "-d", primary.conninfo]
    command += ["-R", "-X", "stream", "-c", "fast"]
    until(lambda: _succeeds(*command), 20.0, pause=0.1)  # fails until pg_hba is loaded
    standby = Server(directory)
    standby.start()
    await_streaming(primary)
    return standby


def _succeeds(*command: object) -> bool:
    with spawn(command, subprocess.DEVNULL, account_of(server_user())) as process:
        return process.wait(60) == 0


def await_streaming(primary: Server) -> None:
    """Wait until a standby streams from *primary*."""
    query = "select count(*) from pg_stat_replication where state = 'streaming'"
    until(lambda: primary.execute(query) != [(0,)], 20.0, pause=0.05)


def rejoin(former: Server, primary: Server) -> None:
    """Start a former primary as a standby of *primary*, from which it must not have diverged."""
    if former.is_running():
        former.stop("fast")
    former.demote()
    with (former.data / "postgresql.auto.conf").open("a") as settings:
        settings.write(f"primary_conninfo = '{primary.conninfo}'\n")
    former.start()


@dataclass
class History:
    """The outcome of each number that writers saw, and the times of acknowledgements."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    acknowledged_at: list[float] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def first_after(self, moment: float) -> float:
        """Return how many seconds after *moment* the first write was acknowledged."""
        return min(at for at in self.acknowledged_at if at > moment) - moment

    def longest_gap(self, since: float) -> float:
        """Return the longest time in which no write was acknowledged, in seconds."""
        times = sorted(at for at in self.acknowledged_at if at > since)
        return max(b - a for a, b in pairwise([since, *times]))


@dataclass(frozen=True)
class Findings:
    """Violations: numbers lost, present twice, or present although their writer got a failure."""

    lost: list[int]
    duplicated: list[int]
    unexpected: list[int]


def check(outcomes: Mapping[int, Outcome], rows: Counter[int]) -> Findings:
    """Compare the outcomes that writers saw with the rows in the table."""
    return Findings(
        lost=[n for n, outcome in outcomes.items() if outcome == "acknowledged" and not rows[n]],
        duplicated=[n for n, times in rows.items() if times > 1],
        unexpected=[n for n in rows if outcomes.get(n, "failed") == "failed"],
    )


class Appends:
    """Threads that append one number after another by `run(call, number)`, until stopped."""

    def __init__(
        self, pool: Pool[Any], *, call: Callable[..., None], threads: int = 4, **options: Any
    ) -> None:
        self.history = History()
        self._pool, self._call, self._options = pool, call, options
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._load = Load(self._append, threads)

    def _append(self) -> None:
        number = next(self._numbers)
        try:
            self._pool.run(self._call, number, **self._options)
        except CommitUncertain as ex:
            self._record(number, "uncertain", ex)
        except psycopg.OperationalError as ex:
            self._record(number, "failed", ex)
        else:
            self._record(number, "acknowledged")

    def _record(self, number: int, outcome: Outcome, error: BaseException | None = None) -> None:
        with self._lock:
            self.history.outcomes[number] = outcome
            if error is None:
                self.history.acknowledged_at.append(time.monotonic())
            else:
                self.history.errors.append(error.with_traceback(None))

    def await_more(self, number: int = 50, seconds: float = 60.0) -> None:
        """Wait until that many more writes are acknowledged."""
        wanted = len(self.history.acknowledged_at) + number
        until(lambda: len(self.history.acknowledged_at) >= wanted, seconds, pause=0.02)

    def stop(self) -> History:
        """Let every thread end its call; return all outcomes."""
        self._load.stop()
        assert self._load.errors == []
        return self.history


def append(conn: psycopg.Connection[Any], number: int) -> None:
    """Append a number unless it is there already."""
    conn.execute(APPEND_ONCE, [number, number])


def append_blindly(conn: psycopg.Connection[Any], number: int) -> None:
    """Append a number without checking that it is new."""
    conn.execute(APPEND, [number])


def rows(execute: Callable[[str], list[tuple[Any, ...]]]) -> Counter[int]:
    """Return how often each number is in the table."""
    return Counter(n for (n,) in execute("select n from appends"))
