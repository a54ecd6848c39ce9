"""The live page in a browser: what it shows of several workers' answers, and accessibility.

Uses Debian's Chromium and downloads no browser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from .browser import CHROMIUM, OPTIONS, TOKEN, Site
from .page_states import NOW, RATES, STATES, Answer, later, many

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # the machine may be busy
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")

Page = Any
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(DBPOOL_DETAILS="always")
    with site.serving():
        yield site


@pytest.fixture(scope="module")
def only_page(browser: Any) -> Iterator[Page]:
    page = browser.new_page(locale="en-GB")
    yield page
    page.close()


@pytest.fixture
def page(only_page: Page) -> Iterator[Page]:
    only_page.set_viewport_size(WIDE)
    only_page.emulate_media(color_scheme="light", reduced_motion="no-preference")
    yield only_page
    only_page.goto("about:blank")  # stops its requests


@pytest.fixture
def load_page(site: Site, page: Page) -> Callable[..., Page]:
    """Load the page, give these answers in turn, and return it once it has shown them all.

    With *wait_for_all* it waits for all parts of the page, which come with different answers.
    """

    def load_page(*answers: Answer, wait_for_all: bool = False, requests: int = 0) -> Page:
        site.show(*answers)
        page.goto(site.url)
        if wait_for_all:
            page.locator("#application").wait_for()
        deadline = monotonic() + 60
        # An answer has been shown once the page sends its next request.
        while site.requests <= max(len(answers), requests) and monotonic() < deadline:
            page.wait_for_timeout(20)  # lets the browser's events arrive
        return page

    return load_page


REPORT = STATES["up"]()


def reply(
    time: float,
    started: list[tuple[int, float]],
    checkouts: int,
    *,
    scope: str = "process",
    **more: Any,
) -> Answer:
    """The JSON of `/stats` with a worker's time, pids, checkouts and state."""
    pool = REPORT["pools"]["default"]
    counters = pool["counters"] | {"checkouts": checkouts}
    processes = [{"pid": pid, "age": 0.0, "uptime": time - start} for pid, start in started]
    pools = {"default": pool | {"counters": counters} | more.pop("pool", {})}
    return REPORT | {"time": time, "scope": scope, "processes": processes, "pools": pools} | more


def text(page: Page, selector: str) -> str:
    return str(page.locator(selector).first.inner_text())


# Numbers


def test_the_rates_of_different_workers_are_not_mixed(load_page: Callable[..., Page]) -> None:
    one, two = [(11, 0.0)], [(22, 0.5)]
    page = load_page(
        reply(100.0, one, 50), reply(101.0, two, 9000), reply(102.0, two, 9007), reply(104.0, one, 90)
    )  # fmt: skip
    assert text(page, "[data-rate]") == "10.0 /s"
    assert text(page, "#summary") == "process 11 only"
    expect(page.locator("#alone")).to_be_visible()
    assert "dbpool.gunicorn" in text(page, "#alone"), "it must say that it shows one worker"


@pytest.mark.parametrize("second", [(22, 0.0), (11, 50.0)], ids=["other pid", "reused pid"])
def test_a_worker_seen_for_the_first_time_has_no_rate(
    load_page: Callable[..., Page], second: tuple[int, float]
) -> None:
    page = load_page(reply(100.0, [(11, 0.0)], 50), reply(101.0, [second], 9000))
    assert text(page, "[data-rate]") == "\N{EN DASH}"


def test_rates_of_all_workers_are_shown_although_one_is_new(
    load_page: Callable[..., Page],
) -> None:
    page = load_page(
        reply(100.0, [(11, 0.0), (22, 0.0)], 100, scope="all"),
        reply(102.0, [(11, 0.0), (33, 100.0)], 150, scope="all"),
    )
    assert text(page, "[data-rate]") == "25.0 /s"
    assert text(page, "#summary") == "2 processes"
    expect(page.locator("#alone")).to_be_hidden()


FINDING = {
    "id": "DB04/default", "code": "DB04", "severity": "critical", "pool": "default", "since": 86.0,
    "text": "3 connections of default wait for a lock that <b>psql</b> holds", "do": "End it.",
    "evidence": {},
}  # fmt: skip


def test_the_verdict_comes_first_and_is_in_title_and_icon(load_page: Callable[..., Page]) -> None:
    more = {"id": "DB18/default", "code": "DB18", "severity": "notice", "text": "slower"}
    page = load_page(reply(100.0, [(1, 0.0)], 1, findings=[FINDING, FINDING | more]))
    verdict = page.locator("section").first
    expect(verdict).to_have_class("verdict critical")
    expect(verdict.locator("h2")).to_have_text(FINDING["text"])  # as text, not as markup
    assert verdict.locator("b").count() == 0
    facts = "critical DB04 \N{MIDDLE DOT} default \N{MIDDLE DOT} for 14.0 s"
    assert text(page, "#verdict .facts").replace("\n", " ") == facts
    assert page.title().startswith("critical: DB04 default")
    assert page.locator("#icon").get_attribute("href").endswith("icon-critical.svg")
    assert page.locator("#verdict-more .notice").inner_text().startswith("notice slower (DB18")
    assert text(page, "#verdict-do") == "End it."
    assert text(page, "#verdict-explain") == "python -m dbpool explain DB04"
    expect(page.get_by_role("status")).to_have_text(FINDING["text"])  # for screen readers


def test_the_worst_pool_is_on_top(load_page: Callable[..., Page]) -> None:
    pools = dict.fromkeys(("default", "a", "replica"), REPORT["pools"]["default"])
    found = [FINDING | {"pool": "replica"}, FINDING | {"pool": "a", "id": "DB04/a"}]
    page = load_page(REPORT | {"pools": pools, "findings": found})
    assert page.locator("[data-name]").all_inner_texts() == ["replica", "a", "default"]


def test_a_pool_without_a_free_connection_is_full_not_up(load_page: Callable[..., Page]) -> None:
    full = {"state": "up", "size": 4, "active": 4, "max_size": 4, "waiting": 6}
    page = load_page(reply(100.0, [(1, 0.0)], 1, pool=full))
    expect(page.locator("[data-state]")).to_have_text("full")
    expect(page.locator("[data-state]")).to_have_class("state full")


def series(**last: float) -> dict[str, list[float | None]]:
    keys = ("in_use", "waiting", "wait_p95", "checkouts", "refused")
    return {key: [None] * 90 + [0] * 80 + [last.get(key, 0)] * 10 for key in keys}


def test_history_and_journal_are_shown(load_page: Callable[..., Page]) -> None:
    shown = series(in_use=4, waiting=6, wait_p95=1.5, checkouts=9)
    minute = {"default": {"wait": {"count": 7, "p50": 0.25, "p95": 1.5, "p99": None}}}
    history = {"step": 5.0, "until": NOW, "pools": {"default": shown}, "minute": minute}
    lines = [{"time": 99.0, "pool": "default", "event": "down", "text": "down: <i>refused</i>"}]
    page = load_page(reply(100.0, [(1, 0.0)], 1, journal=lines, history=history), wait_for_all=True)
    expect(page.locator(".strips svg")).to_have_count(5)
    expect(page.locator(".wait_p95 dd").last).to_have_text("peak 1.5 s")
    expect(page.locator(".refused")).to_have_class("refused calm")
    assert page.locator(".unknown").first.get_attribute("d").count("M") == 90, "unknown is a gap"
    expect(page.locator("#lines td").last).to_have_text("down: <i>refused</i>")
    wait = page.locator("[data-minute] tbody tr").first.locator("td").all_inner_texts()
    assert wait == ["7", "250 ms", "1.5 s", "\N{EN DASH}"], "of the last minute"


def cells(page: Page, selector: str) -> list[list[str]]:
    rows = page.locator(f"{selector} tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def test_holders_are_shown_with_session_and_worker(
    load_page: Callable[..., Page],
) -> None:
    held = {"thread": "T-1", "seconds": 14.0, "where": "pay.py:88", "endpoint": "billing.pay"}
    waiting = {"pid": 5001, "worker": 4711, "status": "idle in transaction", "waits": True}
    endpoints = {
        "default": [{"endpoint": "<b>pay</b>", "in_use": 1.5, "use_share": 0.75, "longest": 14.0}]
    }
    page = load_page(
        reply(100.0, [(1, 0.0)], 1, endpoints=endpoints,
              pool={"holders": [held | waiting, held | {"status": "query"}]}),
        wait_for_all=True,
    )  # fmt: skip
    dash = "\N{EN DASH}"
    first, second = cells(page, "[data-held]")
    assert first[3:6] == ["waits for another connection", "5001", "4711"]
    assert second[3:6] == ["query", dash, dash]
    labels = page.locator("[data-held] tbody tr").first.locator("th, td")
    assert [each.get_attribute("data-label") for each in labels.all()][3:6] == ["now", "session", "worker"]  # fmt: skip
    assert cells(page, "[data-used]") == [["<b>pay</b>", "1.5", "75 %", "14.0 s"]]


def test_a_blocker_is_shown_and_named_beside_blocked_sessions(
    load_page: Callable[..., Page],
) -> None:
    page = load_page(STATES["locked"]())
    assert cells(page, "#blockers")[0][:3] == ["17023", "nightly report, 10.0.3.9", "idle in transaction"]  # fmt: skip
    assert {row[4] for row in cells(page, "[data-held]")} == {"17023 nightly report"}


def test_the_pages_numbers_are_those_of_stats(load_page: Callable[..., Page]) -> None:
    first = STATES["busy"]()
    last = later(first, RATES["busy"])
    page = load_page(first, last, wait_for_all=True)
    pool = last["pools"]["default"]
    for key in ("active", "idle", "connecting", "waiting", "state"):
        assert text(page, f"[data-{key}]") == str(pool[key])
    assert text(page, "[data-size]") == f"{pool['size']} of {pool['max_size']}"
    assert text(page, "[data-rate]") == f"{RATES['busy']}.0 /s"
    for part, counts in (
        ("totals", pool["counters"]),
        ("discarded", pool["counters"]["discarded"]),
    ):
        shown = page.locator(f"[data-{part}] > div").all()
        found = {box.locator("dt").inner_text(): box.locator("dd").inner_text() for box in shown}
        assert found == {
            k.replace("_", " "): f"{v:,}" for k, v in counts.items() if k != "discarded"
        }
    busy, threads = (sum(each[key] for each in last["processes"]) for key in ("busy", "threads"))
    assert text(page, "#summary") == f"3 processes, {busy} of {threads} threads busy"
    workers = last["workers"]["default"]
    assert [row[0] for row in cells(page, "[data-workers]")] == [str(w["pid"]) for w in workers]
    assert [row[6] for row in cells(page, "[data-workers]")] == [
        f"{w['checkouts']:,}" for w in workers
    ]
    assert [row[1] for row in cells(page, "[data-times]")] == [f"{pool[k]['count']:,}" for k in ("wait", "use", "connect")]  # fmt: skip
    assert len(cells(page, "[data-held]")) == len(pool["holders"])
    assert [row[0] for row in cells(page, "[data-used]")] == [e["endpoint"] for e in last["endpoints"]["default"]]  # fmt: skip
    assert len(cells(page, "#lines")) == len(last["journal"])
    server = last["servers"]["default"]
    assert f"{server['used']} of {server['max']} connections used" in text(page, "[data-server]")
    page.locator("[data-settings] summary").click()
    settings = {row[0]: row[1:] for row in cells(page, "[data-rows]")}
    assert settings["max_size"] == ["4", "DBPOOL_MAX_SIZE"]
    assert settings["conninfo"] == [
        "user=shop password=*** dbname=shop host=db.internal",
        "DATABASE_URL",
    ]
    assert settings["min_size"] == ["1", "default"]


def test_changed_counters_are_bold_and_zeros_are_grey(load_page: Callable[..., Page]) -> None:
    page = load_page(reply(100.0, [(11, 0.0)], 50), reply(101.0, [(11, 0.0)], 57))
    assert page.locator("[data-totals] .moved").all_inner_texts() == ["57"]
    assert "zero" in page.locator("[data-totals] dd").last.get_attribute("class")


def test_only_a_worker_that_is_overdue_stands_out(load_page: Callable[..., Page]) -> None:
    shown = STATES["silent"]()
    slow, fast, silent = shown["workers"]["default"]
    workers = [slow | {"age": 12.0, "interval": 14.0}, fast, silent]
    page = load_page(shown | {"workers": {"default": workers}}, wait_for_all=True)
    assert page.locator("[data-workers] .alarm").all_inner_texts() == ["47.0 s ago"]


# Time


def test_the_page_requests_only_new_steps_of_the_history(
    load_page: Callable[..., Page], page: Page
) -> None:
    first = STATES["busy"]()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    load_page(first, requests=7)
    history = [url for url in requests if "history" in url]
    assert "since" not in history[0]
    assert f"since={NOW - 20:.1f}" in history[1]
    steps = page.locator(".in_use .known").get_attribute("d").count("M")
    assert steps == len(first["history"]["pools"]["default"]["in_use"]), "old steps stay"


def test_without_shared_statistics_the_whole_history_is_requested(
    load_page: Callable[..., Page], page: Page
) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    load_page(STATES["busy"]() | {"scope": "process"}, requests=6)
    assert not any("since" in url for url in requests), "another worker may answer next"


def test_a_cursor_shows_the_values_of_another_time(load_page: Callable[..., Page]) -> None:
    page = load_page(STATES["locked"](), wait_for_all=True)
    cursor = page.get_by_role("slider", name="Time")
    assert cursor.get_attribute("aria-valuetext").startswith("now: in use 12, waiting 6")
    cursor.focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    value = cursor.get_attribute("aria-valuetext")
    assert re.match(r"\d\d:\d\d:\d\d: in use \d+\.?\d*, waiting 0", value)
    assert text(page, ".waiting dd") == "0"
    page.keyboard.press("End")
    assert text(page, ".waiting dd") == "6"


# Accessibility


def violations(page: Page, *rules: str) -> list[str]:
    """The violations that axe-core finds, by all its rules or by these."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe.AXE_SCRIPT)
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    found: list[str] = page.evaluate(
        """async (options) => (await axe.run(options)).violations.flatMap(
            (each) => each.nodes.map((node) => `${each.id}: ${node.html}`))""",
        options,
    )
    return found


def check_accessibility(page: Page) -> None:
    """Check the page at both widths in both colour schemes, and on a very small screen."""
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(WIDE)
    assert violations(page) == []
    page.emulate_media(color_scheme="dark")
    assert violations(page, "color-contrast") == []
    page.set_viewport_size(NARROW)
    assert violations(page) == []
    page.emulate_media(color_scheme="light")
    assert violations(page, "color-contrast") == []
    for width in (390, 360):
        page.set_viewport_size({"width": width, "height": 700})
        cut = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((each) => {
                const box = each.getBoundingClientRect();
                return each.checkVisibility() && !each.closest(".unseen, thead, svg")
                    && (box.right > innerWidth + 0.5 || each.scrollWidth > Math.ceil(each.clientWidth) + 1
                        && getComputedStyle(each).display !== "inline");
            }).map((each) => each.outerHTML.slice(0, 99))"""
        )
        assert cut == [], "something is cut off or scrolls sideways"


@pytest.mark.parametrize("name", STATES)
def test_every_state_is_accessible(load_page: Callable[..., Page], name: str) -> None:
    page = load_page(STATES[name](), wait_for_all=True)
    for summary in page.locator("summary").all():
        summary.click()
    page.locator("#pause").click()
    page.emulate_media(reduced_motion="reduce")
    check_accessibility(page)


def test_old_numbers_are_marked_and_still_readable(
    load_page: Callable[..., Page], site: Site
) -> None:
    page = load_page(STATES["full"](), wait_for_all=True)
    site.app.view_functions["dbpool.stats"], answer = lambda: ("busy", 503), site.app.view_functions["dbpool.stats"]  # fmt: skip
    try:
        expect(page.locator("#summary")).to_have_text("no answer: HTTP 503")
    finally:
        site.app.view_functions["dbpool.stats"] = answer
    page.locator("#pause").click()
    assert "stale" in page.locator("body").get_attribute("class")
    assert violations(page) == []


def test_bars_have_enough_contrast() -> None:
    css = (Path(__file__).parent.parent / "dbpool/flask/static/live.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for bar in ("blue", "green", "amber", "red", "slate"):
            for behind in ("card", "track") if bar in ("blue", "green", "amber") else ("card",):
                assert contrast(colours[bar], colours[behind]) >= 3.0, (bar, behind)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as WCAG defines it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        red, green, blue = (
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_moves_with_reduced_motion(load_page: Callable[..., Page]) -> None:
    page = load_page(STATES["up"]())
    duration = "getComputedStyle(document.querySelector('.bar i')).transitionDuration"
    assert page.evaluate(duration) == "0.3s"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(duration) == "0s"


def test_the_keyboard_reaches_everything(load_page: Callable[..., Page]) -> None:
    page = load_page(STATES["busy"](), wait_for_all=True)
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["pause", "INPUT", "SUMMARY", "SUMMARY"]
    page.keyboard.press("Enter")
    expect(page.locator("#application-settings")).to_be_visible()


# Size and traffic


def test_the_page_is_small_and_loads_only_from_its_own_site(browser: Any, site: Site) -> None:
    site.show(many())
    page = browser.new_page()  # with an empty cache
    answers: list[Any] = []
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda answer: answers.append(answer))  # noqa: PLW0108  # no method of a list will do
    page.goto(site.url)
    page.locator("#application").wait_for()
    origin = site.url.removesuffix("/db/")
    assert all(each.url.startswith(origin) for each in answers)
    sizes = {each.url: len(each.body()) for each in answers if "/stats" not in each.url and each.ok}
    assert len(sizes) >= 6
    assert sum(sizes.values()) < 150 * 1024
    assert errors == [], "the content security policy blocked something"
    page.close()


def test_a_poll_is_small_with_sixteen_workers(load_page: Callable[..., Page], site: Site) -> None:
    for names in (["default"], ["default", "replica", "reports"]):
        site.sizes.clear()
        page = load_page(of_pools(many(), names), wait_for_all=True)
        for card in page.locator(".pool").all():
            workers = card.locator("[data-workers] tbody tr")
            assert workers.count() == 16
            expect(card.locator(".strips svg")).to_have_count(5)
        assert max(site.sizes) <= 20 * 1024


def of_pools(answer: Answer, names: list[str]) -> Answer:
    """The same answer for several pools."""

    def copied(pools: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(names, pools["default"])

    changed = {key: copied(answer[key]) for key in ("pools", "endpoints", "workers", "servers")}
    history = answer["history"]
    both = {key: copied(history[key]) for key in ("pools", "minute")}
    settings = answer["settings"] | {"pools": copied(answer["settings"]["pools"])}
    return answer | changed | {"history": history | both, "settings": settings}


# Signing in


@pytest.fixture(scope="module")
def closed() -> Iterator[Site]:
    site = Site(DBPOOL_TOKEN=TOKEN)
    with site.serving():
        yield site


def test_a_browser_without_javascript_signs_in_and_out(browser: Any, closed: Site) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(closed.url)
    assert page.locator("[role=alert]").inner_text() == ""
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type("wrong token")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("This token is wrong.")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    assert page.url == closed.url, "the token must not be in the URL"
    expect(page.get_by_role("heading", name="dbpool")).to_be_visible()
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/db")
    page.goto(closed.url + "stats")
    assert '"pools"' in page.content()
    page.goto(closed.url)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.context.cookies() == []
    page.close()


def test_a_link_from_another_site_opens_the_page_signed_in(
    browser: Any, closed: Site, site: Site
) -> None:
    page = browser.new_page()
    page.goto(closed.url)
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("[data-state]")).to_be_visible()
    page.goto(site.url.replace("127.0.0.1", "localhost"))
    page.evaluate("(url) => { location.href = url }", closed.url)  # like a link in a chat
    page.wait_for_url(closed.url)
    expect(page.locator("[data-state]")).to_be_visible()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()
    page.close()


def test_the_end_of_a_session_is_shown_beside_the_last_numbers(browser: Any, closed: Site) -> None:
    page = browser.new_page()
    page.goto(closed.url)
    page.get_by_label("Token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("[data-state]")).to_be_visible()
    page.context.clear_cookies()
    expect(page.locator("#signed-out")).to_be_visible()
    expect(page.locator("[data-state]")).to_be_visible()
    page.get_by_role("link", name="Sign in").click()
    expect(page.get_by_label("Token")).to_be_visible()
    page.close()


def test_the_sign_in_form_is_accessible(page: Page, closed: Site) -> None:
    page.goto(closed.url)
    check_accessibility(page)
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Token")).to_have_attribute("aria-invalid", "true")
    check_accessibility(page)


def test_a_closed_page_says_how_to_open_it(page: Page) -> None:
    site = Site()
    with site.serving():
        page.goto(site.url)
        expect(page.get_by_role("alert")).to_contain_text("set DBPOOL_TOKEN")
        expect(page.get_by_label("Token")).to_be_hidden()
        check_accessibility(page)
