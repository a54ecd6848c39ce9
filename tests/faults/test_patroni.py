"""Kill ten leaders of a Patroni cluster under load. Needs `patroni` and `etcd` on the path."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dbpool import Pool
from dbpool.embedded._programs import server_user
from tests.postgres import binaries, free_port, kill_tree, until
from tests.replication import TABLE, Appends, Findings, append_blindly, check, rows

logger = logging.getLogger(__name__)

PATRONI = shutil.which("patroni")
ETCD = shutil.which("etcd")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATRONI is None, reason="needs patroni (pip install patroni)"),
    pytest.mark.skipif(ETCD is None, reason="needs etcd (Debian's etcd-server)"),
]

NODES = 3
KILLS = 10
# The smallest that Patroni takes: seconds until a leader that vanished with its agent is replaced.
TTL = 20


class Cluster:
    """Three nodes, each a PostgreSQL with a Patroni agent, and the etcd that they share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if user := server_user():
            shutil.chown(directory, user)
        self.ports = [free_port() for _ in range(NODES)]
        self._rest = [free_port() for _ in range(NODES)]
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._client, self._peer = free_port(), free_port()

    def start(self) -> None:
        url = f"http://127.0.0.1:{self._client}"
        self._spawn(
            ETCD, "--data-dir", self._directory / "etcd", "--listen-client-urls", url,
            "--advertise-client-urls", url, "--listen-peer-urls", f"http://127.0.0.1:{self._peer}",
            "--unsafe-no-fsync", log="etcd",
        )  # fmt: skip
        until(lambda: _get(self._client, "/health"), 30.0, pause=0.1)
        for node in range(NODES):
            self._start(node)
            until(lambda node=node: self._role(node), 60.0, pause=0.2)  # type: ignore[misc]

    def _spawn(self, *command: object, log: str) -> subprocess.Popen[bytes]:
        user = server_user()
        with (self._directory / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                env={k: v for k, v in os.environ.items() if not k.startswith(("PG", "ETCD"))},
                cwd="/",
                user=user,
                group="nogroup" if user else None,
                extra_groups=[] if user else None,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _start(self, node: int) -> None:
        path = self._directory / f"{node}.json"  # YAML reads JSON
        path.write_text(json.dumps(self._config(node)))
        self._agents[node] = self._spawn(PATRONI, path, log=str(node))

    def _config(self, node: int) -> dict[str, Any]:
        rules = ["local all all trust", "host all all 127.0.0.1/32 trust",
                 "host replication all 127.0.0.1/32 trust"]  # fmt: skip
        return {
            "scope": "dbpool",
            "name": f"node{node}",
            "restapi": {"listen": f"127.0.0.1:{self._rest[node]}"},
            "etcd3": {"host": f"127.0.0.1:{self._client}"},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL,
                    "loop_wait": 2,
                    "retry_timeout": 5,
                    "primary_start_timeout": 0,  # a dead leader is replaced, not started again
                    "synchronous_mode": True,
                    "postgresql": {"use_pg_rewind": True},
                },
                "initdb": [{"encoding": "UTF8"}, "no-locale", "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.ports[node]}",
                "data_dir": str(self._directory / f"data{node}"),
                "bin_dir": str(binaries()),
                "pgpass": str(self._directory / f"pgpass{node}"),
                "pg_hba": rules,
                "parameters": {
                    "unix_socket_directories": str(self._directory),
                    "fsync": "off",
                    "shared_buffers": "16MB",
                    "max_connections": 40,
                },
                "authentication": {
                    "superuser": {"username": "postgres", "password": "p"},
                    "replication": {"username": "replicator", "password": "r"},
                    "rewind": {"username": "postgres", "password": "p"},
                },
            },
        }

    def _role(self, node: int) -> str | None:
        """Return the role that a node's agent reports; None if its server does not run."""
        log = self._directory / f"{node}.log"
        assert self._agents[node].poll() is None, log.read_text()[-2000:]
        found = _get(self._rest[node], "/patroni")
        return str(found["role"]) if found and found.get("state") == "running" else None

    def leader(self) -> int | None:
        """Return the number of the primary's node."""
        for node in range(NODES):
            if _get(self._rest[node], "/primary") is not None:
                return node
        return None

    def await_healthy(self) -> None:
        """Wait until there is a leader with a synchronous standby."""
        until(self._is_healthy, 90.0, pause=0.2)

    def _is_healthy(self) -> bool:
        roles = [self._role(node) for node in range(NODES)]
        sync = [_get(self._rest[node], "/sync") for node in range(NODES)]
        return None not in roles and self.leader() is not None and any(sync)

    def kill_server(self, node: int) -> None:
        """Kill all processes of a node's server: its agent gives up the leadership."""
        pid = int((self._directory / f"data{node}" / "postmaster.pid").read_text().split()[0])
        kill_tree(pid)

    def kill_node(self, node: int) -> None:
        """Kill agent and server: the other nodes notice when the leader's key expires."""
        agent = self._agents[node]
        agent.kill()
        self.kill_server(node)
        agent.wait(10)

    def revive(self, node: int) -> None:
        """Start the agent of a node again if it was killed."""
        if self._agents[node].poll() is not None:
            self._start(node)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement on the leader."""
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            cursor = conn.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    @property
    def conninfo(self) -> str:
        """A connection string with all nodes and target_session_attrs=read-write."""
        hosts, ports = ",".join(["127.0.0.1"] * NODES), ",".join(map(str, self.ports))
        return (
            f"host={hosts} port={ports} user=postgres password=p dbname=postgres"
            " target_session_attrs=read-write"
        )

    def close(self) -> None:
        for agent in self._agents.values():  # an agent that ends cleanly stops its server too
            agent.terminate()
        for agent in self._agents.values():
            with suppress(subprocess.TimeoutExpired):
                agent.wait(20)
        for node in range(NODES):
            with suppress(OSError, ValueError, IndexError):
                self.kill_server(node)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def _get(port: int, path: str) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as answer:
            return dict(json.loads(answer.read() or b"{}"))
    except (OSError, ValueError):
        return None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Not in pytest's own folder, which the servers' user may not enter.
    directory = Path(tempfile.mkdtemp(prefix="dbpool-patroni-"))
    directory.chmod(0o755)
    cluster = Cluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(directory)


def test_killing_ten_leaders_loses_and_doubles_no_write(cluster: Cluster) -> None:
    cluster.await_healthy()
    cluster.execute(TABLE)
    outages: list[float] = []
    with Pool(cluster.conninfo, max_size=4, connect_timeout=2) as pool:
        appends = Appends(pool, call=append_blindly, threads=3, timeout=60)
        for kill in range(KILLS):
            appends.await_more()
            leader = cluster.leader()
            assert leader is not None
            killed = time.monotonic()
            # Every third time the whole node, which the others notice after TTL seconds.
            (cluster.kill_node if kill % 3 == 2 else cluster.kill_server)(leader)
            until(lambda leader=leader: cluster.leader() not in {leader, None}, 90.0, pause=0.05)  # type: ignore[misc]
            appends.await_more()
            outages.append(appends.history.longest_gap(killed))
            cluster.revive(leader)
            cluster.await_healthy()
        history = appends.stop()
    counts = Counter(history.outcomes.values())
    logger.info("outages %s s; %s", [round(each, 1) for each in outages], dict(counts))
    assert check(history.outcomes, rows(cluster.execute)) == Findings([], [], [])
    assert counts["failed"] == 0, history.errors[:3]
