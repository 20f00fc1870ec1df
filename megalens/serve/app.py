"""The application: a lens, its thread, and the routes behind their guard; and the process that serves it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from megalens.api import Lens
from megalens.config import ConfigError
from megalens.page.workbench import workbench
from megalens.serve import schema
from megalens.serve.answers import answer, refusal
from megalens.serve.guard import LOCAL, Guard
from megalens.serve.limits import Limits, Refused
from megalens.serve.metrics import Metrics
from megalens.serve.reader import Reader
from megalens.serve.routes import Routes, handler
from megalens.serve.worker import Worker

PORT = 5009
STOP_SECONDS = 30  # requests that are being answered when the server is asked to stop have so long


def make_app(
    lens: Lens, limits: Limits | None = None, secret: str | None = None, hosts: frozenset[str] | None = None, batch: int = 32
) -> Starlette:
    """The ASGI application of a lens, which nobody else may use meanwhile.

    Args:
        limits: what it takes; None: the usual.
        secret: the key that requests must bring; None: none.
        hosts: names it may be asked for by (:class:`Guard`); None: any.
        batch: explanations at a time.

    ``app.state`` has its ``worker`` and ``metrics``.
    """
    limits, metrics = limits or Limits(), Metrics()
    reader, worker = Reader(lens, limits), Worker(batch)
    routes = Routes(reader, worker, limits)
    title = f"layer {lens.module.config.layer_l} of {lens.module.config.model_label}"
    page = workbench(title)
    kinds = {
        "tokenize": schema.Shared,
        "extract": schema.Extract,
        "explain": schema.Explain,
        "describe": schema.Describe,
        "score": schema.ScoreAsked,
        "compare": schema.CompareAsked,
        "completion": schema.Completion,
        "edit": schema.Edit,
        "steer": schema.Steer,
        "samples": schema.Samples,
    }

    async def alive(request: Request) -> Response:
        return answer({"status": "ok" if worker.alive else "the model's thread has ended"}, 200 if worker.alive else 503)

    async def shown_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def counted(request: Request) -> Response:
        return PlainTextResponse(metrics.text(_gauges(worker)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(Refused(error.status_code, error.detail))

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    paths = [
        Route("/", routes.health),
        Route("/health", alive),
        Route("/metrics", counted),
        Route("/page", shown_page),
        *(Route(f"/{name}", handler(routes, kind, getattr(routes, name)), methods=["POST"]) for name, kind in kinds.items()),
    ]
    guard = Middleware(Guard, limits=limits, metrics=metrics, secret=secret, hosts=hosts, routes=frozenset(each.path for each in paths))
    app = Starlette(routes=paths, middleware=[guard], exception_handlers={HTTPException: failed}, lifespan=life)
    app.state.worker, app.state.metrics, app.state.reader = worker, metrics, reader
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0: a free one.

    Raises:
        ConfigError: the address is taken, or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        mend = "set port= to another one (0: any that is free), or host= to an address of this machine"
        raise ConfigError(f"nothing can be served at {host}:{port}: {error.strerror or error}; {mend}") from None


def make_server(app: Starlette) -> uvicorn.Server:
    """The HTTP server of an application; ``run(sockets)`` it, and set ``should_exit`` to stop it."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS, timeout_keep_alive=30, server_header=False, backlog=512
        )
    )


def serve(app: Starlette, sockets: list[socket.socket]) -> None:
    """Answer until the process is asked to stop (SIGINT, SIGTERM); what is being answered then is finished first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again when it has stopped; that is no error
    make_server(app).run(sockets)


def names_of(host: str) -> frozenset[str] | None:
    """By which names a server may be asked for that listens there: any, unless only this machine can reach it."""
    return LOCAL if host in LOCAL else None


def _gauges(worker: Worker) -> list[tuple[str, str, str, float]]:
    return [
        ("megalens_waiting", "gauge", "rows and calls in the queue", worker.waiting),
        ("megalens_busy", "gauge", "1 while the model computes", worker.busy),
        ("megalens_up", "gauge", "1 while the model's thread runs", worker.alive),
        ("megalens_batches_total", "counter", "turns of the model's thread", worker.batches),
        ("megalens_batch_rows_total", "counter", "rows and calls in them", worker.batch_rows),
    ]
