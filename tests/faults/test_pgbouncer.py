"""A pool behind PgBouncer: its error messages, its shutdown. Needs Debian's `pgbouncer`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dbpool import (
    CommitUncertain,
    DatabaseMisconfigured,
    Databases,
    DatabaseUnavailable,
    Pool,
    Settings,
)
from dbpool.embedded._programs import account_of, server_user, spawn
from dbpool.errors import classify
from dbpool.health import Health
from dbpool.processes import Processes
from tests.pools import GRACE, MakePool, await_up, fill
from tests.postgres import Server, free_port, until
from tests.replication import TABLE, Appends, Findings, append_blindly, check, rows
from tests.threads import Load, Task

PROGRAM = os.environ.get("TEST_PGBOUNCER") or shutil.which(
    "pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin"
)

VERSION = (
    tuple(map(int, re.findall(r"\d+", subprocess.check_output([PROGRAM, "-V"], text=True))[:2]))
    if PROGRAM
    else ()
)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer")

MAX_CLIENTS = 6
THREADS = 4

_CONFIG = """\
[databases]
postgres = host=127.0.0.1 port={server.port}
elsewhere = host=127.0.0.1 port={server.port} dbname=nowhere
nowhere_near = host=127.0.0.1 port={dead_port} connect_query='select 1'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {directory}/users
pool_mode = transaction
max_client_conn = {max_clients}
query_wait_timeout = {query_wait_timeout}
default_pool_size = {size}
server_login_retry = 0.1
server_idle_timeout = 0.5
admin_users = app
logfile = {directory}/log
{extra}
"""


class Bouncer:
    """PgBouncer in front of *server*, in transaction mode."""

    def __init__(
        self, server: Server, size: int = 20, query_wait_timeout: float = 1.0, extra: str = ""
    ) -> None:
        self._server = server
        self.port = free_port()
        self._directory = server.directory / "bouncer"
        self._directory.mkdir()
        self._write("users", '"app" "right"\n')
        config = _CONFIG.format(
            server=server,
            dead_port=free_port(),
            port=self.port,
            directory=self._directory,
            max_clients=MAX_CLIENTS,
            size=size,
            query_wait_timeout=query_wait_timeout,
            extra=extra,
        )
        self._config = self._write("ini", config)
        self._log = self._write("log", "")
        if user := server_user():
            shutil.chown(self._directory, user)

    def _write(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.write_text(text)
        if user := server_user():
            shutil.chown(path, user)
        return path

    def start(self) -> None:
        # The file needs an absolute path.
        self._process = spawn(
            [PROGRAM, "-q", self._config], subprocess.DEVNULL, account_of(server_user())
        )
        until(lambda: self._is_up() or self._process.poll() is not None)
        assert self._process.poll() is None, self._log.read_text()

    def _is_up(self) -> bool:
        try:
            psycopg.connect(self.conninfo_for()).close()
        except psycopg.OperationalError:
            return False
        return True

    def shut_down_safely(self) -> None:
        """SIGINT: a safe shutdown, which waits for transactions to end."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def log(self) -> str:
        """Return PgBouncer's log."""
        return self._log.read_text()

    def command(self, text: str) -> None:
        """Run a command on its admin console."""
        conninfo = self.conninfo_for(dbname="pgbouncer")
        with psycopg.connect(conninfo, autocommit=True) as console:
            console.execute(text)

    def kill(self) -> None:
        """SIGKILL: its clients find their connections closed."""
        self._process.kill()
        self._process.wait(10)

    def conninfo_for(self, **params: object) -> str:
        """A connection string for its only user."""
        defaults: dict[str, object] = {"port": self.port, "user": "app", "password": "right"}
        return self._server.conninfo_for(**{**defaults, **params})


@pytest.fixture
def bouncer(own_server: Server) -> Iterator[Bouncer]:
    own_server.execute("create role app login password 'right'")
    bouncer = Bouncer(own_server)
    bouncer.start()
    yield bouncer
    bouncer.kill()


@pytest.fixture
def small_bouncer(own_server: Server) -> Iterator[Bouncer]:
    """PgBouncer with a single server connection, for which clients wait long."""
    own_server.execute("create role app login password 'right'")
    bouncer = Bouncer(own_server, size=1, query_wait_timeout=30.0)
    bouncer.start()
    yield bouncer
    bouncer.kill()


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("password", {"password": "wrong"}),
        ("password", {"user": "nobody"}),
        ("database", {"dbname": "missing"}),
        ("database", {"dbname": "elsewhere"}),
        ("timeout", {"dbname": "nowhere_near"}),
        ("tls", {"sslmode": "require"}),
    ],
)
def test_pgbouncers_errors_are_classified(
    bouncer: Bouncer, kind: str, params: dict[str, object]
) -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(bouncer.conninfo_for(**params))
    assert classify(caught.value) == kind


def test_the_error_of_a_pool_not_set_up_for_pgbouncer_names_the_setting(
    bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(bouncer.conninfo_for())
    with pytest.raises(DatabaseMisconfigured, match="DBPOOL_POOLER=transaction") as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "conninfo"
    error = pool.stats().breaker.last_error or ""  # what the log and the views show
    assert "DBPOOL_POOLER=transaction" in error
    assert "right" not in error


@pytest.fixture
def bouncer_in_mode(own_server: Server) -> Iterator[Callable[[str], Bouncer]]:
    """A function that starts a PgBouncer in the given mode."""
    with ExitStack() as bouncers:

        def start(mode: str) -> Bouncer:
            own_server.execute("create role app login password 'right'")
            bouncer = Bouncer(own_server, extra=f"pool_mode = {mode}")
            bouncer.start()
            bouncers.callback(bouncer.kill)
            return bouncer

        yield start


def test_in_session_mode_the_error_names_the_settings_and_they_work(
    bouncer_in_mode: Callable[[str], Bouncer], make_pool: MakePool
) -> None:
    bouncer = bouncer_in_mode("session")
    with pytest.raises(DatabaseMisconfigured, match="DBPOOL_STATEMENT_TIMEOUT=server"):
        make_pool(bouncer.conninfo_for()).fetch_value("select 1")
    pool = make_pool(
        bouncer.conninfo_for(),
        statement_timeout="server",
        idle_in_transaction_timeout="server",
        session_reset="session",
        max_size=2,
    )
    for _ in range(10):  # psycopg prepares it from the sixth on
        assert pool.fetch_value("select %s::int + 1", [1]) == 2
        with pool.connection() as conn:
            conn.execute("set search_path = elsewhere")
    assert pool.fetch_value("show search_path") != "elsewhere"
    assert pool.stats().counters.connects == 1


def test_a_disabled_database_is_named_in_the_error(bouncer: Bouncer, make_pool: MakePool) -> None:
    bouncer.command("DISABLE postgres")
    with pytest.raises(DatabaseMisconfigured) as caught:
        make_pool(bouncer.conninfo_for(), pooler="transaction").fetch_value("select 1")
    assert caught.value.kind == "database"


def test_in_statement_mode_single_statements_work(
    bouncer_in_mode: Callable[[str], Bouncer], make_pool: MakePool
) -> None:
    conninfo = bouncer_in_mode("statement").conninfo_for()
    pool = make_pool(conninfo, pooler="transaction")
    assert pool.fetch_all("select %s::int", [1]) == [(1,)]
    with pytest.raises(psycopg.errors.ProtocolViolation), pool.connection() as conn:
        conn.execute("select 1")
    assert pool.execute("select 1") == 1
    plain = make_pool(conninfo, pooler="transaction", kwargs={"autocommit": True})
    with plain.connection() as conn:
        assert conn.execute("select 2").fetchone() == (2,)


def test_a_pool_works_through_pgbouncer(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=4)
    for _ in range(20):  # a prepared statement would stay on another server connection
        assert pool.fetch_value("select %s::int + 1", [1]) == 2
        assert pool.run(lambda conn: conn.execute("select 2").fetchone()) == (2,)
    pool.check()
    assert pool.stats().counters.discarded["dead"] == 0


def test_negative_pids_invented_by_pgbouncer_are_reported_as_zero(
    bouncer: Bouncer, make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=5)
    tmp_path.chmod(0o700)
    processes = Processes({"it": pool}, tmp_path)
    with ExitStack() as held:
        pids = [held.enter_context(pool.connection()).info.backend_pid for _ in range(5)]
        processes.publish()
        report = processes.collect_others()
        assert report is not None
        read = sorted(holder.pid or 0 for holder in report.pools["it"].holders)
        assert read == sorted(max(0, pid) for pid in pids)
    processes.close()


def test_a_pool_works_through_pgbouncer_with_pgconnect_timeout_set(
    bouncer: Bouncer, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "3")
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction")
    assert pool.fetch_value("select 1") == 1


def test_begin_and_the_first_statement_go_through_pgbouncer_in_one_trip(
    bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=4, pipeline_begin=True)
    for number in range(20):
        with pool.connection() as conn:
            assert conn.execute("select %s::int + 1", [number]).fetchone() == (number + 1,)
            pid = conn.execute("select pg_backend_pid()").fetchone()
            assert conn.execute("select pg_backend_pid()").fetchone() == pid
        with pytest.raises(psycopg.errors.DivisionByZero), pool.connection() as conn:
            conn.execute("select 1 / %s", [0])
    assert pool.stats().counters.connects <= 4


def test_a_stopped_pgbouncer_is_an_outage(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(
        bouncer.conninfo_for(), pooler="transaction", min_size=3, max_size=3, outage_grace=GRACE
    )
    fill(pool)
    bouncer.kill()
    with pytest.raises(DatabaseUnavailable) as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "refused"
    bouncer.start()
    await_up(pool)
    assert pool.fetch_value("select 1") == 1


def test_a_restart_of_pgbouncer_fails_no_caller(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", min_size=3, max_size=3)
    fill(pool)
    bouncer.kill()
    bouncer.start()
    assert [pool.fetch_value("select 1") for _ in range(10)] == [1] * 10


@pytest.fixture
def append_pool(bouncer: Bouncer, own_server: Server, make_pool: MakePool) -> Pool[Any]:
    """A pool through PgBouncer, with a table to which tests append."""
    own_server.execute(TABLE)
    own_server.execute("grant all on appends to app")
    return make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=THREADS)


def test_a_safe_shutdown_under_load_fails_no_run(
    bouncer: Bouncer, own_server: Server, append_pool: Pool[Any]
) -> None:
    appends = Appends(append_pool, call=append_blindly, threads=THREADS, timeout=30)
    for _ in range(3):
        appends.await_more()
        bouncer.shut_down_safely()
        bouncer.start()
    appends.await_more()
    history = appends.stop()
    assert history.errors == []
    assert check(history.outcomes, rows(own_server.execute)) == Findings([], [], [])


def test_a_safe_shutdown_under_load_fails_no_single_statement(
    bouncer: Bouncer, own_server: Server, append_pool: Pool[Any]
) -> None:
    """PgBouncer refuses a statement before the server gets it, and the pool sends it again.

    Before 1.23 it kept such clients waiting, and closed their connections without an error.
    """
    load = Load(lambda: append_pool.execute("insert into appends values (1)"), threads=THREADS)
    for _ in range(3):
        load.await_calls()
        bouncer.shut_down_safely()
        bouncer.start()
    load.await_calls()
    load.stop()
    assert len(load.errors) <= (0 if VERSION >= (1, 23) else 3 * THREADS), load.errors
    assert all(isinstance(error, CommitUncertain) for error in load.errors)
    ((count,),) = own_server.execute("select count(*) from appends")
    assert load.calls - len(load.errors) <= count <= load.calls


def test_a_statement_with_query_wait_timeout_is_sent_again(
    bouncer: Bouncer, own_server: Server, make_pool: MakePool
) -> None:
    """The server never got it, so its outcome is not uncertain."""
    own_server.execute(TABLE)
    own_server.execute("grant all on appends to app")
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=4, timeout=20)
    bouncer.command("PAUSE")
    append = Task(pool.execute, "insert into appends values (1)")
    until(lambda: "query_wait_timeout" in bouncer.log())
    bouncer.command("RESUME")
    assert append.result() == 1
    assert own_server.execute("select count(*) from appends") == [(1,)]


def test_a_write_refused_because_of_a_failed_login_is_not_uncertain(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool
) -> None:
    own_server.execute(TABLE)
    own_server.execute("grant all on appends to app")
    pool = make_pool(
        bouncer.conninfo_for(), pooler="transaction", max_size=1, outage_grace=GRACE, timeout=1
    )
    fill(pool)
    stop_behind(pool, own_server)
    with pytest.raises(DatabaseUnavailable) as caught:
        pool.execute("insert into appends values (1)")
    assert caught.value.kind == "refused"


def test_killing_pgbouncer_under_load_fails_only_statements_in_flight(
    bouncer: Bouncer, own_server: Server, append_pool: Pool[Any]
) -> None:
    load = Load(lambda: append_pool.execute("insert into appends values (1)"), threads=THREADS)
    load.await_calls()
    bouncer.kill()
    bouncer.start()
    load.await_calls()
    load.stop()
    assert len(load.errors) <= THREADS, load.errors
    assert all(isinstance(error, CommitUncertain) for error in load.errors), load.errors
    ((count,),) = own_server.execute("select count(*) from appends")
    acknowledged = load.calls - len(load.errors)
    assert acknowledged <= count <= load.calls


def test_a_full_pgbouncer_is_no_outage_while_connections_live(
    bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(
        bouncer.conninfo_for(),
        pooler="transaction",
        max_size=MAX_CLIENTS + 2,
        outage_grace=GRACE,
    )
    held = [pool.getconn() for _ in range(MAX_CLIENTS)]
    waiter = Task(pool.fetch_value, "select 1")
    until(lambda: pool.stats().counters.connect_failures >= 2)
    assert (pool.state, pool.breaker.kind) == ("up", "saturated")
    for conn in held:
        pool.putconn(conn)
    assert waiter.result() == 1


def stop_behind(pool: Pool[Any], server: Server, mode: str = "fast") -> None:
    """Stop the server and wait until PgBouncer has noticed: its logins fail from then on."""
    server.stop(mode)
    until(lambda: _login_fails(pool))


def _login_fails(pool: Pool[Any]) -> bool:
    try:
        pool.fetch_value("select 1")
    except psycopg.OperationalError as ex:
        return "login has been failing" in str(ex) or isinstance(ex, DatabaseUnavailable)
    return False


@pytest.mark.parametrize("min_size", [0, 1, 4])
def test_a_dead_server_behind_pgbouncer_is_an_outage(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool, min_size: int
) -> None:
    pool = make_pool(
        bouncer.conninfo_for(),
        pooler="transaction",
        min_size=min_size,
        max_size=4,
        outage_grace=GRACE,
        timeout=3,
    )
    fill(pool)
    connects = pool.stats().counters.connects
    stop_behind(pool, own_server)
    errors = []
    began = time.monotonic()
    while pool.state != "down":
        with pytest.raises(psycopg.OperationalError) as caught:
            pool.fetch_value("select 1")
        errors.append(caught.value)
        assert time.monotonic() - began < 10.0
    assert pool.stats().counters.connects - connects <= 4, "a login to PgBouncer alone counts"
    until(lambda: pool.breaker.kind == "refused")
    for _ in range(50):
        with pytest.raises(DatabaseUnavailable) as refused:
            pool.fetch_value("select 1")
        assert refused.value.kind == "refused"
    assert {type(error) for error in errors} <= {DatabaseUnavailable}, "a view would not answer 503"
    own_server.start()
    await_up(pool, 5.0)
    assert pool.fetch_value("select 1") == 1


@pytest.mark.parametrize("use", ["fetch", "block", "statement in a block", "run"])
def test_pgbouncers_error_for_a_failed_login_counts_as_a_failed_connect(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool, use: str
) -> None:
    pool = make_pool(
        bouncer.conninfo_for(), pooler="transaction", min_size=3, max_size=3, outage_grace=GRACE
    )
    fill(pool)
    spare = make_pool(
        bouncer.conninfo_for(), pooler="transaction", max_size=1, outage_grace=GRACE, timeout=1
    )
    fill(spare)
    stop_behind(spare, own_server)
    spare.close()
    with pytest.raises(DatabaseUnavailable) as caught:
        if use == "fetch":
            pool.fetch_value("select 1")
        elif use == "run":
            pool.run(lambda conn: conn.execute("select 1"), attempts=1)
        else:
            with pool.connection() as conn:
                conn.execute("select %s", [1]) if use == "block" else conn.execute("select 1")
    assert caught.value.kind == "refused"
    assert "right" not in f"{caught.value} {caught.value.__cause__}"
    assert pool.stats().idle == 0, "the other connections cannot reach the server either"
    own_server.start()
    until(lambda: _serves(pool.fetch_value))


def test_readiness_notices_a_dead_server_behind_pgbouncer(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool
) -> None:
    """Only the probe uses the pool, and all its connections to PgBouncer work."""
    settings = Settings(
        conninfo=bouncer.conninfo_for(),
        pooler="transaction",
        min_size=3,
        max_size=3,
        outage_grace=GRACE,
    )
    with Databases({"default": settings}) as databases:
        health = Health(databases)
        databases.default.wait()
        assert health.ready().status == "up"
        own_server.stop()
        until(lambda: health.ready().status == "down", 20.0, pause=0.1)
        own_server.start()
        until(lambda: health.ready().status == "up", 20.0, pause=0.1)


def test_a_busy_server_behind_pgbouncer_is_no_outage(
    own_server: Server, small_bouncer: Bouncer, make_pool: MakePool
) -> None:
    """All of PgBouncer's server connections are busy, so pings get no answer in time."""
    pool = make_pool(
        small_bouncer.conninfo_for(),
        pooler="transaction",
        max_size=3,
        outage_grace=GRACE,
        ping_after=0.0,
        ping_timeout=0.2,
    )
    with ThreadPoolExecutor(3) as threads:
        conns = [pool.getconn() for _ in range(3)]
        for conn in conns[1:]:
            pool.putconn(conn)
        busy = threads.submit(conns[0].execute, "select pg_sleep(2)")
        until(lambda: own_server.execute(
            "select 1 from pg_stat_activity where query = 'select pg_sleep(2)' and state = 'active'"
        ))  # fmt: skip
        with pytest.raises(DatabaseUnavailable) as caught:
            pool.getconn(timeout=0.5)  # both its ping and a new connection's ping wait
        assert caught.value.kind in {"saturated", "timeout", "unknown"}
        assert pool.state == "up"
        assert pool.stats().counters.discarded["dead"] <= 2
        busy.result()
        conns[0].rollback()
        pool.putconn(conns[0])
        assert pool.stats().counters.circuit_opened == 0
        until(lambda: _serves(pool.fetch_value))


def test_a_stopped_server_behind_pgbouncer_has_kind_timeout_or_refused(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(
        bouncer.conninfo_for(), pooler="transaction", min_size=2, max_size=2, timeout=1
    )
    fill(pool)
    own_server.stop()
    errors = []
    for _ in range(2):
        with pytest.raises(psycopg.OperationalError) as caught:
            pool.fetch_value("select 1")
        errors.append(classify(caught.value))
    assert set(errors) <= {"timeout", "refused"}
    own_server.start()
    until(lambda: _serves(pool.fetch_value))


def _serves(fetch: Callable[[str], object]) -> bool:
    try:
        return fetch("select 1") == 1
    except psycopg.OperationalError:
        return False


@pytest.fixture
def ignoring_bouncer(own_server: Server) -> Iterator[Bouncer]:
    """PgBouncer that accepts startup options and ignores them."""
    own_server.execute("create role app login password 'right'")
    bouncer = Bouncer(own_server, extra="ignore_startup_parameters = options")
    bouncer.start()
    yield bouncer
    bouncer.kill()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"statement_timeout": 5, "idle_in_transaction_timeout": 6},
        {"kwargs": {"options": "-c work_mem=5MB"}, "statement_timeout": "server"},
    ],
)
def test_a_pooler_that_ignores_options_is_logged_once(
    ignoring_bouncer: Bouncer,
    make_pool: MakePool,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, object],
) -> None:
    pool = make_pool(ignoring_bouncer.conninfo_for(), min_size=3, max_size=3, **options)
    fill(pool)
    pool.fetch_one("select 1")
    pool.drain()
    fill(pool)
    (text,) = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert "DBPOOL_POOLER=transaction" in text
    assert ("work_mem" if "kwargs" in options else "statement_timeout") in text


def test_a_declared_pooler_that_ignores_options_is_not_logged(
    ignoring_bouncer: Bouncer, make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(ignoring_bouncer.conninfo_for(), pooler="transaction")
    pool.fetch_one("select 1")
    assert "ignored" not in caplog.text
