"""A user's type checker sees precise types, needs no annotations, and finds mistakes."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from psycopg_pool import ConnectionPool

from dbpool import Settings
from dbpool.pool._options import Options

ROOT = Path(__file__).parent.parent

USE = """\
from typing import Any

import psycopg
from flask import Flask
from psycopg.rows import class_row, dict_row
from psycopg_pool import ConnectionPool

import dbpool
from dbpool.flask import DBPool, create_blueprint


class Note:
    pass


def insert(conn: psycopg.Connection, number: int) -> str:
    return str(number)


def library(pool: ConnectionPool[psycopg.Connection[tuple[Any, ...]]]) -> None: ...


tuned = dbpool.Pool("", max_size=4, ping_after="10s", outage_grace=1, kwargs={"autocommit": True})

with dbpool.Pool() as pool:
    reveal_type(pool)  # Pool[Connection[tuple[Any, ...]]]
    with pool.connection(timeout=1) as conn:
        reveal_type(conn)  # Connection[tuple[Any, ...]]
    reveal_type(pool.getconn())  # Connection[tuple[Any, ...]]
    reveal_type(pool.fetch_all("select 1"))  # list[Any]
    reveal_type(pool.fetch_all("select 1", row_factory=dict_row))  # list[dict[str, Any]]
    reveal_type(pool.fetch_one("select 1", [1], row_factory=class_row(Note)))  # Note | None
    reveal_type(pool.execute("select 1"))  # int
    reveal_type(pool.run(insert, 1))  # str
    reveal_type(pool.stats().wait.quantile(0.99))  # float
    reveal_type(pool.holders()[0].endpoint)  # str | None
    library(pool)

generic = dbpool.Pool(connection_class=psycopg.Connection[dict[str, Any]])
with generic.connection() as generic_conn:
    reveal_type(generic_conn)  # Connection[dict[str, Any]]
    reveal_type(generic_conn.execute("select 1").fetchone())  # dict[str, Any] | None

rows: dbpool.Pool[psycopg.Connection[dict[str, Any]]] = dbpool.Pool(
    kwargs={"row_factory": dict_row}
)
with rows.connection() as dict_conn:
    reveal_type(dict_conn.execute("select 1").fetchone())  # dict[str, Any] | None

databases = dbpool.Databases.from_env()
reveal_type(list(databases))  # list[str]
reveal_type(databases.default)  # Pool[Any]

db = DBPool()
db.init_app(Flask(__name__))
reveal_type(db.pool)  # Pool[Any]
reveal_type(db["replica"])  # Pool[Any]
reveal_type(db.health.ready().is_ready)  # bool
reveal_type(create_blueprint(authorize=lambda: True))  # Blueprint

try:
    pool.fetch_value("select 1")
except dbpool.DatabaseUnavailable as ex:
    reveal_type(ex.retry_after)  # float
except psycopg.OperationalError:
    pass
"""

MISUSE = """\
import dbpool
from dbpool.flask import create_blueprint

pool = dbpool.Pool()
pool.connection(timeout="1s")  # arg-type
pool.conection()  # attr-defined
pool.fetch_all(1)  # arg-type
pool.execute("select 1").fetchall()  # attr-defined
pool.close("now")  # arg-type
dbpool.Pool(max_sise=3)  # call-arg
dbpool.Pool(ping_after=None)  # arg-type
dbpool.Databases()  # call-arg
dbpool.Poool()  # attr-defined
create_blueprint(authorize=True)  # arg-type
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Check both files at once with mypy --strict, without this project's configuration."""
    api = pytest.importorskip("mypy.api")
    home = tmp_path_factory.mktemp("typing")
    (home / "use.py").write_text(USE)
    (home / "misuse.py").write_text(MISUSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("MYPYPATH", str(ROOT))
        out, err, _ = api.run(["--strict", "--no-pretty", "--config-file=", "use.py", "misuse.py"])
    assert err == ""
    return str(out)


def test_a_user_sees_precise_types(mypy: str) -> None:
    revealed = {
        int(line): re.sub(r"\b(?:\w+\.)+(?=\w)", "", kind)
        for line, kind in re.findall(
            r'^use\.py:(\d+): note: Revealed type is "(.*)"$', mypy, re.MULTILINE
        )
    }
    expected = {
        number: line.partition("  # ")[2]
        for number, line in enumerate(USE.splitlines(), 1)
        if "reveal_type" in line
    }
    assert revealed == expected
    assert "use.py" not in {line.partition(":")[0] for line in mypy.splitlines() if "error" in line}


def test_mypy_finds_a_users_mistakes(mypy: str) -> None:
    found = {
        int(line): code
        for line, code in re.findall(
            r"^misuse\.py:(\d+): error: .*\[([\w-]+)\]$", mypy, re.MULTILINE
        )
    }
    expected = {
        number: line.partition("  # ")[2]
        for number, line in enumerate(MISUSE.splitlines(), 1)
        if "  # " in line
    }
    assert found == expected


def test_the_options_are_the_settings_and_psycopg_pools_parameters() -> None:
    parents = inspect.signature(ConnectionPool.__init__).parameters.keys() - {
        "self",
        "conninfo",
        "connection_class",
    }
    settings = {field.name for field in fields(Settings)} - {"conninfo", "explicit"}
    assert Options.__annotations__.keys() == parents | settings
