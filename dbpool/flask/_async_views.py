"""Lets asynchronous views hold connections on behalf of their request's thread.

Flask runs each asynchronous view in an event loop and a thread of its own. That thread knows
neither the endpoint of the request nor which connections to take back at its end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

from flask import Flask

from dbpool import holders

AsyncFunction = Callable[..., Coroutine[Any, Any, Any]]


def follow_async_views(app: Flask) -> None:
    """Make the threads of asynchronous functions hold connections for the request's thread.

    Flask documents `Flask.async_to_sync` as the method to override for how these functions run. If
    the application overrides it, its threads are unknown, and nothing is changed.
    """
    if type(app).async_to_sync is not Flask.async_to_sync or "async_to_sync" in vars(app):
        return
    convert = app.async_to_sync

    def async_to_sync(func: AsyncFunction) -> Callable[..., Any]:
        async def followed(who: holders.ThreadInfo, /, *args: Any, **kwargs: Any) -> Any:
            with _holding_for(who):
                return await func(*args, **kwargs)

        run = convert(followed)

        @wraps(func)
        def call(*args: Any, **kwargs: Any) -> Any:
            return run(holders.current.thread, *args, **kwargs)

        return call

    app.async_to_sync = async_to_sync  # type: ignore[method-assign]


@contextmanager
def _holding_for(who: holders.ThreadInfo) -> Iterator[None]:
    """Let this thread, and those of `asyncio.to_thread`, hold connections for *who*."""
    if not _is_alone():
        yield
        return
    own, thread = holders.current.thread, who.thread
    # `HeldLong` should show the stack of this thread.
    holders.current.thread, who.thread = who, threading.current_thread()
    asyncio.get_running_loop().set_default_executor(
        ThreadPoolExecutor(
            thread_name_prefix="asyncio",
            initializer=setattr,
            initargs=(holders.current, "thread", who),
        )
    )
    try:
        yield
    finally:
        holders.current.thread, who.thread = own, thread


def _is_alone() -> bool:
    """Whether the loop, and so its thread, was made for this call.

    Under an ASGI server the call runs in the server's own loop, together with others.
    """
    return len(asyncio.all_tasks()) == 1
