"""`tests/README.md` names every folder and helper, and most tests need no server."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
MAP = (TESTS / "README.md").read_text()

WHOLE_SUITE = 1000  # functions; with fewer only a part of the suite runs


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


def test_at_most_half_of_the_test_functions_need_a_server(request: pytest.FixtureRequest) -> None:
    all_, needing = set(), set()
    for item in request.session.items:
        assert isinstance(item, pytest.Function)
        function = item.nodeid.partition("[")[0]
        all_.add(function)
        if "template" in item.fixturenames:  # the fixture that all servers are copied from
            needing.add(function)
    if len(all_) < WHOLE_SUITE:
        pytest.skip("this is not the whole suite")
    assert len(needing) / len(all_) <= 0.5
