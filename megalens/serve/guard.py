"""What stands before every route: who may ask, how many at once, and what is counted."""

from __future__ import annotations

import hmac
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalens.serve.answers import refusal
from megalens.serve.limits import Limits, Refused
from megalens.serve.metrics import Metrics
from megalens.serve.worker import Left

OPEN = ("/health", "/page")
"""Need no key: neither says anything of the lens, and a browser cannot send a header with the first request for a page."""
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """An ASGI application around another one.

    Args:
        app: what answers.
        limits: ``max_requests`` counts.
        metrics: told of every request.
        secret: what ``X-SECRET-KEY`` must be; None: anybody may ask.
        hosts: names by which the server may be asked for, so that no other site's name leads a browser here; None: any.
        routes: paths that are counted by name; others are counted together.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        secret: str | None = None,
        hosts: frozenset[str] | None = None,
        routes: frozenset[str] = frozenset(),
    ):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.secret, self.hosts, self.routes = secret, hosts, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, left = time.perf_counter(), 500, False

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.begin()
        try:
            self._check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, noted)
        except Refused as error:
            await refusal(error)(scope, receive, noted)
        except (Left, ClientDisconnect):
            status, left = 499, True
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.end(route, status, time.perf_counter() - start, left)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self.hosts:
            raise Refused(403, "This server is asked for by its own name only: 127.0.0.1 or localhost.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "Pages of other sites may not ask.")
        if self.secret is not None and path not in OPEN:
            given = headers.get("x-secret-key")
            if given is None:
                raise Refused(401, "X-SECRET-KEY header required")
            if not hmac.compare_digest(given.encode(), self.secret.encode()):
                raise Refused(403, "Invalid secret key")
        if self.metrics.in_flight > self.limits.max_requests and path != "/health":
            raise Refused(503, f"{self.limits.max_requests} requests are being answered (max_requests). Please retry.")
