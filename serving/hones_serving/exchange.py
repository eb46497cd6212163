"""The HTTP request that is being handled, as the engine finds it: what it was admitted with, whether it generates.

A context variable holds it, so it reaches whatever runs in the request's own tasks and in tasks that those begin, such
as a response in the background; a thread pool's threads have no context of their own and must be given one.

Only the engine knows which routes generate, and its versions and options change that. So no route is named here: where
the engine takes a request in, it calls `generating`, and what generates on a route that is not steered is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hones_serving.registry import Admission

_exchange: ContextVar[Exchange | None] = ContextVar("hones_exchange", default=None)


class Exchange:
    """One request and its answer.

    `admission` is what the request was admitted with, None on a route that is not steered. On such a route `count` is
    called once, when the request generates and its answer has begun. The exchange of a steered request never begins.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self.admission: Admission | None = None
        self.generates = False
        self._count = count
        self._begun = self._counted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Make this the request that is being handled, within the block and in all tasks that begin there."""
        token = _exchange.set(self)
        try:
            yield
        finally:
            _exchange.reset(token)

    def begin(self) -> None:
        """Note that the request was not refused: its answer begins."""
        self._begun = True
        self._settle()

    def generate(self) -> None:
        """Note that the request generates."""
        self.generates = True
        self._settle()

    def _settle(self) -> None:
        if self._begun and self.generates and not self._counted:
            self._counted = True
            self._count()


def generating() -> None:
    """Mark the request that is being handled, if there is one, as one that generates; repeated calls are fine."""
    exchange = _exchange.get()
    if exchange is not None:
        exchange.generate()


def current_admission() -> Admission | None:
    """The admission of the request that is being handled; None if there is none, or on a route that is not steered."""
    exchange = _exchange.get()
    return None if exchange is None else exchange.admission
