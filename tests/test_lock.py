"""The lock files are complete, pinned, hashed and consistent, and pip obeys them."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.scripts import python

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]
LOCKS = [
    "requirements.txt",
    "webapp/requirements.txt",
    "bench/requirements.txt",
    "docs/requirements.txt",
]
FILES = [*LOCKS, "tools/requirements.txt"]


def pins(path: str) -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package in a lock file."""
    found: dict[str, tuple[str, list[str]]] = {}
    text = (ROOT / path).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            wanted, *hashes = re.split(r"\s+--hash=", line.strip())
            requirement = Requirement(wanted)
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert "*" not in specifier.version
            found[canonicalize_name(requirement.name)] = (specifier.version, hashes)
    return found


def bounds(*groups: str, package: bool = True) -> list[Requirement]:
    """The requirements in pyproject.toml: the package with its extras, and these groups."""
    wanted: list[Any] = []
    if package:
        wanted += PROJECT["project"]["dependencies"]
        for extra in PROJECT["project"]["optional-dependencies"].values():
            wanted += extra
    for group in groups:
        for item in GROUPS[group]:
            if isinstance(item, str):
                wanted.append(item)
            else:
                wanted += map(str, bounds(item["include-group"], package=False))
    return [Requirement(text) for text in wanted]


@pytest.mark.parametrize("path", FILES)
def test_every_package_is_pinned_and_hashed(path: str) -> None:
    assert pins(path)
    for name, (_, hashes) in pins(path).items():
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name


@pytest.mark.parametrize("path", FILES)
def test_the_header_has_the_command_and_no_index_is_named(path: str) -> None:
    text = (ROOT / path).read_text()
    assert "make lock" in text.splitlines()[1]
    assert not re.search(r"https?:|index-url|find-links|file:", text)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("requirements.txt", bounds("dev")),
        ("webapp/requirements.txt", bounds()),
        ("bench/requirements.txt", bounds("embedded", "bench")),
        ("docs/requirements.txt", bounds("docs")),
        ("tools/requirements.txt", bounds("lock", package=False)),
    ],
    ids=FILES,
)
def test_every_bound_of_the_project_is_locked(path: str, wanted: list[Requirement]) -> None:
    locked = pins(path)
    for requirement in wanted:
        version, _ = locked[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement


@pytest.mark.parametrize("path", LOCKS[1:])
def test_the_lock_files_agree(path: str) -> None:
    full = pins("requirements.txt")
    both = {name: pin for name, pin in pins(path).items() if name in full}
    assert {name: full[name] for name in both} == both


def test_the_image_has_no_packages_of_tests_and_lint() -> None:
    tools = {canonicalize_name(r.name) for r in bounds("test", "lint", package=False)}
    assert pins("webapp/requirements.txt").keys().isdisjoint(tools)


def test_pip_installs_no_package_without_a_hash(tmp_path: Path) -> None:
    metadata = "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n"
    with zipfile.ZipFile(tmp_path / "tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.dist-info/METADATA", metadata)
        wheel.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    lock = tmp_path / "requirements.txt"
    lock.write_text("tiny==1\n")
    done = python(
        ROOT / "tools" / "make_venv.py",
        tmp_path / "venv",
        lock,
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        seconds=100,
    )
    assert done.returncode == 1
    assert "hash" in done.stderr.lower()
    assert len(done.stderr.splitlines()) == 1


def imported(path: Path, seen: set[Path]) -> Iterator[str]:
    """The third-party packages that a file imports, directly or through our own modules."""
    if path in seen:
        return
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            origin = ".".join([*path.relative_to(ROOT).parts[: -node.level], node.module or ""])
            base = origin.strip(".") if node.level else node.module or ""
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            top, stem = name.partition(".")[0], ROOT / name.replace(".", "/")
            if (ROOT / top).is_dir():
                for module in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if module.is_file():
                        yield from imported(module, seen)
            elif top not in sys.stdlib_module_names:
                yield top


def test_packages_that_benchmarks_import_are_locked_for_them() -> None:
    known, locked, seen = packages_distributions(), pins("bench/requirements.txt"), set[Path]()
    found = {each for path in (ROOT / "bench").glob("*.py") for each in imported(path, seen)}
    found -= {"psycopg2"}  # its distribution is psycopg2-binary, which tests do not need
    assert {"django", "pytest"} <= found
    missing = [
        each for each in found if not any(canonicalize_name(d) in locked for d in known[each])
    ]
    assert missing == []
