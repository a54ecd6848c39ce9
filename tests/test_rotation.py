"""Rotating a password as docs/secrets.md describes fails no request."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg

from dbpool import Pool, Settings

from .postgres import Server, binaries, until
from .threads import Load


def write(path: Path, text: str) -> None:
    """Write a new file and rename it, as the page does."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


PAGE = Path(__file__).parent.parent / "docs" / "secrets.md"
TERMINAL = "import pty, sys; sys.exit(pty.spawn(['sh', '-c', sys.argv[1]]))"  # psql asks on one


def test_the_commands_of_the_page_change_a_password(own_server: Server, tmp_path: Path) -> None:
    commands = "\n".join(
        re.findall(r"^ +```sh\n(.*?)^ +```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    )
    commands = re.sub("^ +", "", commands, flags=re.MULTILINE)
    commands = commands.replace("/run/secrets", str(tmp_path)).replace("--host db ", "")
    write(tmp_path / "app_password", "old\n")
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute("create role app login password 'old'")
        admin.execute("create database app")
    environ = {
        "PATH": f"{binaries()}{os.pathsep}{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": f"{own_server.port}",
        "PGPASSWORD": "old",
    }
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL, commands],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            output = b""
            for prompt in (b"password", b"again"):
                while not re.search(prompt + rb"[^\n]*: $", output):
                    more = os.read(process.stdout.fileno(), 1024)
                    assert more, output
                    output += more
                password = re.findall(rb"[0-9a-f]{48}", output)[0]
                process.stdin.write(password + b"\n")
                process.stdin.flush()
            output += process.stdout.read()
            assert process.wait(30) == 0, output
        finally:
            process.kill()
    changed = (tmp_path / "app_password").read_text().strip()
    assert changed == password.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["app_password"]
    psycopg.connect(own_server.conninfo_for(user="app", password=changed, dbname="app")).close()


def test_the_server_and_then_the_file_change_under_load(own_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "password"
    write(file, "old\n")
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute("create role app login password 'old'")
        settings = Settings(
            conninfo=own_server.conninfo_for(user="app"),
            password_file=str(file),
            max_size=4,
            # New connections are made all the time. The last old one must live until the first
            # failure is known, which may take a second on a busy machine.
            max_lifetime=4.0,
            outage_grace=0.05,  # shorter than the time until the file changes
        )
        with Pool(settings=settings) as pool:
            load = Load(lambda: pool.fetch_value("select 1"), threads=4)
            load.await_calls(100)
            admin.execute("alter role app password 'new'")
            until(lambda: pool.stats().counters.connect_failures > 0)  # the old password fails
            load.await_calls(500)
            write(file, "new\n")
            connects = pool.stats().counters.connects
            until(lambda: pool.stats().counters.connects > connects)
            load.await_calls(100)
            load.stop()
            assert load.errors == []


def test_another_role_takes_over_under_load(own_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "url"
    write(file, own_server.conninfo_for(user="app_a", password="a"))
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute("create role app")
        admin.execute("create role app_a login in role app password 'a'")
        settings = Settings(conninfo_file=str(file), max_size=4, max_lifetime=0.2)
        with Pool(settings=settings) as pool:
            load = Load(lambda: pool.fetch_value("select 1"), threads=4)
            load.await_calls(100)
            admin.execute("create role app_b login in role app password 'b'")
            write(file, own_server.conninfo_for(user="app_b", password="b"))
            query = "select count(*) from pg_stat_activity where usename = 'app_a'"
            until(lambda: admin.execute(query).fetchone() == (0,))
            admin.execute("alter role app_a nologin")
            load.await_calls(100)
            load.stop()
            assert load.errors == []
            assert pool.fetch_value("select current_user") == "app_b"
