"""How answers go out: JSON, streams of events, errors; and what becomes of the work when a client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megalens import cli
from megalens.config import ConfigError
from megalens.evaluate import EvaluationError
from megalens.page.text import finite
from megalens.serve.limits import Refused
from megalens.serve.worker import Closed, Left

Result = TypeVar("Result")
BODY_SECONDS = 60.0  # a client may take so long to send its request


def json_bytes(value: Any) -> bytes:
    """JSON; numbers that are not finite become null."""
    return json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")


def answer(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(json_bytes(value), status, media_type="application/json")


def refusal(error: Exception) -> Response:
    """The response to a request that failed: its status, and ``detail``."""
    status, detail = told(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return Response(json_bytes({"detail": detail}), status, headers, media_type="application/json")


def told(error: Exception) -> tuple[int, str | list[dict]]:
    """An error's status and what to say of it."""
    if isinstance(error, Refused):
        return error.status, error.detail
    if isinstance(error, (EvaluationError, ConfigError)):
        return 400, " ".join(str(error).split())
    if isinstance(error, Closed):
        return 503, "The server is stopping."
    lines = cli.told(error)
    return 500, lines[0] if lines else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


async def body_of(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        Refused: it has more than ``most`` bytes, or does not come.
        ClientDisconnect: the client has left.
    """
    if int(request.headers.get("content-length") or 0) > most:
        raise Refused(413, f"The body has more than {most} bytes.")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                if (size := size + len(part)) > most:
                    raise Refused(413, f"The body has more than {most} bytes.")
    except TimeoutError:
        raise Refused(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None
    return b"".join(parts)


async def while_listening(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work, which is cancelled if the client leaves; the request's body must have been read.

    Raises:
        Left: the client has left.
    """
    working, listening = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Server-sent events: a line ``data: JSON`` for each frame, and ``data: [DONE]``. A failure is a frame with ``error``.

    Args:
        frames: closed when the client leaves.
        close: called at the end, however it ends.
    """

    def __init__(self, frames: AsyncGenerator[dict, None], close: Callable[[], object]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.frames, self.close = frames, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_listening(receive, self._send(send))
        finally:
            await self.frames.aclose()
            self.close()

    async def _send(self, send: Send) -> None:
        try:
            async with aclosing(self.frames) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": b"data: " + json_bytes(frame) + b"\n\n", "more_body": True})
        except Exception as error:  # noqa: BLE001 (the status has gone out: the stream itself must say it, and end)
            line = b"data: " + json_bytes({"error": told(error)[1]}) + b"\n\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
