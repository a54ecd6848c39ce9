"""The `.env`: files that another user could have written are not read; what a file may contain."""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from dbpool import ConfigError, Settings
from dbpool.flask import DBPool
from webapp import create_app

ROOT = Path(__file__).parent.parent
STRANGER = 54321  # the id of no user or group of this process

NOBODY = pwd.getpwnam("nobody")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory; the working directory lies two levels below it."""
    below = tmp_path / "project" / "src"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    tmp_path.chmod(0o755)
    return tmp_path


def write(directory: Path, text: str = "DATABASE_URL=host=of-the-file\n") -> Path:
    file = directory / ".env"
    file.write_text(text)
    file.chmod(0o644)
    return file


def chosen(**config: Any) -> str:
    """The connection string that a Flask application ends up with."""
    app, db = Flask("app"), DBPool()
    app.config.update(config)
    db.init_app(app)
    with app.app_context():
        return db.pool.settings.resolve()


# Owner and permissions


def owned_by_another_user(above: Path) -> str:
    os.chown(write(above), STRANGER, -1)
    return f"it belongs to another user (uid {STRANGER})"


def in_a_strangers_directory(above: Path) -> str:
    write(above)
    os.chown(above, STRANGER, -1)
    return f"{above} belongs to another user (uid {STRANGER})"


def below_a_strangers_directory(above: Path) -> str:
    write(above)
    os.chown(above / "project", STRANGER, -1)
    return f"{above / 'project'} belongs to another user (uid {STRANGER})"


def linked_from_a_strangers_directory(above: Path) -> str:
    write(above / "project").rename(above / "mine")
    (above / ".env").symlink_to("mine")
    os.chown(above, STRANGER, -1)
    return f"{above} belongs to another user"


def linked_into_a_strangers_directory(above: Path) -> str:
    other = above / "other"
    other.mkdir()
    write(other)
    (above / ".env").symlink_to(other / ".env")
    os.chown(other, STRANGER, -1)
    return f"{other} belongs to another user"


def of_another_group(above: Path) -> str:
    file = write(above)
    os.chown(file, -1, STRANGER)
    file.chmod(0o664)
    return f"another group (gid {STRANGER}) can write to it"


def in_another_groups_directory(above: Path) -> str:
    write(above)
    os.chown(above, -1, STRANGER)
    above.chmod(0o2775)
    return f"another group (gid {STRANGER}) can write to {above}"


def open_to_everybody(above: Path) -> str:
    write(above).chmod(0o666)
    return "everybody can write to it"


def in_an_open_directory(above: Path) -> str:
    write(above)
    above.chmod(0o777)
    return f"everybody can write to {above}"


def in_a_sticky_directory(above: Path) -> str:
    write(above)
    above.chmod(0o1777)
    return f"everybody can write to {above}"


def below_an_open_directory(above: Path) -> str:
    write(above)
    (above / "project").chmod(0o777)
    return f"everybody can write to {above / 'project'}"


Setup = Callable[[Path], str]
FOREIGN = [
    *(
        pytest.param(set_up, marks=as_root)
        for set_up in (
            owned_by_another_user,
            in_a_strangers_directory,
            below_a_strangers_directory,
            linked_from_a_strangers_directory,
            linked_into_a_strangers_directory,
            of_another_group,
            in_another_groups_directory,
        )
    ),
    open_to_everybody,
    in_an_open_directory,
    in_a_sticky_directory,
    below_an_open_directory,
]


@pytest.mark.parametrize("set_up", FOREIGN)
def test_a_file_that_others_could_have_written_is_skipped_with_one_warning(
    above: Path, set_up: Setup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = set_up(above)
    monkeypatch.setenv("DATABASE_URL", "host=of-the-environment")
    caplog.set_level(logging.INFO, logger="dbpool")
    assert chosen() == "host=of-the-environment"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(above / ".env") in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("set_up", FOREIGN)
@pytest.mark.parametrize("environ", [{}, {"PGPASSWORD": "hunter2", "PGUSER": "u"}])
def test_a_skipped_file_is_named_if_nothing_else_names_a_database(
    above: Path, set_up: Setup, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = set_up(above)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="DATABASE_URL is not set") as caught:
        chosen()
    assert str(above / ".env") in str(caught.value)
    assert reason in str(caught.value)
    assert "DBPOOL_DOTENV" in str(caught.value)


@pytest.mark.parametrize("name", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGSERVICE"])
def test_a_skipped_file_is_no_error_if_libpqs_variables_name_a_database(
    above: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_everybody(above)
    monkeypatch.setenv(name, "5432")
    assert chosen() == ""


@pytest.mark.parametrize("set_up", FOREIGN)
def test_the_nearest_file_ends_the_search(
    above: Path, set_up: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file further up belongs to another project, even if it is safe."""
    folder = above / "a" / "b"
    (folder / "project" / "src").mkdir(parents=True)
    write(above)
    monkeypatch.chdir(folder / "project" / "src")
    folder.chmod(0o755)
    set_up(folder)
    with pytest.raises(ConfigError, match="DATABASE_URL is not set"):
        chosen()


def plain(above: Path) -> None:
    write(above)


def private(above: Path) -> None:
    write(above).chmod(0o600)


def with_umask_002(above: Path) -> None:
    write(above).chmod(0o664)
    above.chmod(0o775)


def linked(above: Path) -> None:
    """Linked as Kubernetes mounts a secret."""
    (above / "..data").mkdir()
    (above / ".env").symlink_to(write(above / "..data"))


@pytest.mark.parametrize("set_up", [plain, private, with_umask_002, linked])
def test_a_safe_file_is_read_and_named(
    above: Path, set_up: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    set_up(above)
    caplog.set_level(logging.INFO, logger="dbpool")
    assert chosen() == "host=of-the-file"
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert str(above / ".env") in record.getMessage()


USER_SCRIPT = """
import os, sys
import dbpool.flask, dotenv.parser, flask
app = flask.Flask("root")
app.testing = True
dbpool.flask.DBPool(app)  # what it imports may be out of the reach of the user
user, group, *groups = map(int, sys.argv[1:])
os.setgroups(groups)
os.setgid(group)
os.setuid(user)
app = flask.Flask("app")
db = dbpool.flask.DBPool(app)
with app.app_context():
    print(db.pool.settings.resolve())
"""


@pytest.fixture
def reachable_directory() -> Iterator[Path]:
    """A directory that a user other than root can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@as_root
@pytest.mark.parametrize(
    ("ids", "owner", "group", "mode", "is_read"),
    [
        ((1234, 1234), 0, 0, 0o644, True),  # baked into an image, or mounted
        ((1234, 1234), 0, 0, 0o664, True),
        ((1234, 1234), STRANGER, 7, 0o644, False),
        ((1234, 1234), 1234, 1234, 0o664, True),  # umask 002
        ((1234, 1234, 4321), 0, 4321, 0o664, True),  # fsGroup: a group without a name
        ((1234, 1234), 0, 4321, 0o664, False),
        ((1234, 1234, 100), 0, 100, 0o664, False),  # every user is in the group "users"
        ((NOBODY.pw_uid, 100), NOBODY.pw_uid, NOBODY.pw_gid, 0o664, True),  # after `newgrp users`
    ],
)
def test_as_an_ordinary_user(
    reachable_directory: Path,
    ids: tuple[int, ...],
    owner: int,
    group: int,
    mode: int,
    is_read: bool,
) -> None:
    file = write(reachable_directory)
    os.chown(file, owner, group)
    file.chmod(mode)
    done = subprocess.run(
        [sys.executable, "-c", USER_SCRIPT, *map(str, ids)],
        cwd=reachable_directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("of-the-file" in done.stdout) is is_read, done.stderr
    assert ("ConfigError" in done.stderr) is not is_read


# A file that DBPOOL_DOTENV names


@pytest.mark.parametrize("set_up", FOREIGN)
def test_a_named_file_is_read_even_if_others_could_have_written_it(
    above: Path, set_up: Setup, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(above)
    path = above / ".env"
    monkeypatch.setenv("DBPOOL_DOTENV", str(path))
    assert chosen() == "host=of-the-file"
    assert Settings.from_env().resolve() == "host=of-the-file"
    monkeypatch.delenv("DBPOOL_DOTENV")
    assert chosen(DBPOOL_DOTENV=path) == "host=of-the-file"
    assert Settings.from_env(dotenv=path).resolve() == "host=of-the-file"
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    # Then the directories between the file and the working directory do not matter.
    assert len(warned) in (0, 4)
    assert all(str(path) in text for text in warned)


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, "/dev/null/none"):
        with pytest.raises(ConfigError, match="cannot read") as caught:
            Settings.from_env(environ={}, dotenv=path)
        assert str(path) in str(caught.value)
        with pytest.raises(ConfigError, match="cannot read"):
            chosen(DBPOOL_DOTENV=path)


@pytest.mark.parametrize("path", [5, True, "a\0b", ["a"]])
def test_an_invalid_path_is_rejected(path: Any) -> None:
    for read in (
        lambda: Settings.from_env(environ={}, dotenv=path),
        lambda: chosen(DBPOOL_DOTENV=path),
    ):
        with pytest.raises(ConfigError, match=r"^dotenv \(DBPOOL_DOTENV\) must be a path, not"):
            read()


def test_off_reads_no_file(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(above)
    assert chosen(DBPOOL_DOTENV="off") == ""
    assert chosen(DBPOOL_DOTENV=False) == ""
    monkeypatch.setenv("DBPOOL_DOTENV", "off")
    assert chosen() == ""
    assert Settings.from_env().resolve() == ""


def test_the_sample_application_looks_in_its_own_checkout_only(
    above: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(above)
    monkeypatch.setattr("webapp.ROOT", above / "project")

    def conninfo() -> str:
        return str(create_app().extensions["dbpool"].databases.default.settings.resolve())

    assert conninfo() == ""
    write(above / "project", "DATABASE_URL=host=of-the-checkout\n")
    assert conninfo() == "host=of-the-checkout"
    monkeypatch.setenv("DBPOOL_DOTENV", str(above / ".env"))
    assert conninfo() == "host=of-the-file"


def dbpool(cwd: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dbpool", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["check", "wait --timeout 100ms", "stats --scope process"])
def test_the_command_line_sends_nothing_to_a_strangers_server(above: Path, command: str) -> None:
    reason = open_to_everybody(above)
    folder = Path.cwd()
    refused = dbpool(folder, *command.split(), PGPASSWORD="hunter2")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert reason in refused.stderr
    skipped = dbpool(folder, *command.split(), PGHOST="127.0.0.1", DBPOOL_OUTAGE_GRACE="0")
    assert skipped.returncode == 1
    assert skipped.stderr.startswith(f"dbpool: warning: {above / '.env'} is not read")
    assert "of-the-file" not in skipped.stdout + skipped.stderr


# Content


def test_the_environment_may_be_used_and_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "NAME=d\nDATABASE_URL=host=h dbname=${NAME} user=${WHO:-nobody}\n")
    assert Settings.from_env(environ={}, dotenv=file).resolve() == "host=h dbname=d user=nobody"
    environ = {"WHO": "me", "NAME": "e"}
    assert Settings.from_env(environ=environ, dotenv=file).resolve() == "host=h dbname=e user=me"


@pytest.mark.parametrize("text", ["${MISSING}", '"${MISSING}"', "a${MISSING}b", "${USED}"])
def test_a_reference_to_an_unset_variable_is_an_error_that_names_it(
    tmp_path: Path, text: str
) -> None:
    file = write(tmp_path, f"USED=${{MISSING}}\nDBPOOL_APPLICATION_NAME={text}\n")
    with pytest.raises(ConfigError, match=r"DBPOOL_APPLICATION_NAME uses \$\{(MISSING|USED)\}"):
        Settings.from_env(environ={}, dotenv=file)
    # No error if the environment sets the variable.
    environ = {"DBPOOL_APPLICATION_NAME": "shop"}
    assert Settings.from_env(environ=environ, dotenv=file).application_name == "shop"


def test_lines_for_other_programs_may_be_anything(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "PS1=${debian_chroot}\nif true\n= =\n#DBPOOL_X\n # PGX=\n; PGY\n--- PGZ ---\nA='\nDBPOOL_MAX_SIZE=3\n",
    )
    assert Settings.from_env(environ={}, dotenv=file).max_size == 3


@pytest.mark.parametrize(
    "line",
    [
        "DATABASE_URL='host=h",
        'export PGHOST="h',
        "DBPOOL_X 3 = 4",
        "DATABASE_URL",
        "PGHOST # none",
        "set DBPOOL_MAX_SIZE=3",
        "EXPORT DATABASE_URL=host=h",
        "$env:PGHOST='h'",
        '"PGHOST"="h"',
        '{"DATABASE_URL": "host=h"}',
        "\u200bDBPOOL_MAX_SIZE=3",
    ],
)
def test_a_line_of_ours_that_cannot_be_parsed_is_an_error(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, f"A=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"\.env: line 2 cannot be parsed"):
        Settings.from_env(environ={}, dotenv=file)


def test_a_name_alone_stands_for_the_value_in_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "DATABASE_URL\nDBPOOL_MAX_SIZE=3\n")
    settings = Settings.from_env(environ={"DATABASE_URL": "host=h"}, dotenv=file)
    assert (settings.conninfo, settings.max_size) == ("host=h", 3)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("'${X}'", "${X}"),
        ("'a ${X:-b} $X'", "a ${X:-b} $X"),
        ('"${X}"', "x"),
        ("${X}", "x"),
        ("$X", "$X"),
        ("${1}", "${1}"),
        ("${}", "${}"),
    ],
)
def test_references_are_expanded_outside_single_quotes(
    tmp_path: Path, value: str, name: str
) -> None:
    for line in (f"DBPOOL_APPLICATION_NAME={value}", f"export DBPOOL_APPLICATION_NAME = {value}"):
        file = write(tmp_path, line)
        assert Settings.from_env(environ={"X": "x"}, dotenv=file).application_name == name


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_an_error(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / ".env"
    file.write_bytes("DATABASE_URL=host=é\n".encode(encoding))
    with pytest.raises(ConfigError, match="it is not UTF-8"):
        Settings.from_env(environ={}, dotenv=file)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes("DATABASE_URL=host=é\n".encode("utf-8-sig"))
    assert Settings.from_env(environ={}, dotenv=file).resolve() == "host=é"


WRONG = {
    "a wrong setting": "DBPOOL_MAX_SIZE=x\n",
    "a reference": "DATABASE_URL=postgresql://u:hunter2@${MISSING}/d\n",
    "a broken line": "DATABASE_URL='postgresql://u:hunter2@h\n",
    "a malformed string": "DATABASE_URL=mysql://u:hunter2@h/d\n",
    "a wrong time": "DBPOOL_CONNECT_TIMEOUT=0\n",
    "another name": "DATABASE_URI=postgresql://u:hunter2@h/d\n",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_no_frame_of_an_error_shows_the_files_content(above: Path, wrong: str) -> None:
    secret = "PGPASSWORD=hunter2\nOTHER=hunter2\nDBPOOL_TOKEN=hunter2-and-so-on\n"
    write(above, secret + WRONG[wrong])
    for read in (chosen, lambda: Settings.from_env(dotenv=above / ".env")):
        with pytest.raises(ConfigError) as caught:
            read()
        assert "hunter2" not in str(caught.value)
        frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
        own_frames = [frame for frame in frames if "/dbpool/" in frame.f_code.co_filename]
        assert own_frames
        for frame in own_frames:
            for name, value in frame.f_locals.items():
                assert "hunter2" not in repr(value), f"{name} in {frame.f_code.co_qualname}"
