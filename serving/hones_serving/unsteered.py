"""Requests that generate on a route that cannot be steered: their answers say so, and they are counted.

Only the engine knows which routes generate, and its versions and options change that. So no route is named here: where
the engine takes a request in, it calls `generating`, which marks the HTTP request that is being handled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_exchange: ContextVar[Exchange | None] = ContextVar("hones_unsteered", default=None)


class Exchange:
    """One HTTP request and its answer: `count` is called once, when the request generates and its answer has begun.

    The exchange of a steered request never begins, so `count` is not called.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self.generates = False
        self._count = count
        self._begun = self._counted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Make `generating` mark this request, within the block and in all tasks that begin there."""
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
    """Mark the HTTP request that is being handled, if there is one, as one that generates; repeated calls are fine."""
    exchange = _exchange.get()
    if exchange is not None:
        exchange.generate()
