"""The HTTP server, and what it does from SIGTERM or SIGINT until the process ends.

1. Who waits is answered 503 at once, and so are /health and every further POST.
2. The answer that runs may take `seconds` more; then it is cut off with an error.
3. What has been answered is sent, which may take GRACE_SECONDS. Then the process ends, whatever still runs in it: one
   second later at the latest.
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
from hones_serving.middleware import App, Receive, Scope, Send, error_content
from hones_serving.transformers_server.turns import LOGGER, STOPPING, Turns

GRACE_SECONDS = 4


def serve(app: FastAPI, sockets: list[socket.socket], seconds: int) -> NoReturn:
    """Listen on `sockets` and answer with an application of `build_app`'s until a signal; then the process ends with 0.

    `seconds` is how long an answer that runs may still take after the signal. What cannot even be cut off, because it
    holds up the event loop, ends with the process and the exit code 1.

    Raises:
        DataError: another process listens there by now.
    """
    listening.listen(sockets)
    # Keep-alive is longer than that of clients and proxies, who would otherwise send into a connection that is closing.
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
        """As uvicorn's, but a signal is not raised again once the server has stopped: that would be the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second SIGINT waits for nothing."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)
        if not self.should_exit:
            # In a thread of its own, which needs neither the event loop nor the interpreter.
            faulthandler.dump_traceback_later(self._seconds + GRACE_SECONDS + 1, exit=True)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which does not say where it listens if it has been given sockets."""
        await super().startup(sockets)
        for one in sockets or ():
            LOGGER.info("Listening on %s, port %d (press Ctrl-C to stop)", *one.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which closes the listening sockets, after the turns have been drained."""
        await self._turns.drain(self._seconds)
        await super().shutdown(sockets)


class StoppingMiddleware:
    """Answers /health and every POST with 503 while the server stops, so that load balancers go elsewhere."""

    def __init__(self, app: App, turns: Turns) -> None:
        self._app = app
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection; the lifespan passes through."""
        stopped = self._turns.stopping and scope["type"] == "http"
        if stopped and (scope["path"] == "/health" or scope["method"] == "POST"):
            await unavailable(STOPPING)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def unavailable(message: str) -> Response:
    """A 503 that may be tried again in a second, over another connection."""
    return JSONResponse(error_content(503, message), 503, {"Retry-After": "1", "Connection": "close"})
