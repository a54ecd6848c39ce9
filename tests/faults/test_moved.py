"""The primary has moved to another server."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg
import pytest
from psycopg.errors import ReadOnlySqlTransaction

from dbpool import DatabaseUnavailable, Pool
from tests.pools import GRACE, MakePool, assert_serves_all, await_up, fill
from tests.postgres import Server, until

PID = "select pg_backend_pid()"


@pytest.fixture
def standby(make_server: Callable[..., Server]) -> Server:
    """A hot standby that follows no primary."""
    server = make_server()
    server.execute("create table t (id int)")
    server.stop()
    server.demote()
    server.start()
    return server


@pytest.fixture
def primary(own_server: Server) -> Server:
    own_server.execute("create table t (id int)")
    return own_server


def writable_of(*servers: Server) -> str:
    ports = ",".join(str(server.port) for server in servers)
    hosts = ",".join(["127.0.0.1"] * len(servers))
    return servers[0].conninfo_for(host=hosts, port=ports, target_session_attrs="read-write")


def fence(server: Server) -> None:
    """Make the server read-only; its connections stay."""
    server.execute("alter system set default_transaction_read_only = on")
    server.reload()
    until(lambda: server.execute("show default_transaction_read_only") == [("on",)])


def rows(server: Server) -> int:
    ((count,),) = server.execute("select count(*) from t")
    return int(count)


def insert(conn: psycopg.Connection[Any]) -> None:
    conn.execute("insert into t values (1)")


def by_statement(pool: Pool) -> None:
    pool.execute("insert into t values (1)")


def by_block(pool: Pool) -> None:
    with pool.connection() as conn:
        insert(conn)


def by_run(pool: Pool) -> None:
    pool.run(insert)


@pytest.mark.parametrize("write", [by_statement, by_block, by_run])
def test_one_failed_write_moves_the_pool_to_the_new_primary(
    primary: Server, standby: Server, make_pool: MakePool, write: Callable[[Pool], None]
) -> None:
    pool = make_pool(writable_of(primary, standby), min_size=4)
    assert set(fill(pool)) == set(primary.backends("dbpool:faults"))
    write(pool)
    assert rows(primary) == 1
    standby.promote()
    fence(primary)
    with pytest.raises(ReadOnlySqlTransaction):
        write(pool)
    for _ in range(20):
        write(pool)
    assert (rows(primary), rows(standby)) == (1, 20)
    until(lambda: not primary.backends("dbpool:faults"))
    assert_serves_all(pool)
    pool.close()
    until(lambda: not standby.backends("dbpool:faults"))


def test_holders_that_all_fail_drain_the_pool_once(
    primary: Server, standby: Server, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(writable_of(primary, standby), max_size=3)
    conns = [pool.getconn() for _ in range(3)]
    for conn in conns:
        pool.putconn(conn)
    standby.promote()
    fence(primary)
    blocks = [pool.connection() for _ in range(3)]
    held = [block.__enter__() for block in blocks]
    for block, conn in zip(blocks, held, strict=True):
        with pytest.raises(ReadOnlySqlTransaction) as caught:
            insert(conn)
        block.__exit__(caught.type, caught.value, caught.tb)
        assert conn.closed
    assert sum("has moved" in message for message in caplog.messages) == 1
    by_statement(pool)
    assert rows(standby) == 1
    assert_serves_all(pool)
    pool.close()
    until(lambda: not standby.backends("dbpool:faults"))


def test_a_role_without_write_privilege_causes_no_drain(
    primary: Server, make_pool: MakePool
) -> None:
    primary.execute("create role reader login password 'r' in role pg_write_all_data")
    primary.execute("alter role reader set default_transaction_read_only = on")
    pool = make_pool(primary.conninfo_for(user="reader", password="r"), min_size=3)
    pids = set(fill(pool))
    for write in (by_statement, by_block, by_run) * 3:
        with pytest.raises(ReadOnlySqlTransaction):
            write(pool)
    assert set(fill(pool)) == pids
    assert pool.stats().counters.connects == 3


def test_a_write_in_a_read_only_transaction_causes_no_drain(
    primary: Server, make_pool: MakePool
) -> None:
    pool = make_pool(writable_of(primary), min_size=3)
    pids = set(fill(pool))
    with pytest.raises(ReadOnlySqlTransaction):
        pool.run(insert, read_only=True)
    with pytest.raises(ReadOnlySqlTransaction), pool.connection() as conn:
        conn.read_only = True
        insert(conn)
    assert set(fill(pool)) == pids


def test_a_write_on_a_standby_causes_no_drain_and_works_after_its_promotion(
    own_server: Server, standby: Server, make_pool: MakePool
) -> None:
    pool = make_pool(server=standby, max_size=1)
    pid = pool.fetch_value(PID)
    for _ in range(3):
        with pytest.raises(ReadOnlySqlTransaction):
            by_statement(pool)
    assert pool.fetch_value(PID) == pid
    standby.promote()
    until(lambda: standby.execute("select pg_is_in_recovery()") == [(False,)])
    by_statement(pool)
    assert pool.fetch_value(PID) == pid
    assert rows(standby) == 1
    assert_serves_all(pool)


def test_an_outage_of_all_writable_servers_ends_with_the_promotion(
    primary: Server, standby: Server, make_pool: MakePool
) -> None:
    pool = make_pool(writable_of(primary, standby), min_size=2, outage_grace=GRACE)
    fill(pool)
    primary.stop("immediate")
    with pytest.raises(psycopg.OperationalError):
        by_statement(pool)
    until(lambda: pool.state == "down")
    assert pool.breaker.kind in {"standby", "refused"}
    standby.promote()
    await_up(pool, 5.0)
    by_statement(pool)
    assert rows(standby) == 1
    assert_serves_all(pool)
    pool.close()
    until(lambda: not standby.backends("dbpool:faults"))


def test_a_server_of_the_wrong_role_is_named_in_the_error(
    primary: Server, standby: Server, make_pool: MakePool
) -> None:
    for server, wanted in ((standby, "read-write"), (standby, "primary"), (primary, "standby")):
        conninfo = server.conninfo_for(target_session_attrs=wanted)
        pool = make_pool(conninfo, server=server, outage_grace=GRACE)
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn()
        assert caught.value.kind == "standby"
        assert type(caught.value) is DatabaseUnavailable, "a standby may be promoted any moment"


def test_a_server_that_was_promoted_is_asked_for_its_role_again(
    standby: Server, make_pool: MakePool
) -> None:
    pool = make_pool(standby.conninfo, min_size=2)
    pids = fill(pool)
    with pytest.raises(ReadOnlySqlTransaction), pool.connection() as conn:
        conn.execute("select 1")  # this transaction stays read-only
        standby.promote()
        insert(conn)
    assert pool.execute("insert into t values (1)") == 1
    assert pool.fetch_value(PID) not in pids
    assert_serves_all(pool)


def test_a_moved_primary_is_noticed_if_pgtargetsessionattrs_asks_for_one(
    primary: Server, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(min_size=2, max_size=2)
    with monkeypatch.context() as environ:
        environ.setenv("PGTARGETSESSIONATTRS", "read-write")
        fill(pool)
    fence(primary)
    with pytest.raises(ReadOnlySqlTransaction):
        pool.execute("insert into t values (1)")
    assert pool.stats().counters.discarded["expired"] >= 1


def test_run_does_not_repeat_a_transaction_that_cannot_begin(
    standby: Server, make_pool: MakePool
) -> None:
    pool = make_pool(server=standby, conninfo=standby.conninfo)
    calls: list[object] = []
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        pool.run(calls.append, isolation=psycopg.IsolationLevel.SERIALIZABLE)
    assert calls == []
    counters = pool.stats().counters
    assert (counters.retries, counters.connects) == (0, 1), "the connection is kept"


# prefer-standby


def preferring_standby(*servers: Server) -> str:
    ports = ",".join(str(server.port) for server in servers)
    hosts = ",".join(["127.0.0.1"] * len(servers))
    return servers[0].conninfo_for(host=hosts, port=ports, target_session_attrs="prefer-standby")


def await_all_on(pool: Pool[Any], server: Server, seconds: float = 20.0) -> None:
    """Wait until all connections of the pool are to that server."""

    def are_connected() -> bool:
        return set(fill(pool)) <= set(server.backends("dbpool:faults")) and pool.stats().size > 0

    until(are_connected, seconds, pause=0.05)


def test_a_pool_that_prefers_a_standby_goes_back_to_it(
    primary: Server, standby: Server, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dbpool")
    pool = make_pool(preferring_standby(primary, standby), min_size=3, max_size=3)
    assert set(fill(pool)) == set(standby.backends("dbpool:faults"))
    standby.stop()
    assert pool.fetch_value("select pg_is_in_recovery()") is False
    fill(pool)
    with pool.connection() as held:  # while held it is kept, and is replaced on return
        standby.start()
        until(lambda: "a standby is back" in caplog.text, 20.0)
        assert held.execute("select 1").fetchone() == (1,), "a held connection stays open"
    await_all_on(pool, standby)
    assert pool.fetch_value("select pg_is_in_recovery()") is True
    until(lambda: not primary.backends("dbpool:faults"))
    assert pool.stats().counters.circuit_opened == 0


def test_a_pool_that_prefers_a_standby_leaves_one_that_was_promoted(
    primary: Server, standby: Server, make_pool: MakePool
) -> None:
    pool = make_pool(preferring_standby(primary, standby), min_size=2, max_size=2)
    assert set(fill(pool)) == set(standby.backends("dbpool:faults"))
    standby.promote()
    for _ in range(2):
        assert pool.fetch_value("select pg_is_in_recovery()") is False
    primary.stop()
    primary.demote()
    primary.start()
    conns = [pool.getconn() for _ in range(2)]
    for conn in conns:  # each learns with an answer that its server was promoted
        conn.execute("select 1")
        conn.rollback()
        pool.putconn(conn)
    await_all_on(pool, primary)


@pytest.mark.parametrize("wanted", ["prefer-standby", "any", "primary"])
def test_prefer_standby_replaces_nothing_without_a_standby(
    primary: Server, make_pool: MakePool, wanted: str
) -> None:
    conninfo = primary.conninfo_for(target_session_attrs=wanted)
    pool = make_pool(conninfo, min_size=2, max_size=2)
    pids = fill(pool)
    for _ in range(5):
        pool.maintain(monotonic())
    until(lambda: len(primary.backends("dbpool:faults")) == 2)
    assert set(fill(pool)) == set(pids)
    assert pool.stats().counters.connects == 2


def test_prefer_standby_may_be_set_by_the_environment(
    primary: Server, standby: Server, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "prefer-standby")
    hosts, ports = "127.0.0.1,127.0.0.1", f"{primary.port},{standby.port}"
    pool = make_pool(primary.conninfo_for(host=hosts, port=ports))
    standby.stop()
    fill(pool)
    standby.start()
    await_all_on(pool, standby)
