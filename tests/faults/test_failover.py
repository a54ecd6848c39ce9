"""A primary and a standby that streams from it: the primary dies, the standby is promoted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbpool import Pool
from tests.namespaces import unshared
from tests.pools import MakePool, assert_serves_all, fill
from tests.postgres import Server, until
from tests.proxy import Mode, Proxy
from tests.replication import (
    SYNCHRONOUS,
    TABLE,
    Appends,
    Findings,
    append,
    append_blindly,
    await_streaming,
    check,
    make_standby,
    rejoin,
    rows,
)

ROOT = Path(__file__).resolve().parent.parent.parent
CONNECT_TIMEOUT = 2  # the smallest that libpq accepts

Pair = tuple[Server, Server]


@pytest.fixture
def pair(make_server: Callable[..., Server]) -> Iterator[Pair]:
    """A primary with synchronous replication, and its standby."""
    primary = make_server(**SYNCHRONOUS)
    # Until the standby follows, the primary acknowledges no commit.
    primary.execute("set synchronous_commit = local; " + TABLE)
    standby = make_standby(primary)
    yield primary, standby
    standby.close()


def conninfo_of(*ports: int, wanted: str = "read-write") -> str:
    hosts = ",".join(["127.0.0.1"] * len(ports))
    return (
        f"host={hosts} port={','.join(map(str, ports))} user=postgres dbname=postgres"
        f" target_session_attrs={wanted}"
    )


@pytest.mark.parametrize("attempts", [0, 8], ids=["at once", "late"])
def test_writes_go_on_within_a_second_of_the_promotion(
    pair: Pair, make_pool: MakePool, attempts: int
) -> None:
    """The dead host refuses connections. Callers with a long enough timeout get no error.

    With a late promotion the pool has reached its longest pause between two attempts.
    """
    primary, standby = pair
    pool = make_pool(conninfo_of(primary.port, standby.port), max_size=4, outage_grace=0.5)
    appends = Appends(pool, call=append, idempotent=True, timeout=30)
    appends.await_more()
    failures = pool.stats().counters.connect_failures
    primary.power_off()
    until(lambda: pool.stats().counters.connect_failures >= failures + attempts, 20.0)
    standby.promote()
    promoted = time.monotonic()
    appends.await_more()
    history = appends.stop()
    assert history.first_after(promoted) < 1.0
    assert history.errors == []
    assert check(history.outcomes, rows(standby.execute)) == Findings([], [], [])
    assert_serves_all(pool)


def test_a_host_whose_packets_are_dropped_costs_one_connect_timeout(
    pair: Pair, make_pool: MakePool
) -> None:
    """The old connections have ended by then, as tcp_user_timeout would end them."""
    primary, standby = pair
    proxy = Proxy(primary.port)
    try:
        conninfo = conninfo_of(proxy.port, standby.port)
        pool = make_pool(conninfo, max_size=4, connect_timeout=CONNECT_TIMEOUT, outage_grace=0.5)
        appends = Appends(pool, call=append, idempotent=True, timeout=30)
        appends.await_more()
        proxy.mode = Mode.SILENT
        proxy.drop()
        primary.power_off()
        standby.promote()
        promoted = time.monotonic()
        appends.await_more()
        history = appends.stop()
    finally:
        proxy.close()
    assert history.first_after(promoted) < CONNECT_TIMEOUT + 1.0
    assert history.errors == []
    assert check(history.outcomes, rows(standby.execute)) == Findings([], [], [])
    assert_serves_all(pool)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (iproute2)")
def test_a_host_that_vanishes_from_the_network_costs_one_connect_timeout() -> None:
    """Its packets are really dropped, also on established connections."""
    command = [*unshared("--net"), sys.executable, "-m", "tests.faults.vanishing_host"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == found["wrong"] == []
    assert found["seconds"] < CONNECT_TIMEOUT + 1.0


@pytest.mark.parametrize(
    "reached", [True, False], ids=["standby has the rows", "standby lacks the rows"]
)
def test_commits_in_flight_at_a_failover_are_uncertain(
    pair: Pair, make_pool: MakePool, reached: bool
) -> None:
    """The primary dies while four commits wait for the standby, which has their rows or not."""
    primary, standby = pair
    pool = make_pool(conninfo_of(primary.port, standby.port), max_size=4, outage_grace=0.5)
    appends = Appends(pool, call=append_blindly, timeout=30)
    appends.await_more()
    if reached:
        primary.execute("alter system set synchronous_commit = remote_apply")
        primary.reload()
        standby.execute("select pg_wal_replay_pause()")
    else:
        ((receiver,),) = standby.execute("select pid from pg_stat_wal_receiver")
        standby.freeze([receiver])
    waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
    until(lambda: primary.execute(waiting) == [(4,)], 20.0)
    primary.power_off()
    if not reached:
        os.kill(receiver, signal.SIGTERM)  # it stops reading from its socket
    standby.thaw()
    standby.promote()
    appends.await_more()
    history = appends.stop()
    uncertain = [n for n, outcome in history.outcomes.items() if outcome == "uncertain"]
    counts = rows(standby.execute)
    assert len(uncertain) == len(history.errors) == 4, history.errors
    assert [counts[n] for n in uncertain] == [int(reached)] * 4
    assert check(history.outcomes, counts) == Findings([], [], [])
    assert_serves_all(pool)


def test_a_switchover_and_back_fails_no_caller(pair: Pair, make_pool: MakePool) -> None:
    """The primary is stopped and comes back as a standby of the new primary."""
    primary, standby = pair
    primary.execute("alter system set synchronous_standby_names = ''")
    pool = make_pool(conninfo_of(primary.port, standby.port), max_size=4, outage_grace=0.5)
    appends = Appends(pool, call=append, idempotent=True, timeout=30)
    for former, next_one in ((primary, standby), (standby, primary)):
        appends.await_more()
        former.stop("fast")
        next_one.promote()
        former.options.pop("synchronous_standby_names", None)
        rejoin(former, next_one)
        await_streaming(next_one)
        appends.await_more()
    history = appends.stop()
    assert history.errors == []
    assert check(history.outcomes, rows(primary.execute)) == Findings([], [], [])
    assert_serves_all(pool)


def test_a_replica_falls_back_to_the_primary_and_returns(pair: Pair, make_pool: MakePool) -> None:
    primary, standby = pair
    primary.execute("set synchronous_commit = local; insert into appends values (1)")
    until(lambda: rows(standby.execute) == Counter([1]))
    conninfo = conninfo_of(primary.port, standby.port, wanted="prefer-standby")
    pool = make_pool(conninfo, min_size=2, max_size=2)
    fill(pool)
    assert is_standby(pool)
    standby.stop("immediate")
    assert pool.run(count, timeout=10) == 1
    assert not is_standby(pool)
    standby.start()
    await_streaming(primary)
    until(lambda: is_standby(pool), 20.0, pause=0.05)
    assert pool.stats().counters.circuit_opened == 0


def is_standby(pool: Pool[Any]) -> bool:
    return bool(pool.fetch_value("select pg_is_in_recovery()"))


def count(conn: Any) -> int:
    return int(conn.execute("select count(*) from appends").fetchone()[0])


# The check of the history itself


OUTCOMES = st.dictionaries(
    st.integers(0, 20), st.sampled_from(["acknowledged", "uncertain", "failed"]), max_size=20
)


@given(outcomes=OUTCOMES, present=st.lists(st.integers(0, 20)))
def test_the_history_finds_every_wrong_outcome(outcomes: Any, present: list[int]) -> None:
    found = check(outcomes, Counter(present))
    assert (found.lost == []) == all(
        n in present for n, outcome in outcomes.items() if outcome == "acknowledged"
    )
    assert (found.duplicated == []) == (len(present) == len(set(present)))
    reported = {n for n, outcome in outcomes.items() if outcome != "failed"}
    assert (found.unexpected == []) == (set(present) <= reported)
