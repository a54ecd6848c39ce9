"""The tests' servers are removed afterwards, also after a killed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dbpool.embedded._programs import servers_in

from .postgres import served, until

ROOT = Path(__file__).resolve().parent.parent

_STARTING = """
import sys
from tests.postgres import Server
server = Server()
server.start()
print(server.directory, flush=True)
sys.stdin.read()
"""


def test_servers_of_a_killed_run_are_stopped_and_removed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _STARTING],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        directory = Path(run.stdout.readline().strip())
        (pid,) = [pid for pid in servers_in(directory / "data") if _is_postmaster(directory, pid)]
        run.kill()
    until(lambda: not directory.exists())
    assert not servers_in(directory / "data", [pid])


def _is_postmaster(directory: Path, pid: int) -> bool:
    return (directory / "data" / "postmaster.pid").read_text().split()[0] == str(pid)


def test_a_server_can_be_killed_and_restarted_and_leaves_nothing() -> None:
    with served() as server:
        server.execute("create table t as select 1")
        server.kill_postmaster()
        assert not server.is_running()
        server.start()
        assert server.execute("select * from t") == [(1,)]
        server.kill_postmaster()
    assert not server.directory.exists()


def test_two_servers_at_once_are_independent() -> None:
    with served(work_mem="5MB") as one, served() as two:
        assert one.port != two.port
        assert one.execute("show work_mem") != two.execute("show work_mem")
