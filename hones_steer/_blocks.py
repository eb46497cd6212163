"""Which block of `Steering.task` the running code is inside.

A block belongs to the context that enters it and to what is started there: copied contexts (asyncio's tasks,
`to_thread`), threads, and jobs of a ThreadPoolExecutor. What else runs beside an open block has nothing to do with it.

A suspended generator may go on in another context than the one in which it entered its block: a server that streams
runs each of its steps in a fresh one. There the block is found by the generator's frame, which is on the stack
whenever the generator's code runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from hones_steer.errors import RoutingError
from hones_steer.slots import IDENTITY

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class Routing:
    """A block's request to the model of `steering`: one slot for every row, or one slot per prompt."""

    steering: object
    expressions: tuple[str, ...]
    slots: tuple[int, ...]
    per_row: bool
    forwards: int = 0
    closed: bool = False
    outer: Routing | None = None
    _generator: FrameType | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"tasks({list(self.expressions)})" if self.per_row else f"task({self.expressions[0]!r})"

    @property
    def steers(self) -> bool:
        return any(slot != IDENTITY for slot in self.slots)

    def open(self) -> None:
        """Make this the innermost block of the calling context and of what is started from it."""
        self.outer = innermost()
        self._generator = _running_generator()
        if self._generator is not None:
            _of_generators.setdefault(self._generator, []).append(self)
        _current.set(self)
        _carry_into_threads()

    def close(self) -> None:
        """End the block, from whichever context; where it is still carried, it says that it was left."""
        self.closed = True
        if self._generator is not None:
            blocks = _of_generators[self._generator]
            blocks.remove(self)
            if not blocks:
                del _of_generators[self._generator]
            self._generator = None
        if _current.get() is self:
            outer = self.outer
            while outer is not None and outer.closed:
                outer = outer.outer
            _current.set(outer)

    def row_slots(self, rows: int | None, *, generating: bool) -> tuple[int, ...]:
        """The slot of each of the forward's rows, or a single slot for all of them.

        Within `generate`, beams and returned sequences repeat each prompt's row (`repeat_interleave`).
        """
        if not self.per_row:
            return self.slots
        repeats = self.require_prompts(rows, exactly=not generating) // len(self.slots)
        return tuple(slot for slot in self.slots for _ in range(repeats))

    def require_prompts(self, rows: int | None, *, exactly: bool = True) -> int:
        """`rows`, or RoutingError if they cannot be the rows of these tasks."""
        if rows is None:
            raise RoutingError(f"{self} cannot tell the number of rows; pass input_ids or inputs_embeds by keyword")
        if rows % len(self.slots) or (exactly and rows != len(self.slots)):
            raise RoutingError(
                f"{self} names {len(self.slots)} rows, but the model was called with {rows}; "
                "give one expression (or None) per row of the batch"
            )
        return rows


_current: ContextVar[Routing | None] = ContextVar("hones_steer_block", default=None)
_of_generators: dict[FrameType, list[Routing]] = {}  # the open blocks that a generator has entered, in this order


def innermost() -> Routing | None:
    """The block that the calling code is inside, of whichever model; it may have been left elsewhere."""
    frame = sys._getframe(1) if _of_generators else None
    while frame is not None and frame.f_code is not _carried.__code__:
        if blocks := _of_generators.get(frame):
            return blocks[-1]
        frame = frame.f_back
    return _current.get()


def block_of(steering: object) -> Routing | None:
    """The innermost block of this steering that the calling code is inside."""
    routing = innermost()
    while routing is not None and routing.steering is not steering:
        routing = routing.outer
    return routing


def carry(function: Callable[P, R], routing: Routing | None) -> Callable[P, R]:
    """The function, running inside this block (None: inside none) wherever it is called."""

    @functools.wraps(function)
    def carrying(*args: P.args, **kwargs: P.kwargs) -> R:
        return _carried(function, routing, args, kwargs)

    return carrying


def _carried(function: Callable[..., R], routing: Routing | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    token = _current.set(routing)
    try:
        return function(*args, **kwargs)
    finally:
        _current.reset(token)


def _running_generator() -> FrameType | None:
    """The frame of the innermost generator that runs the caller, if any; not of one that is a context manager.

    The generator of a @contextmanager is not on the stack while its block runs, but whoever entered it is.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        driver = frame.f_back
        if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR) and (
            driver is None or driver.f_code.co_filename != contextlib.__file__
        ):
            return frame
        frame = driver
    return None


_submitting = threading.local()  # .now: a worker that starts belongs to no block; its jobs bring theirs along


@functools.cache
def _carry_into_threads() -> None:
    """From now on, let threads started and jobs submitted inside a block belong to it.

    Before Python 3.14 (and after it, unless `-X thread_inherit_context` says so) a new thread knows nothing of its
    parent's context, and nothing else tells it from a thread that has nothing to do with the block.
    """
    threads: Any = threading.Thread
    pools: Any = ThreadPoolExecutor
    start, submit = threads.start, pools.submit

    @functools.wraps(start)
    def start_carrying(thread: Any) -> None:
        routing = None if getattr(_submitting, "now", False) else innermost()
        if routing is None:
            start(thread)
            return
        run = thread.run
        thread.run = carry(run, routing)
        try:
            start(thread)
        except BaseException:
            thread.run = run
            raise

    @functools.wraps(submit)
    def submit_carrying(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        routing = innermost()
        _submitting.now = True
        try:
            return submit(pool, function if routing is None else carry(function, routing), *args, **kwargs)
        finally:
            _submitting.now = False

    threads.start, pools.submit = start_carrying, submit_carrying
