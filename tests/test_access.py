"""Who sees details: any result of an `authorize` function, and any request headers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, Response, make_response, redirect
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from werkzeug.exceptions import Forbidden, HTTPException, NotFound
from werkzeug.test import TestResponse

from dbpool import PoolExhausted
from dbpool.flask import DBPool, create_blueprint

from .conftest import MakeApp

TOKEN = "a-token-of-some-length"
NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"
CLOSED = ("/db/stats", "/db/metrics", "/db/")

fuzz_settings = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Rule:
    """An `authorize` function that returns, or raises, what the test sets."""

    verdict: Any = None

    def __call__(self) -> object:
        if isinstance(self.verdict, Raised):
            raise self.verdict.error
        return self.verdict


class Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


@pytest.fixture
def rule() -> Rule:
    return Rule()


@pytest.fixture
def rule_app(make_app: MakeApp, rule: Rule) -> Flask:
    return make_app(NOWHERE, authorize=rule, DBPOOL_TOKEN=TOKEN, DBPOOL_OUTAGE_GRACE="0s")


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    app = make_app(NOWHERE, DBPOOL_TOKEN=TOKEN, DBPOOL_OUTAGE_GRACE="0s")

    # The pool makes no connects meanwhile: hypothesis' runs must not depend on another thread.
    @app.get("/fails")
    def fails() -> str:
        raise PoolExhausted("all are out")

    return app


def shows_details(answer: TestResponse) -> bool:
    return "counters" in answer.text or "checkouts" in answer.text or "data-stats" in answer.text


def test_true_from_authorize_shows_details(rule_app: Flask, rule: Rule) -> None:
    rule.verdict = True
    for path in CLOSED:
        assert rule_app.test_client().get(path).status_code == 200


@pytest.mark.parametrize("verdict", [False, None])
def test_false_and_none_deny_access(rule_app: Flask, rule: Rule, verdict: object) -> None:
    rule.verdict = verdict
    headers = {"Authorization": f"Bearer {TOKEN}"}  # the rule takes the place of the token
    for path in CLOSED:
        answer = rule_app.test_client().get(path, headers=headers)
        assert (answer.status_code, answer.json) == (403, {"error": "forbidden"})


class Empty(Response):
    """A response whose truth value is false."""

    def __len__(self) -> int:
        return 0


def answers() -> list[tuple[str, Any, int]]:
    return [
        ("response", Response("go away", 418), 418),
        ("redirect", redirect("/login"), 302),
        ("false response", Empty("go away", 402), 402),
        ("body and status", ("go away", 418), 418),
        ("body and headers", ("please", {"X-Reason": "x"}), 200),
        ("body, status and headers", ({"error": "no"}, "451 No", [("X-Reason", "x")]), 451),
        ("exception", Forbidden("not you"), 403),
        ("exception with a response", HTTPException(response=Response("x", 429)), 429),
        ("raised", Raised(NotFound()), 404),
    ]


@pytest.mark.parametrize(("verdict", "status"), [each[1:] for each in answers()])
def test_a_response_or_http_exception_from_authorize_is_sent(
    rule_app: Flask, rule: Rule, verdict: Any, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    rule.verdict = verdict
    health = rule_app.test_client().get("/db/health")
    for path in CLOSED:
        answer = rule_app.test_client().get(path)
        assert answer.status_code == status
        assert not shows_details(answer)
    assert set(health.get_json()["databases"].values()) <= {"starting", "down"}, "it shows details"
    assert "authorize returned" not in caplog.text


def test_an_http_exception_goes_to_the_applications_own_handler(make_app: MakeApp) -> None:
    app = make_app(NOWHERE, authorize=Forbidden)
    app.register_error_handler(Forbidden, lambda ex: ("sign in first", 401))
    answer = app.test_client().get("/db/stats")
    assert (answer.status_code, answer.text) == (401, "sign in first")


class TrueLike:
    """Like numpy's booleans: true and equal to True, but not `True` itself."""

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return bool(other)

    __hash__ = None  # type: ignore[assignment]


class BoolRaises:
    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


async def coroutine() -> bool:
    return True


def generator() -> Iterator[bool]:
    yield True


ANY_RESULT = st.one_of(
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.booleans()),
    st.dictionaries(st.text(), st.booleans()),
    st.frozensets(st.integers()),
    st.sampled_from([object(), Forbidden, Response, ValueError("x"), TrueLike(), BoolRaises()]),
    st.tuples(),
    st.tuples(st.none() | st.booleans() | st.integers()),
    st.tuples(st.none() | st.booleans() | st.integers(), st.integers() | st.text()),
    st.tuples(st.text(), st.sampled_from([0, 1, 99, 600, True, False, 10**9, "", "ok", object()])),
    st.tuples(st.text(), st.just(403), st.sampled_from([{"X": "a\nb"}, 1])),
    st.tuples(*[st.integers()] * 4),
)


@fuzz_settings
@example("no")
@example("yes")
@example(403)
@example(1)
@example([])
@example(["admin"])
@given(ANY_RESULT)
def test_any_other_result_is_a_logged_500_without_details(
    rule_app: Flask, rule: Rule, caplog: pytest.LogCaptureFixture, verdict: object
) -> None:
    rule.verdict = verdict
    client = rule_app.test_client()
    for path in CLOSED:
        caplog.clear()
        answer = client.get(path)
        assert answer.status_code == 500, verdict
        assert not shows_details(answer)
        assert "authorize returned" in caplog.text


@pytest.mark.parametrize("verdict", ["no", 1, 403, [], ["admin"], object(), TrueLike(), ()])
def test_with_any_other_result_health_shows_no_details(
    rule_app: Flask, rule: Rule, verdict: object, caplog: pytest.LogCaptureFixture
) -> None:
    rule.verdict = verdict
    answer = rule_app.test_client().get("/db/health")
    assert answer.status_code == 503, "the database is down"
    assert set(answer.get_json()["databases"].values()) <= {"starting", "down"}, "it shows details"
    assert "authorize returned" in caplog.text


@pytest.mark.parametrize("make", [coroutine, generator])
def test_a_coroutine_or_generator_from_authorize_opens_nothing(
    make_app: MakeApp, make: Any
) -> None:
    app = make_app(NOWHERE, authorize=lambda: make() or None, DBPOOL_OUTAGE_GRACE="0s")
    assert app.test_client().get("/db/stats").status_code == 500
    assert "counters" not in app.test_client().get("/db/health").text


def test_a_wrong_result_of_authorize_is_not_logged_by_value(
    rule_app: Flask, rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    rule.verdict = "the password of somebody"
    assert "somebody" not in rule_app.test_client().get("/db/stats").text + caplog.text


# Malformed headers. Werkzeug's client sends only UTF-8, so these are put into the environment as
# a server does it: one character for each byte.


def ask(app: Flask, path: str, **headers: str) -> TestResponse:
    environ = {f"HTTP_{name.upper()}": value for name, value in headers.items()}
    return app.test_client().get(path, environ_overrides=environ)


HEADER = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=60)
CREDENTIALS = st.one_of(
    HEADER,
    st.builds(lambda rest: f"Basic {rest}", HEADER),
    st.builds(lambda raw: "Basic " + base64.b64encode(raw).decode(), st.binary()),
    st.builds(lambda rest: f"Bearer {rest}", HEADER),
    st.builds(lambda rest: f"Digest {rest}", HEADER),
    st.builds(lambda scheme, rest: f"{scheme} {rest}", HEADER, HEADER),
)
UNREADABLE = [
    "Basic \xff",
    "Basic",
    "Basic ",
    "Basic !!!!",
    "Basic YQ",
    "Basic /////w==",
    "Basic " + base64.b64encode(TOKEN.encode()).decode(),  # no colon, so no password
    "Basic " + "QUFB" * 100_000,
    "Basic " + base64.b64encode(b"a:\0").decode(),
    "Basic a=b,c",
    "Bearer",
    "Bearer ",
    "Bearer \xff",
    "Bearer \0",
    "Bearer a=b",
    "Bearer " + "x" * 1_000_000,
    "Digest \xff",
    "Digest username=\"\xff\", realm*=UTF-8''%ff",
    "Digest username*=junk''%zz, =, ,",
    "digest",
    "Negotiate \0\0",
    "\xff \xff",
    " ",
    "=",
]


@pytest.mark.parametrize("header", UNREADABLE, ids=lambda header: repr(header[:30]))
def test_malformed_credentials_are_answered_with_401(app: Flask, header: str) -> None:
    for path in CLOSED:
        answer = ask(app, path, authorization=header)
        assert answer.status_code == 401
        assert len(answer.headers.getlist("WWW-Authenticate")) == 2
    assert ask(app, "/db/health", authorization=header).status_code == 503, "needs no token"


@fuzz_settings
@given(CREDENTIALS)
def test_no_credentials_cause_a_server_error(app: Flask, header: str) -> None:
    assert ask(app, "/db/stats", authorization=header).status_code == 401


def test_the_error_differs_for_a_wrong_and_a_missing_token(app: Flask) -> None:
    missing, wrong = ask(app, "/db/stats"), ask(app, "/db/stats", authorization="Bearer wrong")
    assert missing.get_json()["error"].startswith("send the token")
    assert wrong.get_json()["error"].startswith("wrong token")


ACCEPTED = st.one_of(
    HEADER,
    st.builds(
        lambda kind, name, value: f"{kind}; {name}={value}",
        st.sampled_from(["application/openmetrics-text", "text/plain", "text/html", "*/*", "a/b"]),
        st.sampled_from(["version", "escaping", "q", "charset"]),
        HEADER,
    ),
)


@fuzz_settings
@example("application/openmetrics-text; version=junk")
@example("text/plain; version=1.x")
@example("text/html;q=nan, application/json;q=-1, */*;q=1e999")
@example("text/html; q*=UTF-8''%ff")
@given(ACCEPTED)
def test_no_accept_header_causes_a_server_error(app: Flask, header: str) -> None:
    credentials = f"Bearer {TOKEN}"
    answer = ask(app, "/db/metrics", accept=header, authorization=credentials)
    assert answer.status_code == 200
    assert "db_client_connections" in answer.text
    assert ask(app, "/fails", accept=header).status_code == 503


@fuzz_settings
@given(st.text(max_size=20))
def test_an_unknown_scope_is_rejected(app: Flask, scope: str) -> None:
    for path in ("/db/stats", "/db/metrics"):
        answer = app.test_client().get(
            path, query_string={"scope": scope}, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        assert answer.status_code == (200 if scope in ("all", "process") else 400)


@pytest.mark.parametrize("query", ["scope=%ff", "scope=all%00", "scope", "scope=&scope=all", "%"])
def test_no_query_string_causes_a_server_error(app: Flask, query: str) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert app.test_client().get(f"/db/stats?{query}", headers=headers).status_code in (200, 400)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "\xff"),
        ("host", ""),
        ("range", "bytes=junk"),
        ("range", "bytes=9999999-"),
        ("if_none_match", '"\xff'),
        ("if_modified_since", "yesterday"),
        ("if_range", "\0"),
        ("cookie", "\xff=\xff; ;=;"),
        ("accept_encoding", "\xff;q=x"),
        ("content_length", "-5"),
        ("content_type", "multipart/form-data; boundary=\xff"),
        ("x_forwarded_for", "127.0.0.1, \xff"),
    ],
)
def test_no_other_header_causes_a_server_error(app: Flask, name: str, value: str) -> None:
    for path in (*CLOSED, "/db/static/live.js"):
        with ask(app, path, authorization=f"Bearer {TOKEN}", **{name: value}) as answer:
            assert answer.status_code in (200, 206, 304, 400, 416)


# Headers of every answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/db/health/live", 200),
        ("GET", "/db/health/ready", 503),
        ("GET", "/db/health", 503),
        ("GET", "/db/stats", 401),
        ("GET", "/db/metrics", 401),
        ("GET", "/db/", 401),
        ("GET", "/db/static/live.js", 200),
        ("GET", "/db/static/nothing.js", 404),
        ("GET", "/db/nothing", 404),
        ("POST", "/db/stats", 405),
        ("OPTIONS", "/db/stats", 200),
        ("HEAD", "/db/health/live", 200),
        ("GET", "/fails", 503),
    ],
)
def test_no_answer_may_be_sniffed(app: Flask, method: str, path: str, status: int) -> None:
    with app.test_client().open(path, method=method) as answer:
        assert answer.status_code == status
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("prefix", ["/db", "/db/", "/deep/er/", "/", None])
def test_rejections_may_not_be_sniffed_or_stored_under_any_prefix(prefix: str | None) -> None:
    app = Flask("app")
    app.config.update(DATABASE_URL=NOWHERE, TESTING=True)
    DBPool(app)
    app.register_blueprint(create_blueprint(), url_prefix=prefix)
    app.add_url_rule("/mine", "mine", view_func=lambda: "mine")
    base = (prefix or "").rstrip("/")
    for path in ("", "/", "/stats", "/health/live", "/sign-in"):
        answer = app.test_client().delete(f"{base}{path}")
        assert answer.status_code == (405 if path else 404)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
    assert "X-Content-Type-Options" not in app.test_client().delete("/mine").headers


def test_opened_views_may_not_be_sniffed_either(make_app: MakeApp) -> None:
    client = make_app(NOWHERE, DBPOOL_DETAILS="always").test_client()
    for path in CLOSED:
        answer = client.get(path)
        assert (answer.status_code, answer.headers["X-Content-Type-Options"]) == (200, "nosniff")


def test_the_rest_of_the_application_is_left_alone(app: Flask) -> None:
    app.add_url_rule("/mine", "mine", view_func=lambda: make_response("mine"))
    for path in ("/mine", "/nothing"):
        assert "X-Content-Type-Options" not in app.test_client().get(path).headers


def test_retry_after_differs_between_clients(app: Flask) -> None:
    client = app.test_client()
    for path in ("/fails", "/db/health/ready"):
        waits = {int(client.get(path).headers["Retry-After"]) for _ in range(60)}
        assert len(waits) > 1
        assert min(waits) >= 1
        assert max(waits) <= 30


def test_metrics_without_prometheus_client_names_the_extra(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    client = make_app(NOWHERE, DBPOOL_DETAILS="always").test_client()
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "dbpool.prometheus", raising=False)
    answer = client.get("/db/metrics")
    assert answer.status_code == 501
    assert "prometheus-client" in answer.get_json()["error"]
    assert "psycopg-dbpool" not in answer.get_json()["error"], "anybody may register that name"
