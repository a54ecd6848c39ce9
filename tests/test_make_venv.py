"""The tool that makes the virtual environment: what it refuses to delete, and its messages."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import python

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "make_venv.py"


# Making a real environment takes seconds, and no test here depends on it.
MAKES_ONE = """
import os, pathlib, sys
venv = pathlib.Path(sys.argv[1])
(venv / "bin").mkdir(parents=True)
(venv / "bin" / "python").symlink_to(sys.executable)
(venv / "pyvenv.cfg").touch()
"""


def module(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "__main__.py").write_text(code)


def run(
    *arguments: str | Path, cwd: Path = ROOT, venv: str = MAKES_ONE
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as modules:
        module(Path(modules), "venv", venv)
        module(Path(modules), "pip", "")
        return python(
            TOOL, *arguments, cwd=cwd, env={"PYTHONPATH": modules, "PYTHONDONTWRITEBYTECODE": "1"}
        )


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "requirements.txt"
    path.touch()
    return path


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def with_documents(folder: Path) -> Path:
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    return folder


def with_hidden_file(folder: Path) -> Path:
    folder.mkdir()
    (folder / ".profile").write_text("export A=1")
    return folder


def with_folder(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    return folder


def behind_a_link(folder: Path) -> Path:
    target = with_documents(folder.with_name("target"))
    folder.symlink_to(target)
    return folder


def not_a_folder(folder: Path) -> Path:
    folder.write_text("a file")
    return folder


@pytest.mark.parametrize(
    "make", [with_documents, with_hidden_file, with_folder, behind_a_link, not_a_folder]
)
def test_a_folder_that_is_not_an_environment_is_not_deleted(
    tmp_path: Path, lock: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "folder")
    before = content(tmp_path)
    done = run(folder, lock)
    assert done.returncode == 1
    assert done.stderr.startswith("venv: ")
    assert len(done.stderr.splitlines()) == 1
    assert str(folder) in done.stderr
    assert content(tmp_path) == before, "it left a lock file beside the folder"


@pytest.mark.parametrize("name", [".", "..", ""])
def test_the_working_directory_is_not_deleted(tmp_path: Path, lock: Path, name: str) -> None:
    work = with_documents(tmp_path / "work")
    assert run(name, lock, cwd=work).returncode == 1
    assert (work / "letter.txt").read_text() == "dear"
    assert lock.exists()


def test_a_users_file_with_the_name_of_the_lock_stays(tmp_path: Path, lock: Path) -> None:
    user_file = tmp_path / "poetry.lock"
    user_file.write_text("precious")
    run(tmp_path / "poetry", lock)
    assert user_file.read_text() == "precious"


def test_an_environment_is_made_once_and_again_for_other_packages(
    tmp_path: Path, lock: Path
) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()  # an empty folder is accepted
    first, second = run(venv, lock), run(venv, lock)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("making")
    assert second.stdout == ""
    (venv / "leftover").mkdir()
    lock.write_text("# other packages\n")
    assert run(venv, lock).stdout.startswith("making")
    assert not (venv / "leftover").exists()
    assert (venv / "bin" / "python").exists()


@pytest.mark.parametrize("leftover", ["pyvenv.cfg", ".stamp"])
def test_an_interrupted_environment_is_made_again(
    tmp_path: Path, lock: Path, leftover: str
) -> None:
    venv = tmp_path / "venv"
    (venv / "lib").mkdir(parents=True)
    (venv / leftover).touch()
    assert run(venv, lock).returncode == 0
    assert (venv / "bin" / "python").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "The virtual environment was not created because ensurepip is not\navailable.  On Debian",
            "apt-get install python3-venv",
        ),
        ("Error: [Errno 28] No space left on device: '/x'", "no space left"),
        ("Error: [Errno 13] Permission denied: '/x/bin'", "Permission denied: '/x/bin'"),
        ("", "it said nothing"),
    ],
)
def test_the_error_says_why_no_environment_could_be_made(
    tmp_path: Path, lock: Path, output: str, message: str
) -> None:
    done = run(tmp_path / "venv", lock, venv=f"import sys\nprint({output!r})\nsys.exit(1)\n")
    assert done.returncode == 1
    assert message in done.stderr
    assert ("python3-venv" in done.stderr) == ("python3-venv" in message)
    assert len(done.stderr.splitlines()) == 1
