"""Signing in with a browser: the form, the cookie, and rejected attempts."""

from __future__ import annotations

import re
from base64 import b64encode
from urllib.parse import urlencode

import pytest
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, TestResponse

from dbpool._sign_in import CLOSED as CLOSED_TEXT
from dbpool._sign_in import (
    LIFETIME,
    TOO_MANY,
    SignIn,
    denial,
    form_for,
    is_cross_site,
    is_signed_in,
)

from .conftest import MakeApp

TOKEN = "a-token-of-some-length"
NOWHERE = "host=127.0.0.1 port=1 user=u dbname=d"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
CLOSED = ("/db/", "/db/stats", "/db/metrics")


class Clock:
    now = 1_795_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app(NOWHERE, DBPOOL_TOKEN=TOKEN, DBPOOL_OUTAGE_GRACE="0s")


def send(client: Client, token: str, path: str = "/db/sign-in", **more: str) -> TestResponse:
    return client.post(path, data={"token": token, **more}, headers=BROWSER)


# Signed cookies


def value_of(cookie: str) -> str:
    return cookie.partition(";")[0].partition("=")[2]


def test_a_cookie_is_valid_for_half_a_day_and_for_its_token_only() -> None:
    clock = Clock()
    sign_in = SignIn(TOKEN, clock)
    cookie = value_of(sign_in.issue("/db/", is_secure=False))
    assert sign_in.recognises(cookie)
    assert SignIn(TOKEN, clock).recognises(cookie), "another worker must accept it"
    assert not SignIn(TOKEN + "2", clock).recognises(cookie)
    clock.now += LIFETIME - 1
    assert sign_in.recognises(cookie)
    clock.now += 1
    assert not sign_in.recognises(cookie)


def test_no_cookie_is_valid_for_longer_than_the_maximum() -> None:
    clock = Clock()
    sign_in = SignIn(TOKEN, clock)
    cookie = value_of(sign_in.issue("/", is_secure=False))
    clock.now -= 60
    assert not sign_in.recognises(cookie), "a cookie from the future"


@given(st.text(max_size=99) | st.from_regex(r"\A\d{10}\.[\w-]{16}\.[\w-]{43}\Z"))
def test_no_cookie_can_be_made_without_the_token(cookie: str) -> None:
    assert not SignIn(TOKEN, Clock()).recognises(cookie)


@given(st.integers(0, 200), st.characters())
def test_a_changed_cookie_is_rejected(at: int, character: str) -> None:
    sign_in = SignIn(TOKEN, Clock())
    cookie = value_of(sign_in.issue("/", is_secure=False))
    at %= len(cookie)
    changed = cookie[:at] + character + cookie[at + 1 :]
    assert sign_in.recognises(changed) == (changed == cookie)


def test_after_ten_wrong_tokens_all_are_rejected_for_a_minute() -> None:
    clock = Clock()
    sign_in = SignIn(TOKEN, clock)
    assert {sign_in.attempt(f"guess-{n}") for n in range(10)} == {"This token is wrong."}
    for offered in ("guess", TOKEN):
        assert str(sign_in.attempt(offered)).startswith("Too many")
    clock.now += 61
    assert sign_in.attempt(TOKEN) is None


# Access to details, in blueprint and door alike


def basic(password: str) -> str:
    return "Basic " + b64encode(f"me:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "problem"),
    [
        ("", ""),
        ("Bearer", "This token is wrong."),
        ("Bearer wrong", "This token is wrong."),
        (f"bearer  {TOKEN} ", None),
        (f"Bearer {TOKEN}", None),
        (f"Basic {TOKEN}", ""),
        (basic("wrong"), "This token is wrong."),
        (basic(TOKEN), None),
        ("Basic !!!!", ""),
        ("Basic \xff", ""),
        (f"Digest {TOKEN}", ""),
    ],
)
def test_the_token_is_accepted_as_bearer_and_basic_credentials(
    authorization: str, problem: str | None
) -> None:
    found = denial(SignIn(TOKEN), {"authorization": authorization})
    assert (None if found is None else found.problem) == problem
    assert found is None or found.reason.startswith("wrong token: ") == (problem != "")


def test_a_cookie_opens_details_while_it_is_valid() -> None:
    clock = Clock()
    sign_in = SignIn(TOKEN, clock)
    pair = sign_in.issue("/", is_secure=False).partition(";")[0]
    headers = {"cookie": f"other=1; {pair} ;more=2"}
    assert denial(sign_in, headers) is None
    assert is_signed_in(sign_in, headers)
    clock.now += LIFETIME
    expired = denial(sign_in, headers)
    assert expired is not None
    assert expired.problem.startswith("Your session has ended")
    assert not is_signed_in(sign_in, headers)


def test_without_a_token_nothing_opens() -> None:
    found = denial(None, {"authorization": "Bearer ", "cookie": "dbpool_=1"})
    assert found is not None
    assert found.problem == found.reason
    assert found.problem.startswith("closed: set")
    assert found.challenges == ()
    assert not is_signed_in(None, {})


def test_the_page_causes_no_browser_dialog() -> None:
    program, page = denial(SignIn(TOKEN), {}), denial(SignIn(TOKEN), {"x-requested-with": "f"})
    assert program is not None
    assert page is not None
    assert [each.split()[0] for each in program.challenges] == ["Basic", "Bearer"]
    assert page.challenges == program.challenges[1:]


def test_the_form_shows_the_next_step() -> None:
    cross_site = {"sec-fetch-site": "cross-site"}
    missing, wrong = form_for("", {}), form_for("This token is wrong.", cross_site)
    assert [missing.status, wrong.status] == [401, 401]
    assert missing.headers.keys() == wrong.headers.keys() == {"WWW-Authenticate"}
    assert (missing.values["invalid"], wrong.values["invalid"]) == ("false", "true")
    assert form_for("", cross_site).headers["Refresh"] == "0"
    assert form_for("", {}, 200).headers == {}
    busy = form_for(TOO_MANY, {})
    assert (busy.status, busy.headers) == (429, {"Retry-After": "60"})
    closed = form_for(CLOSED_TEXT, {})
    assert (closed.status, closed.headers, closed.values["hidden"]) == (403, {}, "hidden")


@pytest.mark.parametrize(
    ("site", "is_foreign"),
    [(None, False), ("none", False), ("same-origin", False), ("same-site", True), ("cross-site", True), ("", True)],
)  # fmt: skip
def test_only_forms_from_this_site_are_accepted(site: str | None, is_foreign: bool) -> None:
    assert is_cross_site({} if site is None else {"sec-fetch-site": site}) is is_foreign


# The form


def test_a_browser_gets_a_form_and_others_get_json(app: Flask) -> None:
    client = app.test_client()
    for path in CLOSED:
        answer = client.get(path, headers=BROWSER)
        assert (answer.status_code, answer.mimetype) == (401, "text/html")
        assert '<form method="post" action="/db/sign-in"' in answer.text
        assert answer.headers.getlist("WWW-Authenticate") == ['Bearer realm="dbpool"']
        assert answer.headers["Cache-Control"] == "no-store"
        assert "form-action 'self'" in answer.headers["Content-Security-Policy"]
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            assert client.get(path, headers=accept).get_json()["error"].startswith("send the token")


def test_the_pages_own_requests_open_no_browser_dialog(app: Flask) -> None:
    answer = app.test_client().get("/db/stats", headers={"X-Requested-With": "fetch"})
    assert answer.headers.getlist("WWW-Authenticate") == ['Bearer realm="dbpool"']
    assert answer.get_json()["error"].startswith("send the token")


def problem(answer: TestResponse) -> str:
    found = re.search(r'role="alert">(.*?)</p>', answer.text)
    assert found
    return found[1]


def test_the_form_shows_the_error(app: Flask) -> None:
    client = app.test_client()
    assert problem(client.get("/db/", headers=BROWSER)) == ""
    answer = send(client, "wrong")
    assert (answer.status_code, problem(answer)) == (401, "This token is wrong.")
    assert 'aria-invalid="true"' in answer.text
    assert "wrong</" not in answer.text, "the typed token must not be shown"
    wrong = client.get("/db/", headers=BROWSER | {"Authorization": "Bearer wrong"})
    assert problem(wrong) == "This token is wrong."
    name = app.extensions["dbpool"].sign_in.cookie_name
    client.set_cookie(name, "old", path="/db")
    assert problem(client.get("/db/", headers=BROWSER)).startswith("Your session has ended")


def test_the_right_token_opens_all_views_until_the_browser_signs_out(app: Flask) -> None:
    client = app.test_client()
    answer = send(client, TOKEN)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/db/")
    cookie = answer.headers["Set-Cookie"]
    assert TOKEN not in cookie
    for part in ("Path=/db;", "HttpOnly", "SameSite=Strict", f"Max-Age={LIFETIME}"):
        assert part in cookie
    assert "Secure" not in cookie
    for path in (*CLOSED, "/db"):
        assert client.get(path).status_code == 200
    assert "server_version" in client.get("/db/health").text or client.get("/db/health").json
    assert client.get("/db/sign-in").headers["Location"] == "/db/"
    assert client.post("/db/sign-out", data={}).headers["Location"] == "/db/sign-in"
    assert client.get("/db/stats").status_code == 401


@pytest.mark.parametrize(
    ("wanted", "location"),
    [("stats", "/db/stats"), ("metrics", "/db/metrics"), ("https://evil.example", "/db/"), ("sign_out", "/db/")],
)  # fmt: skip
def test_the_form_redirects_only_to_the_requested_view(
    app: Flask, wanted: str, location: str
) -> None:
    assert send(app.test_client(), TOKEN, next=wanted).headers["Location"] == location


def test_only_the_first_field_of_a_view_is_offered(app: Flask) -> None:
    client = app.test_client()
    assert 'name="next" value="stats"' in client.get("/db/stats", headers=BROWSER).text
    assert client.get(f"/db/sign-in?token={TOKEN}", headers=BROWSER).status_code == 200
    assert client.get(f"/db/?token={TOKEN}", headers=BROWSER).status_code == 401, (
        "a token must not be in a URL"
    )


def test_signing_in_works_below_a_prefix_and_behind_tls(app: Flask) -> None:
    outer = DispatcherMiddleware(Flask("outer"), {"/inner": app})
    page = Client(outer).get("/inner/db/", headers=BROWSER)
    assert 'action="/inner/db/sign-in"' in page.text
    form = {"token": TOKEN}
    for proto, is_secure in (("https", True), ("HTTPS, http", True), ("http,https", False)):
        client = Client(outer)
        answer = client.post("/inner/db/sign-in", data=form, headers={"X-Forwarded-Proto": proto})
        assert answer.headers["Location"] == "/inner/db/"
        assert "Path=/inner/db;" in answer.headers["Set-Cookie"]
        assert answer.headers["Set-Cookie"].endswith("; Secure") == is_secure
    client = Client(app)
    answer = client.post("/db/sign-in", data=form, base_url="https://localhost")
    assert answer.headers["Set-Cookie"].endswith("; Secure")


@pytest.mark.parametrize("path", ["/db/sign-in", "/db/sign-out"])
def test_forms_of_other_sites_and_oversized_ones_are_rejected(app: Flask, path: str) -> None:
    client = app.test_client()
    for site in ("cross-site", "same-site", "\xff"):
        answer = client.post(path, data={"token": TOKEN}, headers={"Sec-Fetch-Site": site})
        assert (answer.status_code, "Set-Cookie" in answer.headers) == (403, False)
    if path == "/db/sign-in":
        long = client.post(path, data={"token": "x" * 5000})
        chunked = client.post(path, headers={"Transfer-Encoding": "chunked"})
        assert (long.status_code, chunked.status_code) == (413, 413)
    for site in ("same-origin", "none"):
        answer = client.post(path, data={"token": TOKEN}, headers={"Sec-Fetch-Site": site})
        assert answer.status_code == 303


def test_a_link_from_another_site_finds_the_browser_signed_in(app: Flask) -> None:
    """The browser withholds a strict cookie, and sends it once the page reloads itself."""
    cross_site = app.test_client().get("/db/", headers=BROWSER | {"Sec-Fetch-Site": "cross-site"})
    assert (cross_site.status_code, cross_site.headers["Refresh"]) == (401, "0")
    same_origin = app.test_client().get("/db/", headers=BROWSER | {"Sec-Fetch-Site": "same-origin"})
    assert "Refresh" not in same_origin.headers


def test_guessing_a_token_is_slowed_down(app: Flask) -> None:
    client = app.test_client()
    assert [send(client, f"guess {n}").status_code for n in range(12)] == [401] * 10 + [429] * 2
    assert int(send(client, TOKEN).headers["Retry-After"]) >= 60
    assert client.get("/db/stats", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_without_a_token_signing_in_is_not_possible(make_app: MakeApp) -> None:
    client = make_app(NOWHERE).test_client()
    answer = client.get("/db/", headers=BROWSER)
    assert (answer.status_code, problem(answer).partition(":")[0]) == (403, "closed")
    assert re.search(r'<form [^>]*action="/db/sign-in" hidden>', answer.text)
    for token in ("", "None", TOKEN):
        assert "Set-Cookie" not in send(client, token).headers


def test_with_authorize_there_is_no_sign_in_form(make_app: MakeApp) -> None:
    client = make_app(NOWHERE, authorize=lambda: False, DBPOOL_TOKEN=TOKEN).test_client()
    assert client.get("/db/", headers=BROWSER).get_json() == {"error": "forbidden"}
    assert send(client, TOKEN).status_code == 404
    client = make_app(NOWHERE, authorize=lambda: True, DBPOOL_TOKEN=TOKEN).test_client()
    assert client.get("/db/", headers=BROWSER).status_code == 200


def test_open_views_need_no_form(make_app: MakeApp) -> None:
    client = make_app(NOWHERE, DBPOOL_DETAILS="always", DBPOOL_TOKEN=TOKEN).test_client()
    assert client.get("/db/sign-in", headers=BROWSER).headers["Location"] == "/db/"


@given(body=st.binary(max_size=300), cookie=st.text(st.characters(max_codepoint=255), max_size=80))
def test_any_form_and_cookie_get_an_answer(body: bytes, cookie: str) -> None:
    client = any_app().test_client()
    for content in (body, urlencode({"token": body}).encode()):
        answer = client.post(
            "/db/sign-in", data=content, content_type="application/x-www-form-urlencoded",
            headers=BROWSER, environ_overrides={"HTTP_COOKIE": cookie.replace("\n", "")},
        )  # fmt: skip
        assert answer.status_code in (401, 429)


def any_app() -> Flask:
    from dbpool.flask import DBPool, create_blueprint

    app = Flask("app")
    app.config.update(TESTING=True, DATABASE_URL=NOWHERE, DBPOOL_TOKEN=TOKEN)
    DBPool(app)
    app.register_blueprint(create_blueprint(), url_prefix="/db")
    return app
