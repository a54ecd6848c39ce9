"""Who may see details: programs send the token, browsers sign in with it once and send a cookie.

This module does not depend on a web framework: the blueprint and the door both use it. Nothing is
stored, so every worker accepts a cookie that another one issued, and changing the token signs
everybody out.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from base64 import b64decode, urlsafe_b64encode
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import quote

from dbpool._secrets import MASK, Secret


class SecretBytes(bytes):
    """Bytes that do not show what they are: debuggers show what an object holds.

    Pickling raises `TypeError`.
    """

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __getitem__(self, key: Any) -> Any:  # debuggers cut off long values: a part is secret too
        part = super().__getitem__(key)
        return SecretBytes(part) if isinstance(part, bytes) else part

    # As a secret string does.
    __copy__ = __deepcopy__ = Secret.__copy__
    __reduce_ex__ = Secret.__reduce_ex__


LIFETIME: Final = 12 * 3600  # seconds until a browser has to sign in again
MAX_BODY: Final = 4096  # bytes of the form that a browser sends
_ATTEMPTS: Final = 10  # wrong tokens that a process accepts within `_WINDOW`
_WINDOW: Final = 60.0  # seconds
_SIGNED: Final = re.compile(r"(\d{1,11}\.[\w-]{16})\.([\w-]{43})", re.ASCII)

# The page loads nothing from other hosts, has no inline scripts, and sends its forms only here.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
# Without Basic: it would make the browser open its own dialog before it shows the form.
CHALLENGE: Final = 'Bearer realm="dbpool"'
_BASIC: Final = 'Basic realm="dbpool", charset="UTF-8"'
_ADVICE: Final = "send the token as a Bearer token, or as the password of HTTP Basic"

MISSING: Final = ""
WRONG: Final = "This token is wrong."
ENDED: Final = "Your session has ended. Sign in again."
TOO_MANY: Final = "Too many wrong tokens. Try again in a minute."
FOREIGN: Final = "forms from other sites are not accepted"
UNMEASURED: Final = f"the form needs a Content-Length of at most {MAX_BODY} bytes"
CLOSED: Final = "closed: set DBPOOL_TOKEN and send it to see this"


class Headers(Protocol):
    """The headers of a request, by their names in lower case."""

    def get(self, name: str, default: str, /) -> str:
        """Return the value of a header."""


class Denial(NamedTuple):
    """Why a client may not see details: *problem* for the form, *reason* for a program."""

    problem: str
    reason: str
    challenges: tuple[str, ...] = ()  # for `WWW-Authenticate`


class Form(NamedTuple):
    """The answer that shows the form: *values* are those of its template, beside where it leads."""

    status: int
    headers: dict[str, str]
    values: dict[str, str]


class SignIn:
    """Issues cookies to browsers that know *token*, and recognises them. *clock* is Unix time."""

    def __init__(self, token: str, clock: Callable[[], float] | None = None) -> None:
        self._token = SecretBytes(token.encode(errors="surrogateescape"))
        self._key = SecretBytes(sha256(b"dbpool sign-in\0" + self._token).digest())
        # Looked up at each call: freezegun puts another in its place for a while.
        self._clock = clock or (lambda: time.time())  # noqa: PLW0108
        # Without a lock, which a fork could leave locked: at worst there is an attempt too many.
        self._failures: deque[float] = deque(maxlen=_ATTEMPTS)
        # Cookies ignore ports: applications with other tokens on this host keep theirs.
        self.cookie_name = f"dbpool_{self._signature('name')[:8]}"

    def is_token(self, offered: bytes) -> bool:
        """Whether *offered* is the token, compared in constant time."""
        return hmac.compare_digest(offered, self._token)

    def sent_cookie(self, headers: Headers) -> str:
        """Return the value of its cookie, "" if the client sent none."""
        pairs = (each.strip().partition("=") for each in headers.get("cookie", "").split(";"))
        return next((value for name, _, value in pairs if name == self.cookie_name), "")

    def recognises(self, cookie: str) -> bool:
        """Whether *cookie* was issued for this token and has not expired."""
        if (match := _SIGNED.fullmatch(cookie)) is None:
            return False
        left = int(match[1].partition(".")[0]) - self._clock()
        is_ours = hmac.compare_digest(match[2], self._signature(match[1]))
        return is_ours and 0 < left <= LIFETIME

    def attempt(self, offered: str) -> str | None:
        """Return why a browser that offers this token is not signed in, None if it is.

        After ten wrong tokens in a minute, this process checks no more tokens for a while.
        """
        now = self._clock()
        # If the clock was set back, failures no longer count.
        if len(self._failures) == _ATTEMPTS and 0 <= now - self._failures[0] < _WINDOW:
            return TOO_MANY
        if self.is_token(offered.encode(errors="replace")):
            return None
        self._failures.append(now)
        return WRONG

    def issue(self, path: str, *, is_secure: bool) -> str:
        """Return the `Set-Cookie` that signs a browser in below *path*."""
        content = f"{int(self._clock()) + LIFETIME}.{secrets.token_urlsafe(12)}"
        return self._set(f"{content}.{self._signature(content)}", LIFETIME, path, is_secure)

    def withdraw(self, path: str, *, is_secure: bool) -> str:
        """Return the `Set-Cookie` that signs it out."""
        return self._set("", 0, path, is_secure)

    def _set(self, value: str, age: int, path: str, is_secure: bool) -> str:
        # Without its last slash: it also holds where the page's address has none.
        where = quote(path.rstrip("/") or "/", safe="/%")
        flags = "HttpOnly; SameSite=Strict" + ("; Secure" if is_secure else "")
        return f"{self.cookie_name}={value}; Max-Age={age}; Path={where}; {flags}"

    def _signature(self, content: str) -> str:
        digest = hmac.digest(self._key, content.encode(), sha256)
        return urlsafe_b64encode(digest).decode().rstrip("=")


def denial(sign_in: SignIn | None, headers: Headers) -> Denial | None:
    """Return why a client may not see details, None if it may; *sign_in* is None without a token."""
    if sign_in is None:
        return Denial(CLOSED, CLOSED)
    offered, cookie = _offered_token(headers.get("authorization", "")), sign_in.sent_cookie(headers)
    if sign_in.recognises(cookie) or (offered is not None and sign_in.is_token(offered)):
        return None
    # The page asks with this header: its reader is to see no dialog.
    is_page = headers.get("x-requested-with", "") != ""
    challenges = (CHALLENGE,) if is_page else (_BASIC, CHALLENGE)
    if offered is not None:
        return Denial(WRONG, f"wrong token: {_ADVICE}", challenges)
    return Denial(ENDED if cookie else MISSING, _ADVICE, challenges)


def is_signed_in(sign_in: SignIn | None, headers: Headers) -> bool:
    """Whether a client sent a cookie that was issued to it and holds."""
    return sign_in is not None and sign_in.recognises(sign_in.sent_cookie(headers))


def _offered_token(authorization: str) -> bytes | None:
    """Return the token in that header; None if there is none, or it cannot be read."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="replace")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return b64decode(value.strip(), validate=True).partition(b":")[2]
    return None


def is_cross_site(headers: Headers) -> bool:
    """Whether another site sent the request, by the header Sec-Fetch-Site."""
    return headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


def came_by_https(headers: Headers) -> bool:
    """Whether a proxy in front says that the client uses HTTPS; of several, the first one counts.

    The header may be forged: then the client's own cookie is sent less often, and nothing else.
    """
    proto = headers.get("x-forwarded-proto", "").partition(",")[0]
    return proto.strip().lower() == "https"


def form_for(problem: str, headers: Headers, status: int | None = None) -> Form:
    """Return the form that asks for the token, with what was wrong about a request."""
    status = status or status_of(problem)
    more = {401: {"WWW-Authenticate": CHALLENGE}, 429: {"Retry-After": f"{_WINDOW:.0f}"}}
    found = dict(more.get(status, {}))
    if problem == MISSING and headers.get("sec-fetch-site", "") == "cross-site":
        # After a link from elsewhere the browser keeps the cookie back; from here it sends it.
        found["Refresh"] = "0"
    invalid = "true" if problem == WRONG else "false"
    hidden = "hidden" if problem == CLOSED else ""
    return Form(status, found, {"problem": problem, "invalid": invalid, "hidden": hidden})


def status_of(problem: str) -> int:
    """Return the HTTP status of an answer that shows the form because of *problem*."""
    return {TOO_MANY: 429, CLOSED: 403}.get(problem, 401)
