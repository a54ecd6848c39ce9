"""The embedded server: how it starts and stops, and how it recovers from a crash."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from dbpool.embedded import EmbeddedError, Interrupted, _cluster, _programs
from tests.postgres import memory
from tests.waiting import until
from webapp import embedded
from webapp.embedded import Server, server

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def reachable_folder(parent: Path) -> Iterator[Path]:
    """A folder that the server's user may enter; pytest's own is closed to it under root."""
    folder = Path(tempfile.mkdtemp(prefix="dbpool-embedded-", dir=parent))
    folder.chmod(0o755)
    yield folder
    for cluster in folder.rglob("postgres-*"):
        end_servers(cluster)
    shutil.rmtree(folder, ignore_errors=True)


def end_servers(cluster: Path) -> None:
    for pid in _programs.servers_in(cluster):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    with reachable_folder(memory()) as folder:
        with server(folder / "data"):
            pass
        yield folder / "data"


@pytest.fixture
def home(made: Path) -> Iterator[Path]:
    """A home with data, shared by tests that do not damage it, as making one takes time."""
    yield made
    end_servers(next(made.glob("postgres-*")))


@pytest.fixture
def new_home() -> Iterator[Path]:
    with reachable_folder(memory()) as folder:
        yield folder / "data"


@pytest.fixture
def home_on_disk() -> Iterator[Path]:
    """A home on the file system of the binaries, so that they can be hard-linked."""
    with reachable_folder(Path("/tmp")) as folder:
        yield folder / "data"


def query(running: Server, statement: str) -> object:
    with psycopg.connect(running.conninfo, autocommit=True, connect_timeout=5) as conn:
        cursor = conn.execute(statement)
        return cursor.fetchall() if cursor.description else None


def postmaster(running: Server) -> int:
    pid = running.pid_in_file()
    assert pid is not None
    return pid


def test_serves_and_keeps_the_data_for_the_next_start(home: Path) -> None:
    with server(home) as first:
        query(first, "create table kept (n integer)")
        query(first, "insert into kept values (7)")
    assert not first.pid_file.exists()
    with server(home) as second:
        assert query(second, "select n from kept") == [(7,)]


def test_takes_no_connection_over_tcp_and_none_from_other_users(home: Path) -> None:
    with server(home) as running:
        assert query(running, "show listen_addresses") == [("",)]
        assert running.sockets.stat().st_mode & 0o777 == 0o700
        assert running.data.stat().st_mode & 0o777 == 0o700


def test_two_holders_share_it_and_the_last_one_stops_it(home: Path) -> None:
    with server(home) as second:
        with server(home) as first:
            assert postmaster(first) == postmaster(second)
        assert query(second, "select 1") == [(1,)]
        pid = postmaster(second)
    assert not _programs.servers_in(second.data, [pid])


def test_stops_in_time_while_a_client_sits_in_a_transaction(home: Path) -> None:
    with server(home) as running:
        conn = psycopg.connect(running.conninfo)
        conn.execute("select 1")
        started = time.monotonic()
    assert time.monotonic() - started < _cluster.FAST_SECONDS + _cluster.IMMEDIATE_SECONDS
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select 1")
    conn.close()


def test_the_server_of_a_killed_holder_is_adopted_and_stopped_by_the_next(
    home: Path,
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from webapp.embedded import server\n"
        "with server(Path(sys.argv[1])) as it: print(it.pid_in_file(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        holder.kill()
    with server(home) as adopted:
        assert postmaster(adopted) == pid
        assert query(adopted, "select 1") == [(1,)]
    assert not _programs.servers_in(adopted.data, [pid])


def test_starts_again_after_the_postmaster_was_killed(home: Path) -> None:
    with server(home) as running:
        query(running, "create table lasting (n integer)")
        client = psycopg.connect(running.conninfo)  # its backend outlives the postmaster
        os.kill(postmaster(running), signal.SIGKILL)
    assert running.pid_file.exists()
    with server(home) as restarted:
        assert query(restarted, "select count(*) from lasting") == [(0,)]
    client.close()


def test_a_holder_revives_a_server_that_crashed(home: Path) -> None:
    with server(home) as running:
        running.revive()
        pid = postmaster(running)
        os.kill(pid, signal.SIGKILL)
        until(lambda: running.pid() is None)
        running.revive()
        assert postmaster(running) != pid
        assert query(running, "select 1") == [(1,)]


def test_a_server_stopped_on_purpose_is_not_revived(home: Path) -> None:
    with server(home) as running:
        os.kill(postmaster(running), signal.SIGINT)
        until(lambda: running.pid() is None)
        running.revive()
        assert running.pid() is None


def test_a_pid_reused_by_another_process_is_not_taken_for_the_server(home: Path) -> None:
    other_process = subprocess.Popen(
        ["sleep", "60"], **_programs.identity(_programs.account_of(_programs.server_user()))
    )
    try:
        cluster = next(home.glob("postgres-*"))
        lines = [
            str(other_process.pid),
            str(cluster),
            "1",
            "5432",
            str(home / "run"),
            "",
            "1 1",
            "ready",
        ]
        (cluster / "postmaster.pid").write_text("\n".join(lines) + "\n")
        (home / "run" / f"{embedded.SOCKET}.lock").write_text("\n".join(lines[:5]) + "\n")
        with server(home) as running:
            assert query(running, "select 1") == [(1,)]
        assert other_process.poll() is None
    finally:
        other_process.kill()
        other_process.wait()


def test_the_next_start_works_after_an_interrupted_initdb(
    new_home: Path,
) -> None:
    def stopping() -> bool:
        return any(new_home.glob("*.new/*"))

    with pytest.raises(Interrupted), server(new_home, stopping):
        pass
    assert not any(folder.suffix != ".new" for folder in new_home.glob("postgres-*"))
    with server(new_home) as running:
        assert query(running, "select 1") == [(1,)]


def test_the_next_start_works_beside_an_initdb_whose_supervisor_was_killed(
    new_home: Path,
) -> None:
    program = "import sys, pathlib\nfrom webapp.embedded import server\nserver(pathlib.Path(sys.argv[1])).__enter__()\n"
    supervisor = subprocess.Popen([sys.executable, "-c", program, str(new_home)], cwd=ROOT)
    until(lambda: any(new_home.glob("*.new/*")))
    supervisor.kill()
    supervisor.wait()
    with server(new_home) as running:
        assert query(running, "select 1") == [(1,)]


def test_the_shells_settings_are_ignored(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere.invalid",
        "PGDATA": "/nonexistent",
        "PGUSER": "nobody-here",
        "PGDATABASE": "none",
        "LC_ALL": "xx_YY.nothing",
    }.items():
        monkeypatch.setenv(name, value)
    with server(home) as running:
        assert query(running, "select 1") == [(1,)]


def test_a_path_too_long_for_a_socket_gets_a_short_folder(new_home: Path) -> None:
    deep = new_home.parent / ("d" * 60) / ("e" * 60)
    with server(deep) as running:
        folder = running.sockets
        assert query(running, "select 1") == [(1,)]
        assert len(str(folder)) < 60
        assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


def test_a_socket_folder_of_another_user_is_rejected(home: Path) -> None:
    shutil.rmtree(home / "run", ignore_errors=True)
    (home / "run").symlink_to("/tmp")
    try:
        with pytest.raises(EmbeddedError, match="belongs to another user"), server(home):
            pass
    finally:
        (home / "run").unlink()


def test_a_server_that_cannot_start_is_an_error_of_one_line(home: Path) -> None:
    configuration = next(home.glob("postgres-*")) / "postgresql.conf"
    content = configuration.read_bytes()
    configuration.write_text("shared_buffers = 'plenty'\n")
    try:
        with pytest.raises(EmbeddedError, match=r"did not start: configuration file") as caught:
            with server(home):
                pass
    finally:
        configuration.write_bytes(content)
    assert "\n" not in str(caught.value)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root serves as another user")


@needs_root
def test_root_keeps_binaries_and_data_elsewhere_when_the_checkout_is_closed(
    new_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_programs, "ROOT_HOME", new_home.parent / "root")
    package = _programs._packaged().parent.parent
    closed = new_home.parent / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(package, closed / package.name)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, closed / libraries.name)
    monkeypatch.setattr(
        _programs, "_packaged", lambda: closed / package.name / "pginstall18" / "bin"
    )
    _programs.binaries.cache_clear()
    try:
        folder = _programs.binaries()
        assert folder.is_relative_to(new_home.parent / "root")
        with server(embedded.home(closed)) as running:
            assert running.home.is_relative_to(new_home.parent / "root")
            assert query(running, "select 1") == [(1,)]
        assert closed.stat().st_mode & 0o777 == 0o700
    finally:
        _programs.binaries.cache_clear()


def test_its_lock_files_are_private(home: Path) -> None:
    (home / "users.lock").chmod(0o644)  # as an earlier release made it
    with server(home):
        for name in ("users.lock", "server.lock"):
            found = (home / name).stat()
            assert (found.st_mode & 0o777, found.st_uid) == (0o600, Server(home).account[0])


def test_a_lock_that_cannot_be_opened_is_an_error_of_one_line(new_home: Path) -> None:
    new_home.mkdir()
    (new_home / "server.lock").symlink_to("/etc/passwd")
    with pytest.raises(EmbeddedError, match=r"cannot open .*server\.lock"):
        with server(new_home):
            pass


@needs_root
def test_root_serves_a_users_data_as_that_user(new_home: Path) -> None:
    with server(new_home):
        pass
    cluster = next(new_home.glob("postgres-*"))
    account = _programs.account_of("daemon")
    for path in (cluster, new_home / "run", *cluster.rglob("*")):
        os.chown(path, *account)
    for path in new_home.glob("*.lock"):
        path.unlink()
    with server(new_home) as running:
        assert {path.stat().st_uid for path in new_home.glob("*.lock")} == {account[0]}
        assert Path(f"/proc/{postmaster(running)}").stat().st_uid == account[0]
        assert query(running, "select 1") == [(1,)]


# The application's role


def test_the_application_is_not_the_superuser_but_owns_its_database(home: Path) -> None:
    with server(home) as running:
        assert query(running, "select current_user, current_database()") == [("webapp", "webapp")]
        attributes = "rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls"
        query_own = f"select {attributes} from pg_roles where rolname = current_user"
        assert query(running, query_own) == [(False,) * 5]
        assert query(running, "select count(*) from pg_auth_members m where m.member ="
                     " (select oid from pg_roles where rolname = current_user)") == [(0,)]  # fmt: skip
        for forbidden in (
            "copy (select 1) to program 'true'",
            "select pg_read_file('postgresql.conf')",
            "set role postgres",
            "alter system set work_mem = '1MB'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                query(running, forbidden)
        query(running, "create schema shop")
        query(running, "drop schema shop")


def test_data_that_an_earlier_version_stored_as_superuser_stays(home: Path) -> None:
    with server(home) as running:
        admin = running.conninfo.replace("webapp@/webapp", "postgres@/postgres")
        with psycopg.connect(admin, autocommit=True) as conn:
            conn.execute("create table old (id int generated always as identity, t text)")
            conn.execute("insert into old (t) values ('kept')")
        with psycopg.connect(admin.replace("/postgres?", "/template1?"), autocommit=True) as conn:
            conn.execute("drop database webapp")
            conn.execute("drop role webapp")
    with server(home) as restarted:
        query(restarted, "insert into old (t) values ('new')")
        query(restarted, "alter table old add column more int")
        assert query(restarted, "select id, t from old order by id") == [(1, "kept"), (2, "new")]
        query(restarted, "drop table old")


# Links that the server's user put into its folder, in which root writes


@contextmanager
def protected_file(folder: Path) -> Iterator[Path]:
    """A file that must not be changed."""
    path = folder / "precious"
    path.write_text("precious\n")
    path.chmod(0o640)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == "precious\n"
    assert (after.st_uid, after.st_gid, after.st_mode) == (
        before.st_uid, before.st_gid, before.st_mode,
    )  # fmt: skip
    path.unlink()


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("parent", ["server.log", "../initdb.log"])
def test_no_link_in_the_servers_folder_is_followed(home: Path, link: object, parent: str) -> None:
    cluster = next(home.glob("postgres-*"))
    path = cluster / parent
    with protected_file(home.parent) as victim:
        path.unlink(missing_ok=True)
        link(victim, path)  # type: ignore[operator]
        with server(home) as running:
            assert query(running, "select 1") == [(1,)]
    if parent == "server.log":
        found = path.lstat()
        assert (stat.S_ISREG(found.st_mode), found.st_nlink) == (True, 1)
        assert found.st_uid == cluster.stat().st_uid
    path.unlink()


def test_a_log_that_cannot_be_written_is_an_error_of_one_line(home: Path) -> None:
    log = next(home.glob("postgres-*")) / "server.log"
    log.unlink(missing_ok=True)
    log.mkdir()
    try:
        with pytest.raises(EmbeddedError, match=r"cannot make .*server\.log"), server(home):
            pass
    finally:
        log.rmdir()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_pid_file_that_is_not_a_regular_file_is_not_read(home: Path, kind: str) -> None:
    path = next(home.glob("postgres-*")) / "postmaster.pid"
    if kind == "link":
        path.symlink_to("/etc/shadow")
    else:
        path.mkdir()
    try:
        with pytest.raises(EmbeddedError) as caught, server(home):
            pass
    finally:
        path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize("name", ["users.lock", "server.lock"])
def test_a_lock_file_that_is_a_link_is_rejected(new_home: Path, name: str) -> None:
    new_home.mkdir()
    with protected_file(new_home.parent) as victim:
        os.link(victim, new_home / name)
        with (
            pytest.raises(EmbeddedError, match="it is a link, or not a regular file"),
            server(new_home),
        ):
            pass
        (new_home / name).unlink()


@needs_root
def test_a_data_folder_that_links_to_a_folder_of_root_is_rejected(new_home: Path) -> None:
    elsewhere = new_home.parent / "etc"
    elsewhere.mkdir()
    new_home.mkdir()
    cluster = Server(new_home).data
    cluster.symlink_to(elsewhere)
    os.lchown(cluster, *_programs.account_of("nobody"))
    with pytest.raises(EmbeddedError), server(new_home):
        pass
    assert list(elsewhere.iterdir()) == []


# Checkouts in which the server cannot work


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # of another user, or on another file system
        shutil.copy2(source, target)


@pytest.mark.parametrize("name", ['a "b" $HOME `id`', "apo'strophe 50%"])
def test_a_checkout_may_have_any_name(
    home_on_disk: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = home_on_disk.parent / name
    package = _programs._packaged().parent.parent
    (checkout / "site").mkdir(parents=True)
    for folder in (home_on_disk.parent, checkout):
        folder.chmod(0o777)
    libraries = f"{package.name}.libs"
    (checkout / "site" / libraries).symlink_to(package.with_name(libraries))
    shutil.copytree(
        package / "pginstall18",
        checkout / "site" / package.name / "pginstall18",
        copy_function=link_or_copy,
        ignore=shutil.ignore_patterns("include", "pkgconfig", "*.a"),
    )
    monkeypatch.setattr(
        _programs, "_packaged", lambda: checkout / "site" / package.name / "pginstall18" / "bin"
    )
    monkeypatch.setattr(_programs, "ROOT_HOME", home_on_disk.parent / "root")
    monkeypatch.setenv("XDG_STATE_HOME", str(home_on_disk.parent / "state"))
    _programs.binaries.cache_clear()
    try:
        with server(embedded.home(checkout)) as running:
            assert running.home == checkout / ".data"
            assert query(running, "select 1") == [(1,)]
        running.sockets.rmdir()  # in /tmp, as postgres accepts no quotes in its path
    finally:
        _programs.binaries.cache_clear()


def test_a_read_only_checkout_has_its_data_elsewhere(
    new_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkout = new_home.parent / "checkout"
    checkout.mkdir(mode=0o555)
    reads_only = os.access

    def access(path: Path, mode: int) -> bool:
        """As on a file system that is mounted read-only, also for root."""
        inside = checkout in (path, *Path(path).parents)
        return not (inside and mode & os.W_OK) and reads_only(path, mode)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(_programs, "ROOT_HOME", new_home.parent / "root")
    monkeypatch.setenv("XDG_STATE_HOME", str(new_home.parent / "state"))
    found = embedded.home(checkout)
    assert new_home.parent in found.parents
    assert checkout not in found.parents
    assert "cannot be written: the data is in" in caplog.text
    with server(found) as running:
        assert query(running, "select 1") == [(1,)]


def test_a_checkout_with_a_line_break_in_its_path_has_its_data_elsewhere(new_home: Path) -> None:
    checkout = new_home.parent / "a\nb"
    checkout.mkdir(mode=0o755)
    assert checkout not in embedded.home(checkout).parents


def test_a_full_disk_is_an_error_of_one_line(
    new_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new_home))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(EmbeddedError, match="No space left on device") as caught, server(new_home):
        pass
    assert "\n" not in str(caught.value)
