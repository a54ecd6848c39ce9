"""Async views run in another thread: connections they hold belong to their request."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, jsonify
from flask.typing import ResponseReturnValue
from flask.views import MethodView

from dbpool import Pool
from dbpool.flask import DBPool
from tests.fake import FakeServer
from tests.threads import Task

from .conftest import MakeApp

asgiref = pytest.importorskip("asgiref.sync")


@pytest.fixture
def db() -> DBPool:
    return DBPool()


@pytest.fixture
def app(make_app: MakeApp, fake: FakeServer, db: DBPool) -> Flask:
    return make_app(fake, db=db)


@pytest.fixture
def pool(app: Flask) -> Pool[Any]:
    pool: Pool[Any] = app.extensions["dbpool"].databases.default
    return pool


def endpoints(pool: Pool[Any]) -> list[str | None]:
    with pool.connection():
        return [holder.endpoint for holder in pool.holders()]


def test_a_holder_in_an_async_view_carries_its_endpoint(app: Flask, pool: Pool[Any]) -> None:
    @app.get("/look")
    async def look() -> ResponseReturnValue:
        await asyncio.sleep(0)
        return jsonify(endpoints(pool))

    @app.get("/tasks")
    async def tasks() -> ResponseReturnValue:
        async def task() -> list[str | None]:
            return endpoints(pool)

        return jsonify(await asyncio.gather(task(), task()))

    @app.get("/threads")
    async def threads() -> ResponseReturnValue:
        return jsonify(await asyncio.to_thread(endpoints, pool))

    @app.get("/back")
    async def back() -> ResponseReturnValue:
        return jsonify(await asgiref.sync_to_async(endpoints)(pool))

    class There(MethodView):
        async def get(self) -> ResponseReturnValue:
            return jsonify(endpoints(pool))

    app.add_url_rule("/there", view_func=There.as_view("there"))
    client = app.test_client()
    assert client.get("/look").json == ["look"]
    assert client.get("/tasks").json == [["tasks"], ["tasks"]]
    assert client.get("/threads").json == ["threads"]
    assert client.get("/back").json == ["back"]
    assert client.get("/there").json == ["there"]
    assert endpoints(pool) == [None]


Leak = Callable[["Pool[Any]", list[Any]], None]


def forget(pool: Pool[Any], leaked: list[Any]) -> None:
    conn = pool.getconn()
    conn.execute("create table t (id int)")
    leaked.append(conn)


@pytest.mark.parametrize("context", ["view", "task", "thread", "sync_to_async", "before_request"])
def test_connections_left_checked_out_by_async_code_are_taken_back(
    make_app: MakeApp, dsn: str, context: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(dsn)
    pool = app.extensions["dbpool"].databases.default
    leaked: list[Any] = []

    async def run() -> None:
        async def task() -> None:
            forget(pool, leaked)

        if context == "task":
            await asyncio.create_task(task())
        elif context == "thread":
            await asyncio.to_thread(forget, pool, leaked)
        elif context == "sync_to_async":
            await asgiref.sync_to_async(forget)(pool, leaked)
        else:
            forget(pool, leaked)

    @app.get("/forgetful")
    async def forgetful() -> str:
        if context != "before_request":
            await run()
        return "done"

    if context == "before_request":
        app.before_request(run)
    with caplog.at_level(logging.ERROR, logger="dbpool"):
        assert app.test_client().get("/forgetful").text == "done"
    assert (pool.stats().active, pool.stats().counters.leaks) == (0, 1)
    assert leaked[0].closed, "the next holder would share it with the code that forgot it"
    assert "test_async_views.py" in caplog.text
    assert "endpoint forgetful" in caplog.text
    assert pool.fetch_value("select to_regclass('t')") is None, "it was committed"


def test_an_async_view_that_fails_leaves_nothing_held(
    app: Flask, pool: Pool[Any], fake: FakeServer
) -> None:
    leaked: list[Any] = []
    fake.answers["create table t (id int)"] = []

    @app.get("/")
    async def view() -> str:
        forget(pool, leaked)
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        app.test_client().get("/")
    assert pool.stats().active == 0


def test_a_connection_held_around_an_async_view_stays_out(
    app: Flask, pool: Pool[Any], caplog: pytest.LogCaptureFixture
) -> None:
    @app.get("/")
    async def view() -> str:
        return str(pool.fetch_value("select 1"))

    with pool.connection() as conn:
        assert app.test_client().get("/").text == "1"
        assert conn.execute("select 2").fetchone() == (2,)
    assert "still held" not in caplog.text


def test_a_connection_of_a_thread_started_by_an_async_view_is_not_taken_back(
    app: Flask, pool: Pool[Any]
) -> None:
    taken, release = threading.Event(), threading.Event()
    others: list[Task] = []

    def work() -> object:
        with pool.connection() as conn:
            taken.set()
            release.wait(10)
            return conn.execute("select 1").fetchone()

    @app.get("/")
    async def view() -> str:
        others.append(Task(work))
        taken.wait(10)
        return "started"

    assert app.test_client().get("/").text == "started"
    release.set()
    assert others[0].result() == (1,)


def test_requests_on_one_event_loop_keep_their_own_connections(app: Flask, pool: Pool[Any]) -> None:
    """As under an ASGI server: Flask's threads pass their coroutines to the server's loop."""
    begun, ended = threading.Event(), threading.Event()

    @app.get("/slow")
    async def slow() -> str:
        with pool.connection() as conn:
            begun.set()
            while not ended.is_set():
                await asyncio.sleep(0.001)
            return str(conn.execute("select 1").fetchone())

    @app.get("/quick")
    async def quick() -> str:
        while not begun.is_set():
            await asyncio.sleep(0.001)
        return str(pool.fetch_value("select 2"))

    def get(path: str) -> str:
        text = app.test_client().get(path).text
        if path == "/quick":
            ended.set()
        return text

    async def serve() -> list[str]:
        call = asgiref.sync_to_async(get, thread_sensitive=False)
        return list(await asyncio.gather(call("/quick"), call("/slow")))

    assert asyncio.run(serve()) == ["2", "(1,)"]
    assert pool.stats().active == 0


def test_requests_on_the_applications_own_loop_keep_their_own_connections(
    make_app: MakeApp, fake: FakeServer
) -> None:
    loop = asyncio.new_event_loop()
    serving = Task(loop.run_forever)

    class CustomFlask(Flask):
        def async_to_sync(self, func: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                return asyncio.run_coroutine_threadsafe(func(*args, **kwargs), loop).result(10)

            return call

    app = make_app(fake, app=CustomFlask("own"))
    pool = app.extensions["dbpool"].databases.default
    first, held = threading.Event(), threading.Event()

    async def pause_until(event: threading.Event) -> None:
        while not event.is_set():
            await asyncio.sleep(0.001)

    @app.get("/first")
    async def view_first() -> str:
        first.set()
        await pause_until(held)
        return "done"

    @app.get("/second")
    async def view_second() -> str:
        with pool.connection() as conn:
            held.set()
            await pause_until(ended)
            return str(conn.execute("select 1").fetchone())

    ended = threading.Event()
    one = Task(app.test_client().get, "/first")
    first.wait(10)
    two = Task(app.test_client().get, "/second")
    assert one.result(10).text == "done"
    ended.set()
    assert two.result(10).text == "(1,)"
    loop.call_soon_threadsafe(loop.stop)
    serving.result(10)
    loop.close()


def test_nested_checkouts_in_an_async_view_are_reported(
    make_app: MakeApp, fake: FakeServer
) -> None:
    app = make_app(fake, DBPOOL_MAX_SIZE=1, DBPOOL_TIMEOUT="50ms", DBPOOL_ERROR_HANDLERS=False)
    pool = app.extensions["dbpool"].databases.default
    pool.open(wait=True)

    @app.get("/")
    async def view() -> str:
        with pool.connection():
            return str(pool.fetch_value("select 1"))

    with pytest.raises(Exception, match="nested"):
        app.test_client().get("/")


def test_a_custom_async_to_sync_is_still_used(make_app: MakeApp, fake: FakeServer) -> None:
    def drive(coroutine: Any) -> Any:
        try:
            coroutine.send(None)
        except StopIteration as ex:
            return ex.value
        raise AssertionError("it waits for something")

    class CustomFlask(Flask):
        def async_to_sync(self, func: Any) -> Any:
            return lambda *args, **kwargs: drive(func(*args, **kwargs))

    app = make_app(fake, app=CustomFlask("own"))
    pool = app.extensions["dbpool"].databases.default

    @app.get("/look")
    async def look() -> ResponseReturnValue:
        return jsonify(endpoints(pool))

    assert app.test_client().get("/look").json == ["look"]
