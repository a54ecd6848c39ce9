"""Parameters inherited from psycopg_pool: an unusable value is rejected at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from dbpool import ConfigError, Pool

NOWHERE = "host=127.0.0.1 port=1"
CALLABLES = ("configure", "check", "reset", "reconnect_failed")


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("value", ["session", True, 1, ["x"], {"a": 1}])
def test_a_callback_that_is_not_callable_is_rejected(name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name} must be callable"):
        Pool(NOWHERE, **options)


async def asynchronous(*_: object) -> None: ...


def generator(*_: object) -> Iterator[None]:
    yield


async def asynchronous_generator(*_: object) -> AsyncIterator[None]:
    yield


class AsynchronousCall:
    async def __call__(self, *_: object) -> None: ...


NEVER_RUN = [
    asynchronous,
    generator,
    asynchronous_generator,
    partial(asynchronous, 1),
    AsynchronousCall(),
]


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("value", NEVER_RUN)
def test_an_async_or_generator_callback_is_rejected(name: str, value: Any) -> None:
    """An async `check` would never run, so every connection would pass."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name} must be callable, without async or yield"):
        Pool(NOWHERE, **options)


@pytest.mark.parametrize("fn", NEVER_RUN)
def test_run_rejects_an_async_or_generator_function(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"^fn must not be asynchronous or a generator"):
        Pool(NOWHERE).run(fn)


@pytest.mark.parametrize("name", CALLABLES)
def test_callbacks_may_be_none(name: str) -> None:
    options: dict[str, Any] = {name: None}
    assert Pool(NOWHERE, **options).state == "starting"


def test_reset_session_names_the_setting_to_use() -> None:
    with pytest.raises(ConfigError, match='session_reset="session"'):
        Pool(NOWHERE, reset="session")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [dict, "psycopg.Connection", None, 3, psycopg.AsyncConnection])
def test_a_connection_class_that_cannot_connect_is_rejected(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^connection_class must be"):
        Pool(NOWHERE, connection_class=value)


def test_a_generic_connection_class_is_accepted() -> None:
    pool = Pool(NOWHERE, connection_class=psycopg.Connection[tuple[int]])
    assert pool.state == "starting"


@pytest.mark.parametrize("sizes", [(1.5, 2), (1, 2.5), ("1", 2), (None, 2)])
def test_resize_with_an_invalid_size_changes_nothing(sizes: Any) -> None:
    pool = Pool(NOWHERE, min_size=2, max_size=4)
    with pytest.raises(TypeError):
        pool.resize(*sizes)
    assert (pool.min_size, pool.max_size) == (2, 4)


def test_inherited_numbers_are_parsed_like_settings() -> None:
    options: dict[str, Any] = {"reconnect_timeout": "5m", "num_workers": "3"}
    pool = Pool(NOWHERE, **options)
    assert (pool.reconnect_timeout, pool.num_workers) == (300.0, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("reconnect_timeout", "soon"), ("reconnect_timeout", -1), ("num_workers", "two")],
)
def test_an_invalid_number_is_rejected(name: str, value: Any) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        Pool(NOWHERE, **options)
