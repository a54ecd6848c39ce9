"""A process exits within two seconds, whatever state its pool is in."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from tests.postgres import Server, until
from tests.proxy import Mode, Proxy
from tests.scripts import EXIT_SECONDS, environ, python, run_script

OPENING = """\
import faulthandler, sys, threading, time
import dbpool

faulthandler.dump_traceback_later(50, exit=True)  # before run_script() gives up: says where it hangs
pool = dbpool.Pool(sys.argv[1], min_size=2, max_size=2, outage_grace=0.2, timeout=20)


def end():
    print("END", time.monotonic(), flush=True)

"""

STATES = {
    "never used": "",
    "open": "pool.fetch_value('select 1')",
    "open and full": "pool.wait()",
    "closed": """
        pool.fetch_value('select 1')
        pool.close()
    """,
    "with a connection out": """
        conn = pool.getconn()
        conn.execute("select 1")
    """,
    "with a connection lost": """
        import warnings
        warnings.simplefilter("ignore")
        pool.getconn()
    """,
    "with a daemon that waits": """
        def wait():
            try:
                pool.getconn()
            except dbpool.PoolClosed:
                pass

        out = [pool.getconn(), pool.getconn()]
        threading.Thread(target=wait, daemon=True).start()
        while not pool.stats().waiting:
            time.sleep(0.01)
    """,
    "with a daemon in a query": """
        pool.wait()
        threading.Thread(
            target=pool.execute, args=["select pg_sleep(3)"], daemon=True
        ).start()
        while not pool.stats().active:
            time.sleep(0.01)
    """,
    "with a listener, and a generator that holds a connection": """
        pool_with_listener = dbpool.Pool(sys.argv[1], listeners=[lambda event: None])

        def rows():
            with pool_with_listener.connection() as conn:
                yield conn

        suspended = rows()
        next(suspended)
    """,
    "with a pool in a cycle": """
        class Holder:
            pass
        holder = Holder()
        holder.me, holder.pool = holder, pool
        pool.wait()
        del pool, holder
    """,
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def write(script: Path, body: str) -> Path:
    script.write_text(OPENING + dedent(body) + "\nend()\n")
    return script


@pytest.mark.parametrize("state", STATES)
def test_ends_in_time(own_server: Server, script: Path, state: str) -> None:
    run_script(write(script, STATES[state]), own_server.conninfo)
    # A backend notices only at the end of its query that its client has gone.
    until(lambda: not own_server.backends("dbpool:default"), 6.0)


def test_ends_in_time_in_an_outage(own_server: Server, script: Path) -> None:
    own_server.stop()
    body = """
    import logging
    logging.disable()
    try:
        pool.fetch_value("select 1")
    except dbpool.DatabaseUnavailable:
        pass
    assert pool.state == "down"
    """
    run_script(write(script, body), own_server.conninfo)


def test_ends_in_time_while_connects_hang(proxy: Proxy, script: Path) -> None:
    proxy.mode = Mode.SILENT
    body = """
    import logging
    logging.disable()
    try:
        pool.fetch_value("select 1")
    except dbpool.DatabaseUnavailable:
        pass
    assert pool.stats().connecting == 2
    """
    run_script(write(script, body), proxy.conninfo)
    proxy.drop()


def test_ends_in_time_with_a_silent_network(proxy: Proxy, script: Path) -> None:
    body = """
    pool.wait()
    print("FULL", flush=True)
    sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, write(script, body), proxy.conninfo],
        env=environ(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "FULL\n"
        proxy.go_silent()
        began = time.monotonic()
        process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert time.monotonic() - began < EXIT_SECONDS
    proxy.drop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_that_waits_for_a_connection(
    own_server: Server, script: Path, number: signal.Signals
) -> None:
    body = """
    import signal
    # A shell without job control starts what runs in its background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = [pool.getconn(), pool.getconn()]
    print("WAITING", flush=True)
    pool.getconn()
    """
    process = subprocess.Popen(
        [sys.executable, write(script, body), own_server.conninfo],
        env=environ(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "WAITING\n"
        began = time.monotonic()
        process.send_signal(number)
        _, output = process.communicate(timeout=10)
    assert time.monotonic() - began < EXIT_SECONDS
    assert process.returncode == -number, output
    until(lambda: not own_server.backends("dbpool:default"), 5.0)


def test_a_pool_whose_opening_was_interrupted_opens_again(own_server: Server, script: Path) -> None:
    body = """
    import signal

    import _thread

    def interrupt(frame, event, arg):   # the first starts the watchdog, the second its threads
        if event == "c_call" and arg is _thread.start_new_thread:
            starts.append(frame)
            if len(starts) == 2:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    starts = []
    sys.setprofile(interrupt)
    try:
        pool.fetch_value("select 1")
    except KeyboardInterrupt:
        starts.append("interrupted")
    assert starts[2:] == ["interrupted"]
    assert pool.fetch_value("select 1") == 1
    """
    run_script(write(script, body), own_server.conninfo)


def test_a_pool_serves_after_a_lack_of_threads_is_over(own_server: Server, script: Path) -> None:
    body = """
    import resource
    from pathlib import Path

    megabytes = 1 << 20
    refused = 0
    for more in range(100, 3000, 100):  # enough for no thread, for one, two ... and for all
        while threading.active_count() > 1:
            time.sleep(0.01)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = in_use + more * megabytes
        threading.stack_size(256 * megabytes)
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        try:
            assert pool.fetch_value("select 1") == 1
            break
        except RuntimeError as ex:
            assert str(ex) == "can't start new thread"
            refused += 1
        finally:
            threading.stack_size(0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    pool.wait()
    assert pool.stats().size == 2
    names = sorted(thread.name.removeprefix("default-") for thread in threading.enumerate())
    assert names == [
        "MainThread", "dbpool-watchdog", "scheduler", "worker-0", "worker-1", "worker-2"
    ]
    print("refused", refused)
    """
    output = run_script(write(script, body), own_server.conninfo)
    assert int(output.partition("refused ")[2].split()[0]) > 3


def test_an_atexit_function_registered_before_the_pool_may_use_it(
    own_server: Server, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        dedent("""
        import atexit, sys
        import dbpool

        @atexit.register
        def save():
            pool.execute("insert into saved values (1)")

        pool = dbpool.Pool(sys.argv[1])
        pool.execute("create table saved (n int)")
        """)
    )
    done = python(script, own_server.conninfo, env=environ(), check=True)
    assert "Traceback" not in done.stderr
    assert own_server.execute("select n from saved") == [(1,)]
    until(lambda: not own_server.backends("dbpool:default"), 6.0)
