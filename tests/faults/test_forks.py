"""A process forks while a pool is open: the child never uses the parent's sessions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from tests.postgres import Server, until
from tests.scripts import run_script

Run = Callable[[str], str]

OPENING = """\
import multiprocessing, os, signal, sys, threading, time
import dbpool

PID = "select pg_backend_pid()"


def wait_for(child, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "it hangs"
        time.sleep(0.005)


def end():
    print("END", time.monotonic(), flush=True)

"""


@pytest.fixture
def run(own_server: Server, tmp_path: Path) -> Run:
    """Run a script against the private server; afterwards no backend is left."""

    def run(body: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(OPENING + dedent(body))
        output = run_script(script, own_server.conninfo)
        until(lambda: not own_server.backends("dbpool:default"))
        return output

    return run


def test_a_childs_application_name_has_its_own_pid(run: Run) -> None:
    output = run("""
        pool = dbpool.Pool(sys.argv[1], max_size=1)
        assert pool.fetch_value("show application_name").endswith(f"/{os.getpid()}")
        child = os.fork()
        if not child:
            print(pool.fetch_value("show application_name").endswith(f"/{os.getpid()}"), flush=True)
            os._exit(0)
        print(wait_for(child))
        pool.close()
        end()
    """)
    assert output.split()[:2] == ["True", "0"]


def test_a_parents_broken_connection_returned_in_a_child_changes_nothing(run: Run) -> None:
    run("""
        pool = dbpool.Pool(sys.argv[1], max_size=1)
        conn = pool.getconn()
        conn.pgconn.finish()
        if child := os.fork():
            assert wait_for(child) == 0
            pool.putconn(conn)
            pool.close()
            end()
        else:
            pool.fetch_value(PID)
            pool.putconn(conn)
            stats = pool.stats()
            assert (stats.size, stats.active, stats.idle) == (1, 0, 1), stats
            pool.close()
            os._exit(0)
    """)


def test_a_pool_made_with_open_false_needs_an_explicit_open_in_a_child_too(run: Run) -> None:
    run("""
        pool = dbpool.Pool(sys.argv[1], open=False)
        if child := os.fork():
            assert wait_for(child) == 0
            end()
        else:
            try:
                pool.fetch_value(PID)
            except dbpool.PoolClosed:
                os._exit(0)
            os._exit("it opened itself")
    """)


CHILDREN = {
    "uses the pool": """
        pids = {pool.fetch_value(PID) for _ in range(20)}
        assert not pids & parents, (pids, parents)
        with pool.connection() as own:
            assert own.info.backend_pid not in parents
        pool.close()
        os._exit(0)
    """,
    "uses the pool and ends without closing it": """
        assert pool.fetch_value(PID) not in parents
        sys.exit(0)
    """,
    "ends at once": "os._exit(0)",
    "exits": "sys.exit(0)",
    "rolls back": """
        try:
            conn.rollback()
        except Exception:
            pass
        sys.exit(0)
    """,
    "commits": """
        try:
            conn.commit()
        except Exception:
            pass
        sys.exit(0)
    """,
    "closes the connection": """
        conn.close()
        sys.exit(0)
    """,
    "returns the connection": """
        pool.putconn(conn)
        assert pool.stats().size == 0
        sys.exit(0)
    """,
    "executes on the connection": """
        try:
            conn.execute("insert into t values (99)")
        except Exception:
            sys.exit(0)
        sys.exit("it could")
    """,
    "closes the pool": """
        pool.close()
        assert pool.state == "stopped"
        sys.exit(0)
    """,
    "drops all it knows": """
        import gc
        del conn, idle
        pool = None
        gc.collect()
        sys.exit(0)
    """,
    "looks at the pool": """
        stats = pool.stats()
        assert (stats.size, stats.active, stats.idle, stats.connecting) == (0, 0, 0, 0)
        assert stats.counters.checkouts == 0
        assert pool.holders() == []
        assert pool.state == "starting"
        sys.exit(0)
    """,
    "forks again": """
        pool.wait()
        pids = {c.info.backend_pid for c in pool._store.bag.idle}
        assert len(pids) == 3
        assert not pids & parents
        grandchild = os.fork()
        if grandchild == 0:
            assert pool.fetch_value(PID) not in parents | pids
            sys.exit(0)
        assert wait_for(grandchild) == 0
        assert {pool.fetch_value(PID) for _ in range(10)} <= pids
        sys.exit(0)
    """,
}


@pytest.mark.parametrize("child", CHILDREN)
def test_the_parents_sessions_survive_a_child_that(
    run: Run, own_server: Server, child: str
) -> None:
    own_server.execute("create table t (id int)")
    body = """
    pool = dbpool.Pool(sys.argv[1], min_size=3, max_size=3)
    pool.wait()
    conn = pool.getconn()
    conn.execute("insert into t values (1)")
    idle = [pool.getconn() for _ in range(2)]
    parents = {c.info.backend_pid for c in [conn, *idle]}
    for other in idle:
        pool.putconn(other)
    child = os.fork()
    if child == 0:
@@
    status = wait_for(child)
    assert status == 0, status
    conn.execute("insert into t values (2)")
    conn.commit()
    pool.putconn(conn)
    conns = [pool.getconn() for _ in range(3)]
    assert {c.execute(PID).fetchone()[0] for c in conns} == parents
    for other in conns:
        pool.putconn(other)
    end()
    """
    block = "\n".join(" " * 8 + line for line in dedent(CHILDREN[child]).strip().splitlines())
    run(dedent(body).replace("@@", block))
    assert own_server.execute("select id from t order by id") == [(1,), (2,)]


def test_forks_while_other_threads_hold_connections_and_locks(run: Run) -> None:
    run("""
    # A machine that stalls is not to look like an outage.
    pool = dbpool.Pool(sys.argv[1], min_size=1, max_size=4, timeout=20, outage_grace=30)
    stop, errors = threading.Event(), []

    def work():
        while not stop.wait(0.003):  # without a pause some kernels starve the children
            try:
                with pool.connection() as conn:
                    pid = conn.info.backend_pid
                    assert conn.execute(PID).fetchone()[0] == pid
                pool.stats()
            except BaseException as ex:
                errors.append(ex)
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    parents = {pool.fetch_value(PID) for _ in range(20)}
    for n in range(20):
        child = os.fork()
        if child == 0:
            backend_pid = pool.fetch_value(PID)
            assert pool.fetch_value(PID) == backend_pid
            assert backend_pid not in parents
            pool.close() if n % 2 else None
            sys.exit(0)
        status = wait_for(child)
        assert status == 0, status
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not errors, errors
    pool.close()
    end()
    """)


@pytest.mark.parametrize("lock", ["_lock"])
def test_forks_while_another_thread_holds_a_lock_of_the_pool(run: Run, lock: str) -> None:
    run(f"""
    pool = dbpool.Pool(sys.argv[1], min_size=1)
    pool.wait()
    held, release = threading.Event(), threading.Event()

    def hold():
        with pool.{lock}:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        pool.run(lambda conn: conn.execute(PID).fetchone())
        sys.exit(0)
    status = wait_for(child)
    release.set()
    thread.join(10)
    assert status == 0, status
    pool.fetch_value(PID)
    end()
    """)


def test_forks_while_waiters_wait_and_connects_are_under_way(run: Run) -> None:
    run("""
    pool = dbpool.Pool(sys.argv[1], max_size=2, timeout=10)
    with pool.connection():
        for n in range(10):
            threads = [threading.Thread(target=pool.fetch_value, args=[PID]) for _ in range(4)]
            for thread in threads:
                thread.start()
            child = os.fork()
            if child == 0:
                pool.fetch_value(PID)
                os._exit(0)
            status = wait_for(child)
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
            assert status == 0, status
    end()
    """)


def test_a_pool_closed_before_the_fork_stays_closed_in_the_child(run: Run) -> None:
    run("""
    pool = dbpool.Pool(sys.argv[1])
    pool.fetch_value(PID)
    pool.close()
    child = os.fork()
    if child == 0:
        try:
            pool.fetch_value(PID)
        except dbpool.PoolClosed:
            sys.exit(0)
        sys.exit(1)
    status = wait_for(child)
    assert status == 0, status
    end()
    """)


def test_a_pool_that_is_not_open_yet_opens_in_both(run: Run) -> None:
    run("""
    pool = dbpool.Pool(sys.argv[1])
    child = os.fork()
    own_pid = pool.fetch_value(PID)
    if child == 0:
        sys.exit(0)
    status = wait_for(child)
    assert status == 0, status
    assert pool.fetch_value(PID) == own_pid
    end()
    """)


def test_the_child_has_a_new_breaker(run: Run) -> None:
    run("""
    import logging
    # A worker that writes to stderr in the moment of the fork would leave its lock to the child.
    logging.disable()
    broken = True
    conninfo = lambda: sys.argv[1] + (" dbname=missing" if broken else "")
    pool = dbpool.Pool(conninfo, timeout=10)
    try:
        pool.fetch_value(PID)
    except dbpool.DatabaseMisconfigured:
        pass
    assert pool.state == "down"
    child = os.fork()
    broken = False
    if child == 0:
        assert pool.breaker.state == "closed"
        pool.fetch_value(PID)
        sys.exit(0)
    status = wait_for(child)
    assert status == 0, status
    end()
    """)


def test_the_watchdog_works_in_the_child(run: Run) -> None:
    output = run("""
    import logging
    logging.basicConfig(stream=sys.stdout)
    reported = threading.Event()

    def listener(event):
        if isinstance(event, dbpool.events.HeldLong):
            reported.set()

    pool = dbpool.Pool(sys.argv[1], leak_after=0.2, listeners=[listener])
    pool.fetch_value(PID)
    child = os.fork()
    if child == 0:
        conn = pool.getconn()
        assert reported.wait(10)
        assert pool.stats().counters.held_long == 1
        pool.putconn(conn)
        sys.exit(0)
    status = wait_for(child, 15)
    assert status == 0, status
    assert pool.stats().counters.held_long == 0
    end()
    """)
    assert output.count("has been held for") == 1


def test_listeners_in_the_child_get_the_childs_events(run: Run) -> None:
    run("""
    received = []
    pool = dbpool.Pool(sys.argv[1], listeners=[received.append])
    assert pool.fetch_value("select 1") == 1
    child = os.fork()
    if child == 0:
        received.clear()
        assert pool.fetch_value("select 1") == 1
        pool.close()
        names = sorted(type(event).__name__ for event in received)
        assert names == ["CheckedIn", "CheckedOut", "Closed", "Connected", "Opened"], names
        sys.exit(0)
    assert (status := wait_for(child)) == 0, status
    assert pool.fetch_value("select 1") == 1
    pool.close()
    assert sum(isinstance(event, dbpool.events.CheckedIn) for event in received) == 2
    end()
    """)


def test_a_child_ends_no_session_that_only_a_threads_local_data_holds(run: Run) -> None:
    run("""
    pool = dbpool.Pool(sys.argv[1], max_size=1)
    own = threading.local()
    held, forked = threading.Event(), threading.Event()
    pids = []

    def hold():
        own.conn = pool.getconn()
        pids.append(own.conn.execute(PID).fetchone())
        held.set()
        forked.wait(20)
        pids.append(own.conn.execute(PID).fetchone())
        pool.putconn(own.conn)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert (status := wait_for(child)) == 0, status
    forked.set()
    thread.join(10)
    assert len(pids) == 2 and pids[0] == pids[1], pids
    pool.close()
    end()
    """)


def test_a_fork_waits_for_a_listener_to_return(run: Run) -> None:
    run("""
    busy, lock = threading.Event(), threading.Lock()

    def listener(event):
        with lock:
            busy.set()
            time.sleep(0.2)

    pool = dbpool.Pool(sys.argv[1], listeners=[listener])
    pool.open()
    assert busy.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if lock.acquire(timeout=5) else 1)
    assert (status := wait_for(child)) == 0, status
    pool.close()
    end()
    """)


def test_forks_while_a_listener_hangs(run: Run) -> None:
    run("""
    release, hangs = threading.Event(), threading.Event()

    def hanging(event):
        hangs.set()
        release.wait(20)

    pool = dbpool.Pool(sys.argv[1], listeners=[hanging])
    assert pool.fetch_value("select 1") == 1
    assert hangs.wait(10)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        assert pool.fetch_value("select 1") == 1
        sys.exit(0)
    assert time.monotonic() - started < 2, "the fork waited too long"
    assert (status := wait_for(child)) == 0, status
    assert pool.fetch_value("select 1") == 1
    release.set()
    end()
    """)


def test_a_listener_may_fork(run: Run) -> None:
    run("""
    parent, statuses = os.getpid(), []

    def forking(event):
        if isinstance(event, dbpool.events.CheckedIn) and os.getpid() == parent:
            child = os.fork()
            if child == 0:
                pool.close()
                os._exit(0)
            statuses.append(wait_for(child))

    pool = dbpool.Pool(sys.argv[1], listeners=[forking])
    for _ in range(5):
        assert pool.fetch_value("select 1") == 1
    pool.close(10)
    assert statuses == [0] * 5, statuses
    end()
    """)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing_have_sessions_of_their_own(run: Run, method: str) -> None:
    run(f"""
    pool = dbpool.Pool(sys.argv[1], min_size=2, max_size=2)


    def work(n):
        time.sleep(0.01)
        return os.getpid(), pool.fetch_value(PID), pool.fetch_value("select %s::int", [n])


    if __name__ == "__main__":
        pool.wait()
        own_pids = {{conn.info.backend_pid for conn in pool._store.bag.idle}}
        context = multiprocessing.get_context({method!r})
        with context.Pool(3) as workers:
            answers = workers.map(work, range(60), chunksize=5)
            workers.close()
            workers.join()
        assert [value for _, _, value in answers] == list(range(60))
        assert not own_pids & {{backend for _, backend, _ in answers}}
        processes = {{process for process, _, _ in answers}}
        sessions = {{(process, backend) for process, backend, _ in answers}}
        assert len({{backend for _, backend in sessions}}) == len(sessions), sessions
        assert len(processes) >= 2
        assert pool.fetch_value(PID) in own_pids
        end()
    """)


def test_a_transaction_of_the_parent_goes_on_over_many_forks(run: Run, own_server: Server) -> None:
    own_server.execute("create table t (id int)")
    run("""
    pool = dbpool.Pool(sys.argv[1])

    def work(conn):
        for n in range(10):
            conn.execute("insert into t values (%s)", [n])
            process = multiprocessing.get_context("fork").Process(target=pool.fetch_value, args=[PID])
            process.start()
            process.join(10)
            assert process.exitcode == 0, process.exitcode
        return conn.execute("select count(*) from t").fetchone()[0]

    assert pool.run(work) == 10
    end()
    """)
    assert own_server.execute("select count(*) from t") == [(10,)]


def test_a_fork_in_a_process_without_free_descriptors(run: Run) -> None:
    run("""
    import resource
    pool = dbpool.Pool(sys.argv[1], min_size=2)
    pool.wait()
    out = pool.getconn()
    parents = {out.info.backend_pid, pool.fetch_value(PID)}
    few, many = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, many))
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    child = os.fork()
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, many))
    if child == 0:
        try:
            out.execute("select 1")
        except Exception:
            pass
        else:
            os._exit(1)
        os._exit(pool.fetch_value(PID) in parents)
    status = wait_for(child)
    assert status == 0, status
    assert out.execute(PID).fetchone()[0] in parents
    pool.putconn(out)
    end()
    """)


def test_a_fork_in_a_root_without_devices(run: Run) -> None:
    run("""
    os.devnull = "/nowhere/null"
    pool = dbpool.Pool(sys.argv[1])
    parents = pool.fetch_value(PID)
    child = os.fork()
    if child == 0:
        os._exit(pool.fetch_value(PID) == parents)
    status = wait_for(child)
    assert status == 0, status
    assert pool.fetch_value(PID) == parents
    end()
    """)


def test_a_reused_descriptor_of_a_closed_connection_is_left_alone(run: Run) -> None:
    run("""
    script = os.open(__file__, os.O_RDONLY)
    pool = dbpool.Pool(sys.argv[1])
    conn = pool.getconn()
    fd = conn.fileno()
    conn.close()
    os.dup2(script, fd)
    child = os.fork()
    if child == 0:
        with open(fd) as script:
            os._exit("import" not in script.read())
    status = wait_for(child)
    assert status == 0, status
    pool.putconn(conn)
    end()
    """)


def test_a_child_forked_without_pythons_fork_hooks(run: Run) -> None:
    """As under uWSGI: the parent's sessions are left alone, the child's pools maintained."""
    run("""
    hooks, os.register_at_fork = os.register_at_fork, lambda **kwargs: None
    sys.modules["uwsgi"] = sys
    pool = dbpool.Pool(sys.argv[1], min_size=2, max_size=2)
    os.register_at_fork = hooks
    pool.wait()
    conns = [pool.getconn(), pool.getconn()]
    parents = {conn.execute(PID).fetchone()[0] for conn in conns}
    for conn in conns:
        conn.commit()
        pool.putconn(conn)
    child = os.fork()
    if child == 0:  # which uses no pool before it opens one
        with dbpool.Pool(sys.argv[1], leak_after=0.2) as own:
            conn = own.getconn()
            deadline = time.monotonic() + 10
            while not own.stats().counters.held_long:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            own.putconn(conn)
        sys.exit(0)
    assert wait_for(child) == 0
    child = os.fork()
    if child == 0:  # which uses none at all, and closes what it inherited as it exits
        sys.exit(0)
    assert wait_for(child) == 0
    for use in (pool.check, pool.drain, lambda: pool.resize(1, 1)):  # the first thing it does
        child = os.fork()
        if child == 0:
            use()
            os._exit(0)
        assert wait_for(child) == 0
    conns = [pool.getconn(), pool.getconn()]
    assert {conn.execute(PID).fetchone()[0] for conn in conns} == parents
    for conn in conns:
        pool.putconn(conn)
    end()
    """)
