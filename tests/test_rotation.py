"""A password is rotated as docs/secrets.md says, and no request fails by it."""

from __future__ import annotations

from pathlib import Path

import psycopg

from dbpool import Pool, Settings

from .postgres import Server, until
from .threads import Load


def write(path: Path, text: str) -> None:
    """As the page does: beside it, and then in its place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_the_server_and_then_the_file_change_under_load(own_server: Server, tmp_path: Path) -> None:
    file = tmp_path / "password"
    write(file, "old\n")
    with psycopg.connect(own_server.conninfo, autocommit=True) as admin:
        admin.execute("create role app login password 'old'")
        settings = Settings(
            conninfo=own_server.conninfo_for(user="app"),
            password_file=str(file),
            max_size=4,
            max_lifetime=2.0,  # so that there are new connections all the time, one by one
            outage_grace=0.05,  # it takes longer than that until the file changes
        )
        with Pool(settings=settings) as pool:
            load = Load(lambda: pool.fetch_value("select 1"), threads=4)
            load.await_calls(100)
            admin.execute("alter role app password 'new'")
            until(lambda: pool.stats().counters.connect_failures > 0)  # it meets the old password
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
