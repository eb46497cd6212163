"""Blocks of `Steering.task`, and a way for running code to find the one that it is inside.

A block belongs to the context that enters it and to whatever is started there: copied contexts (asyncio's tasks,
`to_thread`), threads, and jobs of a ThreadPoolExecutor. Other code that runs while a block is open is not inside it.

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
from typing import Any, NamedTuple, ParamSpec, TypeVar

from hones_steer._calls import Call, Generation
from hones_steer.errors import RoutingError
from hones_steer.scopes import ALL, split
from hones_steer.slots import IDENTITY

P = ParamSpec("P")
R = TypeVar("R")


class Slots(NamedTuple):
    """The slots of a call: one for each row, or one for all; with `each_token` one for each token, row after row."""

    values: tuple[int, ...]
    each_token: bool = False


@dataclass(eq=False)
class Routing:
    """One block: a request to the model of `steering` for one slot for every row, or one slot per prompt.

    `expressions` are as the user wrote them, `slots` the slots of the scale tables that hold them. With `counts` the
    model is called with one row, of which `counts[i]` tokens have slot i, one sequence after the other. `scopes` say
    which tokens are steered, one for each slot; `ends` where the prompts end, one for each slot or one for all, padding
    and cached tokens counted, or None: where those of `generate` do. `forwards` counts the forwards that ran inside the
    block; `outer` is the block around it.
    """

    steering: object
    expressions: tuple[str, ...]
    slots: tuple[int, ...]
    per_row: bool
    counts: tuple[int, ...] | None = None
    scopes: tuple[str, ...] = (ALL,)
    ends: tuple[int, ...] | None = None
    forwards: int = 0
    closed: bool = False
    outer: Routing | None = None
    _generator: FrameType | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.counts is not None:
            return f"packed({list(self.expressions)}, {list(self.counts)})"
        scopes = [*self.scopes] if len({*self.scopes}) > 1 else self.scopes[0]
        scope = f", scope={scopes!r}" if self.is_scoped else ""
        return f"tasks({[*self.expressions]}{scope})" if self.per_row else f"task({self.expressions[0]!r}{scope})"

    @property
    def steers(self) -> bool:
        """Whether any row is steered at all."""
        return any(slot != IDENTITY for slot in self.slots)

    @property
    def is_scoped(self) -> bool:
        """Whether any row is steered in a part of its tokens only."""
        return any(scope != ALL for scope in self.scopes)

    def open(self) -> None:
        """Make this the innermost block of the calling context and of what is started from it."""
        self.outer = innermost()
        self._generator = _running_generator()
        if self._generator is not None:
            _of_generators.setdefault(self._generator, []).append(self)
        _current.set(self)
        _carry_into_threads()

    def close(self) -> None:
        """End the block, from any context; code that still carries it sees `closed`."""
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

    def slots_of(self, call: Call, generation: Generation | None) -> Slots:
        """The slots of a call of the model, which is inside `generation` if that is not None.

        Within `generate`, beams and returned sequences repeat each prompt's row (`repeat_interleave`).

        Raises:
            RoutingError: the call cannot have these rows, or it is not known which tokens are the prompt's.
        """
        if self.counts is not None:
            return Slots(self._token_slots(call.rows, call.tokens, self.counts), each_token=True)
        repeats = 1
        if self.per_row:
            repeats = self.require_prompts(call.rows, exactly=generation is None) // len(self.slots)
        if self.is_scoped:
            return self._scoped_slots(call, generation, repeats)
        return Slots(tuple(slot for slot in self.slots for _ in range(repeats)))

    def _scoped_slots(self, call: Call, generation: Generation | None, repeats: int) -> Slots:
        if call.tokens is None:
            raise RoutingError(f"{self} cannot tell the number of tokens; pass input_ids or inputs_embeds by keyword")
        ends = self._prompt_ends(call, call.tokens, generation)
        rows = []  # of each slot's rows: the slots of their tokens
        for slot, scope, end in zip(self.slots, self.scopes, ends, strict=True):
            pieces = split(scope, end, call.cached or 0, call.tokens)
            rows.append([slot if steered else IDENTITY for count, steered in pieces for _ in range(count)])
        kinds = [set(row) for row in rows]
        if all(kind <= {IDENTITY} for kind in kinds):
            return Slots((IDENTITY,))
        if all(len(kind) == 1 for kind in kinds):
            return Slots(tuple(slot for kind in kinds for slot in kind for _ in range(repeats)))
        if not self.per_row:
            repeats = self.require_prompts(call.rows, exactly=False)
        return Slots(tuple(slot for row in rows for _ in range(repeats) for slot in row), each_token=True)

    def _prompt_ends(self, call: Call, tokens: int, generation: Generation | None) -> tuple[int, ...]:
        """Where the prompt of each slot ends, in a call with so many tokens of each row."""
        first = generation is not None and generation.with_cache is None
        if generation is not None:
            with_cache = call.cached is not None
            if first:
                generation.with_cache = with_cache
            if generation.with_cache != with_cache or (not with_cache and tokens < (generation.width or 0)):
                raise RoutingError(
                    f"{self} cannot tell the positions of tokens: the model keeps its cache in its own way, or runs on "
                    "other tokens in between (guidance_scale does that); leave out scope"
                )
        if self.ends is not None:
            return self.ends * (len(self.slots) if len(self.ends) == 1 else 1)
        if generation is None or generation.width is None:
            raise RoutingError(
                f"{self} cannot tell where the prompt ends; call generate() with a prompt, or give prompt_end"
            )
        if first:
            cached = call.cached or 0
            # Further tokens may be drafts, but those come as ids.
            virtual = cached != generation.cached or (call.embedded and cached + tokens > generation.width)
            if virtual or cached >= generation.width:
                raise RoutingError(
                    f"{self} cannot tell where the prompt ends: the model got other tokens than generate() (virtual "
                    "ones, or a cache that the attention_mask leaves out); give prompt_end"
                )
        return (generation.width,) * len(self.slots)

    def _token_slots(self, rows: int | None, tokens: int | None, counts: tuple[int, ...]) -> tuple[int, ...]:
        if (rows, tokens) != (1, sum(counts)):
            raise RoutingError(
                f"{self} names {sum(counts)} tokens of one row, but the model was called with {rows} rows of {tokens}; "
                "give the number of tokens of each sequence in the row"
            )
        slots = tuple(slot for slot, count in zip(self.slots, counts, strict=True) for _ in range(count))
        return slots[:1] if slots.count(slots[0]) == len(slots) else slots

    def require_prompts(self, rows: int | None, *, exactly: bool = True) -> int:
        """Return `rows`; raise RoutingError if they cannot be the rows of these tasks.

        They must be a multiple of the number of tasks (beams), or with `exactly` just that number.
        """
        if rows is None:
            raise RoutingError(f"{self} cannot tell the number of rows; pass input_ids or inputs_embeds by keyword")
        if rows % len(self.slots) or (exactly and rows != len(self.slots)):
            raise RoutingError(
                f"{self} names {len(self.slots)} rows, but the model was called with {rows}; "
                "give one expression (or None) per row of the batch"
            )
        return rows


_current: ContextVar[Routing | None] = ContextVar("hones_steer_block", default=None)
_of_generators: dict[FrameType, list[Routing]] = {}  # the open blocks that each generator has entered, in order


def innermost() -> Routing | None:
    """The innermost block, of any model, that the calling code is inside, or None; it may be closed already."""
    frame = sys._getframe(1) if _of_generators else None
    while frame is not None and frame.f_code is not _carried.__code__:
        if blocks := _of_generators.get(frame):
            return blocks[-1]
        frame = frame.f_back
    return _current.get()


def block_of(steering: object) -> Routing | None:
    """The innermost block of this steering that the calling code is inside, or None."""
    routing = innermost()
    while routing is not None and routing.steering is not steering:
        routing = routing.outer
    return routing


def carry(function: Callable[P, R], routing: Routing | None) -> Callable[P, R]:
    """Wrap a function, so that it runs inside this block (None: inside no block) wherever it is called."""

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
    """The frame of the innermost generator that runs the caller, or None; generators of a @contextmanager do not count.

    Such a generator is not on the stack while its block runs, but the code that entered the block is.
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


_submitting = threading.local()  # .now: this thread submits a job; a worker that starts for it is in no block


@functools.cache
def _carry_into_threads() -> None:
    """Make threads started, and jobs submitted, inside a block belong to it from now on.

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
