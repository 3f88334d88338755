"""Security checks for every request to the review page, and security headers for every reply.

Contract (tests/review/test_security.py attacks each part):
- The Host header must name this machine: a loopback name, an IP address, or the configured host. This stops DNS
  rebinding, where another site's own name points here.
- A request from another site's page is rejected by Sec-Fetch-Site. A POST needs the page's own Origin (if the browser
  sends one, and browsers do), a JSON body of at most ``BODY_LIMIT`` bytes, and the CSRF token.
- Replies allow only this server's own scripts, styles and requests, allow no frame around them, and are not stored.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_LIMIT = 4 << 20
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types rlaif"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class SecurityMiddleware:
    """ASGI middleware that rejects forbidden requests and adds ``HEADERS`` to every reply.

    ``host``: the address on which the page listens, accepted as Host in addition to this machine's names."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.allowed_hosts = {
            "localhost",
            host.casefold(),
            socket.gethostname().casefold(),
            socket.getfqdn().casefold(),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        rejection = self._rejection(str(scope["method"]), headers)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                security_headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                other_headers = [header for header in message["headers"] if header[0].decode().lower() not in HEADERS]
                message = {**message, "headers": [*other_headers, *security_headers]}
            await send(message)

        if rejection:
            from starlette.responses import PlainTextResponse

            status, reason = rejection
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _rejection(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return HTTP status and reason if the request is forbidden."""
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            return 421, f"unknown host name {_host_name(host)!r}; use the link that rlaif printed"
        site = headers.get("sec-fetch-site")
        navigates = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in (None, "same-origin", "none") and not navigates:
            return 403, "cross-site request rejected"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "method not allowed; use GET or POST"
        if method == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.casefold() != host.casefold():
                return 403, "cross-site label rejected"
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "a label must be sent as application/json"
            if not headers.get("content-length", "").isdigit():
                return 411, "the Content-Length header is missing"
            if int(headers["content-length"]) > BODY_LIMIT:
                return 413, f"a label must not exceed {BODY_LIMIT >> 20} MiB"
        return None

    def _is_allowed_host(self, host: str) -> bool:
        name = _host_name(host)
        if name in self.allowed_hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").casefold()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Return True if ``host`` is reachable from this machine only."""
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
