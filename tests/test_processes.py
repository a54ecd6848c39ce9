"""Statistics of several processes: merged, archived, and robust against damaged files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dbpool.metrics import BreakerSnapshot, HolderSnapshot, Metrics, Snapshot
from dbpool.processes import Processes
from dbpool.processes._archive import part_to_json
from dbpool.processes._files import ProcessLock, is_held, locked, start_time, write
from dbpool.prometheus import expose
from dbpool.report import Process, Report
from tests.scripts import python
from tests.threads import Task

from .namespaces import own_pids
from .postgres import until

WORKER = """
import sys, time
from dbpool.metrics import Metrics
from dbpool.processes import Processes

class Fake:
    def stats(self):
        metrics = Metrics()
        metrics.checkouts = int(sys.argv[2])
        metrics.wait.add(0.001)
        return metrics.snapshot([], state="up", size=1, idle=1)

processes = Processes({"default": Fake()}, directory=sys.argv[1])
processes.start()
assert processes.publish()
print("ready", flush=True)
time.sleep(60)
"""


DERIVED = {"count", "sum", "p50", "p95", "p99"}  # written, but not read back


class Counting:
    """Stands in for a pool: any object with `stats()` is enough."""

    def __init__(self, checkouts: int = 0) -> None:
        self.metrics = Metrics()
        self.metrics.checkouts = checkouts

    def stats(self) -> Snapshot:
        return self.metrics.snapshot([], state="up", size=2, active=1, idle=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "stats"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def processes(directory: Path) -> Iterator[Processes]:
    processes = Processes({"default": Counting(5)}, directory=directory)
    yield processes
    processes.close()


@pytest.fixture
def workers(directory: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two worker processes with 10 and 20 checkouts."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), count],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for count in ("10", "20")
    ]
    for worker in started:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    yield started
    for worker in started:
        worker.kill()
        worker.communicate()


def checkouts(report: dict[str, Any]) -> int:
    return int(report["pools"]["default"]["counters"]["checkouts"])


def test_without_a_directory_a_process_reports_only_itself() -> None:
    report = Processes({"default": Counting(5)}).report()
    assert report["scope"] == "process"
    assert [process["pid"] for process in report["processes"]] == [os.getpid()]
    assert checkouts(report) == 5


def test_all_processes_are_merged(
    processes: Processes, workers: list[subprocess.Popen[str]]
) -> None:
    report = processes.report()
    assert report["schema"] == 2
    assert report["scope"] == "all"
    assert {process["pid"] for process in report["processes"]} == {
        os.getpid(),
        *(worker.pid for worker in workers),
    }
    assert all(0 <= process["age"] < 30 for process in report["processes"])
    assert checkouts(report) == 35
    assert report["pools"]["default"]["size"] == 4
    assert checkouts(processes.report("process")) == 5


def test_totals_do_not_fall_when_a_worker_is_killed(
    processes: Processes, workers: list[subprocess.Popen[str]]
) -> None:
    assert checkouts(processes.report()) == 35
    workers[0].kill()
    workers[0].wait()
    for _ in range(3):
        report = processes.report()
        assert checkouts(report) == 35
        assert report["pools"]["default"]["size"] == 3
        assert workers[0].pid not in {process["pid"] for process in report["processes"]}


def test_a_zombie_worker_counts_as_ended(
    processes: Processes, workers: list[subprocess.Popen[str]]
) -> None:
    workers[0].kill()
    stdout = workers[0].stdout
    assert stdout is not None
    assert stdout.read() == ""  # it has ended, but its parent has not waited for it
    until(lambda: processes.report()["pools"]["default"]["size"] == 3)
    assert checkouts(processes.report()) == 35


def test_nothing_is_archived_while_another_process_does(
    processes: Processes, workers: list[subprocess.Popen[str]], directory: Path
) -> None:
    workers[0].kill()
    workers[0].wait()
    with (directory / "app.lock").open("w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        assert checkouts(processes.report()) == 35
        assert not (directory / "app.archive").exists()
    assert checkouts(processes.report()) == 35
    assert (directory / "app.archive").exists()


def test_a_hung_workers_age_grows_and_its_counts_stay(
    processes: Processes, workers: list[subprocess.Popen[str]]
) -> None:
    os.kill(workers[0].pid, signal.SIGSTOP)

    def age() -> float:
        ages = {process["pid"]: process["age"] for process in processes.report()["processes"]}
        return float(ages[workers[0].pid])

    until(lambda: age() > 1.5)
    assert checkouts(processes.report()) == 35
    os.kill(workers[0].pid, signal.SIGCONT)
    until(lambda: age() < 1.5)


CONTAINED = WORKER.replace("time.sleep(60)", "sys.stdin.read()")


class Contained:
    """A worker that is process 1 in its own pid namespace, as in a container."""

    def __init__(self, directory: Path, count: str) -> None:
        self._process = subprocess.Popen(
            [*own_pids(), sys.executable, "-c", CONTAINED, str(directory), count],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def contained(directory: Path) -> Iterator[list[Contained]]:
    """Two workers in two containers, with 100 and 200 checkouts; both are process 1."""
    started = [Contained(directory, count) for count in ("100", "200")]
    yield started
    for each in started:
        each.kill()


def test_containers_may_share_the_directory(
    processes: Processes,
    contained: list[Contained],
    workers: list[subprocess.Popen[str]],
    directory: Path,
) -> None:
    for _ in range(3):
        report = processes.report()
        assert checkouts(report) == 335
        assert report["pools"]["default"]["size"] == 6
        assert [p["pid"] for p in report["processes"]].count(1) == 2
        assert len(report["processes"]) == 5
    # The report is the same from inside a container.
    command = [sys.executable, "-m", "dbpool", "stats", "--dir", str(directory)]
    done = subprocess.run(
        [*own_pids(), *command],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert checkouts(json.loads(done.stdout)) == 335
    assert len(json.loads(done.stdout)["processes"]) == 5

    contained[0].kill()
    workers[1].kill()
    workers[1].wait()
    until(lambda: processes.report()["pools"]["default"]["size"] == 4)  # takes a moment
    for _ in range(3):
        report = processes.report()
        assert checkouts(report) == 335
        assert len(report["processes"]) == 3
    assert len(list(directory.glob("*.alive"))) == 3


FORKING = """
import os
if os.fork() == 0:
    for fd in (0, 1, 2):
        os.close(fd)
    time.sleep(60)
    os._exit(0)
print("forked", flush=True)
time.sleep(60)
"""


def test_a_dead_worker_does_not_seem_alive_because_of_its_forked_child(
    processes: Processes, directory: Path
) -> None:
    script = WORKER.replace("time.sleep(60)", FORKING)
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(directory), "10"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    assert worker.stdout.readline() == "forked\n"
    assert processes.report()["pools"]["default"]["size"] == 3
    worker.kill()  # its forked child lives on
    worker.communicate()
    report = processes.report()
    os.killpg(worker.pid, signal.SIGKILL)
    assert report["pools"]["default"]["size"] == 2
    assert checkouts(report) == 15


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parents_lock(directory: Path) -> None:
    with locked(directory / "app.lock") as is_locked:
        assert is_locked
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
    with locked(directory / "app.lock") as is_locked:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert is_locked


def test_a_process_whose_lock_file_was_removed_is_recognised_by_its_pid(
    processes: Processes, workers: list[subprocess.Popen[str]], directory: Path
) -> None:
    for lock_file in directory.glob("*.alive"):
        lock_file.unlink()
    assert checkouts(processes.report()) == 35
    assert processes.report()["pools"]["default"]["size"] == 4
    workers[0].kill()
    workers[0].wait()
    assert processes.report()["pools"]["default"]["size"] == 3
    assert checkouts(processes.report()) == 35


def test_a_process_gets_its_lock_while_others_check_it(directory: Path) -> None:
    stop, path = threading.Event(), directory / "one.alive"

    def ask() -> None:
        while not stop.is_set():
            is_held(path)

    checkers = [Task(ask) for _ in range(3)]
    try:
        for _ in range(200):
            ProcessLock(path).close()
            path.unlink()
    finally:
        stop.set()
        for checker in checkers:
            checker.result()


LOCKLESS = """
import errno, os, sys

def hook(event, args):  # as a file system that keeps no locks
    if event == "fcntl.flock":
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

sys.addaudithook(hook)
"""


def test_without_file_locks_a_process_is_recognised_by_its_pid(directory: Path) -> None:
    report = """
import json
print(json.dumps(Processes({}, directory=sys.argv[1]).collect_others().to_json()), flush=True)
"""
    first = LOCKLESS + WORKER
    second = first.replace("time.sleep(60)", report)
    command = [sys.executable, "-c", first, str(directory), "10"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        command = [sys.executable, "-c", second, str(directory), "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        worker.kill()
    found = json.loads(done.stdout.splitlines()[1])
    assert checkouts(found) == 30
    assert len(found["processes"]) == 2
    assert list(directory.glob("*.alive")) == []
    assert "statistics" not in done.stderr


def test_a_file_that_cannot_be_opened_is_tried_again(directory: Path) -> None:
    script = """
import os, resource, sys
from tests.test_processes import Counting
from dbpool.processes import Processes

processes = Processes({"default": Counting(5)}, directory=sys.argv[1])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
assert not processes.publish()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert processes.publish()
print(*os.listdir(sys.argv[1]))
"""
    done = python("-c", script, str(directory), check=True)
    endings = {Path(name).suffix for name in done.stdout.split()}
    assert endings == {".alive", ".json"}


HOLDING = WORKER.replace(
    "idle=1)",
    'idle=1, holders=(HolderSnapshot("other", 5.0, "a.py:1 f"),),'
    ' breaker=BreakerSnapshot("open", 1.0, "refused", 30.0))',
).replace("import Metrics", "import BreakerSnapshot, HolderSnapshot, Metrics")


class Holding(Counting):
    """Stands in for a pool with one holder, whose age is constant."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def stats(self) -> Snapshot:
        holders = (HolderSnapshot("own", self._seconds, "b.py:1 g"),)
        return self.metrics.snapshot([], state="up", size=1, active=1, holders=holders)


def test_holders_of_other_processes_age_between_snapshots(directory: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(directory), "10"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    os.kill(worker.pid, signal.SIGSTOP)  # so that it publishes no more
    processes = Processes({"default": Holding(6.0)}, directory=directory)

    def pool() -> dict[str, Any]:
        found: dict[str, Any] = processes.report()["pools"]["default"]
        return found

    def uptime() -> float:
        found = {p["pid"]: p["uptime"] for p in processes.report()["processes"]}
        return float(found[worker.pid])

    def ages() -> dict[str, float]:
        return {holder["thread"]: holder["seconds"] for holder in pool()["holders"]}

    try:
        first, remaining, up = ages(), pool()["breaker"]["retry_after"], uptime()
        until(lambda: ages()["other"] > first["other"] + 0.1)
        assert pool()["breaker"]["retry_after"] < remaining < 30.0
        assert uptime() > up
        assert ages()["own"] < 6.5  # its own snapshot is current
        until(lambda: ages()["other"] > ages()["own"])
        assert [holder["thread"] for holder in pool()["holders"]] == ["other", "own"]
    finally:
        worker.kill()
        worker.communicate()
        processes.close()


def test_a_recycled_pid_is_another_process(processes: Processes, directory: Path) -> None:
    processes.publish()
    (own,) = directory.glob("*.json")
    record = json.loads(own.read_text())
    record |= {"pid": 1, "start": "12345"}
    (directory / "app-1-12345.json").write_text(json.dumps(record))
    report = processes.report()
    assert 1 not in {process["pid"] for process in report["processes"]}
    assert checkouts(report) == 10
    assert checkouts(processes.report()) == 10
    assert not (directory / "app-1-12345.json").exists()


def test_a_crash_between_archiving_and_removing_doubles_no_counts(
    processes: Processes, directory: Path
) -> None:
    processes.publish()
    (own,) = directory.glob("*.json")
    record = json.loads(own.read_text()) | {"pid": 1, "start": "12345"}
    dead = directory / "app-1-12345.json"
    dead.write_text(json.dumps(record))
    assert checkouts(processes.report()) == 10
    dead.write_text(json.dumps(record))
    assert checkouts(processes.report()) == 10


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"[]",
        b'{"schema": 99}',
        b"\xff\xfe",
        b"null",
        b"[" * 200_000,
        b"x",
        b"x\x9cgarbage",
        zlib.compress(b"[]")[:-1],
        zlib.compress(b" " * (1 << 21) + b"[]"),
    ],
    ids=lambda garbage: repr(garbage[:20]),
)
def test_damaged_files_are_ignored_and_logged_once(
    processes: Processes, directory: Path, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "app-7-7.json").write_bytes(garbage)
    (directory / "app.archive").write_bytes(garbage)
    for _ in range(3):
        assert checkouts(processes.report()) == 5
    assert len([r for r in caplog.records if "app-7-7.json" in r.message]) == 1


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from paths(each, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def make_record() -> dict[str, Any]:
    metrics = Metrics()
    metrics.wait.add(0.5)
    snapshot = metrics.snapshot(
        [],
        state="down",
        size=1,
        breaker=BreakerSnapshot("open", 1.0, "refused", 2.0),
        holders=(HolderSnapshot("a", 1.0, "a.py:1 f", "index"), HolderSnapshot("a", 1.0, "b")),
    )
    parent = os.getppid()
    process = Process(parent, start_time(parent) or "0", written=1.0, uptime=1.0)
    record: dict[str, Any] = json.loads(
        json.dumps(part_to_json(Report({"default": snapshot}, (process,))))
    )
    return record


ODD: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, float("nan"), float("inf"), "\ud800", 1 << 100, 1e308])
    | st.text(st.characters(), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    path.chmod(0o700)
    return path


@given(st.sampled_from(list(paths(make_record()))), ODD, st.booleans())
def test_the_report_is_strict_json_whatever_a_file_contains(
    shared: Path, path: tuple[Any, ...], odd: Any, is_archive: bool
) -> None:
    record = replaced(make_record(), path, odd)
    if is_archive and isinstance(record, dict):
        record["folded"] = []
    name = "app.archive" if is_archive else "app-7-7.json"
    (shared / name).write_text(json.dumps(record))
    processes = Processes({"default": Counting(5)}, directory=shared)
    report = processes.report()
    processes.close()
    for file in shared.iterdir():
        file.unlink()
    json.dumps(report, allow_nan=False, ensure_ascii=False).encode()
    assert report["scope"] == "all"
    assert checkouts(report) >= 5
    expose(report)


def test_an_incomplete_record_is_not_used(processes: Processes, directory: Path) -> None:
    for path in paths(make_record()):
        if not path or not isinstance(path[-1], str) or path[-1] in {"default", *DERIVED}:
            continue
        record = inner = make_record()
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (directory / "app-7-7.json").write_text(json.dumps(record))
        assert len(processes.report()["processes"]) == 1, path


def test_text_that_cannot_be_encoded_does_not_hide_a_worker(directory: Path) -> None:
    processes = Processes({"a\udc80": Counting(5)}, directory=directory)
    report = processes.report()
    assert report["pools"].keys() == {"a?"}
    expose(report)
    processes.close()


def test_a_directory_in_place_of_a_file_leaks_no_descriptor(
    processes: Processes, directory: Path
) -> None:
    (directory / "app-1-1.json").mkdir()
    processes.report()
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        assert checkouts(processes.report()) == 5
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_file_that_is_too_large_is_not_read(processes: Processes, directory: Path) -> None:
    archive = {"schema": 2, "folded": [], "pools": processes.report()["pools"]}
    (directory / "app.archive").write_text(json.dumps(archive))
    assert checkouts(processes.report()) == 10
    (directory / "app.archive").write_text(json.dumps(archive) + " " * (1 << 20))
    assert checkouts(processes.report()) == 5


def test_a_link_is_not_followed(processes: Processes, directory: Path, tmp_path: Path) -> None:
    processes.publish()
    (own,) = directory.glob("*.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(own.read_text())
    (directory / "app-7-7.json").symlink_to(elsewhere)
    assert checkouts(processes.report()) == 5


def test_a_directory_open_to_others_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.chmod(0o755)
    processes = Processes({"default": Counting(5)}, directory=directory)
    for _ in range(2):
        assert processes.report()["scope"] == "process"
    (warning,) = [message for message in caplog.messages if "private" in message]
    assert warning.endswith(": its mode is 0755, and must be 0700")
    assert list(directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a directory away")
def test_another_users_directory_is_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.chown(directory, "nobody")
    processes = Processes({"default": Counting(5)}, directory=directory)
    assert processes.report()["scope"] == "process"
    assert ": it belongs to uid " in caplog.text
    assert ", this process runs as 0" in caplog.text
    assert list(directory.iterdir()) == []


def test_a_missing_directory_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processes = Processes({"default": Counting(5)}, directory=tmp_path / "nowhere")
    for _ in range(2):
        assert processes.report()["scope"] == "process"
    assert len([r for r in caplog.records if "nowhere" in r.message]) == 1


def test_a_failing_write_does_no_harm_and_is_logged_once(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processes = Processes({"default": Counting(5)}, directory=directory, app="a" * 300)
    for _ in range(2):  # the name is too long for a file system
        assert processes.report()["scope"] == "process"
    assert len([r for r in caplog.records if "cannot write" in r.message]) == 1
    processes.close()


def test_a_full_disk_does_no_harm_and_is_logged_once(directory: Path) -> None:
    script = f"""
import resource, signal
from tests.test_processes import Counting
from dbpool.processes import Processes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
processes = Processes({{"default": Counting(5)}}, directory={str(directory)!r})
for _ in range(3):
    report = processes.report()
    assert report["scope"] == "process"
    assert report["pools"]["default"]["counters"]["checkouts"] == 5
"""
    done = python("-c", script, check=True)
    assert done.stderr.count("cannot write statistics") == 1
    assert list(directory.glob("*.json")) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_read_only_file_system_does_no_harm_and_is_logged_once(directory: Path) -> None:
    script = f"""
from tests.test_processes import Counting
from dbpool.processes import Processes
processes = Processes({{"default": Counting(5)}}, directory={str(directory)!r})
for _ in range(3):
    report = processes.report()
    assert report["scope"] == "process"
    assert report["pools"]["default"]["counters"]["checkouts"] == 5
"""
    mount = 'mount -t tmpfs -o mode=700 none "$0" && mount -o remount,ro "$0" || exit 77; exec "$@"'
    names = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    done = python("-c", script, prefix=[*names, "sh", "-c", mount, str(directory)])
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write statistics") == 1
    assert "Read-only file system" in done.stderr


class Growing(Counting):
    """Stands in for a pool that counts one more checkout at each snapshot."""

    def stats(self) -> Snapshot:
        self.metrics.checkouts += 1
        return super().stats()


def published(directory: Path) -> int:
    (own,) = directory.glob("*.json")
    return checkouts(json.loads(own.read_text()))


def test_a_publication_is_never_overwritten_by_an_older_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes({"default": Growing()}, directory=directory)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(path: Path, data: object) -> int:
        monkeypatch.undo()
        begun.set()
        assert go_on.wait(30)
        return write(path, data)

    monkeypatch.setattr("dbpool.processes._processes.write", slowly)
    older = Task(processes.publish)
    assert begun.wait(30)
    processes.start()
    last = Task(processes.close)
    go_on.set()
    older.result(30)
    last.result(30)
    assert published(directory) == 2


def test_a_process_reports_about_itself_what_others_read(directory: Path) -> None:
    processes = Processes({"default": Growing()}, directory=directory)
    assert checkouts(processes.report()) == published(directory)
    processes.close()


def test_a_hanging_write_delays_no_report(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dbpool.processes._processes.WRITE_TIMEOUT", 0.01)
    processes = Processes({"default": Counting(5)}, directory=directory)
    with processes._state().writing:
        for _ in range(2):
            assert processes.report()["scope"] == "process"
    assert len([r for r in caplog.records if "takes longer" in r.message]) == 1
    assert processes.report()["scope"] == "all"
    processes.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_forked_during_a_publication_publishes(directory: Path) -> None:
    processes = Processes({"default": Counting(5)}, directory=directory)
    processes.start()
    state = processes._state()
    with state.writing, state.starting:
        pid = os.fork()
        if pid == 0:
            processes.start()
            is_expected = processes.publish() and processes._state().is_publishing
            os._exit(0 if is_expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert checkouts(processes.report()) == 10
    processes.close()


def test_a_lack_of_threads_fails_no_request_and_is_retried(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("dbpool.processes._processes.PUBLISH_INTERVAL", 0.01)
    processes = Processes({"default": Counting(5)}, directory=directory)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            assert checkouts(processes.report()) == 5
            until(lambda: time.monotonic() >= processes._state().retry_at)
    assert len([r for r in caplog.records if "new thread" in r.message]) == 1
    processes.start()
    assert "dbpool-stats" in {thread.name for thread in threading.enumerate()}
    processes.close()


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_jump_changes_no_age_and_no_count(
    processes: Processes,
    workers: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    days: int,
) -> None:
    before, now = processes.report(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + days * 86400)
    after = processes.report()
    assert abs(after["time"] - before["time"] - days * 86400) < 60
    assert all(0 <= process["age"] < 30 for process in after["processes"])
    assert [p["pid"] for p in after["processes"]] == [p["pid"] for p in before["processes"]]
    assert checkouts(after) == checkouts(before) == 35
    assert processes.publish()


def test_two_applications_do_not_mix(processes: Processes, directory: Path) -> None:
    other = Processes({"default": Counting(100)}, directory=directory, app="other/../app")
    assert checkouts(other.report()) == 100
    assert checkouts(processes.report()) == 5
    other.close()


def test_two_applications_with_one_name_in_a_process_are_reported_as_one(
    processes: Processes, directory: Path
) -> None:
    other = Processes({"default": Counting(100)}, directory=directory)
    other.publish()
    for _ in range(2):
        for each in (processes, other):
            report = each.report()
            assert checkouts(report) == 105
            assert [process["pid"] for process in report["processes"]] == [os.getpid()]
    other.close()


def test_both_applications_of_a_dead_process_are_archived(
    processes: Processes, directory: Path
) -> None:
    for number in (0, 1):
        record = make_record() | {"pid": 1, "start": "12345", "number": number}
        (directory / f"app-1-12345-{number}.json").write_text(json.dumps(record))
    for _ in range(2):
        assert processes.report()["pools"]["default"]["wait"]["count"] == 2
    assert list(directory.glob("app-1-*.json")) == []


def test_the_exposition_is_accepted_by_both_parsers(processes: Processes) -> None:
    report = processes.report()
    odd = 'odd "name"\n\\ {}'
    report["pools"][odd] = report["pools"]["default"]
    body, content_type = expose(report, "text/plain")
    assert content_type.startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    names = {sample.labels["pool_name"] for sample in families["db_client_connection_max"].samples}
    assert names == {"default", odd}
    body, content_type = expose(report, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    modern = {f.name: f for f in openmetrics.text_string_to_metric_families(body.decode())}  # type: ignore[no-untyped-call]
    assert modern["dbpool_checkouts"].samples[0].value == 5
