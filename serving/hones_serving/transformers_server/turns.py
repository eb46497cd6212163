"""Turns: only so many requests generate at a time, and each must hear when its turn begins or will not come.

Transformers' server queues every request and generates all of them, also for clients that have left and after it was
told to stop. Here every request has a turn. Everything runs in the event loop, except `begin` and `end`, which the
generation thread calls.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from hones_steer.errors import StateError

T = TypeVar("T")

LOGGER = logging.getLogger("uvicorn.error")  # the log of the HTTP server
STOPPING = "the server is stopping; send the request to another one, or again later"


class StoppingError(StateError):
    """The server stops before it has answered; another server can answer."""


class Turns:
    """The turns that were asked for and are not over; `stopping` says whether the server is stopping."""

    def __init__(self) -> None:
        self.stopping = False
        self._open: set[Turn] = set()
        self._changed = asyncio.Event()

    def add(self, turn: Turn) -> None:
        """Let a turn wait. Raises StoppingError if the server is stopping."""
        if self.stopping:
            raise StoppingError(STOPPING)
        self._open.add(turn)

    def remove(self, turn: Turn) -> None:
        """Forget a turn that is over, or that nobody waits for."""
        self._open.discard(turn)
        self._changed.set()

    async def drain(self, seconds: float) -> None:
        """Refuse the turns that wait; let those that run finish, or cut them off with an error after `seconds`."""
        self.stopping = True
        waiting = [turn for turn in self._open if not turn.running]
        for turn in waiting:
            turn.refuse(STOPPING)
        LOGGER.info("Stopping: %d waiting requests refused, %d answers to finish", len(waiting), len(self._open))
        try:
            async with asyncio.timeout(seconds):
                while self._open:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            LOGGER.warning("Stopping: %d answers not finished after %g seconds are cut off", len(self._open), seconds)
        for turn in tuple(self._open):
            turn.refuse("the server has stopped before the answer was complete; send the request again")


class Turn:
    """One request's turn, made in the event loop that handles the request.

    It waits once `ask` was called, is `running` from `begin` to `end`, and is `abandoned` when the server refuses it or
    the client has left.
    """

    def __init__(self, turns: Turns) -> None:
        self.running = False
        self.abandoned = threading.Event()  # nobody waits for the answer any more
        self._turns = turns
        self._loop = asyncio.get_running_loop()
        self._asked = False
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._refused: asyncio.Future[StoppingError] = self._loop.create_future()

    def ask(self) -> None:
        """Ask for the turn. Raises StoppingError if the server is stopping."""
        self._turns.add(self)
        self._asked = True

    async def begun(self) -> None:
        """Wait until the turn begins, if it was asked for. Raises StoppingError if it will not."""
        if self._asked:
            await self.or_refused(self._begun)

    async def or_refused(self, awaited: Awaitable[T]) -> T:
        """Await and return the result of `awaited`.

        Raises:
            StoppingError: the server ends the turn first; `awaited` goes on then.
        """
        answer = asyncio.ensure_future(awaited)
        answer.add_done_callback(_retrieve)
        await asyncio.wait((answer, self._refused), return_when=asyncio.FIRST_COMPLETED)
        if self._refused.done():
            raise self._refused.result()
        return answer.result()

    def when_refused(self, tell: Callable[[StoppingError], None]) -> None:
        """Call `tell` when the server ends the turn."""
        self._refused.add_done_callback(lambda refused: None if refused.cancelled() else tell(refused.result()))

    def refuse(self, why: str) -> None:
        """End the turn, begun or not, because the server stops."""
        if not self._refused.done():  # before generation stops, or a stream could end as if it were complete
            self._refused.set_result(StoppingError(why))
        self._give_up()

    def leave(self) -> None:
        """End the turn, begun or not, because the client has left."""
        if self._asked and not self.running and not self.abandoned.is_set():
            LOGGER.info("A client has left before its turn: nothing is generated for it")
        self._give_up()

    def _give_up(self) -> None:
        self.abandoned.set()
        if not self.running:
            self._turns.remove(self)

    def begin(self) -> bool:
        """Begin the turn; the generation thread calls this. False: nobody waits for it; `end` must not be called."""
        if self.abandoned.is_set():
            return False
        self.running = True
        with unless_closed(self._loop):
            self._loop.call_soon_threadsafe(_set, self._begun)
        return True

    def end(self) -> None:
        """End the turn; the generation thread calls this."""
        with unless_closed(self._loop):
            self._loop.call_soon_threadsafe(self._turns.remove, self)


TURN: ContextVar[Turn] = ContextVar("hones_turn")  # the turn of the request that is being handled


@contextmanager
def unless_closed(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Leave the block, without an error, when it finds the loop closed: nobody waits in it any more."""
    try:
        yield
    except RuntimeError:
        if not loop.is_closed():
            raise


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _retrieve(answer: asyncio.Future[T]) -> None:
    """Retrieve a task's error: asyncio would log it where nobody does, and here nobody waits for it any more."""
    if not answer.cancelled():
        answer.exception()
