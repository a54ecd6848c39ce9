"""The statistics directory that gunicorn's hooks make: its place, its owner, its removal."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dbpool import gunicorn as hooks
from dbpool.processes import _directory
from dbpool.processes._files import is_held
from tests.scripts import python

from .gunicorn_site import Site
from .namespaces import own_pids, read_only, unshared
from .postgres import until

ROOT = Path(__file__).parent.parent
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root serves as another user")


MASTER = """
import logging, os, sys, time
from types import SimpleNamespace
from dbpool import gunicorn as hooks

logging.basicConfig(format="%(levelname)s %(message)s")
parent = sys.argv[1] or None
cfg = SimpleNamespace(worker_tmp_dir=parent, uid=os.geteuid(), gid=os.getegid())
server = SimpleNamespace(cfg=cfg, log=logging.getLogger("gunicorn"))
hooks.on_starting(server)
reading, writing = os.pipe()
child = os.fork()  # a worker, which outlives its master
if child == 0:
    for fd in (0, 1, 2, writing):
        os.close(fd)
    time.sleep(60)
    os._exit(0)
os.close(writing)
os.read(reading, 1)  # until the worker has closed what it inherited
print(child, os.environ.get("DBPOOL_STATS_DIR", ""), flush=True)
if sys.stdin.readline():  # anything but an end asks to stop in order
    hooks.on_exit(server)
"""


class Master:
    """A process that runs the hooks of a gunicorn master."""

    def __init__(self, parent: Path | str, *prefix: str, **environ: str) -> None:
        target = {k: v for k, v in os.environ.items() if k not in ("TMPDIR", "TEMP", "TMP")}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", MASTER, str(parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=target | environ,
        )
        assert self.process.stdout is not None
        child, _, directory = self.process.stdout.readline().strip().partition(" ")
        self.directory = Path(directory) if directory else None
        self._child = 0 if prefix else int(child)  # otherwise it ends with its namespace

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> str:
        """Stop it cleanly; return its output."""
        return self.process.communicate("stop\n", 30)[1]

    def close(self) -> None:
        self.kill()
        self.process.communicate()
        if self._child:
            os.kill(self._child, signal.SIGKILL)


@pytest.fixture
def start() -> Iterator[Callable[..., Master]]:
    masters: list[Master] = []

    def start(parent: Path | str, *prefix: str, **environ: str) -> Master:
        masters.append(Master(parent, *prefix, **environ))
        return masters[-1]

    yield start
    for master in masters:
        master.close()


def named(parent: Path) -> set[Path]:
    return set(parent.iterdir())


def test_masters_do_not_touch_each_others_directories(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    first, second = start(tmp_path), start(tmp_path)
    assert named(tmp_path) == {first.directory, second.directory}
    assert first.stop() == second.stop() == ""
    assert named(tmp_path) == set()


def test_a_worker_that_outlives_its_master_does_not_keep_the_directory(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    first = start(tmp_path)
    first.kill()  # its forked worker still runs
    assert named(tmp_path) == {first.directory}
    second = start(tmp_path)
    assert named(tmp_path) == {second.directory}


def test_masters_in_other_containers_are_left_alone_while_they_run(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    inside = [start(tmp_path, *own_pids()) for _ in range(2)]  # both are process 1
    outside = [start(tmp_path) for _ in range(2)]
    inside.append(start(tmp_path, *own_pids()))
    masters = [*inside, *outside]
    assert named(tmp_path) == {master.directory for master in masters}
    for killed in (inside[0], outside[0]):
        assert killed.directory is not None
        lock_file = killed.directory / ".master"
        assert is_held(lock_file)
        killed.kill()
        until(lambda lock_file=lock_file: not is_held(lock_file))  # type: ignore[misc]  # a namespace takes time
    inside.append(start(tmp_path, *own_pids()))
    remaining = {master.directory for master in (*inside[1:], *outside[1:])}
    assert named(tmp_path) == remaining


@pytest.mark.parametrize(
    "name", ["dbpool-stats-1-0123456789ab", "dbpool-stats-1-1", "x-dbpool-stats-1-0123456789ab"]
)
def test_directories_that_no_master_made_are_not_swept(
    start: Callable[..., Master], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    start(tmp_path)
    assert (tmp_path / name / "file").exists()


def test_a_directory_that_was_being_removed_is_swept(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    (tmp_path / "dbpool-stats-1-0123456789ab").mkdir()
    master = start(tmp_path)
    assert named(tmp_path) == {master.directory}


def test_a_command_in_a_container_finds_the_master_that_runs_there(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    outside = [start(tmp_path), start(tmp_path, *own_pids())]
    finding = "from dbpool.processes._directory import find_directories; print(*find_directories())"
    script = MASTER.replace(
        "if sys.stdin.readline():",
        f"import subprocess; subprocess.run([sys.executable, '-c', {finding!r}])\n"
        "if sys.stdin.readline():",
    )
    done = python(
        "-c",
        script,
        str(tmp_path),
        prefix=[*own_pids()],
        env={"TMPDIR": str(tmp_path)},
        stdin="stop\n",
        check=True,
    )
    made, found = done.stdout.splitlines()
    assert made.partition(" ")[2] == found
    assert named(tmp_path) == {master.directory for master in outside}
    # Without a master in this container it may find several.
    done = python("-c", finding, prefix=[*own_pids()], env={"TMPDIR": str(tmp_path)}, check=True)
    assert set(done.stdout.split()) >= {str(master.directory) for master in outside}


@only_root
def test_only_the_directories_of_the_same_user_are_swept(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    remaining = start(tmp_path)
    remaining.kill()
    assert remaining.directory is not None
    shutil.chown(remaining.directory, "nobody")
    start(tmp_path)
    assert remaining.directory.exists()


@only_root
def test_a_command_ignores_a_directory_that_another_user_has_planted(
    start: Callable[..., Master],
) -> None:
    script = """
import os, sys
from dbpool.processes._directory import find_directories
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
print(*find_directories())
"""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o1777)
        planted, own = start(parent), start(parent)
        for master, mode in (planted, 0o755), (own, 0o700):
            assert master.directory is not None
            master.directory.chmod(mode)
            (master.directory / ".master").chmod(0o644)
        assert planted.directory is not None
        for path in (planted.directory, planted.directory / ".master"):
            os.chown(path, 54321, 54321)
        found = [
            python("-c", script, user, env={"TMPDIR": parent}, check=True).stdout.split()
            for user in ("0", "54322", "54321")
        ]
        below_parent = [
            [directory for directory in directories if directory.startswith(parent)]
            for directories in found
        ]
        assert below_parent == [[str(own.directory)], [], [str(planted.directory)]]


def test_a_link_in_place_of_a_directory_is_not_followed(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    target = tmp_path / "kept"
    target.mkdir()
    (target / "file").touch()
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "dbpool-stats-1-0123456789ab").symlink_to(target)
    start(parent)
    assert (target / "file").exists()


def test_a_directory_set_by_the_user_is_kept(start: Callable[..., Master], tmp_path: Path) -> None:
    master = start(tmp_path, DBPOOL_STATS_DIR="/somewhere/else")
    assert master.directory == Path("/somewhere/else")
    assert master.stop() == ""
    assert named(tmp_path) == set()


def test_a_master_made_by_a_master_has_a_directory_of_its_own(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    old = start(tmp_path)
    new = start(tmp_path, DBPOOL_STATS_DIR=str(old.directory))  # as after SIGUSR2
    assert new.directory != old.directory
    old.stop()
    assert named(tmp_path) == {new.directory}


def test_a_directory_removed_by_others_is_no_error_at_the_end(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    master = start(tmp_path)
    assert master.directory is not None
    shutil.rmtree(master.directory)
    assert master.stop() == ""


# Read-only file systems


def is_in_memory(master: Master) -> bool:
    return master.directory is not None and master.directory.parent == Path("/dev/shm")


needs_memory = pytest.mark.skipif(
    not os.access("/dev/shm", os.W_OK), reason="needs a writable /dev/shm"
)


@needs_memory
@pytest.mark.parametrize("kind", ["unset", "missing", "file", "full"])
def test_dev_shm_is_used_if_the_directory_cannot_be_made(
    start: Callable[..., Master], tmp_path: Path, kind: str
) -> None:
    parent = tmp_path / "place"
    prefix: list[str] = []
    if kind == "file":
        parent.touch()
    elif kind == "full":  # two inodes: the mount and the directory, but no file in it
        parent.mkdir()
        mount = 'mount -t tmpfs -o nr_inodes=2 none "$0" && exec "$@"'
        prefix = [*unshared("--mount"), "sh", "-c", mount, str(parent)]
    master = start("" if kind == "unset" else parent, *prefix)
    assert is_in_memory(master)
    assert master.stop() == ""
    assert master.directory is not None
    assert not master.directory.exists()


@needs_memory
def test_a_directory_on_a_disk_is_logged_with_the_amount_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DBPOOL_STATS_DIR", str(tmp_path))
    monkeypatch.delenv("DBPOOL_SERVE", raising=False)
    logged: list[str] = []
    log = SimpleNamespace(info=lambda text, *args: logged.append(text % args))
    for answer, expected in ((True, 0), (None, 0), (False, 1)):
        monkeypatch.setattr(hooks, "is_in_memory", lambda path, known=answer: known)
        hooks.on_starting(SimpleNamespace(log=log))
        monkeypatch.setenv("DBPOOL_STATS_DIR", str(tmp_path))
        assert len(logged) == expected
    assert f"{tmp_path} is not in memory" in logged[0]
    assert "up to 4 KiB a second" in logged[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/mounts")
def test_is_in_memory_recognises_tmpfs() -> None:
    mounts = map(str.split, Path("/proc/mounts").read_text().splitlines())
    kinds = {path: kind for _, path, kind, *_ in mounts}
    for mount in {"/dev/shm", "/proc", "/sys"} & kinds.keys():
        assert _directory.is_in_memory(Path(mount)) is (kinds[mount] == "tmpfs")
    assert _directory.is_in_memory(Path("/no/such/directory")) is None


def test_a_read_only_root_is_no_error(start: Callable[..., Master], tmp_path: Path) -> None:
    for parent in ("", tmp_path):
        master = start(parent, *read_only("/dev/shm"))
        assert is_in_memory(master)
        assert master.stop() == ""


def test_no_writable_directory_logs_one_warning(
    start: Callable[..., Master], tmp_path: Path
) -> None:
    for parent in ("", tmp_path):
        master = start(parent, *read_only())
        assert master.directory is None
        (line,) = master.stop().splitlines()
        assert line.startswith("WARNING dbpool: no directory can be made for the statistics (")
        assert "/dev/shm: " in line
        assert "Read-only file system" in line


@needs_memory
def test_gunicorn_serves_on_a_read_only_root(dsn: str, tmp_path: Path) -> None:
    site = Site(
        tmp_path,
        dsn,
        more="worker_tmp_dir, loglevel = '/dev/shm', 'warning'",
        prefix=read_only("/dev/shm"),
    )
    try:
        site.get("/")
        assert site.stats()["scope"] == "all"
        assert site.stop() < 10
        assert site.output() == ""
    finally:
        site.kill()


def test_the_master_closes_no_pool_for_a_worker_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[float] = []
    monkeypatch.setattr("dbpool.pool._fork.close_all", closed.append)
    hooks.worker_exit(SimpleNamespace(pid=os.getpid()), None)
    assert closed == []


# The master runs as root; the workers' user may write to the parent directory


RACE = """
import os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
from dbpool import gunicorn as hooks

parent, user, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
remaining = 0  # events until the other user acts; 0 is never


def act():
    \"\"\"Put root's directory, or a link to it, in place of the hooks'.\"\"\"
    path = next((p for p in parent.iterdir() if p.name != victim.name), None)
    if path is not None:
        path.rename(parent / "stolen")
        if method == "link":
            path.symlink_to(victim)
        else:
            victim.rename(path)


def hook(event, args):
    global remaining
    if remaining > 0:
        remaining -= 1
        if remaining == 0:
            act()


class Log:
    def warning(self, *arguments):
        pass

    info = warning


def left_behind():
    path = parent / "dbpool-stats-1-00000000aaaa"
    path.mkdir(mode=0o700)
    (path / ".master").touch()
    os.chown(path, user, user)


def nothing():
    pass


def started():
    hooks.on_starting(server)


sys.addaudithook(hook)
cfg = SimpleNamespace(worker_tmp_dir=str(parent), uid=user, gid=user)
server = SimpleNamespace(cfg=cfg, log=Log())
victim = parent / "victim"
for before, phase in (
    (nothing, hooks.on_starting), (left_behind, hooks.on_starting), (started, hooks.on_exit)
):
    for step in range(1, 1000):
        victim.mkdir(mode=0o755)
        (victim / "file").touch()
        inode = victim.stat().st_ino
        before()
        remaining = step
        phase(server)
        is_over, remaining = remaining > 0, 0
        (found,) = [p for p in parent.iterdir() if p.stat(follow_symlinks=False).st_ino == inode]
        for path in (found, found / "file"):
            assert path.stat().st_uid == 0, (before, phase, step, path)
        hooks.on_exit(server)
        for path in parent.iterdir():
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
        if is_over:
            break
    print(step)
"""


@only_root
@pytest.mark.parametrize("method", ["link", "move"])
def test_the_workers_user_gains_no_access_to_files_of_root(tmp_path: Path, method: str) -> None:
    """Whatever it puts in place of the directory, at any step."""
    nobody = pwd.getpwnam("nobody")
    done = python("-c", RACE, str(tmp_path), str(nobody.pw_uid), method)
    assert done.returncode == 0, done.stderr
    assert all(int(steps) > 3 for steps in done.stdout.split())
    assert len(done.stdout.split()) == 3
