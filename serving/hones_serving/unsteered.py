"""Requests that generate by a route that cannot be steered: their answers say so, and they are counted.

Which routes generate is for the engine to know, and changes with its versions and options. So nothing here names any:
where the engine takes a request in, `generating` says that the HTTP request being handled is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_exchange: ContextVar[Exchange | None] = ContextVar("hones_unsteered", default=None)


class Exchange:
    """One request: `count` is called once, when it generates and its answer has begun (`begin`).

    What is steered never begins it.
    """

    def __init__(self, count: Callable[[], None]) -> None:
        self.generates = False
        self._count = count
        self._begun = self._counted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, and in all tasks that begin there, `generating` is about this request."""
        token = _exchange.set(self)
        try:
            yield
        finally:
            _exchange.reset(token)

    def begin(self) -> None:
        """The request is not refused: its answer begins."""
        self._begun = True
        self._settle()

    def generate(self) -> None:
        """The request generates."""
        self.generates = True
        self._settle()

    def _settle(self) -> None:
        if self._begun and self.generates and not self._counted:
            self._counted = True
            self._count()


def generating() -> None:
    """Say that the engine generates for the request that is being handled, if there is one; any number of times."""
    exchange = _exchange.get()
    if exchange is not None:
        exchange.generate()
