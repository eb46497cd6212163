"""The HTTP server, and its steps from SIGTERM or SIGINT until the process ends.

1. Requests that wait are answered 503 at once, and so are /health and every further POST.
2. The answers that run may take `seconds` more; then they are cut off with an error.
3. Answers that are complete are sent, which may take GRACE_SECONDS. Then the process ends, whatever still runs in it,
   one second later at the latest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from hones_serving import listening
from hones_serving.asgi import App, Receive, Scope, Send, error_content
from hones_serving.transformers_server.turns import LOGGER, STOPPING, Turns

GRACE_SECONDS = 4


def serve(app: FastAPI, sockets: list[socket.socket], seconds: int) -> NoReturn:
    """Listen on bound `sockets` and serve an application of `build_app` until a signal; then end the process with 0.

    Answers that run may take `seconds` more after the signal. If they cannot even be cut off, because one holds up
    the event loop, the process ends with 1.

    Raises:
        DataError: another process listens there by now.
    """
    listening.listen(sockets)
    # Keep-alive is longer than that of clients and proxies, which would otherwise use a connection that is closing.
    config = uvicorn.Config(app, timeout_keep_alive=75, timeout_graceful_shutdown=GRACE_SECONDS)
    _Server(config, app.state.turns, seconds).run(sockets)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an interpreter that winds up while the generation thread is in a forward pass may crash


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, turns: Turns, seconds: int) -> None:
        super().__init__(config)
        self._turns = turns
        self._seconds = seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but do not raise them again at the end: that would set the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second SIGINT ends the process at once."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)
        if not self.should_exit:
            # Runs in a thread of its own, which needs neither the event loop nor the interpreter.
            faulthandler.dump_traceback_later(self._seconds + GRACE_SECONDS + 1, exit=True)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and log the addresses, which uvicorn does not if it is given sockets."""
        await super().startup(sockets)
        for listening_socket in sockets or ():
            LOGGER.info("Listening on %s, port %d (press Ctrl-C to stop)", *listening_socket.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the turns, then shut down as uvicorn does, which closes the listening sockets."""
        await self._turns.drain(self._seconds)
        await super().shutdown(sockets)


class StoppingMiddleware:
    """Answers /health and every POST with 503 while the server stops, so that load balancers go elsewhere."""

    def __init__(self, app: App, turns: Turns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the lifespan passes through."""
        stopped = self._turns.stopping and scope["type"] == "http"
        if stopped and (scope["path"] == "/health" or scope["method"] == "POST"):
            await unavailable(STOPPING)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def unavailable(message: str) -> Response:
    """A response 503 that tells the client to try again in a second, over another connection."""
    return JSONResponse(error_content(503, message), 503, {"Retry-After": "1", "Connection": "close"})
