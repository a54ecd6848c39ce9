"""What a holder changes on a connection, and what the pool restores."""

from __future__ import annotations

from typing import Any

from psycopg import Connection, IsolationLevel
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader

from dbpool import Pool
from tests.interrupts import every_point


class UppercaseLoader(TextLoader):
    def load(self, data: Any) -> str:
        return str(super().load(data)).upper()


def test_session_attributes_are_restored(server_pool: Pool) -> None:
    with server_pool.connection() as conn:
        conn.autocommit = True
        conn.row_factory = dict_row  # type: ignore[assignment]
        conn.isolation_level = IsolationLevel.SERIALIZABLE
        conn.read_only = True
        conn.deferrable = True
        conn.prepare_threshold = None
        conn.prepared_max = 3
        conn.execute("select 1")
    with server_pool.connection() as same:
        assert same is conn
        assert same.autocommit is False
        assert same.row_factory is tuple_row
        assert same.isolation_level is None
        assert same.read_only is None
        assert same.deferrable is None
        assert (same.prepare_threshold, same.prepared_max) == (5, 100)
        assert same.execute("show transaction_isolation").fetchone() == ("read committed",)


def test_a_holders_adapters_are_removed_and_those_of_configure_stay(
    dsn: str,
) -> None:
    def configure(conn: Connection[Any]) -> None:
        conn.adapters.register_loader("varchar", UppercaseLoader)

    def fetch(conn: Connection[Any]) -> list[Any]:
        query = "select 'a'::text, 'b'::varchar, 'c'::name"
        return list(conn.execute(query).fetchone() or ())

    with Pool(dsn, max_size=1, configure=configure) as pool:
        for name in ("text", "varchar", "name"):
            assert list(pool.fetch_one("select 'a'::text, 'b'::varchar") or ()) == ["a", "B"]
            with pool.connection() as conn:
                conn.adapters.register_loader(
                    name, TextLoader if name == "varchar" else UppercaseLoader
                )
                assert fetch(conn) == [
                    "A" if name == "text" else "a",
                    "b" if name == "varchar" else "B",
                    "C" if name == "name" else "c",
                ]
            conn = pool.getconn()
            assert fetch(conn) == ["a", "B", "c"]
            pool.putconn(conn)  # the pool rolls its transaction back


def test_an_interrupted_return_passes_no_session_settings_to_the_next_holder(dsn: str) -> None:
    with Pool(dsn, max_size=1, timeout=5, leak_after=0.4, session_reset="session") as pool:
        held: list[Connection] = []

        def change() -> None:
            held.append(pool.getconn())
            held[0].execute("set work_mem = '3MB'")
            held[0].commit()

        change()
        for _ in every_point(lambda: pool.putconn(held.pop())):
            held.clear()
            assert pool.fetch_value("show work_mem") != "3MB"
            change()
        pool.putconn(held.pop())
