"""Browsers sign in with the token once, and then send a cookie that was made from it.

Knows no web framework: the blueprint and the door both use it. Nothing is stored, so that every
worker accepts what another one issued, and a new token signs everybody out.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from typing import Final
from urllib.parse import quote

LIFETIME: Final = 12 * 3600  # seconds until a browser has to sign in again
MAX_BODY: Final = 4096  # bytes of the form that a browser sends
_ATTEMPTS: Final = 10  # wrong tokens that a process accepts within `_WINDOW`
_WINDOW: Final = 60.0  # seconds
_SIGNED: Final = re.compile(r"(\d{1,11}\.[\w-]{16})\.([\w-]{43})", re.ASCII)

# The page loads nothing from elsewhere, nothing in it is inline, and its forms come back here.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
# Without Basic, which would have the browser ask in a window of its own before it shows the form.
CHALLENGE: Final = 'Bearer realm="dbpool"'

MISSING: Final = ""
WRONG: Final = "This token is wrong."
ENDED: Final = "Your session has ended. Sign in again."
TOO_MANY: Final = "Too many wrong tokens. Try again in a minute."
FOREIGN: Final = "forms of other sites are not accepted"
UNMEASURED: Final = f"send a form of at most {MAX_BODY} bytes, and its length"
CLOSED: Final = "closed: set DBPOOL_TOKEN, and send it, to see this"


class SignIn:
    """Issues cookies to browsers that know *token*, and recognises them. *clock* is Unix time."""

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self._token = token.encode(errors="surrogateescape")
        self._key = sha256(b"dbpool sign-in\0" + self._token).digest()
        self._clock = clock
        # Without a lock, which a fork could leave locked: at worst there is an attempt too many.
        self._failures: deque[float] = deque(maxlen=_ATTEMPTS)
        # Cookies ignore ports: applications with other tokens on this host keep theirs.
        self.cookie_name = f"dbpool_{self._signature('name')[:8]}"

    def is_token(self, offered: bytes) -> bool:
        """Whether *offered* is the token, compared in constant time."""
        return hmac.compare_digest(offered, self._token)

    def recognises(self, cookie: str) -> bool:
        """Whether *cookie* was issued for this token and has not expired."""
        if (match := _SIGNED.fullmatch(cookie)) is None:
            return False
        left = int(match[1].partition(".")[0]) - self._clock()
        is_ours = hmac.compare_digest(match[2], self._signature(match[1]))
        return is_ours and 0 < left <= LIFETIME

    def attempt(self, offered: str) -> str | None:
        """Return why a browser that offers this token is not signed in, None if it is.

        After ten wrong ones in a minute this process looks at no more tokens for a while.
        """
        now = self._clock()
        # A clock that was set back forgives.
        if len(self._failures) == _ATTEMPTS and 0 <= now - self._failures[0] < _WINDOW:
            return TOO_MANY
        if self.is_token(offered.encode(errors="replace")):
            return None
        self._failures.append(now)
        return WRONG

    def issue(self, path: str, *, is_secure: bool) -> str:
        """Return the `Set-Cookie` that signs a browser in below *path*."""
        content = f"{int(self._clock()) + LIFETIME}.{secrets.token_urlsafe(12)}"
        return self._cookie(f"{content}.{self._signature(content)}", LIFETIME, path, is_secure)

    def withdraw(self, path: str, *, is_secure: bool) -> str:
        """Return the `Set-Cookie` that signs it out."""
        return self._cookie("", 0, path, is_secure)

    def _cookie(self, value: str, age: int, path: str, is_secure: bool) -> str:
        # Without its last slash: it also holds where the page's address has none.
        where = quote(path.rstrip("/") or "/", safe="/%")
        flags = "HttpOnly; SameSite=Strict" + ("; Secure" if is_secure else "")
        return f"{self.cookie_name}={value}; Max-Age={age}; Path={where}; {flags}"

    def _signature(self, content: str) -> str:
        digest = hmac.digest(self._key, content.encode(), sha256)
        return urlsafe_b64encode(digest).decode().rstrip("=")


def is_cross_site(fetch_site: str | None) -> bool:
    """Whether another site sent the request, by the header Sec-Fetch-Site."""
    return fetch_site not in (None, "same-origin", "none")


def status_of(problem: str) -> int:
    """Return the HTTP status of an answer that shows the form because of *problem*."""
    return {TOO_MANY: 429, CLOSED: 403}.get(problem, 401)
