"""The maps of the package and of the tests name what there is; most tests need no server."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import dbpool.pool

TESTS = Path(__file__).resolve().parent
MAP = (TESTS / "README.md").read_text()
PACKAGE = TESTS.parent / "dbpool"
FILES_OF_POOL = sorted((PACKAGE / "pool").glob("_[a-z]*.py"))

WHOLE_SUITE = 1000  # functions; fewer are a part of it, which tells nothing


def test_it_names_every_folder_and_every_helper() -> None:
    folders = [f"tests/{path.parent.name}/" for path in TESTS.glob("*/__init__.py")]
    helpers = [
        path.name
        for path in TESTS.glob("*.py")
        if not path.name.startswith(("test_", "__")) and path.name != "conftest.py"
    ]
    assert [name for name in folders + helpers if f"`{name}`" not in MAP] == []


def test_it_names_every_file_of_the_tests_of_the_pool() -> None:
    subjects = [path.stem.removeprefix("test_") for path in TESTS.glob("pool/test_*.py")]
    assert [subject for subject in subjects if f"`{subject}`" not in MAP] == []


def test_contributing_names_every_folder_and_module_of_the_package() -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(?:dbpool/)?(\w+(?:/|\.py))`", text))
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert (folders | modules) - named == set()


def test_the_pools_own_map_names_every_file() -> None:
    named = set(re.findall(r"`(_\w+)`", dbpool.pool.__doc__ or ""))
    assert {path.stem for path in FILES_OF_POOL} == named


def test_the_pools_own_map_names_functions_that_exist() -> None:
    named = re.findall(r"`(\w+)\.(\w+)`", dbpool.pool.__doc__ or "")
    modules = {path.stem: import_module(f"dbpool.pool.{path.stem}") for path in FILES_OF_POOL}
    owners: dict[str, object] = {"dbpool": dbpool, **modules}
    for module in modules.values():
        owners |= {name: each for name, each in vars(module).items() if isinstance(each, type)}
    assert len(named) > 20
    assert [pair for pair in named if not hasattr(owners[pair[0]], pair[1])] == []


def test_at_most_half_of_the_test_functions_need_a_server(request: pytest.FixtureRequest) -> None:
    all_, needing = set(), set()
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        function = item.nodeid.partition("[")[0]
        all_.add(function)
        if "template" in item.fixturenames:  # what every server is a copy of
            needing.add(function)
    if len(all_) < WHOLE_SUITE:
        pytest.skip("this is not the whole suite")
    assert len(needing) / len(all_) <= 0.5
