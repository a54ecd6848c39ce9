"""A pool behind PgBouncer: its own words, and its end. Needs Debian's `pgbouncer`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from dbpool import DatabaseMisconfigured, DatabaseUnavailable
from dbpool.errors import classify
from tests.postgres import Server, free_port, spawn, until
from webapp.embedded import server_user

from .steps import GRACE, Task, await_up, fill
from .support import MakePool

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no pgbouncer here")

MOST_CLIENTS = 6

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
max_client_conn = {most_clients}
query_wait_timeout = 1
server_login_retry = 0.1
server_idle_timeout = 0.5
logfile = {directory}/log
"""


class Bouncer:
    """PgBouncer in front of *server*, in transaction mode."""

    def __init__(self, server: Server) -> None:
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
            most_clients=MOST_CLIENTS,
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
        # An absolute path stays one.
        self._process = spawn(str(PROGRAM), "-q", self._config, output=subprocess.DEVNULL)
        until(lambda: self._is_up() or self._process.poll() is not None)
        assert self._process.poll() is None, self._log.read_text()

    def _is_up(self) -> bool:
        try:
            psycopg.connect(self.conninfo_for()).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL: its clients find their connections closed."""
        self._process.kill()
        self._process.wait(10)

    def conninfo_for(self, **params: object) -> str:
        """The connection string of its one user."""
        ours: dict[str, object] = {"port": self.port, "user": "app", "password": "right"}
        return self._server.conninfo_for(**{**ours, **params})


@pytest.fixture
def bouncer(own_server: Server) -> Iterator[Bouncer]:
    own_server.execute("create role app login password 'right'")
    bouncer = Bouncer(own_server)
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
def test_what_it_says_is_understood(bouncer: Bouncer, kind: str, params: dict[str, object]) -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(bouncer.conninfo_for(**params))
    assert classify(caught.value) == kind


def test_it_takes_no_timeouts_at_the_start_and_the_error_says_what_to_set(
    bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(bouncer.conninfo_for())
    with pytest.raises(DatabaseMisconfigured, match="DBPOOL_POOLER=transaction") as caught:
        pool.fetch_value("select 1")
    assert caught.value.kind == "conninfo"
    told = pool.stats().breaker.last_error or ""  # by the log and the views too
    assert "DBPOOL_POOLER=transaction" in told
    assert "right" not in told


def test_a_pool_works_through_it(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", max_size=4)
    for _ in range(20):  # a prepared statement would be left on another's server connection
        assert pool.fetch_value("select %s::int + 1", [1]) == 2
        assert pool.run(lambda conn: conn.execute("select 2").fetchone()) == (2,)
    pool.check()
    assert pool.stats().counters.discarded["dead"] == 0


def test_begin_goes_through_it_with_the_first_statement(
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


def test_its_end_is_met_like_a_servers(bouncer: Bouncer, make_pool: MakePool) -> None:
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


def test_its_restart_costs_nobody_an_error(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", min_size=3, max_size=3)
    fill(pool)
    bouncer.kill()
    bouncer.start()
    assert [pool.fetch_value("select 1") for _ in range(10)] == [1] * 10


def test_full_it_is_no_outage_while_connections_live(bouncer: Bouncer, make_pool: MakePool) -> None:
    pool = make_pool(
        bouncer.conninfo_for(),
        pooler="transaction",
        max_size=MOST_CLIENTS + 2,
        outage_grace=GRACE,
    )
    held = [pool.getconn() for _ in range(MOST_CLIENTS)]
    waiter = Task(pool.fetch_value, "select 1")
    until(lambda: pool.stats().counters.connect_failures >= 2)
    assert (pool.state, pool.breaker.kind) == ("up", "saturated")
    for conn in held:
        pool.putconn(conn)
    assert waiter.result() == 1


def test_a_server_that_restarts_behind_it_is_met_by_its_own_word(
    own_server: Server, bouncer: Bouncer, make_pool: MakePool
) -> None:
    pool = make_pool(bouncer.conninfo_for(), pooler="transaction", min_size=2, max_size=2)
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
